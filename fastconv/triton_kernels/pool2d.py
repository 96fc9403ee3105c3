"""What the pooling kernels share: how a tensor is cut into tiles, and how large a tile is.

An NCHW tensor is N * C images of one channel in NHWC, so one kernel serves both layouts: a program
takes a tile of pixels x channels, and only a pixel pays for divisions.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastconv.triton_kernels.problem import ITEMSIZE, Device, Pool2dProblem, ceil_div

# --- inside a kernel ------------------------------------------------------------------------------


@triton.jit
def tile_of_program(
    rows,
    columns,
    pixels,
    channel_packs,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PACK: tl.constexpr,
    NHWC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """This program's tile of images of rows x columns pixels.

    Returns the number of channels; of each pixel of the tile its image, row, column and number; of
    each channel its number; and which of pixels x channels exist.
    """
    # A product with PACK, which the compiler sees: loads and stores of 16 bytes. An argument can be
    # known to be a multiple of 16 alone, which 8 channels of 2 bytes are not.
    channels = channel_packs * PACK if NHWC else 1
    channel_tiles = tl.cdiv(channels, CHANNELS)
    program = tl.program_id(0)
    pixel_tile = program // channel_tiles
    if WIDE:
        pixel_tile = pixel_tile.to(tl.int64)
    pixel = pixel_tile * PIXELS + tl.arange(0, PIXELS)
    line = pixel // columns
    image = line // rows
    c = program % channel_tiles * CHANNELS + tl.arange(0, CHANNELS)
    inside = (pixel < pixels)[:, None] & (c < channels)[None, :]
    return channels, image, line - image * rows, pixel - line * columns, pixel, c, inside


@triton.jit
def windows_over(x, pad, count, EXTENT: tl.constexpr, STRIDE: tl.constexpr):
    """First and last + 1 of the windows that cover position x along one axis; numerators stay
    positive, where all divisions agree."""
    begin = tl.maximum(x + (pad + STRIDE - EXTENT), 0) // STRIDE
    end = tl.minimum((x + pad) // STRIDE + 1, count)
    return begin, end


# --- configurations -------------------------------------------------------------------------------


def pack_of(problem: Pool2dProblem) -> int:
    """Channels that are loaded and stored at once: 16 bytes, or one."""
    p = problem
    pack = 16 // ITEMSIZE[p.dtype]
    return pack if p.layout == "NHWC" and p.C % pack == 0 and p.aligned else 1


def has_wide_numbers(problem: Pool2dProblem) -> bool:
    """Whether a pixel's number or an offset passes 32 bits, or a product that bounds an adaptive
    window. The numbers of a tile's pixels that do not exist reach less than 2^16 beyond the last;
    the offsets of what is masked may wrap."""
    p = problem
    products = (p.P + 1) * (p.H + 1), (p.Q + 1) * (p.W + 1)
    return (
        p.N * p.C * max(p.H * p.W, p.P * p.Q) + 2**16 >= 2**31
        or p.kind == "adaptive_average"
        and max(products) >= 2**31
    )


class Config(NamedTuple):
    name: str
    channel_bytes: int  # of neighbouring channels in a tile, NHWC
    thread_packs: int  # packs a thread has: 16 bytes of channels, or else pairs of elements
    num_warps: int
    why: str
    taps: int = 1  # lanes of a tile that share a window

    def elements(self, problem: Pool2dProblem) -> int:
        """Of a tile, with each of a window's taps counted."""
        # Elements that are loaded one by one have an address each, of two registers: 16 of them,
        # as there are in two packs of 16 bits, spill.
        return 32 * self.num_warps * self.thread_packs * max(pack_of(problem), 2)


# Wherever a lane has a window, or a position that windows lie over, of its own.
CONFIGS = (
    Config("large", 128, 2, 4, "a cache line of channels; two packs of each tap on their way"),
    Config("small", 128, 1, 4, "where large tiles would leave SMs of the card without one"),
)


def configs_for(problem: Pool2dProblem, device: Device) -> tuple[Config, ...]:
    # Single elements' addresses and 64-bit positions together: four of each spill.
    spills = pack_of(problem) == 1 and has_wide_numbers(problem)
    return CONFIGS[1:] if spills else CONFIGS


def largest_that_fills(configs, problem: Pool2dProblem, pixels: int, device: Device) -> Config:
    """The first, of falling size, that gives every SM four tiles: 16 of its 64 warps, whose loads
    hide each other's latency."""
    for config in configs:
        if problem.N * problem.C * pixels >= 4 * device.sm_count * config.elements(problem):
            return config
    return configs[-1]


# --- plans ----------------------------------------------------------------------------------------


def is_empty(problem: Pool2dProblem) -> bool:
    """Whether a tensor of the call has no elements: its address is 0, and csrc/torch has the
    answer without a launch."""
    p = problem
    return 0 in (p.N, p.C, p.H, p.W, p.P, p.Q)


class Tiling(NamedTuple):
    """What a launch over images of rows x columns pixels says to tile_of_program."""

    arguments: tuple[int, int]  # pixels, channel_packs
    constants: dict
    grid: tuple[int]


def tiling(problem: Pool2dProblem, rows: int, columns: int, config: Config) -> Tiling:
    p = problem
    nhwc = p.layout == "NHWC"
    channels = p.C if nhwc else 1
    pixels = p.N * rows * columns * (1 if nhwc else p.C)
    elements = config.elements(p) // config.taps
    width = config.channel_bytes // ITEMSIZE[p.dtype]
    CHANNELS = min(triton.next_power_of_2(channels), width, elements)
    PIXELS = elements // CHANNELS
    constants = {
        "PIXELS": PIXELS,
        "CHANNELS": CHANNELS,
        "PACK": pack_of(p),
        "NHWC": nhwc,
        "WIDE": has_wide_numbers(p),
    }
    grid = (ceil_div(pixels, PIXELS) * ceil_div(channels, CHANNELS),)
    return Tiling((pixels, channels // pack_of(p)), constants, grid)
