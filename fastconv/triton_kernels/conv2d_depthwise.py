"""Depthwise convolution: one channel a filter, K = m * C, filter k reads channel k // m.

    input  N x C x H x W      filter  K x 1 x R x S      out  N x K x P x Q      grad like out

There is no matrix product: a filter meets one channel, so a result costs R * S multiply-adds and
every operand is used by R * S results. Memory bounds it, and what lies beside what decides:

    NHWC   a block is pixels x channels, a lane 16 bytes of channels
    NCHW   a block is channels x pixels, and neighbouring lanes are neighbouring pixels

One kernel a direction does both: where it has placed pixels and channels along the two dimensions
of its block, the rest is the same. A tap's input is read anew for every tap, from L1.

    fprop  out[n,k,p,q]  = sum over r, s      of filter[k,r,s] * input[n,k//m,h,w]
    dgrad  out[n,c,h,w]  = sum over r, s, j   of filter[c*m+j,r,s] * grad[n,c*m+j,p,q]
    wgrad  out[k,r,s]    = sum over n, p, q   of grad[n,k,p,q] * input[n,k//m,h,w]

        where h = p * stride_h - pad_h + r * dil_h, and likewise w.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastconv.triton_kernels.conv2d_wgrad import add_splits, next_pixels
from fastconv.triton_kernels.epilogue import activate, epilogue_constants, epilogue_pointers
from fastconv.triton_kernels.layout import Source, fills_lines
from fastconv.triton_kernels.plan import Launch, Plan, Pointer, Row, Step
from fastconv.triton_kernels.problem import (
    ITEMSIZE,
    Conv2dProblem,
    Device,
    accumulator_of,
    ceil_div,
    is_wide,
    strides_of,
)
from fastconv.triton_kernels.tiles import accumulator


@triton.jit
def block_of(N, plane, channels, CHANNELS_LAST: tl.constexpr, PIXELS: tl.constexpr,
             CHANNELS: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """(image, pixel, channel) of a program's block, each along its dimension, and which pixels
    exist. NHWC counts pixels on through all images, NCHW through one."""
    blocks = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    c = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    program //= blocks
    if WIDE:  # a tensor of 2^31 elements or more
        program = program.to(tl.int64)
        c = c.to(tl.int64)
    if CHANNELS_LAST:
        m = (program * PIXELS + tl.arange(0, PIXELS))[:, None]
        n = m // plane
        return n, m % plane, c[None, :], n < N
    else:
        blocks = tl.cdiv(plane, PIXELS)
        m = (program % blocks * PIXELS + tl.arange(0, PIXELS))[None, :]
        return program // blocks, m, c[:, None], m < plane


@triton.jit
def conv2d_depthwise_fprop_kernel(
    input,
    filter,
    scale,
    shift,
    residual,
    out,
    N,
    Q,
    PQ,
    H,
    W,
    K,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    in_n,
    in_c,
    in_h,
    in_w,
    flt_k,
    flt_tap,
    out_n,
    out_k,
    out_m,
    R: tl.constexpr,
    S: tl.constexpr,
    UNROLL: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    n, m, k, exist = block_of(N, PQ, K, CHANNELS_LAST, PIXELS, CHANNELS, WIDE)
    known = exist & (k < K)
    h = m // Q * stride_h - pad_h
    w = m % Q * stride_w - pad_w
    pixels = input + n * in_n + h * in_h + w * in_w + k // MULTIPLIER * in_c
    total = tl.zeros(known.shape, dtype=ACCUMULATOR)
    for tap in tl.range(0, R * S, loop_unroll_factor=UNROLL):
        y = tap // S * dil_h
        x = tap % S * dil_w
        inside = (h + y >= 0) & (h + y < H) & (w + x >= 0) & (w + x < W)
        pixel = tl.load(pixels + (y * in_h + x * in_w), mask=known & inside, other=0.0)
        factor = tl.load(filter + k * flt_k + tap * flt_tap, mask=k < K, other=0.0)
        total += pixel.to(ACCUMULATOR) * factor.to(ACCUMULATOR)
    if SCALE:
        total *= tl.load(scale + k, mask=k < K, other=0.0)
    if SHIFT:
        total += tl.load(shift + k, mask=k < K, other=0.0)
    place = n * out_n + m * out_m + k * out_k
    if RESIDUAL:
        total += tl.load(residual + place, mask=known, other=0.0).to(ACCUMULATOR)
    y = activate(total, ACTIVATION, SLOPE).to(out.dtype.element_ty)
    tl.store(out + place, y, mask=known)


@triton.jit
def conv2d_depthwise_dgrad_kernel(
    grad,
    filter,
    out,
    N,
    W,
    HW,
    P,
    Q,
    C,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    grad_n,
    grad_k,
    grad_p,
    grad_q,
    flt_k,
    flt_tap,
    out_n,
    out_c,
    out_m,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,  # divisors: the divisions become shifts and products
    STRIDE_W: tl.constexpr,
    UNROLL: tl.constexpr,
    MULTIPLIER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    n, m, c, exist = block_of(N, HW, C, CHANNELS_LAST, PIXELS, CHANNELS, WIDE)
    known = exist & (c < C)
    h = tl.where(exist, m // W + pad_h, -1)  # where there is no pixel, no tap meets one
    w = m % W + pad_w
    images = grad + n * grad_n
    total = tl.zeros(known.shape, dtype=ACCUMULATOR)
    for step in tl.range(0, R * S * MULTIPLIER, loop_unroll_factor=UNROLL):
        tap = step // MULTIPLIER
        k = c * MULTIPLIER + step % MULTIPLIER
        y = h - tap // S * dil_h
        x = w - tap % S * dil_w
        meets = (c < C) & (y >= 0) & (x >= 0)
        if STRIDE_H > 1:
            meets &= y % STRIDE_H == 0
        if STRIDE_W > 1:
            meets &= x % STRIDE_W == 0
        p = y // STRIDE_H
        q = x // STRIDE_W
        meets &= (p < P) & (q < Q)
        pixels = images + p * grad_p + q * grad_q + k * grad_k
        pixel = tl.load(pixels, mask=meets, other=0.0)
        factor = tl.load(filter + k * flt_k + tap * flt_tap, mask=c < C, other=0.0)
        total += pixel.to(ACCUMULATOR) * factor.to(ACCUMULATOR)
    place = n * out_n + m * out_m + c * out_c
    tl.store(out + place, total.to(out.dtype.element_ty), mask=known)


@triton.jit
def conv2d_depthwise_wgrad_kernel(
    grad,
    input,
    out,
    M,
    M_split,
    P,
    Q,
    H,
    W,
    K,
    R,
    S,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    grad_n,
    grad_k,
    grad_p,
    grad_q,
    in_n,
    in_c,
    in_h,
    in_w,
    MULTIPLIER: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    TAPS: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDE: tl.constexpr,
):
    """A block adds up TAPS neighbouring taps of one row of some filters, over one part of the
    pixels: the gradient is read once for them all. Its lanes are added up at the end."""
    blocks_s = tl.cdiv(S, TAPS)
    blocks_k = tl.cdiv(K, CHANNELS)
    program = tl.program_id(0)
    s = program % blocks_s * TAPS + tl.arange(0, TAPS)
    r = program // blocks_s % R
    k = program // (blocks_s * R) % blocks_k * CHANNELS + tl.arange(0, CHANNELS)
    split = program // (blocks_s * R * blocks_k)
    if WIDE:
        split = split.to(tl.int64)
        k = k.to(tl.int64)
    begin = split * M_split
    end = tl.minimum(begin + M_split, M)
    lane = tl.arange(0, PIXELS)
    PIXEL_DIM: tl.constexpr = 1 if CHANNELS_LAST else 2
    tap = s[:, None, None]
    channel = k[None, None, :] if CHANNELS_LAST else k[None, :, None]
    n = (begin + lane) // (P * Q)
    p = (begin + lane) // Q % P
    q = (begin + lane) % Q
    total = tl.zeros(
        (TAPS, PIXELS, CHANNELS) if CHANNELS_LAST else (TAPS, CHANNELS, PIXELS),
        dtype=ACCUMULATOR,
    )
    for first in range(begin, end, PIXELS):
        y = p * stride_h - pad_h + r * dil_h
        x = q * stride_w - pad_w
        read = (first + lane < end) & (y >= 0) & (y < H)
        place = n * grad_n + p * grad_p + q * grad_q
        pixels = n * in_n + y * in_h + x * in_w
        if CHANNELS_LAST:
            read, place = read[None, :, None], place[None, :, None]
            pixels, x = pixels[None, :, None], x[None, :, None]
        else:
            read, place = read[None, None, :], place[None, None, :]
            pixels, x = pixels[None, None, :], x[None, None, :]
        read &= channel < K
        dy = tl.load(grad + place + channel * grad_k, mask=read, other=0.0)
        x += tap * dil_w
        pixel = tl.load(
            input + pixels + tap * dil_w * in_w + channel // MULTIPLIER * in_c,
            mask=read & (x >= 0) & (x < W) & (tap < S),
            other=0.0,
        )
        total += dy.to(ACCUMULATOR) * pixel.to(ACCUMULATOR)
        n, p, q = next_pixels(n, p, q, P, Q, PIXELS)
    sums = tl.sum(total, axis=PIXEL_DIM)
    known = (s < S)[:, None] & (k < K)[None, :]
    filters = out + (split * K + k) * (R * S) + r * S
    tl.store(filters[None, :] + s[:, None], sums.to(out.dtype.element_ty), mask=known)


class Config(NamedTuple):
    """An entry of the tables: pixels times channels of a block."""

    elements: int
    num_warps: int
    why: str


CONFIGS = (
    Config(2048, 4, "16 results a lane: two vectors of 16 bits, four of float32"),
    Config(1024, 4, "8 a lane: single elements, each with its address and mask"),
    Config(512, 2, "8 a lane: where the larger blocks would leave SMs without work"),
)

# For each of the elements a block keeps TAPS sums.
WGRAD_CONFIGS = (
    Config(1024, 4, "32 sums a lane, and as many products under way"),
    Config(256, 2, "16 sums a lane: few pixels"),
)

TAPS = 4  # of one row of the filter; a 3x3 filter leaves one in four idle
UNROLLED = 9  # taps whose loads are under way at once: a 3x3 filter's
UNROLLED_SCATTERED = 3  # the same where lanes load single elements, or where taps are many
BLOCKS_SM = 4  # blocks an SM should have at least, to hide what each waits for
WORKSPACE = 64 << 20  # bytes of partial sums
STEPS_SPLIT = 8  # least of a part of the pixels: fewer would be spent on adding up the lanes


class Shape(NamedTuple):
    """Sides of a block."""

    pixels: int
    channels: int


def shape_of(p: Conv2dProblem, config: Config, pixels: int, channels: int) -> Shape:
    """A block of at most `pixels` and `channels`: of NHWC a line of 128 bytes of channels, of NCHW
    as many pixels as there are."""
    elements = config.elements // 2 if p.dtype == "float64" else config.elements
    pixels, channels = triton.next_power_of_2(pixels), triton.next_power_of_2(channels)
    if p.layout == "NHWC":
        channels = min(channels, 128 // ITEMSIZE[p.dtype])
        return Shape(min(pixels, elements // channels), channels)
    pixels = min(pixels, elements)
    return Shape(pixels, min(channels, elements // pixels))


def blocks_of(p: Conv2dProblem, config: Config, backward: bool) -> tuple[Shape, int]:
    """A block's sides, and how many blocks write the result."""
    channels, plane = (p.C, p.H * p.W) if backward else (p.K, p.P * p.Q)
    images, pixels = (1, p.N * plane) if p.layout == "NHWC" else (p.N, plane)
    shape = shape_of(p, config, pixels, channels)
    return shape, images * ceil_div(pixels, shape.pixels) * ceil_div(channels, shape.channels)


# Left alone, ptxas stops at 64 or 80 for the sake of one block more on an SM, and spills one.
REGISTERS = 255


def reads_lines(p: Conv2dProblem) -> bool:
    """Whether a lane reads 16 bytes of channels."""
    return p.layout == "NHWC" and p.aligned and p.C == p.K and fills_lines(p.C, p.dtype)


def unrolled(p: Conv2dProblem, taps: int) -> int:
    """Taps whose loads are under way at once."""
    whole = reads_lines(p) and taps <= UNROLLED
    return taps if whole else min(taps, UNROLLED_SCATTERED)


def configs_for(p: Conv2dProblem, device: Device) -> tuple[Config, ...]:
    """The table's entries that a problem can have without spilling registers."""
    lines, elements, small = CONFIGS
    return (lines if reads_lines(p) and not is_wide(p) else elements), small


def wgrad_configs_for(p: Conv2dProblem, device: Device) -> tuple[Config, ...]:
    """All, as above."""
    return WGRAD_CONFIGS


def choose(p: Conv2dProblem, device: Device, backward: bool = False) -> Config:
    """The largest blocks that fill the device, or else the smallest."""
    configs = configs_for(p, device)
    filling = (c for c in configs if blocks_of(p, c, backward)[1] >= BLOCKS_SM * device.sm_count)
    return next(filling, configs[-1])


def fprop_plan(p: Conv2dProblem, device: Device, config: Config | None = None) -> Plan:
    """The launches of a convolution."""
    config = config or choose(p, device)
    shape, blocks = blocks_of(p, config, backward=False)
    filter = filter_source(p)
    flt_k, flt_tap = filter_strides(p, filter)
    out_n, out_k, _, out_m = strides_of(p.layout, p.K, p.P, p.Q)
    main = Launch(
        conv2d_depthwise_fprop_kernel,
        (blocks,),
        (
            Pointer("input", p.dtype),
            filter.pointer,
            *epilogue_pointers(p, "scale", "shift", "residual"),
            Pointer("out", p.dtype),
            *(p.N, p.Q, Step(p.P * p.Q), p.H, p.W, Step(p.K)),
            *(p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dil_h, p.dil_w),
            *map(Step, strides_of(p.layout, p.C, p.H, p.W)),
            *map(Step, (flt_k, flt_tap, out_n, out_k, out_m)),
        ),
        {
            "R": p.R,
            "S": p.S,
            "UNROLL": unrolled(p, p.R * p.S),
            "MULTIPLIER": p.K // p.C,
            "CHANNELS_LAST": p.layout == "NHWC",
            **epilogue_constants(p),
            "ACCUMULATOR": accumulator(p.dtype),
            "PIXELS": shape.pixels,
            "CHANNELS": shape.channels,
            "WIDE": is_wide(p),
        },
        config.num_warps,
        max_registers=REGISTERS,
    )
    return Plan((*filter.launches, main), filter.workspace)


def dgrad_plan(p: Conv2dProblem, device: Device, config: Config | None = None) -> Plan:
    """The launches of the input's gradient."""
    config = config or choose(p, device, backward=True)
    shape, blocks = blocks_of(p, config, backward=True)
    filter = filter_source(p)
    flt_k, flt_tap = filter_strides(p, filter)
    out_n, out_c, _, out_m = strides_of(p.layout, p.C, p.H, p.W)
    main = Launch(
        conv2d_depthwise_dgrad_kernel,
        (blocks,),
        (
            Pointer("grad", p.dtype),
            filter.pointer,
            Pointer("out", p.dtype),
            *(p.N, p.W, Step(p.H * p.W), p.P, p.Q, Step(p.C)),
            *(p.pad_h, p.pad_w, p.dil_h, p.dil_w),
            *map(Step, strides_of(p.layout, p.K, p.P, p.Q)),
            *map(Step, (flt_k, flt_tap, out_n, out_c, out_m)),
        ),
        {
            "R": p.R,
            "S": p.S,
            "STRIDE_H": p.stride_h,
            "STRIDE_W": p.stride_w,
            "UNROLL": unrolled(p, p.R * p.S * (p.K // p.C)),
            "MULTIPLIER": p.K // p.C,
            "CHANNELS_LAST": p.layout == "NHWC",
            "ACCUMULATOR": accumulator(p.dtype),
            "PIXELS": shape.pixels,
            "CHANNELS": shape.channels,
            "WIDE": is_wide(p),
        },
        config.num_warps,
        max_registers=REGISTERS,
    )
    return Plan((*filter.launches, main), filter.workspace)


def filter_source(p: Conv2dProblem) -> Source:
    """The filters, for NHWC copied so that a tap's channels are contiguous: as they lie, a lane
    would load each of its eight channels' factors by itself, for every tap."""
    return Source("filter", p.dtype, "NCHW", 1, p.K, p.R * p.S, copy=p.layout == "NHWC")


def filter_strides(p: Conv2dProblem, filter: Source) -> tuple[int, int]:
    """Of a channel and of a tap."""
    _, flt_k, _, flt_tap = strides_of(filter.layout, p.K, 1, p.R * p.S)
    return flt_k, flt_tap


def wgrad_shape(p: Conv2dProblem, config: Config) -> tuple[Shape, int]:
    """A block's sides, and how many blocks one part of the pixels needs."""
    shape = shape_of(p, config, p.N * p.P * p.Q, p.K)
    return shape, ceil_div(p.K, shape.channels) * p.R * ceil_div(p.S, taps_of(p))


def taps_of(p: Conv2dProblem) -> int:
    return min(TAPS, triton.next_power_of_2(p.S))


def split_pixels(p: Conv2dProblem, device: Device, config: Config) -> int:
    """Pixels of one part, in whole steps: as many parts as fill the device twice."""
    shape, blocks = wgrad_shape(p, config)
    pixels = p.N * p.P * p.Q
    gradient = p.K * p.R * p.S * ITEMSIZE[accumulator_of(p.dtype)]
    most = min(WORKSPACE // gradient, pixels // (STEPS_SPLIT * shape.pixels))
    splits = max(1, min(2 * BLOCKS_SM * device.sm_count // blocks, most))
    return ceil_div(ceil_div(pixels, splits), shape.pixels) * shape.pixels


def choose_wgrad(p: Conv2dProblem, device: Device) -> Config:
    """The larger blocks where they fill the device."""
    large, small = WGRAD_CONFIGS
    _, blocks = wgrad_shape(p, large)
    splits = ceil_div(p.N * p.P * p.Q, split_pixels(p, device, large))
    return large if blocks * splits >= BLOCKS_SM * device.sm_count else small


def wgrad_plan(p: Conv2dProblem, device: Device, config: Config | None = None) -> Plan:
    """The launches of the filter's gradient."""
    config = config or choose_wgrad(p, device)
    shape, blocks = wgrad_shape(p, config)
    M, M_split = p.N * p.P * p.Q, split_pixels(p, device, config)
    splits = ceil_div(M, M_split)
    launches, workspace, target = (), {}, Pointer("out", p.dtype)
    if splits > 1:
        add, workspace = add_splits(p, splits)
        launches, target = (add,), Pointer("partials", accumulator_of(p.dtype))
    main = Launch(
        conv2d_depthwise_wgrad_kernel,
        (blocks * splits,),
        (
            Pointer("grad", p.dtype),
            Pointer("input", p.dtype),
            target,
            *(M, M_split, p.P, p.Q, p.H, p.W, Step(p.K), p.R, p.S),
            *(p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dil_h, p.dil_w),
            *map(Step, strides_of(p.layout, p.K, p.P, p.Q)),
            *map(Step, strides_of(p.layout, p.C, p.H, p.W)),
        ),
        {
            "MULTIPLIER": p.K // p.C,
            "CHANNELS_LAST": p.layout == "NHWC",
            "ACCUMULATOR": accumulator(p.dtype),
            "TAPS": taps_of(p),
            "PIXELS": shape.pixels,
            "CHANNELS": shape.channels,
            "WIDE": is_wide(p),
        },
        config.num_warps,
        max_registers=REGISTERS,
    )
    return Plan((main, *launches), workspace)


ROWS = (
    Row("conv2d_depthwise_triton_fprop", fprop_plan, configs_for),
    Row("conv2d_depthwise_triton_dgrad", dgrad_plan, configs_for),
    Row("conv2d_depthwise_triton_wgrad", wgrad_plan, wgrad_configs_for),
)
