"""What the kernels that multiply matrices have in common: how large a tile is, how precisely it
multiplies, and the order in which a grid walks the tiles."""

from typing import NamedTuple

import triton
import triton.language as tl

from fastconv.triton_kernels.problem import (
    ITEMSIZE,
    Conv2dProblem,
    Device,
    accumulator_of,
    ceil_div,
)

BAND = 8  # rows of tiles that share their filters in L2


class Tile(NamedTuple):
    """One entry of a table of configurations: rows by columns of a block's accumulator."""

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    # Of the tensor cores' rate, what the main loop of a full wave of such tiles is expected to
    # reach. Estimates: only their order matters, for choosing.
    share: float
    why: str

    def depth(self, dtype: str) -> int:
        """Elements of the reduction in a stage: 128 bytes, one line of shared memory's widest
        swizzle and of the L1 cache."""
        return 128 // ITEMSIZE[dtype]

    def stages_within(self, shared_memory: int) -> int:
        """num_stages, or as many as a smaller card's shared memory holds."""
        stage = (self.rows + self.columns) * 128
        return max(1, min(self.num_stages, shared_memory // stage))

    def options(self, device: Device) -> dict:
        """A launch's warps, stages and registers."""
        return {
            "num_warps": self.num_warps,
            "num_stages": self.stages_within(device.shared_memory),
            # mma.sync's operands pass through registers. Left alone, ptxas aims at three blocks of
            # 168 registers on an SM and spills a few; shared memory holds two.
            "max_registers": None if device.has_warpgroup_dot else 255,
        }


# Of falling size. A tile reads (rows + columns) and computes rows * columns: the larger, the more
# often what was read is used; the smaller, the more blocks there are to share 132 SMs.
TILES = (
    Tile(128, 256, 8, 3, 1.0, "85 flops a byte read: the only one above Hopper's ridge in 16 bits"),
    Tile(128, 128, 8, 4, 0.85, "half the columns: K <= 128, or too few tiles of the first"),
    Tile(128, 64, 4, 4, 0.7, "K <= 64; reads the input once as the larger ones do"),
    Tile(64, 128, 4, 4, 0.65, "few rows: 7x7 planes of a small batch"),
    Tile(64, 64, 4, 4, 0.5, "four times the blocks of 128x128; fits strict float32 and float64"),
    Tile(64, 32, 4, 4, 0.3, "K <= 32"),
    Tile(64, 16, 4, 4, 0.15, "K <= 16: groups of a few channels; 16 is the least tl.dot takes"),
)


def tiles_for(dtype: str, tf32: bool) -> tuple[Tile, ...]:
    """The table's entries whose accumulators and operands fit the registers."""
    area = 128 * 256
    if dtype == "float64":
        area = 64 * 32
    elif dtype == "float32" and not tf32:
        area = 64 * 64  # a second accumulator, and each operand in two parts: see `dot`
    return tuple(t for t in TILES if t.rows * t.columns <= area)


def choose_tile(tiles, rows: int, columns: int, batches: int, device: Device) -> Tile:
    """The entry with the least expected time for `batches` products of rows x columns: waves of
    blocks, times a block's area, over its share of the peak."""

    def expected(tile: Tile) -> float:
        blocks = ceil_div(rows, tile.rows) * ceil_div(columns, tile.columns) * batches
        # Two blocks of at most 96 KiB are on an SM at a time.
        resident = max(1, device.shared_memory // ((tile.rows + tile.columns) * 128 * 4))
        waves = ceil_div(blocks, device.sm_count * resident)
        return waves * resident * tile.rows * tile.columns / tile.share

    return min(tiles, key=expected)


def precision(dtype: str, tf32: bool, device: Device) -> str:
    """tl.dot's input_precision. Strict float32 on NVIDIA's tensor cores takes three TF32 products,
    whose error is float32's; elsewhere, and for other dtypes, "ieee"."""
    if dtype != "float32" or device.backend != "cuda":
        return "ieee"
    return "tf32" if tf32 else "tf32x3"


def step_depth(there: int, tile: Tile, dtype: str, scattered: bool) -> int:
    """Elements of a reduction over `there` in a step: no more than there are, and no less than
    tl.dot takes. `scattered`: each lane reads single elements, by addresses of its own."""
    most = 32 if scattered else tile.depth(dtype)
    return max(16, min(most, triton.next_power_of_2(there)))


def tile_constants(p: Conv2dProblem, device: Device, tile: Tile, depth: int) -> dict:
    """The constants of a kernel that calls `dot` and `walk`."""
    return {
        "PRECISION": precision(p.dtype, p.tf32, device),
        "ACCUMULATOR": accumulator(p.dtype),
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": depth,
        "BAND": BAND,
    }


def accumulator(dtype: str) -> tl.dtype:
    return tl.float64 if accumulator_of(dtype) == "float64" else tl.float32


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr, DEPTH: tl.constexpr):
    """total + a @ b. Tensor cores may truncate where they add up: strict float32 leaves them one
    step of the reduction and adds the steps by plain float32 additions, which the compiler would
    fold back into the dot but for max_num_imprecise_acc."""
    if PRECISION == "tf32x3":
        step = tl.dot(
            a,
            b,
            input_precision=PRECISION,
            max_num_imprecise_acc=DEPTH,
            out_dtype=total.dtype,
        )
        return total + step
    else:
        return tl.dot(a, b, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def walk(tile, rows, columns, BAND: tl.constexpr):
    """(row, column) of a tile's number: BAND rows of tiles are walked column by column, so that
    the blocks that run together share both operands in L2."""
    band = tile // (BAND * columns)
    first = band * BAND
    height = tl.minimum(rows - first, BAND)
    inside = tile % (BAND * columns)
    return first + inside % height, inside // height
