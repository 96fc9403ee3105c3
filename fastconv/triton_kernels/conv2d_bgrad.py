"""Bias gradient: the sum of the output's gradient over N, P and Q for each of the K filters.

Tiles and slices are BatchNorm's: a program adds a slice of some filters' pixels, a few additions a
lane in the accumulator's type, then the lanes in float64. A second launch joins the slices in
order, unless there is but one.
"""

import triton
import triton.language as tl

from fastconv.triton_kernels.channel_sums import (
    JOINED_CHANNELS,
    JOINED_SLICES,
    Config,
    all_channels,
    choose,
    configs_for,
    slice_of_program,
    slices_of,
    sum_lanes,
    sum_slices,
    tile_at,
)
from fastconv.triton_kernels.plan import Launch, Plan, Pointer, Row
from fastconv.triton_kernels.problem import Conv2dProblem, Device, ceil_div


@triton.jit
def store_sum(out, c, mine, sum):
    """float64 as it is: a slice's sum, or the result. Others by way of float32, their accumulator's
    type: from float64 to 16 bits there is no single instruction."""
    if out.dtype.element_ty != tl.float64:
        sum = sum.to(tl.float32)
    tl.store(out + c, sum, mask=mine)


@triton.jit
def conv2d_bgrad_kernel(
    grad,
    out,  # or the partials: float64 of [slice, filter]
    outer,
    channels,
    inner,
    inner_tiles,
    tiles,
    groups,
    per_slice,
    PACK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    OUTER: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    WIDE: tl.constexpr,
):
    A: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    slice, begin, end, first_channel = slice_of_program(tiles, groups, per_slice, CHANNELS)
    total = tl.zeros((OUTER, CHANNELS, INNER), A)
    for tile in range(begin, end):
        offset, inside, _, _, _ = tile_at(
            tile, first_channel, outer, channels, inner, inner_tiles,
            PACK, CHANNELS_LAST, OUTER, CHANNELS, INNER, WIDE,
        )  # fmt: skip
        total += tl.load(grad + offset, mask=inside, other=0.0).to(A)
    C = all_channels(channels, PACK, CHANNELS_LAST)
    c = first_channel + tl.arange(0, CHANNELS)
    if A == tl.float64 and OUTER > 16:
        # Nothing wider is left to add in: groups of 16, so that no sum is long.
        total = tl.sum(tl.reshape(total, (OUTER // 16, 16, CHANNELS, INNER)), 1)
    store_sum(out + slice * C, c, c < C, sum_lanes(total.to(tl.float64)))


@triton.jit
def join_sums_kernel(partials, out, K, slices, SLICES: tl.constexpr, CHANNELS: tl.constexpr):
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mine = c < K
    store_sum(out, c, mine, sum_slices(partials, c, mine, K, slices, SLICES))


def plan(problem: Conv2dProblem, device: Device, config: Config | None = None) -> Plan:
    p = problem
    if 0 in (p.N, p.K, p.P, p.Q):
        return Plan(())  # of an empty tensor, whose address is 0; csrc/torch has the zeros
    config = config or choose(p, device)
    s = slices_of(p.N, p.K, p.P, p.Q, p.dtype, p.layout, config)
    out, partials = Pointer("out", p.dtype), Pointer("partials", "float64")
    split = s.count > 1
    sums = Launch(
        conv2d_bgrad_kernel,
        (s.count * s.groups,),
        (
            Pointer("grad", p.dtype),
            partials if split else out,
            *(*s.arguments, s.tiles, s.groups, s.per_slice),
        ),
        s.constants,
        num_warps=config.num_warps,
    )
    if not split:
        return Plan((sums,))
    join = Launch(
        join_sums_kernel,
        (ceil_div(p.K, JOINED_CHANNELS),),
        (partials, out, p.K, s.count),
        {"SLICES": JOINED_SLICES, "CHANNELS": JOINED_CHANNELS},
    )
    return Plan((sums, join), {"partials": 8 * s.count * p.K})


ROWS = (Row("conv2d_triton_bgrad", plan, configs_for),)
