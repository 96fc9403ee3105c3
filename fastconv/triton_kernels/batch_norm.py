"""What both directions of BatchNorm share."""

import triton
import triton.language as tl

from fastconv.triton_kernels.channel_sums import Config, Slices, slices_of
from fastconv.triton_kernels.plan import Pointer
from fastconv.triton_kernels.problem import BatchNormProblem


@triton.jit
def per_channel(values, c, mine, GIVEN: tl.constexpr, absent: tl.constexpr):
    """Of weight or bias, in float64; `absent` where there is none."""
    if GIVEN:
        return tl.load(values + c, mask=mine, other=0.0).to(tl.float64)
    else:
        return tl.full(c.shape, absent, tl.float64)


@triton.jit
def affine_of(
    var,
    weight,
    bias,
    c,
    mine,
    EPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    A: tl.constexpr,
):
    """z's factor and summand. Forward with an activation and backward both take them from here, or
    a z near a kink could lie on either side of it."""
    scale = per_channel(weight, c, mine, WEIGHT, 1.0) / tl.sqrt(var.to(tl.float64) + EPS)
    return scale.to(A), per_channel(bias, c, mine, BIAS, 0.0).to(A)


def if_given(given: bool, name: str, dtype: str, other: Pointer) -> Pointer:
    """A kernel does not touch the pointer that stands in for one that is not there."""
    return Pointer(name, dtype) if given else other


def activation_constants(p: BatchNormProblem) -> dict:
    slope = p.slope if p.activation == "leaky_relu" else 0.0
    return {"ACTIVATION": p.activation, "SLOPE": slope}


def slices_for(problem: BatchNormProblem, config: Config) -> Slices:
    p = problem
    return slices_of(p.N, p.C, p.H, p.W, p.dtype, p.layout, config)


def sum_arguments(s: Slices) -> tuple:
    return *s.arguments, s.tiles, s.groups, s.per_slice, s.count
