"""Convolution forward as an implicit matrix product: no patch matrix is ever written.

    rows     m = (n, p, q)     N * P * Q of them
    columns  k                 a group's filters
    depth    (r, s, c)         the taps and channels of a filter

    input  N x C x H x W       filter  K x C/G x R x S       out  N x K x P x Q

A block computes one tile of rows by columns of a group. Along the depth it walks the taps inside a
block of channels, so that a tap's neighbours find their input in L1; a step reads `rows` pixels of
one tap and `columns` filters, and multiplies them. Groups of few channels (an image's three) would
leave most of a step empty: there the depth is taken flat, and every lane finds its own tap.

Layouts are strides: with NHWC a pixel's channels are contiguous, and a lane reads 16 bytes.
"""

import triton
import triton.language as tl

from fastconv.triton_kernels.epilogue import (
    epilogue_constants,
    epilogue_pointers,
    finish,
    merge_statistics,
    statistics_of_tile,
)
from fastconv.triton_kernels.layout import Source, fills_lines
from fastconv.triton_kernels.plan import Launch, Plan, Pointer, Row, Step
from fastconv.triton_kernels.problem import (
    Conv2dProblem,
    Device,
    accumulator_of,
    ceil_div,
    is_wide,
    strides_of,
)
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
def conv2d_fprop_kernel(
    input,
    filter,
    scale,
    shift,
    residual,
    out,
    means,
    squares,
    M,
    tiles_m,
    P,
    Q,
    H,
    W,
    K,
    K_group,
    C_group,
    in_n,
    in_c,
    in_h,
    in_w,
    flt_k,
    flt_c,
    flt_r,
    flt_s,
    out_n,
    out_k,
    out_m,
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    FLAT: tl.constexpr,
    WHOLE: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    WIDE: tl.constexpr,
):
    tiles_k = tl.cdiv(K_group, COLUMNS)
    program = tl.program_id(0)
    group = program // (tiles_m * tiles_k)
    tile_m, tile_k = walk(program % (tiles_m * tiles_k), tiles_m, tiles_k, BAND)
    if WIDE:  # a tensor of 2^31 elements or more
        tile_m = tile_m.to(tl.int64)
        group = group.to(tl.int64)

    if PER_IMAGE:  # NCHW: a tile's rows are neighbours in memory where it stores them
        tiles_image = tl.cdiv(M, ROWS)
        n = tile_m // tiles_image
        first_m = tile_m % tiles_image * ROWS
        m = first_m + tl.arange(0, ROWS)
        p = m // Q
        place = n * out_n + m * out_m
    else:
        first_m = tile_m * ROWS
        m = first_m + tl.arange(0, ROWS)
        n = m // (P * Q)
        p = (m // Q) % P
        place = m * out_m
    q = m % Q
    h = p * STRIDE_H - PAD_H
    w = q * STRIDE_W - PAD_W
    k = tile_k * COLUMNS + tl.arange(0, COLUMNS)
    lane = tl.arange(0, DEPTH)
    if WIDE:  # c * in_c passes 32 bits where one NCHW image does
        lane = lane.to(tl.int64)
    pixels = input + n * in_n + h * in_h + w * in_w + group * C_group * in_c
    filters = filter + (group * K_group + k) * flt_k

    total = tl.zeros((ROWS, COLUMNS), dtype=ACCUMULATOR)
    if FLAT:
        for first in range(0, R * S * C_group, DEPTH):
            j = first + lane
            c = j % C_group
            s = (j // C_group) % S
            r = j // (C_group * S)
            inside = j < R * S * C_group
            y = h[:, None] + (r * DIL_H)[None, :]
            x = w[:, None] + (s * DIL_W)[None, :]
            read = (y >= 0) & (y < H) & (x >= 0) & (x < W) & (m < M)[:, None] & inside[None, :]
            tap = r * DIL_H * in_h + s * DIL_W * in_w + c * in_c
            a = tl.load(pixels[:, None] + tap[None, :], mask=read, other=0.0)
            tap = r * flt_r + s * flt_s + c * flt_c
            known = inside[:, None] & (k < K_group)[None, :]
            b = tl.load(filters[None, :] + tap[:, None], mask=known, other=0.0)
            total = dot(a, b, total, PRECISION, DEPTH)
    else:
        for step in range(0, R * S * tl.cdiv(C_group, DEPTH)):
            tap = step % (R * S)
            r = tap // S
            s = tap % S
            if WIDE:
                r = r.to(tl.int64)
                s = s.to(tl.int64)
            c = step // (R * S) * DEPTH + lane
            y = h + r * DIL_H
            x = w + s * DIL_W
            read = m < M
            if PAD_H > 0:
                read &= (y >= 0) & (y < H)
            if PAD_W > 0:
                read &= (x >= 0) & (x < W)
            read = read[:, None]
            known = (k < K_group)[None, :]
            if not WHOLE:  # the last block of channels is not full
                read &= (c < C_group)[None, :]
                known &= (c < C_group)[:, None]
            move = r * DIL_H * in_h + s * DIL_W * in_w
            a = tl.load(pixels[:, None] + move + (c * in_c)[None, :], mask=read, other=0.0)
            move = r * flt_r + s * flt_s
            b = tl.load(filters[None, :] + move + (c * flt_c)[:, None], mask=known, other=0.0)
            total = dot(a, b, total, PRECISION, DEPTH)

    filters_known = k < K_group
    known = (m < M)[:, None] & filters_known[None, :]
    k += group * K_group
    place = place[:, None] + (k * out_k)[None, :]
    y = finish(
        total,
        scale,
        shift,
        residual,
        k,
        filters_known,
        place,
        known,
        SCALE,
        SHIFT,
        RESIDUAL,
        ACTIVATION,
        SLOPE,
        out.dtype.element_ty,
    )
    tl.store(out + place, y, mask=known)
    if STATISTICS:
        count = tl.minimum(M - first_m, ROWS)
        statistics_of_tile(
            y, known, count, means, squares, tile_m, k, filters_known, K, ACCUMULATOR
        )


def is_flat(p: Conv2dProblem) -> bool:
    """Whether a step of the depth holds several taps: one of 16 channels would be half empty."""
    return p.C // p.G <= 8


def is_scattered(p: Conv2dProblem) -> bool:
    """Whether lanes read single elements, each by an address of its own: a register pair."""
    return is_flat(p) or not fills_lines(p.C // p.G, p.dtype) or not p.aligned


def depth_of(p: Conv2dProblem, tile: Tile) -> int:
    """Elements of the depth in a step."""
    there = p.C // p.G * (p.R * p.S if is_flat(p) else 1)
    return step_depth(there, tile, p.dtype, is_scattered(p))


def configs_for(p: Conv2dProblem, device: Device) -> tuple[Tile, ...]:
    """The table's entries that a problem can have without spilling registers."""
    tiles = tiles_for(p.dtype, p.tf32)
    area = 128 * 256
    if not device.has_warpgroup_dot or p.statistics or p.residual:
        area = 128 * 128  # mma.sync takes its operands, and these epilogues a tile, in registers
    if is_scattered(p):
        area = 64 * 64
    return tuple(t for t in tiles if t.rows * t.columns <= area)


def choose(p: Conv2dProblem, device: Device) -> Tile:
    """The tile for a problem."""
    return choose_tile(configs_for(p, device), p.N * p.P * p.Q, p.K // p.G, p.G, device)


def plan(p: Conv2dProblem, device: Device, config: Tile | None = None) -> Plan:
    """The launches of a convolution, and of its result's statistics where they are asked for."""
    tile = config or choose(p, device)
    C_group, K_group = p.C // p.G, p.K // p.G
    per_image = p.layout == "NCHW"
    M = p.P * p.Q if per_image else p.N * p.P * p.Q
    tiles_m = ceil_div(M, tile.rows) * (p.N if per_image else 1)
    depth = depth_of(p, tile)
    copy = fills_lines(C_group, p.dtype)
    x = Source("input", p.dtype, p.layout, p.N, p.C, p.H * p.W, copy)
    filter = Source("filter", p.dtype, p.filter_layout, p.K, C_group, p.R * p.S, copy)
    out_n, out_k, _, out_m = strides_of(p.layout, p.K, p.P, p.Q)
    sums = accumulator_of(p.dtype)
    main = Launch(
        conv2d_fprop_kernel,
        (tiles_m * ceil_div(K_group, tile.columns) * p.G,),
        (
            x.pointer,
            filter.pointer,
            *epilogue_pointers(p, "scale", "shift", "residual"),
            Pointer("out", p.dtype),
            *epilogue_pointers(p, "means", "squares"),
            Step(M) if per_image else M,
            *(tiles_m, p.P, p.Q, p.H, p.W, p.K),
            Step(K_group),
            Step(C_group),
            *map(Step, strides_of(x.layout, p.C, p.H, p.W)),
            *map(Step, strides_of(filter.layout, C_group, p.R, p.S)),
            *map(Step, (out_n, out_k, out_m)),
        ),
        {
            "R": p.R,
            "S": p.S,
            "STRIDE_H": p.stride_h,
            "STRIDE_W": p.stride_w,
            "PAD_H": p.pad_h,
            "PAD_W": p.pad_w,
            "DIL_H": p.dil_h,
            "DIL_W": p.dil_w,
            "PER_IMAGE": per_image,
            "FLAT": is_flat(p),
            "WHOLE": C_group % depth == 0,
            **epilogue_constants(p),
            "STATISTICS": p.statistics,
            **tile_constants(p, device, tile, depth),
            "WIDE": is_wide(p),
        },
        **tile.options(device),
    )
    launches = (*x.launches, *filter.launches, main)
    workspace = x.workspace | filter.workspace
    if p.statistics:
        merge, partials = merge_statistics(tiles_m, tile.rows, M, p.N * p.P * p.Q, p.K, sums)
        launches, workspace = (*launches, merge), workspace | partials
    return Plan(launches, workspace)


ROWS = (
    Row("conv2d_igemm_triton_fprop", plan, configs_for, dots=True),
    Row("conv2d_igemm_triton_statistics", plan, configs_for, dots=True),
)
