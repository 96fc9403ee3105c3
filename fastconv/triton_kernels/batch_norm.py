"""BatchNorm and its gradients.

Two sums a channel first: the moments of the input (fprop, training) or the sums of grad and of
grad * (input - mean) (dgrad). Programs sum slices of the data, a small kernel joins the slices and
makes each channel's few coefficients, and a last one computes every element from them. Inference
is the last one alone. So training reads its input twice and writes once: the least there is for
data that no card can hold.

A slice subtracts the mean of its first tile before it squares. Then M2 = sum(d^2) - sum(d)^2 / n
cannot cancel: that tile is at least 1 / LONGEST_SLICE of the slice, and wherever the others lie
M2 is no less than about that share of sum(d^2). Slices are merged by Chan's formula, in order and
in float64.
"""

import triton
import triton.language as tl

from fastconv.triton_kernels.channel_sums import (
    JOINED_CHANNELS,
    JOINED_SLICES,
    Config,
    Slices,
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
from fastconv.triton_kernels.problem import (
    ITEMSIZE,
    BatchNormProblem,
    Device,
    accumulator_of,
    ceil_div,
)

# --- the sums -------------------------------------------------------------------------------------


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
def gradient_sums_kernel(
    input,
    grad,
    mean_in,
    partials,  # sums of grad, then of grad * (input - mean), of [slice, channel]
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
    C = all_channels(channels, PACK, CHANNELS_LAST)
    slice, begin, end, first_channel = slice_of_program(tiles, groups, per_slice, CHANNELS)
    c = first_channel + tl.arange(0, CHANNELS)
    mine = c < C
    mean = tl.load(mean_in + c, mask=mine, other=0.0)
    grads = tl.zeros((OUTER, CHANNELS, INNER), A)
    products = tl.zeros((OUTER, CHANNELS, INNER), A)
    for tile in range(begin, end):
        offset, inside, _, _, _ = tile_at(
            tile, first_channel, outer, channels, inner, inner_tiles,
            PACK, CHANNELS_LAST, OUTER, CHANNELS, INNER, WIDE,
        )  # fmt: skip
        x = tl.load(input + offset, mask=inside, other=0.0).to(A)
        dy = tl.load(grad + offset, mask=inside, other=0.0).to(A)  # outside, x is then no matter
        grads += dy
        products += dy * (x - mean[None, :, None])
    place = partials + slice * C + c
    tl.store(place, sum_lanes(grads.to(tl.float64)), mask=mine)
    tl.store(place + slices * C, sum_lanes(products.to(tl.float64)), mask=mine)


# --- joining the slices ---------------------------------------------------------------------------


@triton.jit
def per_channel(values, c, mine, GIVEN: tl.constexpr, absent: tl.constexpr):
    """Of weight or bias, in float64; `absent` where there is none."""
    if GIVEN:
        return tl.load(values + c, mask=mine, other=0.0).to(tl.float64)
    else:
        return tl.full(c.shape, absent, tl.float64)


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
    SLICES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Chan's formula for all slices at once: M2 = sum of (M2_i + n_i * (mean_i - mean)^2).

    Coefficients: y = (x - mean) * scale + shift. The part of the mean that its type cannot hold
    goes into the shift: with a mean of 1e4 it is worth 5e-4.
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
    scale = per_channel(weight, c, mine, WEIGHT, 1.0) / tl.sqrt(var + EPS)
    rounded = mean.to(A)
    shift = per_channel(bias, c, mine, BIAS, 0.0) - (mean - rounded.to(tl.float64)) * scale
    tl.store(mean_out + c, rounded, mask=mine)
    tl.store(var_out + c, var.to(A), mask=mine)
    tl.store(coefficients + c, rounded, mask=mine)
    tl.store(coefficients + C + c, scale.to(A), mask=mine)
    tl.store(coefficients + 2 * C + c, shift.to(A), mask=mine)


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
    """Coefficients: dx = ((dy - mean of dy) - (x - mean) * slope) * scale."""
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


# --- every element --------------------------------------------------------------------------------


@triton.jit
def normalise_kernel(
    input,
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
        var = tl.load(var_in + c, mask=mine, other=1.0).to(tl.float64)
        scale = (per_channel(weight, c, mine, WEIGHT, 1.0) / tl.sqrt(var + EPS)).to(A)
        shift = per_channel(bias, c, mine, BIAS, 0.0).to(A)
    x = tl.load(input + offset, mask=inside, other=0.0).to(A)
    y = (x - mean[None, :, None]) * scale[None, :, None] + shift[None, :, None]
    tl.store(out + offset, y, mask=inside)


@triton.jit
def input_gradient_kernel(
    input,
    grad,
    out,
    coefficients,
    outer,
    channels,
    inner,
    inner_tiles,
    groups,
    TRAINING: tl.constexpr,
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
    C = all_channels(channels, PACK, CHANNELS_LAST)
    dy = tl.load(grad + offset, mask=inside, other=0.0).to(A)
    if TRAINING:
        mean = tl.load(coefficients + c, mask=mine, other=0.0)
        mean_dy = tl.load(coefficients + C + c, mask=mine, other=0.0)
        slope = tl.load(coefficients + 2 * C + c, mask=mine, other=0.0)
        x = tl.load(input + offset, mask=inside, other=0.0).to(A)
        dy = (dy - mean_dy[None, :, None]) - (x - mean[None, :, None]) * slope[None, :, None]
    scale = tl.load(coefficients + 3 * C + c, mask=mine, other=0.0)
    tl.store(out + offset, dy * scale[None, :, None], mask=inside)


# --- plans ----------------------------------------------------------------------------------------


def _if_given(given: bool, name: str, A: str, other: Pointer) -> Pointer:
    """A kernel does not touch the pointer that stands in for one that is not there."""
    return Pointer(name, A) if given else other


def _slices(problem: BatchNormProblem, config: Config) -> Slices:
    p = problem
    return slices_of(p.N, p.C, p.H, p.W, p.dtype, p.layout, config)


def _sum_arguments(s: Slices) -> tuple:
    return *s.arguments, s.tiles, s.groups, s.per_slice, s.count


def plan_fprop(problem: BatchNormProblem, device: Device, config: Config | None = None) -> Plan:
    p = problem
    if 0 in (p.N, p.C, p.H, p.W):
        return Plan(())
    config = config or choose(p, device)
    s = _slices(p, config)
    A = accumulator_of(p.dtype)
    input = Pointer("input", p.dtype)
    weight = _if_given(p.weight, "weight", A, input)
    bias = _if_given(p.bias, "bias", A, input)
    options = {"EPS": p.eps, "WEIGHT": p.weight, "BIAS": p.bias}
    if p.training:
        partials, coefficients = Pointer("partials", "float64"), Pointer("coefficients", A)
        statistics = (coefficients, coefficients)
        moments = Launch(
            moments_kernel,
            (s.count * s.groups,),
            (input, partials, *_sum_arguments(s)),
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
            options | {"SLICES": JOINED_SLICES, "CHANNELS": JOINED_CHANNELS},
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
        (input, Pointer("out", p.dtype), *statistics, weight, bias, *s.arguments, s.groups),
        options | {"TRAINING": p.training} | s.constants,
        num_warps=config.num_warps,
    )
    return Plan((*sums, normalise), workspace)


def plan_dgrad(problem: BatchNormProblem, device: Device, config: Config | None = None) -> Plan:
    p = problem
    if 0 in (p.N, p.C, p.H, p.W):
        return Plan(())
    config = config or choose(p, device)
    s = _slices(p, config)
    A = accumulator_of(p.dtype)
    input, grad = Pointer("input", p.dtype), Pointer("grad", p.dtype)
    weight = _if_given(p.weight, "weight", A, input)
    mean, var = Pointer("mean_in", A), Pointer("var_in", A)
    partials, coefficients = Pointer("partials", "float64"), Pointer("coefficients", A)
    sums = Launch(
        gradient_sums_kernel,
        (s.count * s.groups,),
        (input, grad, mean, partials, *_sum_arguments(s)),
        s.constants,
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
    input_gradient = Launch(
        input_gradient_kernel,
        (s.tiles * s.groups,),
        (input, grad, Pointer("out", p.dtype), coefficients, *s.arguments, s.groups),
        {"TRAINING": p.training} | s.constants,
        num_warps=config.num_warps,
    )
    workspace = {"partials": 8 * 2 * s.count * p.C, "coefficients": 4 * p.C * ITEMSIZE[A]}
    return Plan((sums, join, *((input_gradient,) if p.out else ())), workspace)


ROWS = (
    Row("batch_norm_triton_fprop", plan_fprop, configs_for),
    Row("batch_norm_triton_dgrad", plan_dgrad, configs_for),
)
