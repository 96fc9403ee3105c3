"""What happens to a convolution's result between its accumulator and the store, in the order of
csrc/core/epilogue.h: z = scale * total + shift + residual; y = round(activation(z)). And BatchNorm
statistics of y, a tile at a time, while it is still in registers."""

import triton
import triton.language as tl

from fastconv.triton_kernels.plan import Launch, Pointer
from fastconv.triton_kernels.problem import ITEMSIZE, Conv2dProblem, accumulator_of, ceil_div


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """Comparisons are written so that NaN passes through, as torch's activations let it."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "relu6":
        z = tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z < 0, z * SLOPE, z)
    elif ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "hardswish":
        gate = z + 3.0
        gate = tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate))
        z = z * gate / 6.0
    elif ACTIVATION == "sigmoid":
        z = 1.0 / (1.0 + tl.exp(-z))
    return z


@triton.jit
def activation_gradient(grad, z, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """grad * activate'(z). At the kinks as torch's; an infinite gradient ends at a flat piece."""
    if ACTIVATION == "relu":
        grad = tl.where(z <= 0, 0.0, grad)
    elif ACTIVATION == "relu6":
        grad = tl.where((z <= 0) | (z >= 6), 0.0, grad)
    elif ACTIVATION == "leaky_relu":
        grad = tl.where(z > 0, grad, grad * SLOPE)
    elif ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        grad *= s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "hardswish":
        grad = tl.where(z <= -3, 0.0, tl.where(z >= 3, grad, grad * (z / 3.0 + 0.5)))
    elif ACTIVATION == "sigmoid":
        s = 1.0 / (1.0 + tl.exp(-z))
        grad *= s * (1.0 - s)
    return grad


@triton.jit
def scaled(total, scale, shift, k, filters, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """scale * total + shift; `k` are the columns' filters, of which `filters` exist."""
    if SCALE:
        total *= tl.load(scale + k, mask=filters, other=0.0)[None, :]
    if SHIFT:
        total += tl.load(shift + k, mask=filters, other=0.0)[None, :]
    return total


@triton.jit
def finish(
    total,  # rows x columns, in the accumulator's type
    scale,
    shift,
    residual,
    k,  # the columns' filters
    filters,  # which of them exist
    place,  # offsets of the tile's elements in the output, and in the residual
    known,  # which of them exist
    SCALE: tl.constexpr,
    SHIFT: tl.constexpr,
    RESIDUAL: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SLOPE: tl.constexpr,
    OUT: tl.constexpr,
):
    """The tile's elements as they are stored, rounded once."""
    total = scaled(total, scale, shift, k, filters, SCALE, SHIFT)
    if RESIDUAL:
        total += tl.load(residual + place, mask=known, other=0.0).to(total.dtype)
    return activate(total, ACTIVATION, SLOPE).to(OUT)


@triton.jit
def statistics_of_tile(
    y,  # rows x columns, rounded: BatchNorm normalises what was stored
    known,
    count,  # rows that exist
    means,  # tiles x K
    squares,
    tile,
    k,
    filters,
    K,
    ACCUMULATOR: tl.constexpr,
):
    """A tile's mean and sum of squared deviations of each column."""
    y = y.to(ACCUMULATOR)
    mean = tl.sum(tl.where(known, y, 0.0), axis=0) / count.to(ACCUMULATOR)
    away = tl.where(known, y - mean[None, :], 0.0)
    tl.store(means + tile * K + k, mean, mask=filters)
    tl.store(squares + tile * K + k, tl.sum(away * away, axis=0), mask=filters)


@triton.jit
def merge_statistics_kernel(
    means,
    squares,
    mean_out,
    var_out,
    M,
    total_rows,
    tiles,
    K,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """Chan's merge of all tiles at once: the mean of their means, weighted, then their squares and
    what each mean is away from it. Two walks over numbers that are in L2; the order is fixed."""
    k = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    tiles_image = tl.cdiv(M, ROWS)
    total = tl.zeros((TILES, COLUMNS), dtype=ACCUMULATOR)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        known = (tile < tiles)[:, None] & (k < K)[None, :]
        count = tl.minimum(M - tile % tiles_image * ROWS, ROWS).to(ACCUMULATOR)
        mean = tl.load(means + tile[:, None] * K + k[None, :], mask=known, other=0.0)
        total += tl.where(known, mean * count[:, None], 0.0)
    centre = tl.sum(total, axis=0) / total_rows
    total = tl.zeros((TILES, COLUMNS), dtype=ACCUMULATOR)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        known = (tile < tiles)[:, None] & (k < K)[None, :]
        count = tl.minimum(M - tile % tiles_image * ROWS, ROWS).to(ACCUMULATOR)
        mean = tl.load(means + tile[:, None] * K + k[None, :], mask=known, other=0.0)
        away = mean - centre[None, :]
        square = tl.load(squares + tile[:, None] * K + k[None, :], mask=known, other=0.0)
        total += tl.where(known, square + away * away * count[:, None], 0.0)
    tl.store(mean_out + k, centre, mask=k < K)
    tl.store(var_out + k, tl.sum(total, axis=0) / total_rows, mask=k < K)


def epilogue_pointers(p: Conv2dProblem, *names: str) -> tuple[Pointer, ...]:
    """What a kernel that calls `finish` and `statistics_of_tile` reads and writes besides `out`;
    where the problem is without, `out` stands in, which is then not touched."""
    sums = accumulator_of(p.dtype)
    there = {
        "scale": Pointer("scale", sums) if p.scale else None,
        "shift": Pointer("shift", sums) if p.shift else None,
        "residual": Pointer("residual", p.dtype) if p.residual else None,
        "means": Pointer("means", sums) if p.statistics else None,
        "squares": Pointer("squares", sums) if p.statistics else None,
    }
    return tuple(there[name] or Pointer("out", p.dtype) for name in names)


def epilogue_constants(p: Conv2dProblem) -> dict:
    """The constants of a kernel that calls `finish`."""
    return {
        "SCALE": p.scale,
        "SHIFT": p.shift,
        "RESIDUAL": p.residual,
        "ACTIVATION": p.activation,
        "SLOPE": p.slope if p.activation == "leaky_relu" else 0.0,
    }


def merge_statistics(tiles: int, rows: int, M: int, total_rows: int, K: int, sums: str):
    """The launch that merges `tiles` statistics of at most `rows` rows, and the workspace of both.

    Every M rows begin a new tile; there are `total_rows` in all.
    """
    launch = Launch(
        merge_statistics_kernel,
        (ceil_div(K, 32),),
        (
            *(Pointer(name, sums) for name in ("means", "squares", "mean_out", "var_out")),
            *(M, total_rows, tiles, K),
        ),
        {
            "ROWS": rows,
            "TILES": 64,
            "COLUMNS": 32,
            "ACCUMULATOR": tl.float64 if sums == "float64" else tl.float32,
        },
        max_registers=128,  # left alone, ptxas stops at 56 or 96 and spills one
    )
    return launch, {"means": tiles * K * ITEMSIZE[sums], "squares": tiles * K * ITEMSIZE[sums]}
