"""1x1 convolution and, at stride 1, its input's gradient: a matrix product.

    out[b, m, j] = sum over d of source[b, m, d] * matrix[d, j]

             source   m                  d   j   matrix
    fprop    input    pixels (n, p, q)   c   k   the filter, transposed
    dgrad    grad     pixels (n, h, w)   k   c   the filter

In NHWC all pixels of a batch lie behind each other: b is 1 and m runs over N * P * Q. In NCHW b is
the image, and a channel's pixels lie behind each other. Either way a lane reads 16 bytes.

Where the device has TMA (sm_90) and the layout is NHWC, one thread asks for whole blocks, which
arrive in shared memory as the tensor cores read them, with zeros beyond the edges: no addresses in
registers, no masks.
"""

from functools import partial
from typing import NamedTuple

import triton
import triton.language as tl

from fastconv.triton_kernels.epilogue import (
    activate,
    epilogue_constants,
    epilogue_pointers,
    finish,
    merge_statistics,
    scaled,
    statistics_of_tile,
)
from fastconv.triton_kernels.layout import fills_lines
from fastconv.triton_kernels.plan import Descriptor, Launch, Plan, Pointer, Row, Step
from fastconv.triton_kernels.problem import (
    ITEMSIZE,
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
def conv1x1_kernel(
    source,
    matrix,
    scale,
    shift,
    residual,
    out,
    means,
    squares,
    M,
    tiles_m,
    J,
    D,
    P,
    Q,
    src_b,
    src_m,
    src_d,
    src_p,
    src_q,
    mat_j,
    mat_d,
    out_b,
    out_m,
    out_j,
    STRIDED: tl.constexpr,
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
    tile_m, tile_j = walk(tl.program_id(0), tiles_m, tl.cdiv(J, COLUMNS), BAND)
    if WIDE:  # a tensor of 2^31 elements or more
        tile_m = tile_m.to(tl.int64)
    tiles_b = tl.cdiv(M, ROWS)
    b = tile_m // tiles_b
    first_m = tile_m % tiles_b * ROWS
    m = first_m + tl.arange(0, ROWS)
    j = tile_j * COLUMNS + tl.arange(0, COLUMNS)
    d = tl.arange(0, DEPTH)
    if WIDE:  # a channel's offset passes 32 bits where one NCHW image does
        j = j.to(tl.int64)
        d = d.to(tl.int64)
    if STRIDED:  # in NCHW m stays inside image b, in NHWC b is 0
        pixels = (b + m // (P * Q)) * src_b + m // Q % P * src_p + m % Q * src_q
    else:
        pixels = b * src_b + m * src_m
    sources = source + pixels[:, None]
    matrices = matrix + (j * mat_j)[None, :]

    total = tl.zeros((ROWS, COLUMNS), dtype=ACCUMULATOR)
    for first in range(0, D, DEPTH):
        read = (m < M)[:, None]
        known = (j < J)[None, :]
        if not WHOLE:  # the last step is not full
            read &= (first + d < D)[None, :]
            known &= (first + d < D)[:, None]
        x = tl.load(sources + ((first + d) * src_d)[None, :], mask=read, other=0.0)
        y = tl.load(matrices + ((first + d) * mat_d)[:, None], mask=known, other=0.0)
        total = dot(x, y, total, PRECISION, DEPTH)

    columns = j < J
    known = (m < M)[:, None] & columns[None, :]
    place = (b * out_b + m * out_m)[:, None] + (j * out_j)[None, :]
    y = finish(
        total,
        scale,
        shift,
        residual,
        j,
        columns,
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
        statistics_of_tile(y, known, count, means, squares, tile_m, j, columns, J, ACCUMULATOR)


@triton.jit
def conv1x1_tma_kernel(
    source,
    matrix,
    residual,
    out,
    scale,
    shift,
    tiles_m,
    J,
    D,
    TRANSPOSED: tl.constexpr,
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
):
    tile_m, tile_j = walk(tl.program_id(0), tiles_m, tl.cdiv(J, COLUMNS), BAND)
    first_m = tile_m * ROWS
    first_j = tile_j * COLUMNS
    total = tl.zeros((ROWS, COLUMNS), dtype=ACCUMULATOR)
    for first in range(0, D, DEPTH):
        x = source.load([first_m, first])
        if TRANSPOSED:
            y = matrix.load([first_j, first]).T
        else:
            y = matrix.load([first, first_j])
        total = dot(x, y, total, PRECISION, DEPTH)

    j = first_j + tl.arange(0, COLUMNS)
    total = scaled(total, scale, shift, j, j < J, SCALE, SHIFT)
    if RESIDUAL:
        total += residual.load([first_m, first_j]).to(ACCUMULATOR)
    y = activate(total, ACTIVATION, SLOPE)
    out.store([first_m, first_j], y.to(out.dtype))


class Product(NamedTuple):
    """The matrix product that a direction is."""

    source: str  # pointers' names
    D: int
    J: int
    transposed: bool  # the filter holds matrix[d, j] at (j, d), not at (d, j)


FPROP, DGRAD = "fprop", "dgrad"


def product_of(p: Conv2dProblem, direction: str) -> Product:
    if direction == FPROP:
        return Product("input", p.C, p.K, True)
    return Product("grad", p.K, p.C, False)


def choose_from(tiles, p: Conv2dProblem, product: Product, device: Device) -> Tile:
    return choose_tile(tiles, p.N * p.P * p.Q, product.J, 1, device)


# --- by addresses ---------------------------------------------------------------------------------


def is_scattered(p: Conv2dProblem) -> bool:
    """Whether lanes read single elements, each by an address of its own: a register pair."""
    lines = fills_lines(p.C, p.dtype) and fills_lines(p.K, p.dtype)
    if p.layout == "NCHW":
        lines = fills_lines(p.H * p.W, p.dtype) and p.stride_h == p.stride_w == 1
    return not lines or not p.aligned


def configs_for(p: Conv2dProblem, device: Device) -> tuple[Tile, ...]:
    """The table's entries that a problem can have without spilling registers."""
    # mma.sync's operands are in registers
    area = 128 * 256 if device.has_warpgroup_dot else 128 * 128
    if p.statistics or p.residual:
        area = 128 * 128
    if is_scattered(p):
        area = 64 * 64
    return tuple(t for t in tiles_for(p.dtype, p.tf32) if t.rows * t.columns <= area)


def plan(p: Conv2dProblem, device: Device, config: Tile | None = None, *, direction: str) -> Plan:
    """The launches of one direction, and of the result's statistics where they are asked for."""
    product = product_of(p, direction)
    tile = config or choose_from(configs_for(p, device), p, product, device)
    per_image = p.layout == "NCHW"
    M = p.P * p.Q * (1 if per_image else p.N)
    tiles_m = ceil_div(M, tile.rows) * (p.N if per_image else 1)
    depth = step_depth(product.D, tile, p.dtype, is_scattered(p))
    src_n, src_d, src_h, src_w = strides_of(p.layout, product.D, p.H, p.W)
    out_n, out_j, _, out_m = strides_of(p.layout, product.J, p.P, p.Q)
    sums = accumulator_of(p.dtype)
    main = Launch(
        conv1x1_kernel,
        (tiles_m * ceil_div(product.J, tile.columns),),
        (
            Pointer(product.source, p.dtype),
            Pointer("filter", p.dtype),
            *epilogue_pointers(p, "scale", "shift", "residual"),
            Pointer("out", p.dtype),
            *epilogue_pointers(p, "means", "squares"),
            Step(M) if per_image else M,
            tiles_m,
            Step(product.J),
            Step(product.D),
            *(p.P, p.Q),
            *map(Step, (src_n, src_w, src_d, p.stride_h * src_h, p.stride_w * src_w)),
            *map(Step, (product.D, 1) if product.transposed else (1, product.J)),
            *map(Step, (out_n, out_m, out_j)),
        ),
        {
            "STRIDED": p.stride_h > 1 or p.stride_w > 1,
            "WHOLE": product.D % depth == 0,
            **epilogue_constants(p),
            "STATISTICS": p.statistics,
            **tile_constants(p, device, tile, depth),
            "WIDE": is_wide(p),
        },
        **tile.options(device),
    )
    if not p.statistics:
        return Plan((main,))
    merge, partials = merge_statistics(tiles_m, tile.rows, M, p.N * p.P * p.Q, product.J, sums)
    return Plan((main, merge), partials)


# --- by TMA ---------------------------------------------------------------------------------------


def tma_configs_for(p: Conv2dProblem, device: Device) -> tuple[Tile, ...]:
    """The table's entries that fit; a result goes out, and a residual comes in, by way of shared
    memory."""
    area = 128 * 256 if device.has_warpgroup_dot and not p.residual else 128 * 128
    area = min(area, device.shared_memory // ITEMSIZE[p.dtype])
    return tuple(t for t in tiles_for(p.dtype, p.tf32) if t.rows * t.columns <= area)


def tma_plan(
    p: Conv2dProblem, device: Device, config: Tile | None = None, *, direction: str
) -> Plan:
    """The one launch of a direction whose tensors TMA takes: NHWC, stride 1, rows of a multiple
    of 16 bytes. A call whose pointers are not such multiples goes by addresses."""
    if not p.aligned:
        return plan(p, device, direction=direction)
    product = product_of(p, direction)
    tile = config or choose_from(tma_configs_for(p, device), p, product, device)
    M = p.N * p.P * p.Q
    tiles_m = ceil_div(M, tile.rows)
    depth = step_depth(product.D, tile, p.dtype, is_scattered(p))

    def rows_of(name: str, rows: int, columns: int, block: tuple[int, int]) -> Descriptor:
        return Descriptor(name, p.dtype, (rows, columns), (columns, 1), block)

    out = rows_of("out", M, product.J, (tile.rows, tile.columns))
    block = (tile.columns, depth) if product.transposed else (depth, tile.columns)
    launch = Launch(
        conv1x1_tma_kernel,
        (tiles_m * ceil_div(product.J, tile.columns),),
        (
            rows_of(product.source, M, product.D, (tile.rows, depth)),
            rows_of("filter", p.K, p.C, block),
            out._replace(name="residual") if p.residual else out,
            out,
            *epilogue_pointers(p, "scale", "shift"),
            tiles_m,
            Step(product.J),
            Step(product.D),
        ),
        {
            "TRANSPOSED": product.transposed,
            **epilogue_constants(p),
            **tile_constants(p, device, tile, depth),
        },
        **tile.options(device),
    )
    return Plan((launch,))


ROWS = (
    Row("conv1x1_tma_triton_sm90_fprop", partial(tma_plan, direction=FPROP), tma_configs_for, True),
    Row("conv1x1_tma_triton_sm90_dgrad", partial(tma_plan, direction=DGRAD), tma_configs_for, True),
    Row("conv1x1_triton_fprop", partial(plan, direction=FPROP), configs_for, dots=True),
    Row("conv1x1_triton_dgrad", partial(plan, direction=DGRAD), configs_for, dots=True),
    Row("conv1x1_triton_statistics", partial(plan, direction=FPROP), configs_for, dots=True),
)
