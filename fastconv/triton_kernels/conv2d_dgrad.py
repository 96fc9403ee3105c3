"""The input's gradient as an implicit matrix product, for any stride.

    rows     pixels of the input of one phase        columns  c, a group's channels
    depth    (tap, k)

    grad  N x K x P x Q       filter  K x C/G x R x S       out  N x C x H x W

Input row h meets tap r only where (h + pad - r * dil) is a multiple of the stride, and then output
row p is that multiple. Rows of the same remainder h % stride, a phase, meet the same taps: every
(stride / gcd(stride, dil))-th, from the first r0 that fits, or none. So a tile holds pixels of one
phase, h = phase + y * stride, and along the phase's taps r0 + i * TAP_STEP

    p = y + (phase + pad - r0 * dil) / stride - i * MOVE        MOVE = TAP_STEP * dil / stride

without a division in the loop and without a product with a zero. A phase without taps is zero.
"""

import math

import triton
import triton.language as tl

from fastconv.triton_kernels.layout import Source, fills_lines
from fastconv.triton_kernels.plan import Launch, Plan, Pointer, Row, Step
from fastconv.triton_kernels.problem import Conv2dProblem, Device, ceil_div, is_wide, strides_of
from fastconv.triton_kernels.tiles import (
    Tile,
    choose_tile,
    dot,
    step_depth,
    tile_constants,
    tiles_for,
    walk,
)


@triton.jit
def first_tap(phase, pad, TAPS: tl.constexpr, STRIDE: tl.constexpr, DIL: tl.constexpr,
              TAP_STEP: tl.constexpr):  # fmt: skip
    """The first tap that rows of this phase meet; TAPS where they meet none."""
    first = TAPS
    for i in range(TAP_STEP):
        tap = TAP_STEP - 1 - i  # downwards, so that the least one stays
        # A multiple of the stride more keeps the sum positive, where % is the remainder.
        meets = (phase + pad + STRIDE * DIL * TAP_STEP - tap * DIL) % STRIDE == 0
        first = tl.where(meets & (tap < TAPS), tap, first)
    return first


@triton.jit
def conv2d_dgrad_kernel(
    grad,
    filter,
    out,
    M,
    tiles_m,
    PHASE_H,
    PHASE_W,
    H,
    W,
    P,
    Q,
    pad_h,
    pad_w,
    K_group,
    C_group,
    grad_n,
    grad_k,
    grad_p,
    grad_q,
    flt_k,
    flt_c,
    flt_r,
    flt_s,
    out_n,
    out_c,
    out_h,
    out_w,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    TAP_STEP_H: tl.constexpr,
    TAP_STEP_W: tl.constexpr,
    PHASES_H: tl.constexpr,
    PHASES_W: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    FLAT: tl.constexpr,
    WHOLE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    WIDE: tl.constexpr,
):
    tiles_c = tl.cdiv(C_group, COLUMNS)
    program = tl.program_id(0)
    tile_m, tile_c = walk(program % (tiles_m * tiles_c), tiles_m, tiles_c, BAND)
    phase = program // (tiles_m * tiles_c) % (PHASES_H * PHASES_W)
    group = program // (tiles_m * tiles_c * PHASES_H * PHASES_W)
    if WIDE:  # a tensor of 2^31 elements or more
        tile_m = tile_m.to(tl.int64)
        group = group.to(tl.int64)
    phase_h = phase // PHASES_W
    phase_w = phase % PHASES_W

    # Pixels of the phase: y < PHASE_H, x < PHASE_W, of which the last may lie outside.
    if PER_IMAGE:  # NCHW: a tile's rows are neighbours in memory where it stores them
        tiles_image = tl.cdiv(M, ROWS)
        n = tile_m // tiles_image
        m = tile_m % tiles_image * ROWS + tl.arange(0, ROWS)
        y = m // PHASE_W
    else:
        m = tile_m * ROWS + tl.arange(0, ROWS)
        n = m // (PHASE_H * PHASE_W)
        y = m // PHASE_W % PHASE_H
    x = m % PHASE_W
    h = phase_h + y * STRIDE_H
    w = phase_w + x * STRIDE_W
    c = tile_c * COLUMNS + tl.arange(0, COLUMNS)

    r0 = first_tap(phase_h, pad_h, R, STRIDE_H, DIL_H, TAP_STEP_H)
    s0 = first_tap(phase_w, pad_w, S, STRIDE_W, DIL_W, TAP_STEP_W)
    taps_h = tl.cdiv(R - r0, TAP_STEP_H)
    taps_w = tl.cdiv(S - s0, TAP_STEP_W)
    MOVE_H: tl.constexpr = TAP_STEP_H * DIL_H // STRIDE_H
    MOVE_W: tl.constexpr = TAP_STEP_W * DIL_W // STRIDE_W
    # Exact where there is a tap; elsewhere unused.
    p = y + (phase_h + pad_h - r0 * DIL_H) // STRIDE_H
    q = x + (phase_w + pad_w - s0 * DIL_W) // STRIDE_W
    pixels = grad + n * grad_n + p * grad_p + q * grad_q + group * K_group * grad_k
    filters = filter + group * K_group * flt_k + c * flt_c

    total = tl.zeros((ROWS, COLUMNS), dtype=ACCUMULATOR)
    lane = tl.arange(0, DEPTH)
    if WIDE:  # k * grad_k passes 32 bits where one NCHW image does
        lane = lane.to(tl.int64)
    if FLAT:
        depth = taps_h * taps_w * K_group
        for first in range(0, depth, DEPTH):
            d = first + lane
            inside = d < depth
            k = d % K_group
            j = d // K_group % tl.maximum(taps_w, 1)
            i = d // (K_group * tl.maximum(taps_w, 1))
            row = p[:, None] - (i * MOVE_H)[None, :]
            column = q[:, None] - (j * MOVE_W)[None, :]
            read = (row >= 0) & (row < P) & (column >= 0) & (column < Q)
            read &= (m < M)[:, None] & inside[None, :]
            tap = k * grad_k - i * MOVE_H * grad_p - j * MOVE_W * grad_q
            a = tl.load(pixels[:, None] + tap[None, :], mask=read, other=0.0)
            tap = k * flt_k + (r0 + i * TAP_STEP_H) * flt_r + (s0 + j * TAP_STEP_W) * flt_s
            known = inside[:, None] & (c < C_group)[None, :]
            b = tl.load(filters[None, :] + tap[:, None], mask=known, other=0.0)
            total = dot(a, b, total, PRECISION, DEPTH)
    else:
        steps = taps_h * taps_w * tl.cdiv(K_group, DEPTH)
        # A phase without taps has no steps; a pipelined loop divides ahead of its first one.
        taps_w = tl.maximum(taps_w, 1)
        taps = tl.maximum(taps_h, 1) * taps_w
        for step in range(0, steps):
            tap = step % taps
            i = tap // taps_w
            j = tap % taps_w
            if WIDE:
                i = i.to(tl.int64)
                j = j.to(tl.int64)
            k = step // taps * DEPTH + lane
            row = p - i * MOVE_H
            column = q - j * MOVE_W
            read = (m < M) & (row >= 0) & (row < P) & (column >= 0) & (column < Q)
            read = read[:, None]
            known = (c < C_group)[None, :]
            if not WHOLE:  # the last block of filters is not full
                read &= (k < K_group)[None, :]
                known &= (k < K_group)[:, None]
            move = -i * MOVE_H * grad_p - j * MOVE_W * grad_q
            a = tl.load(pixels[:, None] + move + (k * grad_k)[None, :], mask=read, other=0.0)
            move = (r0 + i * TAP_STEP_H) * flt_r + (s0 + j * TAP_STEP_W) * flt_s
            b = tl.load(filters[None, :] + move + (k * flt_k)[:, None], mask=known, other=0.0)
            total = dot(a, b, total, PRECISION, DEPTH)

    if STRIDE_H == 1 and STRIDE_W == 1:  # rows of pixels lie behind each other
        place = n * out_n + m if PER_IMAGE else m * out_w
        known = (m < M)[:, None] & (c < C_group)[None, :]
    else:
        place = n * out_n + h * out_h + w * out_w
        known = ((m < M) & (h < H) & (w < W))[:, None] & (c < C_group)[None, :]
    c += group * C_group
    tl.store(
        out + place[:, None] + (c * out_c)[None, :],
        total.to(out.dtype.element_ty),
        mask=known,
    )


def phases(p: Conv2dProblem) -> tuple[int, int]:
    """Remainders of rows and of columns; no more than there are of those."""
    return min(p.stride_h, p.H), min(p.stride_w, p.W)


def is_flat(p: Conv2dProblem) -> bool:
    """Whether a step of the depth holds several taps, as in fprop."""
    return p.K // p.G <= 8


def is_scattered(p: Conv2dProblem) -> bool:
    """Whether lanes read single elements, each by an address of its own: a register pair."""
    lines = fills_lines(p.K // p.G, p.dtype) and fills_lines(p.C // p.G, p.dtype)
    return is_flat(p) or not lines or not p.aligned


def depth_of(p: Conv2dProblem, tile: Tile) -> int:
    """Elements of the depth in a step."""
    there = p.K // p.G * (p.R * p.S if is_flat(p) else 1)
    return step_depth(there, tile, p.dtype, is_scattered(p))


def configs_for(p: Conv2dProblem, device: Device) -> tuple[Tile, ...]:
    """The table's entries that a problem can have without spilling registers."""
    # mma.sync's operands are in registers
    area = 128 * 256 if device.has_warpgroup_dot else 128 * 128
    if p.layout == "NCHW" and p.stride_h * p.stride_w > 1:
        area = 128 * 128  # every store's address is a register pair
    if is_scattered(p):
        area = 64 * 64
    return tuple(t for t in tiles_for(p.dtype, p.tf32) if t.rows * t.columns <= area)


def choose(p: Conv2dProblem, device: Device) -> Tile:
    """The tile for a problem."""
    phases_h, phases_w = phases(p)
    rows = p.N * ceil_div(p.H, phases_h) * ceil_div(p.W, phases_w)
    return choose_tile(configs_for(p, device), rows, p.C // p.G, p.G * phases_h * phases_w, device)


def plan(p: Conv2dProblem, device: Device, config: Tile | None = None) -> Plan:
    """The launches of the input's gradient."""
    tile = config or choose(p, device)
    C_group, K_group = p.C // p.G, p.K // p.G
    phases_h, phases_w = phases(p)
    phase_h, phase_w = ceil_div(p.H, p.stride_h), ceil_div(p.W, p.stride_w)
    per_image = p.layout == "NCHW"
    M = phase_h * phase_w * (1 if per_image else p.N)
    tiles_m = ceil_div(M, tile.rows) * (p.N if per_image else 1)
    depth = depth_of(p, tile)
    dy = Source("grad", p.dtype, p.layout, p.N, p.K, p.P * p.Q, fills_lines(K_group, p.dtype))
    filter = Source(
        "filter", p.dtype, p.filter_layout, p.K, C_group, p.R * p.S, fills_lines(C_group, p.dtype)
    )
    main = Launch(
        conv2d_dgrad_kernel,
        (tiles_m * ceil_div(C_group, tile.columns) * phases_h * phases_w * p.G,),
        (
            dy.pointer,
            filter.pointer,
            Pointer("out", p.dtype),
            Step(M) if per_image else M,
            *(tiles_m, phase_h, phase_w, p.H, p.W, p.P, p.Q, p.pad_h, p.pad_w),
            Step(K_group),
            Step(C_group),
            *map(Step, strides_of(dy.layout, p.K, p.P, p.Q)),
            *map(Step, strides_of(filter.layout, C_group, p.R, p.S)),
            *map(Step, strides_of(p.layout, p.C, p.H, p.W)),
        ),
        {
            "R": p.R,
            "S": p.S,
            "STRIDE_H": p.stride_h,
            "STRIDE_W": p.stride_w,
            "DIL_H": p.dil_h,
            "DIL_W": p.dil_w,
            "TAP_STEP_H": p.stride_h // math.gcd(p.stride_h, p.dil_h),
            "TAP_STEP_W": p.stride_w // math.gcd(p.stride_w, p.dil_w),
            "PHASES_H": phases_h,
            "PHASES_W": phases_w,
            "PER_IMAGE": per_image,
            "FLAT": is_flat(p),
            "WHOLE": K_group % depth == 0,
            **tile_constants(p, device, tile, depth),
            "WIDE": is_wide(p),
        },
        **tile.options(device),
    )
    return Plan((*dy.launches, *filter.launches, main), dy.workspace | filter.workspace)


ROWS = (Row("conv2d_igemm_triton_dgrad", plan, configs_for, dots=True),)
