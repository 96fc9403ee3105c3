"""Max pooling and its gradient.

fprop reads a window row by row; an element becomes the maximum when it is greater than the maximum
so far or is NaN. Hence of equal elements the first is kept and of several NaNs the last, as torch
does. A window of -inf alone, or of nothing, keeps the position of its first tap that is not above
or left of the tensor.

dgrad gathers: each input position visits the windows over it in ascending order and adds the
gradients of those whose maximum it was. No atomics, one rounding, always the same bits.
"""

import triton
import triton.language as tl

from fastconv.triton_kernels.plan import Launch, Plan, Pointer, Row
from fastconv.triton_kernels.pool2d import (
    Config,
    configs_for,
    is_empty,
    largest_that_fills,
    tile_of_program,
    tiling,
    windows_over,
)
from fastconv.triton_kernels.problem import Device, Pool2dProblem, ceil_div

# --- the kernels ----------------------------------------------------------------------------------


@triton.jit
def max_pool2d_fprop_kernel(
    input,
    out,
    index_out,
    H,
    W,
    P,
    Q,
    pad_h,
    pad_w,
    pixels,
    channel_packs,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    UNROLL_S: tl.constexpr,
    KEEP: tl.constexpr,  # the place of each maximum
    FLAT: tl.constexpr,  # as h * W + w of the input; else as r * S + s of the window
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PACK: tl.constexpr,
    NHWC: tl.constexpr,
    WIDE: tl.constexpr,
):
    channels, image, p, q, pixel, c, inside = tile_of_program(
        P, Q, pixels, channel_packs, PIXELS, CHANNELS, PACK, NHWC, WIDE
    )
    T: tl.constexpr = input.dtype.element_ty
    A: tl.constexpr = tl.float64 if T == tl.float64 else tl.float32
    h0 = p * STRIDE_H - pad_h
    w0 = q * STRIDE_W - pad_w
    # The first tap that does not fall before the tensor.
    r0 = tl.maximum(DIL_H - 1 - h0, 0) // DIL_H
    s0 = tl.maximum(DIL_W - 1 - w0, 0) // DIL_W
    first_tap = (h0 + r0 * DIL_H) * W + (w0 + s0 * DIL_W) if FLAT else r0 * S + s0
    where = first_tap[:, None] + tl.zeros((PIXELS, CHANNELS), first_tap.dtype)
    # As stored: a conversion to float32 and back would lose a NaN's bits.
    best = tl.full((PIXELS, CHANNELS), float("-inf"), A).to(T)
    for r in range(R):
        h = h0 + r * DIL_H
        row_inside = (h >= 0) & (h < H)
        line = (image * H + h) * W
        for s in tl.range(0, S, loop_unroll_factor=UNROLL_S):
            w = w0 + s * DIL_W
            there = inside & (row_inside & (w >= 0) & (w < W))[:, None]
            tap = (line + w)[:, None] * channels + c[None, :]
            x = tl.load(input + tap, mask=there, other=float("-inf"))
            value = x.to(A)
            better = (value > best.to(A)) | (value != value)
            here = h * W + w if FLAT else tl.zeros_like(h) + (r * S + s)
            best = tl.where(better, x, best)
            where = tl.where(better, here[:, None], where)
    place = pixel[:, None] * channels + c[None, :]
    tl.store(out + place, best, mask=inside)
    if KEEP:
        tl.store(index_out + place, where.to(index_out.dtype.element_ty), mask=inside)


@triton.jit
def max_pool2d_dgrad_kernel(
    grad,
    index_in,
    out,
    H,
    W,
    P,
    Q,
    pad_h,
    pad_w,
    pixels,
    channel_packs,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    COVER_H: tl.constexpr,  # windows over a position, at most
    COVER_W: tl.constexpr,
    UNROLL_COVER_W: tl.constexpr,
    FLAT: tl.constexpr,
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
    p0, p_end = windows_over(h, pad_h, P, (R - 1) * DIL_H + 1, STRIDE_H)
    q0, q_end = windows_over(w, pad_w, Q, (S - 1) * DIL_W + 1, STRIDE_W)
    total = tl.zeros((PIXELS, CHANNELS), A)
    for i in range(COVER_H):
        p = p0 + i
        down = h + pad_h - p * STRIDE_H
        # A window that covers the row with a tap: with a dilation it may step over it.
        row_covered = (p < p_end) & (down % DIL_H == 0)
        for j in tl.range(0, COVER_W, loop_unroll_factor=UNROLL_COVER_W):
            q = q0 + j
            right = w + pad_w - q * STRIDE_W
            covered = row_covered & (q < q_end) & (right % DIL_W == 0)
            here = h * W + w if FLAT else down // DIL_H * S + right // DIL_W
            window = ((image * P + p) * Q + q)[:, None] * channels + c[None, :]
            there = inside & covered[:, None]
            kept = tl.load(index_in + window, mask=there, other=0)
            dy = tl.load(grad + window, mask=there, other=0.0).to(A)  # 0 where no window is
            total += tl.where(kept.to(here.dtype) == here[:, None], dy, 0.0)
    tl.store(out + pixel[:, None] * channels + c[None, :], total, mask=inside)


# --- plans ----------------------------------------------------------------------------------------

# Rows of windows up to this wide are unrolled: with two packs a tap, the loads of a row of three
# are 96 bytes a thread on their way. The rows stay a loop: 3 x 3 taps at once cost registers, and
# with int64 positions a stack.
UNROLLED = 4


def unroll(width: int) -> int:
    return width if width <= UNROLLED else 1


def choose_fprop(problem: Pool2dProblem, device: Device) -> Config:
    outputs = problem.P * problem.Q
    return largest_that_fills(configs_for(problem, device), problem, outputs, device)


def choose_dgrad(problem: Pool2dProblem, device: Device) -> Config:
    inputs = problem.H * problem.W
    return largest_that_fills(configs_for(problem, device), problem, inputs, device)


def _sizes(problem: Pool2dProblem) -> tuple:
    p = problem
    return p.H, p.W, p.P, p.Q, p.pad_h, p.pad_w


def _window(problem: Pool2dProblem) -> dict:
    """Windows, strides and dilations come in few values, and constants save their divisions."""
    p = problem
    return {
        "R": p.R,
        "S": p.S,
        "STRIDE_H": p.stride_h,
        "STRIDE_W": p.stride_w,
        "DIL_H": p.dil_h,
        "DIL_W": p.dil_w,
        "FLAT": p.index == "int64",
    }


def plan_fprop(problem: Pool2dProblem, device: Device, config: Config | None = None) -> Plan:
    p = problem
    if is_empty(p):
        return Plan(())
    config = config or choose_fprop(p, device)
    tiles = tiling(p, p.P, p.Q, config)
    out = Pointer("out", p.dtype)
    keep = p.index != "none"
    launch = Launch(
        max_pool2d_fprop_kernel,
        tiles.grid,
        (
            Pointer("input", p.dtype),
            out,
            Pointer("index_out", p.index) if keep else out,
            *_sizes(p),
            *tiles.arguments,
        ),
        _window(p) | {"KEEP": keep, "UNROLL_S": unroll(p.S)} | tiles.constants,
        num_warps=config.num_warps,
    )
    return Plan((launch,))


def plan_dgrad(problem: Pool2dProblem, device: Device, config: Config | None = None) -> Plan:
    p = problem
    if is_empty(p):
        return Plan(())
    config = config or choose_dgrad(p, device)
    tiles = tiling(p, p.H, p.W, config)
    cover_h = ceil_div((p.R - 1) * p.dil_h + 1, p.stride_h)
    cover_w = ceil_div((p.S - 1) * p.dil_w + 1, p.stride_w)
    launch = Launch(
        max_pool2d_dgrad_kernel,
        tiles.grid,
        (
            Pointer("grad", p.dtype),
            Pointer("index_in", p.index),
            Pointer("out", p.dtype),
            *_sizes(p),
            *tiles.arguments,
        ),
        _window(p)
        | {"COVER_H": cover_h, "COVER_W": cover_w, "UNROLL_COVER_W": unroll(cover_w)}
        | tiles.constants,
        num_warps=config.num_warps,
    )
    return Plan((launch,))


ROWS = (
    Row("max_pool2d_triton_fprop", plan_fprop, configs_for),
    Row("max_pool2d_triton_dgrad", plan_dgrad, configs_for),
)
