"""BatchNorm, with the residual and the activation behind it.

In training the moments of the input first: programs sum slices of the data, a small kernel joins
the slices and makes each channel's few coefficients, and a last one computes every element from
them. Inference is the last one alone. So training reads its input twice and writes once: the least
there is for data that no card can hold. A residual is a tensor more to read, no launch more.

A slice subtracts the mean of its first tile before it squares. Then M2 = sum(d^2) - sum(d)^2 / n
cannot cancel: that tile is at least 1 / LONGEST_SLICE of the slice, and wherever the others lie
M2 is no less than about that share of sum(d^2). Slices are merged by Chan's formula, in order and
in float64.
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
    tile_at,
)
from fastconv.triton_kernels.epilogue import activate
from fastconv.triton_kernels.plan import Launch, Plan, Pointer, Row
from fastconv.triton_kernels.problem import (
    ITEMSIZE,
    BatchNormProblem,
    Device,
    accumulator_of,
    ceil_div,
)


@triton.jit
def moments_kernel(
    input,
    partials,  # means, then M2s, of [slice, channel]; then the slices' counts
    outer,
    channels,
    inner,
    inner_tiles,
    tiles,
    groups,
    per_slice,
    slices,
    PACK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    OUTER: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    WIDE: tl.constexpr,
):
    A: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    slice, begin, end, first_channel = slice_of_program(tiles, groups, per_slice, CHANNELS)
    offset, inside, c, mine, count = tile_at(
        begin, first_channel, outer, channels, inner, inner_tiles,
        PACK, CHANNELS_LAST, OUTER, CHANNELS, INNER, WIDE,
    )  # fmt: skip
    x = tl.load(input + offset, mask=inside, other=0.0).to(A)
    # Divided before they are added, or numbers that float32 can hold would overflow.
    pivot = sum_lanes(x / count.to(A))
    sums = tl.zeros((OUTER, CHANNELS, INNER), A)
    squares = tl.zeros((OUTER, CHANNELS, INNER), A)
    elements = tl.zeros_like(count)
    for tile in range(begin, end):
        offset, inside, c, mine, count = tile_at(
            tile, first_channel, outer, channels, inner, inner_tiles,
            PACK, CHANNELS_LAST, OUTER, CHANNELS, INNER, WIDE,
        )  # fmt: skip
        x = tl.load(input + offset, mask=inside, other=0.0).to(A)
        d = tl.where(inside, x - pivot[None, :, None], 0.0)
        sums += d
        squares += d * d
        elements += count
    n = elements.to(tl.float64)
    above_pivot = sum_lanes(sums.to(tl.float64)) / n
    m2 = sum_lanes(squares.to(tl.float64)) - above_pivot * above_pivot * n
    m2 = tl.where(m2 < 0, 0.0, m2)  # not tl.maximum, which would lose NaN
    C = all_channels(channels, PACK, CHANNELS_LAST)
    place = partials + slice * C + c
    tl.store(place, pivot.to(tl.float64) + above_pivot, mask=mine)
    tl.store(place + slices * C, m2, mask=mine)
    if first_channel == 0:
        tl.store(partials + 2 * slices * C + slice, n)


@triton.jit
def join_moments_kernel(
    partials,
    weight,
    bias,
    mean_out,
    var_out,
    coefficients,
    C,
    slices,
    EPS: tl.constexpr,  # as an argument it would be a float32
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLICES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Chan's formula for all slices at once: M2 = sum of (M2_i + n_i * (mean_i - mean)^2).

    Coefficients: z = (x - mean) * scale + shift. The part of the mean that its type cannot hold
    goes into the shift: with a mean of 1e4 it is worth 5e-4. Where an activation follows, backward
    computes z again from the mean and variance as they are stored, so that forward does, too.
    """
    c = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    mine = c < C
    counts = partials + 2 * slices * C
    total = tl.zeros((SLICES, CHANNELS), tl.float64)
    elements = tl.zeros((SLICES, CHANNELS), tl.float64)
    for first in range(0, slices, SLICES):
        slice = first + tl.arange(0, SLICES)[:, None]
        there = (slice < slices) & mine[None, :]
        n = tl.load(counts + slice, mask=slice < slices, other=0.0)
        total += n * tl.load(partials + slice * C + c[None, :], mask=there, other=0.0)
        elements += n
    count = tl.sum(elements, 0)
    mean = tl.sum(total, 0) / count
    squares = tl.zeros((SLICES, CHANNELS), tl.float64)
    for first in range(0, slices, SLICES):
        slice = first + tl.arange(0, SLICES)[:, None]
        there = (slice < slices) & mine[None, :]
        n = tl.load(counts + slice, mask=slice < slices, other=0.0)
        delta = tl.load(partials + slice * C + c[None, :], mask=there, other=0.0) - mean[None, :]
        m2 = tl.load(partials + slices * C + slice * C + c[None, :], mask=there, other=0.0)
        squares += m2 + tl.where(slice < slices, n * delta * delta, 0.0)
    var = tl.sum(squares, 0) / count
    A: tl.constexpr = mean_out.dtype.element_ty
    rounded = mean.to(A)
    if ACTIVATION == "none":
        scale = per_channel(weight, c, mine, WEIGHT, 1.0) / tl.sqrt(var + EPS)
        shift = per_channel(bias, c, mine, BIAS, 0.0) - (mean - rounded.to(tl.float64)) * scale
    else:
        scale, shift = affine_of(var.to(A), weight, bias, c, mine, EPS, WEIGHT, BIAS, A)
    tl.store(mean_out + c, rounded, mask=mine)
    tl.store(var_out + c, var.to(A), mask=mine)
    tl.store(coefficients + c, rounded, mask=mine)
    tl.store(coefficients + C + c, scale.to(A), mask=mine)
    tl.store(coefficients + 2 * C + c, shift.to(A), mask=mine)


@triton.jit
def normalise_kernel(
    input,
    residual,
    out,
    mean_in,  # training: the coefficients
    var_in,
    weight,
    bias,
    outer,
    channels,
    inner,
    inner_tiles,
    groups,
    EPS: tl.constexpr,
    TRAINING: tl.constexpr,
    WEIGHT: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
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
    A: tl.constexpr = mean_in.dtype.element_ty
    mean = tl.load(mean_in + c, mask=mine, other=0.0)
    if TRAINING:
        C = all_channels(channels, PACK, CHANNELS_LAST)
        scale = tl.load(mean_in + C + c, mask=mine, other=0.0)
        shift = tl.load(mean_in + 2 * C + c, mask=mine, other=0.0)
    else:
        var = tl.load(var_in + c, mask=mine, other=1.0)
        scale, shift = affine_of(var, weight, bias, c, mine, EPS, WEIGHT, BIAS, A)
    x = tl.load(input + offset, mask=inside, other=0.0).to(A)
    z = (x - mean[None, :, None]) * scale[None, :, None] + shift[None, :, None]
    if RESIDUAL:
        z += tl.load(residual + offset, mask=inside, other=0.0).to(A)
    tl.store(out + offset, activate(z, ACTIVATION, SLOPE), mask=inside)


def plan_fprop(problem: BatchNormProblem, device: Device, config: Config | None = None) -> Plan:
    p = problem
    if 0 in (p.N, p.C, p.H, p.W):
        return Plan(())
    config = config or choose(p, device)
    s = slices_for(p, config)
    A = accumulator_of(p.dtype)
    input = Pointer("input", p.dtype)
    weight = if_given(p.weight, "weight", A, input)
    bias = if_given(p.bias, "bias", A, input)
    residual = if_given(p.residual, "residual", p.dtype, input)
    options = {"EPS": p.eps, "WEIGHT": p.weight, "BIAS": p.bias}
    if p.training:
        partials, coefficients = Pointer("partials", "float64"), Pointer("coefficients", A)
        statistics = (coefficients, coefficients)
        moments = Launch(
            moments_kernel,
            (s.count * s.groups,),
            (input, partials, *sum_arguments(s)),
            s.constants,
            num_warps=config.num_warps,
        )
        join = Launch(
            join_moments_kernel,
            (ceil_div(p.C, JOINED_CHANNELS),),
            (
                *(partials, weight, bias),
                *(Pointer("mean_out", A), Pointer("var_out", A), coefficients),
                *(p.C, s.count),
            ),
            options
            | {
                "ACTIVATION": p.activation,
                "SLICES": JOINED_SLICES,
                "CHANNELS": JOINED_CHANNELS,
            },
        )
        sums = (moments, join)
        workspace = {
            "partials": 8 * (2 * s.count * p.C + s.count),
            "coefficients": 3 * p.C * ITEMSIZE[A],
        }
    else:
        statistics = (Pointer("mean_in", A), Pointer("var_in", A))
        sums, workspace = (), {}
    normalise = Launch(
        normalise_kernel,
        (s.tiles * s.groups,),
        (
            *(input, residual, Pointer("out", p.dtype), *statistics, weight, bias),
            *(*s.arguments, s.groups),
        ),
        options
        | {"TRAINING": p.training, "RESIDUAL": p.residual}
        | activation_constants(p)
        | s.constants,
        num_warps=config.num_warps,
    )
    return Plan((*sums, normalise), workspace)


ROWS = (Row("batch_norm_triton_fprop", plan_fprop, configs_for),)
