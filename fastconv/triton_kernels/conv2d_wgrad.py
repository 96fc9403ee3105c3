"""The filter's gradient as an implicit matrix product, its long sum split between blocks.

    rows     k, a group's filters       columns  (tap, c)
    depth    m = (n, p, q)              N * P * Q of them

    grad  N x K x P x Q       input  N x C x H x W       out  K x C/G x R x S

    out[k, c, r, s] = sum over n, p, q of grad[n, k, p, q] * input[n, c, p * stride - pad + r * dil,
                                                                         q * stride - pad + s * dil]

A block computes one tile of filters by channels of one tap: a step reads a run of pixels of both
tensors, channels contiguous, and multiplies one by the other transposed. Groups of few channels (an
image's three) would leave most of a tile empty: there the columns are taken flat, and every lane
finds its own tap.

There are few tiles and up to millions of pixels, so the pixels are split between blocks. Each
writes its part of the sum; a second launch adds the parts in their order, rounds once, and writes
the filter in its own layout. How many parts there are depends on problem and device alone: the same
call gives the same bits.
"""

import triton
import triton.language as tl

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
from fastconv.triton_kernels.tiles import Tile, dot, tile_constants, walk


@triton.jit
def next_pixels(n, p, q, P, Q, DEPTH: tl.constexpr):
    """The pixels DEPTH further on: two comparisons, where divisions would take longer than the
    products of a step."""
    q += DEPTH % Q
    past = q >= Q
    q = tl.where(past, q - Q, q)
    p += DEPTH // Q % P + past.to(tl.int32)
    past = p >= P
    p = tl.where(past, p - P, p)
    n += DEPTH // (P * Q) + past.to(tl.int32)
    return n, p, q


@triton.jit
def conv2d_wgrad_kernel(
    grad,
    input,
    out,
    M,
    M_split,
    P,
    Q,
    H,
    W,
    R,
    S,
    stride_h,
    stride_w,
    pad_h,
    pad_w,
    dil_h,
    dil_w,
    K_group,
    C_group,
    filter_elements,
    groups,
    grad_n,
    grad_k,
    grad_p,
    grad_q,
    in_n,
    in_c,
    in_h,
    in_w,
    GRAD_LINEAR: tl.constexpr,
    INPUT_LINEAR: tl.constexpr,
    PADDED: tl.constexpr,
    FLAT: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    BAND: tl.constexpr,
    WIDE: tl.constexpr,
):
    filter_row = R * S * C_group
    tiles_k = tl.cdiv(K_group, ROWS)
    tiles_c = tl.cdiv(filter_row if FLAT else C_group, COLUMNS)
    tiles_columns = tiles_c if FLAT else tiles_c * R * S
    # The blocks of one part come together: they share its pixels in L2.
    program = tl.program_id(0)
    tile_k, tile = walk(program % (tiles_k * tiles_columns), tiles_k, tiles_columns, BAND)
    group = program // (tiles_k * tiles_columns) % groups
    split = program // (tiles_k * tiles_columns * groups)
    if WIDE:  # a tensor of 2^31 elements or more
        group = group.to(tl.int64)
        split = split.to(tl.int64)

    k = tile_k * ROWS + tl.arange(0, ROWS)
    c = tile % tiles_c * COLUMNS + tl.arange(0, COLUMNS)
    if FLAT:
        column = c
        columns_known = column < filter_row
        r = column // (S * C_group) * dil_h
        s = column // C_group % S * dil_w
        if WIDE:
            r = r.to(tl.int64)
            s = s.to(tl.int64)
        c = column % C_group
        channels = input + (group * C_group + c) * in_c + r * in_h + s * in_w
        y0 = -pad_h
        x0 = -pad_w
    else:
        tap = tile // tiles_c
        columns_known = c < C_group
        column = tap * C_group + c
        y0 = tap // S * dil_h - pad_h
        x0 = tap % S * dil_w - pad_w
        channels = input + (group * C_group + c) * in_c
    filters = grad + (group * K_group + k) * grad_k

    begin = split * M_split
    end = tl.minimum(begin + M_split, M)
    lane = tl.arange(0, DEPTH)
    n = ((begin + lane) // (P * Q)).to(tl.int32)
    p = ((begin + lane) // Q % P).to(tl.int32)
    q = ((begin + lane) % Q).to(tl.int32)
    total = tl.zeros((ROWS, COLUMNS), dtype=ACCUMULATOR)
    for first in range(begin, end, DEPTH):
        inside = lane < end - first
        image = n.to(tl.int64) if WIDE else n
        if GRAD_LINEAR:
            place = (first + lane) * grad_q
        else:
            place = image * grad_n + p * grad_p + q * grad_q
        read = (k < K_group)[:, None] & inside[None, :]
        dy = tl.load(filters[:, None] + place[None, :], mask=read, other=0.0)
        read = inside[:, None] & columns_known[None, :]
        if INPUT_LINEAR:
            place = (first + lane) * in_w
        else:
            y = p * stride_h + y0
            x = q * stride_w + x0
            row, position = (y.to(tl.int64), x.to(tl.int64)) if WIDE else (y, x)
            place = image * in_n + row * in_h + position * in_w
            if PADDED and FLAT:
                row = y[:, None] + r[None, :]
                position = x[:, None] + s[None, :]
                read &= (row >= 0) & (row < H) & (position >= 0) & (position < W)
            elif PADDED:
                read &= ((y >= 0) & (y < H) & (x >= 0) & (x < W))[:, None]
        pixels = tl.load(channels[None, :] + place[:, None], mask=read, other=0.0)
        total = dot(dy, pixels, total, PRECISION, DEPTH)
        n, p, q = next_pixels(n, p, q, P, Q, DEPTH)

    out += split * filter_elements + group * K_group * filter_row
    tl.store(
        out + k[:, None] * filter_row + column[None, :],
        total.to(out.dtype.element_ty),
        mask=(k < K_group)[:, None] & columns_known[None, :],
    )


@triton.jit
def add_splits_kernel(
    partials,  # splits x K x (R * S) x C/G
    out,
    elements,
    splits,
    taps,
    C_group,
    flt_c,
    flt_tap,
    IN_PLACE: tl.constexpr,
    SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    WIDE: tl.constexpr,
):
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    i = program * LANES + tl.arange(0, LANES)
    total = tl.zeros((SPLITS, LANES), dtype=partials.dtype.element_ty)
    for first in range(0, splits, SPLITS):
        split = first + tl.arange(0, SPLITS)
        known = (split < splits)[:, None] & (i < elements)[None, :]
        total += tl.load(partials + split[:, None] * elements + i[None, :], mask=known, other=0.0)
    place = i
    if not IN_PLACE:
        filter_row = taps * C_group
        tap = i // C_group % taps
        place = i // filter_row * filter_row + tap * flt_tap + i % C_group * flt_c
    tl.store(out + place, tl.sum(total, axis=0).to(out.dtype.element_ty), mask=i < elements)


def add_splits(p: Conv2dProblem, splits: int) -> tuple[Launch, dict[str, int]]:
    """The launch that adds the parts of a filter's gradient, and the workspace they are in."""
    sums = accumulator_of(p.dtype)
    C_group, taps = p.C // p.G, p.R * p.S
    elements = p.K * C_group * taps
    _, flt_c, _, flt_tap = strides_of(p.filter_layout, C_group, p.R, p.S)
    lanes, at_once = 128, 8  # a filter of 64 x 64 x 3 x 3 is 288 blocks; 8 loads a lane under way
    launch = Launch(
        add_splits_kernel,
        (ceil_div(elements, lanes),),
        (
            Pointer("partials", sums),
            Pointer("out", p.dtype),
            Step(elements),
            splits,
            taps,
            Step(C_group),
            *(flt_c, flt_tap),
        ),
        {
            "IN_PLACE": keeps_order(p),
            "SPLITS": at_once,
            "LANES": lanes,
            "WIDE": (splits + at_once) * elements + lanes >= 2**31,
        },
    )
    return launch, {"partials": splits * elements * ITEMSIZE[sums]}


def keeps_order(p: Conv2dProblem) -> bool:
    """Whether (k, tap, c) is the filter's own order."""
    return p.filter_layout == "NHWC" or p.R * p.S == 1 or p.C == p.G


# The columns of a tile are one tap's channels, or a small group's (tap, channel) pairs. Small tiles
# take mma.sync on every card: wgmma has 64 rows.
CONFIGS = (
    Tile(128, 256, 8, 3, 1.0, "85 flops a byte read: 256 channels or more"),
    Tile(128, 128, 8, 3, 0.85, "C/G or K/G of 128, or few tiles"),
    Tile(128, 64, 4, 4, 0.65, "64 channels of a tap"),
    Tile(64, 128, 4, 4, 0.65, "64 filters"),
    Tile(64, 64, 4, 4, 0.5, "most that strict float32 and an image's three channels take"),
    Tile(64, 32, 4, 4, 0.3, "float64; 32 channels"),
    Tile(32, 32, 4, 4, 0.2, "groups of 32"),
    Tile(16, 64, 4, 4, 0.15, "groups of up to 16 filters, 4 or 8 channels, 3x3 taps"),
    Tile(16, 32, 2, 4, 0.1, "groups of up to 16 filters and 32 channels"),
)

WORKSPACE = 64 << 20  # bytes of partial sums, as much as L2 holds on sm_90
PIXELS_SPLIT = 512  # least of a part: 8 steps in 16 bits, of which filling the pipeline takes 3

# In multiply-adds of one SM's tensor cores (2048 a cycle in 16 bits). A partial sum is written and
# read: 8 bytes, of which memory moves 14 a cycle and SM.
PARTIAL = 1200
SECOND_LAUNCH = 5_000_000  # 1.5 us


def is_flat(p: Conv2dProblem) -> bool:
    """Whether a tile's columns hold several taps: of 16 channels half would be empty."""
    return p.C // p.G <= 8


def depth_of(p: Conv2dProblem, tile: Tile) -> int:
    """Pixels in a step."""
    if is_flat(p) or not reads_lines(p):  # every element's address is a register pair
        return max(16, tile.depth(p.dtype) // 2)
    return tile.depth(p.dtype)


def reads_lines(p: Conv2dProblem) -> bool:
    """Whether both tensors are read 16 bytes at a time."""
    lines = fills_lines(p.C // p.G, p.dtype) and fills_lines(p.K // p.G, p.dtype)
    return p.aligned and lines


def configs_for(p: Conv2dProblem, device: Device) -> tuple[Tile, ...]:
    """The table's entries that a problem can have without spilling registers."""
    # mma.sync's operands are in registers
    area = 128 * 256 if device.has_warpgroup_dot else 128 * 128
    scattered = is_flat(p) or not reads_lines(p)  # a register pair for each element's address
    if p.dtype == "float64":
        area = 32 * 32 if scattered else 64 * 32
    elif scattered or (p.dtype == "float32" and not p.tf32):
        area = 64 * 64  # strict: a second accumulator, and each operand in two parts
    return tuple(t for t in CONFIGS if t.rows * t.columns <= area)


def tiles_of(p: Conv2dProblem, tile: Tile) -> int:
    """Tiles of the whole gradient."""
    C_group, taps = p.C // p.G, p.R * p.S
    columns = ceil_div(C_group * taps, tile.columns)
    if not is_flat(p):
        columns = ceil_div(C_group, tile.columns) * taps
    return p.G * ceil_div(p.K // p.G, tile.rows) * columns


def resident(tile: Tile, device: Device) -> int:
    """Blocks on an SM at a time: by shared memory, and no more than 16 warps of 128 registers."""
    stages = tile.stages_within(device.shared_memory)
    blocks = device.shared_memory // ((tile.rows + tile.columns) * 128 * stages)
    return max(1, min(blocks, 16 // tile.num_warps))


def split_pixels(p: Conv2dProblem, tile: Tile, splits: int) -> int:
    """Pixels of a part: whole steps."""
    return ceil_div(ceil_div(p.N * p.P * p.Q, splits), 64) * 64


def expected(p: Conv2dProblem, device: Device, tile: Tile, splits: int) -> float:
    """Waves of blocks, times a block's products over its share of the peak, and the parts' sum."""
    at_once = resident(tile, device)
    waves = ceil_div(tiles_of(p, tile) * splits, device.sm_count * at_once)
    area = tile.rows * tile.columns / tile.share
    time = waves * at_once * area * split_pixels(p, tile, splits)
    if splits > 1:
        partials = splits * p.K * (p.C // p.G) * p.R * p.S
        time += SECOND_LAUNCH + partials * PARTIAL / device.sm_count
    return time


def splits_of(p: Conv2dProblem, device: Device, tile: Tile) -> int:
    """Parts of the sum: what fills one to four waves, whichever is expected to be done first."""
    gradient = p.K * (p.C // p.G) * p.R * p.S * ITEMSIZE[accumulator_of(p.dtype)]
    most = max(1, min(WORKSPACE // gradient, p.N * p.P * p.Q // PIXELS_SPLIT))
    wave = device.sm_count * resident(tile, device)
    filling = {max(1, min(most, waves * wave // tiles_of(p, tile))) for waves in (1, 2, 3, 4)}
    return min(sorted(filling | {1}), key=lambda splits: expected(p, device, tile, splits))


def choose(p: Conv2dProblem, device: Device) -> Tile:
    """The tile for a problem."""
    return min(
        configs_for(p, device),
        key=lambda tile: expected(p, device, tile, splits_of(p, device, tile)),
    )


def plan(p: Conv2dProblem, device: Device, config: Tile | None = None) -> Plan:
    """The launches of the filter's gradient."""
    tile = config or choose(p, device)
    C_group, K_group = p.C // p.G, p.K // p.G
    copy_grad, copy_input = fills_lines(K_group, p.dtype), fills_lines(C_group, p.dtype)
    dy = Source("grad", p.dtype, p.layout, p.N, p.K, p.P * p.Q, copy_grad)
    x = Source("input", p.dtype, p.layout, p.N, p.C, p.H * p.W, copy_input)
    splits = splits_of(p, device, tile)
    M_split = split_pixels(p, tile, splits)
    splits = ceil_div(p.N * p.P * p.Q, M_split)  # rounded up to whole steps, they may be fewer
    # In another order a tile's stores would be single elements: there the second launch sorts them.
    whole = splits == 1 and keeps_order(p)
    padded = p.pad_h > 0 or p.pad_w > 0
    same_pixels = p.R == p.S == p.stride_h == p.stride_w == 1 and not padded
    main = Launch(
        conv2d_wgrad_kernel,
        (tiles_of(p, tile) * splits,),
        (
            dy.pointer,
            x.pointer,
            Pointer("out", p.dtype) if whole else Pointer("partials", accumulator_of(p.dtype)),
            *(p.N * p.P * p.Q, M_split, p.P, p.Q, p.H, p.W, p.R, p.S),
            *(p.stride_h, p.stride_w, p.pad_h, p.pad_w, p.dil_h, p.dil_w),
            Step(K_group),
            Step(C_group),
            Step(p.K * C_group * p.R * p.S),
            p.G,
            *map(Step, strides_of(dy.layout, p.K, p.P, p.Q)),
            *map(Step, strides_of(x.layout, p.C, p.H, p.W)),
        ),
        {
            "GRAD_LINEAR": dy.layout == "NHWC",
            "INPUT_LINEAR": x.layout == "NHWC" and same_pixels,
            "PADDED": padded,
            "FLAT": is_flat(p),
            **tile_constants(p, device, tile, depth_of(p, tile)),
            "WIDE": is_wide(p),
        },
        tile.num_warps,
        tile.stages_within(device.shared_memory),
    )
    launches, workspace = (*dy.launches, *x.launches, main), dy.workspace | x.workspace
    if not whole:
        add, partials = add_splits(p, splits)
        launches, workspace = (*launches, add), workspace | partials
    return Plan(launches, workspace)


ROWS = (Row("conv2d_igemm_triton_wgrad", plan, configs_for, dots=True),)
