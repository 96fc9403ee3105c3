"""Sums by channel, as BatchNorm and a bias gradient need them.

Every tensor is seen as outer x channels x inner: in NHWC N * H * W rows of C channels (inner 1), in
NCHW N x C planes of H * W elements. A tile is some rows of a cache line of channels, or some planes
of one channel; either way neighbouring lanes read neighbouring memory, and an offset costs no
division.

A program sums a slice: consecutive tiles of its group of channels, lane by lane in the
accumulator's type, then the lanes in float64. What it leaves, the partials, is joined by a second
kernel in the slices' order, in float64: always the same bits.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from fastconv.triton_kernels.problem import (
    ITEMSIZE,
    BatchNormProblem,
    Conv2dProblem,
    Device,
    ceil_div,
)

# --- inside a kernel ------------------------------------------------------------------------------


@triton.jit
def all_channels(channels, PACK: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """How many there are. The innermost size is told in units of PACK: the product, which the
    compiler sees, makes loads and stores of 16 bytes."""
    return channels * PACK if CHANNELS_LAST else channels


@triton.jit
def tile_at(
    tile,
    first_channel,
    outer,
    channels,
    inner,
    inner_tiles,
    PACK: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    OUTER: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Offsets and mask of a tile, its channels and their mask, and its elements of a channel."""
    outer_tile = tile // inner_tiles
    inner_tile = tile % inner_tiles
    if WIDE:
        outer_tile, inner_tile = outer_tile.to(tl.int64), inner_tile.to(tl.int64)
        inner = inner.to(tl.int64)
    C = all_channels(channels, PACK, CHANNELS_LAST)
    if CHANNELS_LAST:
        plane, first_inner = 1, 0
    else:
        plane, first_inner = inner * PACK, inner_tile * INNER
    first_outer = outer_tile * OUTER
    o = first_outer + tl.arange(0, OUTER)
    c = first_channel + tl.arange(0, CHANNELS)
    i = first_inner + tl.arange(0, INNER)
    line = (o * C)[:, None, None] + c[None, :, None]
    offset = line * plane + i[None, None, :]
    mine = c < C
    inside = ((o < outer)[:, None] & mine[None, :])[:, :, None] & (i < plane)[None, None, :]
    count = tl.minimum(outer - first_outer, OUTER) * tl.minimum(plane - first_inner, INNER)
    return offset, inside, c, mine, count


@triton.jit
def slice_of_program(tiles, groups, per_slice, CHANNELS: tl.constexpr):
    """This program's slice, its first tile and last + 1, and its first channel."""
    program = tl.program_id(0)
    slice = program // groups
    begin = slice * per_slice
    return slice, begin, tl.minimum(begin + per_slice, tiles), program % groups * CHANNELS


@triton.jit
def sum_lanes(lanes):
    """The sum of each channel of a tile."""
    return tl.sum(tl.sum(lanes, 2), 0)


@triton.jit
def sum_slices(partials, c, mine, C, slices, SLICES: tl.constexpr):
    """The sum of each channel `c` over partials of [slice, channel]."""
    lanes = tl.zeros((SLICES, c.shape[0]), tl.float64)
    for first in range(0, slices, SLICES):
        slice = first + tl.arange(0, SLICES)[:, None]
        there = (slice < slices) & mine[None, :]
        lanes += tl.load(partials + slice * C + c[None, :], mask=there, other=0.0)
    return tl.sum(lanes, 0)


# --- configurations -------------------------------------------------------------------------------


class Config(NamedTuple):
    name: str
    channel_bytes: int  # of neighbouring channels in a tile, NHWC
    thread_packs: int  # 16-byte packs a thread has
    num_warps: int
    why: str

    def elements(self, dtype: str) -> int:
        """Of a tile."""
        return 32 * self.num_warps * self.thread_packs * (16 // ITEMSIZE[dtype])


# One serves all sizes: with fewer tiles than SMs a tile takes its latency and little more, and half
# the tile in half the threads would take as long.
CONFIGS = (Config("slab", 128, 4, 8, "64 bytes a thread on their way, a cache line of channels"),)

# 512 programs of 256 threads are 1,000 threads on each of an H200's 132 SMs. A constant, so that
# slices, and with them the bits of their sums, are the same on every card.
PROGRAMS = 512
# BatchNorm reads a slice's first tile twice, the second time from the cache: not all of the data.
SHORTEST_SLICE = 2
# Tiles in a slice, at most: so many additions in float32 lose 2 bits before the rest is in float64.
LONGEST_SLICE = 16
# A tile of the kernels that join the partials: eight float64 for each of their 128 threads.
JOINED_SLICES = 64
JOINED_CHANNELS = 16


def configs_for(problem: BatchNormProblem | Conv2dProblem, device: Device) -> tuple[Config, ...]:
    return CONFIGS


def choose(problem: BatchNormProblem | Conv2dProblem, device: Device) -> Config:
    return configs_for(problem, device)[0]


# --- plans ----------------------------------------------------------------------------------------


class Slices(NamedTuple):
    """How N x C images of H x W are cut into tiles, and these into slices."""

    arguments: tuple[int, int, int, int]  # of tile_at: outer, channels, inner, inner_tiles
    constants: dict  # and its constants
    tiles: int  # of each group of channels
    groups: int
    per_slice: int  # tiles
    count: int


def slices_of(N: int, C: int, H: int, W: int, dtype: str, layout: str, config: Config) -> Slices:
    """Of an image that is not empty."""
    # With one channel, or planes of one element, both views are the same memory: the one with
    # longer contiguous runs is taken.
    channels_last = C > 1 and (layout == "NHWC" or H * W == 1)
    elements = config.elements(dtype)
    pack = 16 // ITEMSIZE[dtype]
    if channels_last:
        outer, inner = N * H * W, 1
        CHANNELS = min(triton.next_power_of_2(C), config.channel_bytes // ITEMSIZE[dtype])
        INNER = 1
        pack = pack if C % pack == 0 else 1
        packed = C // pack, inner
    else:
        outer, inner = (1, N * H * W) if C == 1 else (N, H * W)
        CHANNELS, INNER = 1, min(triton.next_power_of_2(inner), elements)
        pack = pack if inner % pack == 0 else 1
        packed = C, inner // pack
    OUTER = elements // (CHANNELS * INNER)
    outer_tiles, inner_tiles = ceil_div(outer, OUTER), ceil_div(inner, INNER)
    tiles, groups = outer_tiles * inner_tiles, ceil_div(C, CHANNELS)
    per_slice = ceil_div(tiles, ceil_div(PROGRAMS, groups))
    per_slice = min(max(per_slice, SHORTEST_SLICE), LONGEST_SLICE)
    constants = {
        "PACK": pack,
        "CHANNELS_LAST": channels_last,
        "OUTER": OUTER,
        "CHANNELS": CHANNELS,
        "INNER": INNER,
        # What the last tile computes of elements that do not exist counts too.
        "WIDE": (outer_tiles * OUTER * C + CHANNELS) * inner + INNER >= 2**31,
    }
    return Slices(
        (outer, *packed, inner_tiles),
        constants,
        tiles,
        groups,
        per_slice,
        ceil_div(tiles, per_slice),
    )
