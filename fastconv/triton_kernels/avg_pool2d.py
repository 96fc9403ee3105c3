"""Average and adaptive average pooling, and their gradients.

fprop: a program takes a tile of pixels x taps x channels, adds the taps of a window step by step
and divides last, so that sums of small integers give the exact quotient rounded once. Windows of
less than 32 elements have one lane; larger ones (a global average: 7 x 7 to 1 x 1) are shared by
many, whose sums are added at the end.

dgrad gathers: each input position adds the windows over it in ascending order, those of one output
row first. Where all windows have one divisor, it divides once, at the end. No atomics, always the
same bits.
"""

import triton
import triton.language as tl

from fastconv.triton_kernels import pool2d
from fastconv.triton_kernels.plan import Launch, Plan, Pointer, Row
from fastconv.triton_kernels.pool2d import (
    Config,
    is_empty,
    largest_that_fills,
    tile_of_program,
    tiling,
    windows_over,
)
from fastconv.triton_kernels.problem import Device, Pool2dProblem, ceil_div

# What a sum is divided by:
ONE = tl.constexpr(0)  # a number that all windows have in common
PADDED = tl.constexpr(1)  # the window's size, with the padding in it
INSIDE = tl.constexpr(2)  # the window's size without the padding

# --- windows --------------------------------------------------------------------------------------


@triton.jit
def span(x, size, count, window, STRIDE: tl.constexpr, pad, ADAPTIVE: tl.constexpr):
    """First and last + 1 of the input positions under window x, along one axis."""
    if ADAPTIVE:
        return x * size // count, ((x + 1) * size + count - 1) // count
    else:
        begin = x * STRIDE - pad
        return tl.maximum(begin, 0), tl.minimum(begin + window, size)


@triton.jit
def counted(x, begin, end, size, window, STRIDE: tl.constexpr, pad, DIVISOR: tl.constexpr):
    """What the divisor counts of window x along one axis. A window may pass the padded edge (by
    ceil_mode): what lies beyond it is not counted. At least 1, since 0 / 0 would be NaN."""
    if DIVISOR == PADDED:
        start = x * STRIDE - pad
        return tl.maximum(tl.minimum(start + window, size + pad) - start, 1)
    else:
        return tl.maximum(end - begin, 1)


@triton.jit
def quotient(a, b):
    """Rounded to nearest: Triton's own float32 division is off by up to two units."""
    if a.dtype == tl.float64:
        return a / b
    else:
        return tl.div_rn(a, b)


# --- the kernels ----------------------------------------------------------------------------------


@triton.jit
def avg_pool2d_fprop_kernel(
    input,
    out,
    H,
    W,
    P,
    Q,
    R,
    S,
    pad_h,
    pad_w,
    divisor,
    pixels,
    channel_packs,
    steps,  # of TAPS over the largest window, R x S
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    DIVISOR: tl.constexpr,
    TAPS: tl.constexpr,  # lanes that share a window
    RUN: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PACK: tl.constexpr,
    NHWC: tl.constexpr,
    WIDE: tl.constexpr,
):
    channels, image, p, q, pixel, c, inside = tile_of_program(
        P, Q, pixels, channel_packs, PIXELS, CHANNELS, PACK, NHWC, WIDE
    )
    A: tl.constexpr = tl.float64 if input.dtype.element_ty == tl.float64 else tl.float32
    h0, h_end = span(p, H, P, R, STRIDE_H, pad_h, ADAPTIVE)
    w0, w_end = span(q, W, Q, S, STRIDE_W, pad_w, ADAPTIVE)
    image_h, image_h_end = (image * H + h0)[:, None], (image * H + h_end)[:, None]
    # A lane walks over the largest window in steps of TAPS without a division.
    tap = tl.arange(0, TAPS)
    r, s = tap // S, tap % S
    down, right = TAPS // S, TAPS % S
    total = tl.zeros((PIXELS, TAPS, CHANNELS), A)
    for first in range(0, steps, RUN):
        run = tl.zeros((PIXELS, TAPS, CHANNELS), A)
        for _ in tl.range(first, tl.minimum(first + RUN, steps), loop_unroll_factor=2):
            line, w = image_h + r[None, :], w0[:, None] + s[None, :]
            covered = (line < image_h_end) & (w < w_end[:, None])
            place = (line * W + w)[:, :, None] * channels + c[None, None, :]
            there = inside[:, None, :] & covered[:, :, None]
            run += tl.load(input + place, mask=there, other=0.0).to(A)
            s += right
            r += down + (s >= S).to(tl.int32)
            s = tl.where(s >= S, s - S, s)
        total += run
    sum = tl.sum(total, 1)
    if DIVISOR == ONE:
        count = tl.zeros_like(p) + divisor
    else:
        count = counted(p, h0, h_end, H, R, STRIDE_H, pad_h, DIVISOR) * counted(
            q, w0, w_end, W, S, STRIDE_W, pad_w, DIVISOR
        )
    mean = quotient(sum, tl.broadcast_to(count.to(A)[:, None], sum.shape))
    tl.store(out + pixel[:, None] * channels + c[None, :], mean, mask=inside)


@triton.jit
def avg_pool2d_dgrad_kernel(
    grad,
    out,
    H,
    W,
    P,
    Q,
    R,
    S,
    pad_h,
    pad_w,
    divisor,
    pixels,
    channel_packs,
    cover_h,
    cover_w,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    ADAPTIVE: tl.constexpr,
    DIVISOR: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PACK: tl.constexpr,
    NHWC: tl.constexpr,
    WIDE: tl.constexpr,
):
    channels, image, h, w, pixel, c, inside = tile_of_program(
        H, W, pixels, channel_packs, PIXELS, CHANNELS, PACK, NHWC, WIDE
    )
    A: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    if ADAPTIVE:
        # Window p covers h when p * H < (h + 1) * P and (p + 1) * H > h * P: a span the other way.
        p0, p_end = span(h, P, H, R, STRIDE_H, pad_h, True)
        q0, q_end = span(w, Q, W, S, STRIDE_W, pad_w, True)
    else:
        p0, p_end = windows_over(h, pad_h, P, R, STRIDE_H)
        q0, q_end = windows_over(w, pad_w, Q, S, STRIDE_W)
    total = tl.zeros((PIXELS, CHANNELS), A)
    for i in range(cover_h):
        p = p0 + i
        h0, h_end = span(p, H, P, R, STRIDE_H, pad_h, ADAPTIVE)
        rows = counted(p, h0, h_end, H, R, STRIDE_H, pad_h, DIVISOR)
        run = tl.zeros((PIXELS, CHANNELS), A)
        for j in range(cover_w):
            q = q0 + j
            covered = (p < p_end) & (q < q_end)
            window = ((image * P + p) * Q + q)[:, None] * channels + c[None, :]
            dy = tl.load(grad + window, mask=inside & covered[:, None], other=0.0).to(A)
            if DIVISOR != ONE:
                w0, w_end = span(q, W, Q, S, STRIDE_W, pad_w, ADAPTIVE)
                count = rows * counted(q, w0, w_end, W, S, STRIDE_W, pad_w, DIVISOR)
                dy = quotient(dy, tl.broadcast_to(count.to(A)[:, None], dy.shape))
            run += dy
        total += run
    if DIVISOR == ONE:
        total = quotient(total, tl.zeros_like(total) + divisor.to(A))
    tl.store(out + pixel[:, None] * channels + c[None, :], total, mask=inside)


# --- configurations -------------------------------------------------------------------------------

# Where a window is shared by lanes.
SHARED_NHWC = (Config("shared_pixels", 64, 2, 4, "64 bytes of channels of 16 taps", taps=16),)
SHARED_NCHW = (
    Config("shared_planes", 64, 4, 4, "whole planes, a program to each two", taps=512),
    Config("shared_rows", 64, 2, 4, "neighbouring lanes along a window's rows", taps=64),
)
LARGE_WINDOW = 32  # elements; with a lane each, a global average would leave most lanes idle
# A lane adds this many elements before their sum joins its own: torch averages whole planes in a
# cascade of sums, and a thousand float32 additions in a row lose 4 bits.
RUN = 32


# Left alone, ptxas stops at 40 or 80 for the sake of one block more on an SM, and spills one.
REGISTERS = 128


def has_large_windows(problem: Pool2dProblem) -> bool:
    R, S = largest_window(problem)
    return R * S >= LARGE_WINDOW


def configs_for_fprop(problem: Pool2dProblem, device: Device) -> tuple[Config, ...]:
    if not has_large_windows(problem):
        return pool2d.configs_for(problem, device)
    return SHARED_NHWC if problem.layout == "NHWC" else SHARED_NCHW


def choose_fprop(problem: Pool2dProblem, device: Device) -> Config:
    configs = configs_for_fprop(problem, device)
    if not has_large_windows(problem):
        return largest_that_fills(configs, problem, problem.P * problem.Q, device)
    R, S = largest_window(problem)
    return next((c for c in configs if c.taps <= R * S), configs[-1])  # no lane without a tap


def choose_dgrad(problem: Pool2dProblem, device: Device) -> Config:
    inputs = problem.H * problem.W
    return largest_that_fills(pool2d.configs_for(problem, device), problem, inputs, device)


# --- plans ----------------------------------------------------------------------------------------


def largest_window(problem: Pool2dProblem) -> tuple[int, int]:
    """Its height and width, or no less."""
    p = problem
    if p.kind == "average":
        return p.R, p.S
    return tuple(
        size // outputs + (2 if size % outputs else 0) for size, outputs in ((p.H, p.P), (p.W, p.Q))
    )


def most_windows_over(problem: Pool2dProblem) -> tuple[int, int]:
    """How many windows cover an input position along H and W, at most."""
    p = problem
    if p.kind == "average":
        return min(ceil_div(p.R, p.stride_h), p.P), min(ceil_div(p.S, p.stride_w), p.Q)
    return tuple(
        outputs // size + 2 if size % outputs else 1 for size, outputs in ((p.H, p.P), (p.W, p.Q))
    )


def divisor_of(problem: Pool2dProblem) -> tuple[int, int]:
    """(ONE, PADDED or INSIDE; the divisor of all windows, or 0)."""
    p = problem
    R, S = largest_window(p)
    if p.kind == "adaptive_average":
        whole = p.H % p.P == 0 and p.W % p.Q == 0
        return (ONE.value, R * S) if whole else (INSIDE.value, 0)
    if p.divisor_override:
        return ONE.value, p.divisor_override
    # The last window may reach into the padding at the end, where that counts, and no further.
    counts = p.count_include_pad
    room_h, room_w = (p.pad_h, p.pad_w) if counts else (0, 0)
    within = (
        (p.P - 1) * p.stride_h - p.pad_h + R <= p.H + room_h
        and (p.Q - 1) * p.stride_w - p.pad_w + S <= p.W + room_w
        and (counts or p.pad_h == p.pad_w == 0)
    )
    if within:
        return ONE.value, R * S
    return (PADDED.value if counts else INSIDE.value), 0


def _windows(problem: Pool2dProblem) -> tuple:
    """A kernel's arguments that say which windows there are, and what divides their sums."""
    p = problem
    return p.H, p.W, p.P, p.Q, *largest_window(p), p.pad_h, p.pad_w, divisor_of(p)[1]


def _constants(problem: Pool2dProblem) -> dict:
    p = problem
    return {
        "STRIDE_H": p.stride_h,
        "STRIDE_W": p.stride_w,
        "ADAPTIVE": p.kind == "adaptive_average",
        "DIVISOR": divisor_of(p)[0],
    }


def plan_fprop(problem: Pool2dProblem, device: Device, config: Config | None = None) -> Plan:
    p = problem
    if is_empty(p):
        return Plan(())
    config = config or choose_fprop(p, device)
    tiles = tiling(p, p.P, p.Q, config)
    R, S = largest_window(p)
    launch = Launch(
        avg_pool2d_fprop_kernel,
        tiles.grid,
        (
            Pointer("input", p.dtype),
            Pointer("out", p.dtype),
            *_windows(p),
            *tiles.arguments,
            ceil_div(R * S, config.taps),
        ),
        tiles.constants | _constants(p) | {"TAPS": config.taps, "RUN": RUN},
        num_warps=config.num_warps,
        max_registers=REGISTERS,
    )
    return Plan((launch,))


def plan_dgrad(problem: Pool2dProblem, device: Device, config: Config | None = None) -> Plan:
    p = problem
    if is_empty(p):
        return Plan(())
    config = config or choose_dgrad(p, device)
    tiles = tiling(p, p.H, p.W, config)
    launch = Launch(
        avg_pool2d_dgrad_kernel,
        tiles.grid,
        (
            Pointer("grad", p.dtype),
            Pointer("out", p.dtype),
            *_windows(p),
            *tiles.arguments,
            *most_windows_over(p),
        ),
        tiles.constants | _constants(p),
        num_warps=config.num_warps,
        max_registers=REGISTERS,
    )
    return Plan((launch,))


ROWS = (
    Row("avg_pool2d_triton_fprop", plan_fprop, configs_for_fprop),
    Row("avg_pool2d_triton_dgrad", plan_dgrad, pool2d.configs_for),
    Row("adaptive_avg_pool2d_triton_fprop", plan_fprop, configs_for_fprop),
    Row("adaptive_avg_pool2d_triton_dgrad", plan_dgrad, pool2d.configs_for),
)
