"""NCHW to NHWC (and filters KCRS to KRSC) ahead of a kernel that reads blocks of channels.

In NCHW a pixel's channels lie H * W elements apart: each would be a load of its own, of 2 bytes in
16-bit types. The copy reads and writes whole lines and costs two passes over a tensor that the
convolution reads many times.
"""

import triton
import triton.language as tl

from fastconv.triton_kernels.plan import Launch, Pointer, Step
from fastconv.triton_kernels.problem import ITEMSIZE, ceil_div

BLOCK = 64  # channels by pixels: 128 bytes in 16 bits, a line, whichever way it is walked


@triton.jit
def to_channels_last_kernel(source, target, C, HW, BLOCK: tl.constexpr, WIDE: tl.constexpr):
    blocks_c = tl.cdiv(C, BLOCK)
    blocks_x = tl.cdiv(HW, BLOCK)
    program = tl.program_id(0)
    n = program // (blocks_c * blocks_x)
    if WIDE:
        n = n.to(tl.int64)
    inside = program % (blocks_c * blocks_x)
    c = inside // blocks_x * BLOCK + tl.arange(0, BLOCK)
    x = inside % blocks_x * BLOCK + tl.arange(0, BLOCK)
    if WIDE:
        c = c.to(tl.int64)
        x = x.to(tl.int64)
    known = (c < C)[:, None] & (x < HW)[None, :]
    image = n * C * HW
    block = tl.load(source + image + c[:, None] * HW + x[None, :], mask=known)
    tl.store(target + image + x[None, :] * C + c[:, None], block, mask=known)


def to_channels_last(name: str, target: str, dtype: str, N: int, C: int, HW: int):
    """The launch that copies N x C x HW into N x HW x C, and the workspace it copies into."""
    elements = N * C * HW
    launch = Launch(
        to_channels_last_kernel,
        (N * ceil_div(C, BLOCK) * ceil_div(HW, BLOCK),),
        (Pointer(name, dtype), Pointer(target, dtype), Step(C), Step(HW)),
        {"BLOCK": BLOCK, "WIDE": elements + C * HW * BLOCK >= 2**31},
    )
    return launch, {target: elements * ITEMSIZE[dtype]}


def fills_lines(channels: int, dtype: str) -> bool:
    """Whether a block of channels that starts at a multiple of `channels` can be read 16 bytes at a
    time, and holds at least two such."""
    return channels * ITEMSIZE[dtype] % 16 == 0 and channels > 8


class Source:
    """A tensor that a kernel reads channels of: as it lies, or copied into channels last first."""

    def __init__(self, name: str, dtype: str, layout: str, N: int, C: int, HW: int, copy: bool):
        self.launches, self.workspace = (), {}
        self.layout, self.pointer = layout, Pointer(name, dtype)
        if HW == 1:
            self.layout = "NHWC"  # the two are the same bytes
        elif copy and layout == "NCHW":
            self.layout, self.pointer = "NHWC", Pointer(f"{name}_channels_last", dtype)
            launch, self.workspace = to_channels_last(name, self.pointer.name, dtype, N, C, HW)
            self.launches = (launch,)
