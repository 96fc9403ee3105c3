"""The gradients of BatchNorm, of the residual and through the activation behind it.

The sums of dz and of dz * (input - mean) first, where dz = grad * activation'(z) is computed on the
way: programs sum slices of the data, a small kernel joins the slices and makes each channel's few
coefficients, and a last one computes every element from them.
"""

import triton
import triton.language as tl

from fastconv.triton_kernels.batch_norm import (
    activation_constants,
    affine_of,
    if_given,
    per_channel,
    slices_for,
    sum_arguments,
)
from fastconv.triton_kernels.channel_sums import (
    JOINED_CHANNELS,
    JOINED_SLICES,
    Config,
    all_channels,
    choose,
    configs_for,
    slice_of_program,
    sum_lanes,
    sum_slices,
    tile_at,
)
from fastconv.triton_kernels.epilogue import activation_gradient
from fastconv.triton_kernels.plan import Launch, Plan, Pointer, Row
from fastconv.triton_kernels.problem import (
    ITEMSIZE,
    BatchNormProblem,
    Device,
    accumulator_of,
    ceil_div,
)


@triton.jit
def gradient_of_z(
    dy,
    x,
    mean,
    scale,
    shift,
    beside,  # the residual or the output
    offset,
    inside,
    Z: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
):
    """dy * activation'(z). Z says what z is: "output", "input" or "residual" (with the input's);
    "none" where nothing follows it."""
    if Z != "none":
        if Z == "output":
            z = tl.load(beside + offset, mask=inside, other=0.0).to(dy.dtype)
        else:
            z = (x - mean[None, :, None]) * scale[None, :, None] + shift[None, :, None]
            if Z == "residual":
                z += tl.load(beside + offset, mask=inside, other=0.0).to(dy.dtype)
        dy = activation_gradient(dy, z, ACTIVATION, SLOPE)
    return dy


@triton.jit
def gradient_sums_kernel(
    input,
    grad,
    beside,
    grad_residual,
    mean_in,
    var_in,
    weight,
    bias,
    partials,  # sums of dz, then of dz * (input - mean), of [slice, channel]
    outer,
    channels,
    inner,
    inner_tiles,
    tiles,
    groups,
    per_slice,
    slices,
    EPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    Z: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    GRAD_RESIDUAL: tl.constexpr,
    PACK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    OUTER: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Where the residual's gradient is wanted, which is dz, it is written here: what comes next
    reads that instead of all that dz is made of."""
    A: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    C = all_channels(channels, PACK, CHANNELS_LAST)
    slice, begin, end, first_channel = slice_of_program(tiles, groups, per_slice, CHANNELS)
    c = first_channel + tl.arange(0, CHANNELS)
    mine = c < C
    mean = tl.load(mean_in + c, mask=mine, other=0.0)
    scale, shift = mean, mean
    if Z == "input" or Z == "residual":
        var = tl.load(var_in + c, mask=mine, other=1.0)
        scale, shift = affine_of(var, weight, bias, c, mine, EPS, WEIGHT, BIAS, A)
    grads = tl.zeros((OUTER, CHANNELS, INNER), A)
    products = tl.zeros((OUTER, CHANNELS, INNER), A)
    for tile in range(begin, end):
        offset, inside, _, _, _ = tile_at(
            tile, first_channel, outer, channels, inner, inner_tiles,
            PACK, CHANNELS_LAST, OUTER, CHANNELS, INNER, WIDE,
        )  # fmt: skip
        x = tl.load(input + offset, mask=inside, other=0.0).to(A)
        dy = tl.load(grad + offset, mask=inside, other=0.0).to(A)  # outside, x is then no matter
        dz = gradient_of_z(
            dy, x, mean, scale, shift, beside, offset, inside, Z, ACTIVATION, SLOPE
        )  # fmt: skip
        if GRAD_RESIDUAL:
            tl.store(grad_residual + offset, dz, mask=inside)
        grads += dz
        products += dz * (x - mean[None, :, None])
    place = partials + slice * C + c
    tl.store(place, sum_lanes(grads.to(tl.float64)), mask=mine)
    tl.store(place + slices * C, sum_lanes(products.to(tl.float64)), mask=mine)


@triton.jit
def join_gradient_sums_kernel(
    partials,
    weight,
    mean_in,
    var_in,
    grad_weight,
    grad_bias,
    coefficients,
    C,
    slices,
    count,
    EPS: tl.constexpr,
    WEIGHT: tl.constexpr,
    SLICES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Coefficients: dx = ((dz - mean of dz) - (x - mean) * slope) * scale."""
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mine = c < C
    grads = sum_slices(partials, c, mine, C, slices, SLICES)
    products = sum_slices(partials + slices * C, c, mine, C, slices, SLICES)
    A: tl.constexpr = mean_in.dtype.element_ty
    mean = tl.load(mean_in + c, mask=mine, other=0.0)
    var = tl.load(var_in + c, mask=mine, other=0.0).to(tl.float64)
    invstd = 1.0 / tl.sqrt(var + EPS)
    n = count.to(tl.float64)
    tl.store(grad_weight + c, (products * invstd).to(A), mask=mine)
    tl.store(grad_bias + c, grads.to(A), mask=mine)
    tl.store(coefficients + c, mean, mask=mine)
    tl.store(coefficients + C + c, (grads / n).to(A), mask=mine)
    tl.store(coefficients + 2 * C + c, (products * invstd * invstd / n).to(A), mask=mine)
    scale = invstd * per_channel(weight, c, mine, WEIGHT, 1.0)
    tl.store(coefficients + 3 * C + c, scale.to(A), mask=mine)


@triton.jit
def input_gradient_kernel(
    input,
    grad,
    beside,
    out,
    var_in,
    weight,
    bias,
    coefficients,
    outer,
    channels,
    inner,
    inner_tiles,
    groups,
    EPS: tl.constexpr,
    TRAINING: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    Z: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PACK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    OUTER: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    WIDE: tl.constexpr,
):
    tile = tl.program_id(0) // groups
    offset, inside, c, mine, _ = tile_at(
        tile, tl.program_id(0) % groups * CHANNELS, outer, channels, inner, inner_tiles,
        PACK, CHANNELS_LAST, OUTER, CHANNELS, INNER, WIDE,
    )  # fmt: skip
    A: tl.constexpr = coefficients.dtype.element_ty
    AGAIN: tl.constexpr = Z == "input" or Z == "residual"
    C = all_channels(channels, PACK, CHANNELS_LAST)
    dz = tl.load(grad + offset, mask=inside, other=0.0).to(A)
    mean = tl.load(coefficients + c, mask=mine, other=0.0)
    x = dz
    if TRAINING or AGAIN:
        x = tl.load(input + offset, mask=inside, other=0.0).to(A)
    z_scale, shift = mean, mean
    if AGAIN:
        var = tl.load(var_in + c, mask=mine, other=1.0)
        z_scale, shift = affine_of(var, weight, bias, c, mine, EPS, WEIGHT, BIAS, A)
    dz = gradient_of_z(dz, x, mean, z_scale, shift, beside, offset, inside, Z, ACTIVATION, SLOPE)
    if TRAINING:
        mean_dz = tl.load(coefficients + C + c, mask=mine, other=0.0)
        slope = tl.load(coefficients + 2 * C + c, mask=mine, other=0.0)
        dz = (dz - mean_dz[None, :, None]) - (x - mean[None, :, None]) * slope[None, :, None]
    scale = tl.load(coefficients + 3 * C + c, mask=mine, other=0.0)
    tl.store(out + offset, dz * scale[None, :, None], mask=inside)


def _z_of(p: BatchNormProblem) -> str:
    """gradient_of_z's Z."""
    if p.activation == "none":
        return "none"
    if p.output:  # given only where the derivative can be read off it: core/epilogue.h
        return "output"
    return "residual" if p.residual else "input"


def plan_dgrad(problem: BatchNormProblem, device: Device, config: Config | None = None) -> Plan:
    p = problem
    if 0 in (p.N, p.C, p.H, p.W):
        return Plan(())
    config = config or choose(p, device)
    s = slices_for(p, config)
    A = accumulator_of(p.dtype)
    input, grad = Pointer("input", p.dtype), Pointer("grad", p.dtype)
    weight = if_given(p.weight, "weight", A, input)
    bias = if_given(p.bias, "bias", A, input)
    mean, var = Pointer("mean_in", A), Pointer("var_in", A)
    partials, coefficients = Pointer("partials", "float64"), Pointer("coefficients", A)
    Z = _z_of(p)
    beside = if_given(Z in ("output", "residual"), Z, p.dtype, input)
    grad_residual = if_given(p.grad_residual, "grad_residual", p.dtype, input)
    options = {"EPS": p.eps, "WEIGHT": p.weight, "BIAS": p.bias, "Z": Z} | activation_constants(p)
    sums = Launch(
        gradient_sums_kernel,
        (s.count * s.groups,),
        (
            *(input, grad, beside, grad_residual, mean, var, weight, bias, partials),
            *sum_arguments(s),
        ),
        options | {"GRAD_RESIDUAL": p.grad_residual} | s.constants,
        num_warps=config.num_warps,
    )
    join = Launch(
        join_gradient_sums_kernel,
        (ceil_div(p.C, JOINED_CHANNELS),),
        (
            *(partials, weight, mean, var),
            *(Pointer("grad_weight", A), Pointer("grad_bias", A), coefficients),
            *(p.C, s.count, p.N * p.H * p.W),
        ),
        {
            "EPS": p.eps,
            "WEIGHT": p.weight,
            "SLICES": JOINED_SLICES,
            "CHANNELS": JOINED_CHANNELS,
        },
    )
    if p.grad_residual:  # dz already
        grad, beside = grad_residual, input
        options |= {"Z": "none", "ACTIVATION": "none", "SLOPE": 0.0}
    input_gradient = Launch(
        input_gradient_kernel,
        (s.tiles * s.groups,),
        (
            *(input, grad, beside, Pointer("out", p.dtype), var, weight, bias, coefficients),
            *(*s.arguments, s.groups),
        ),
        options | {"TRAINING": p.training} | s.constants,
        num_warps=config.num_warps,
    )
    workspace = {"partials": 8 * 2 * s.count * p.C, "coefficients": 4 * p.C * ITEMSIZE[A]}
    return Plan((sums, join, *((input_gradient,) if p.out else ())), workspace)


ROWS = (Row("batch_norm_triton_dgrad", plan_dgrad, configs_for),)
