"""What a Triton kernel is asked for: csrc/core's problem structs as tuples, and the device.

``csrc/torch/triton.cpp`` hands these tuples over field by field, in this order; a test compares
the two. Layouts are "NCHW" or "NHWC" (of a filter: KCRS or KRSC), always densely packed.
"""

from typing import NamedTuple


class Conv2dProblem(NamedTuple):
    """A convolution, as in ``csrc/core/conv2d_problem.h``."""

    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride_h: int = 1
    stride_w: int = 1
    pad_h: int = 0
    pad_w: int = 0
    dil_h: int = 1
    dil_w: int = 1
    G: int = 1
    dtype: str = "float32"
    layout: str = "NCHW"  # of input and output, and of their gradients
    filter_layout: str = "NCHW"
    tf32: bool = False  # float32 operands may be rounded to TF32
    scale: bool = False  # the epilogue: one factor a filter,
    shift: bool = False  # one summand a filter,
    residual: bool = False  # a tensor like the output,
    activation: str = "none"
    slope: float = 0.01  # of "leaky_relu"
    statistics: bool = False  # mean and biased variance of each channel of the result
    aligned: bool = True  # every pointer of the call is a multiple of 16 bytes

    @property
    def P(self) -> int:
        return (self.H + 2 * self.pad_h - self.dil_h * (self.R - 1) - 1) // self.stride_h + 1

    @property
    def Q(self) -> int:
        return (self.W + 2 * self.pad_w - self.dil_w * (self.S - 1) - 1) // self.stride_w + 1


class Pool2dProblem(NamedTuple):
    """A pooling, as in ``csrc/core/pool2d_problem.h``."""

    kind: str  # "max", "average", "adaptive_average"
    N: int
    C: int
    H: int
    W: int
    P: int
    Q: int
    R: int = 1
    S: int = 1
    stride_h: int = 1
    stride_w: int = 1
    pad_h: int = 0
    pad_w: int = 0
    dil_h: int = 1  # "max" only
    dil_w: int = 1
    count_include_pad: bool = True
    divisor_override: int = 0  # 0: none
    # How the place of each maximum is kept: "none", "uint8" (r * S + s), "int32" (the same for
    # windows of more than 256), "int64" (h * W + w in the input plane).
    index: str = "none"
    dtype: str = "float32"
    layout: str = "NCHW"
    aligned: bool = True


class BatchNormProblem(NamedTuple):
    """A BatchNorm, as in ``csrc/core/batch_norm_problem.h``, and which pointers it comes with."""

    N: int
    C: int
    H: int
    W: int
    eps: float = 1e-5
    training: bool = True
    dtype: str = "float32"
    layout: str = "NCHW"
    activation: str = "none"
    slope: float = 0.01  # of "leaky_relu"
    weight: bool = True  # absent: ones
    bias: bool = True  # absent: zeros
    residual: bool = False  # in backward: to compute the activation's argument again
    output: bool = False  # backward: of forward, to take the activation's derivative from
    out: bool = True  # in backward: whether the input's gradient is wanted
    grad_residual: bool = False  # backward: whether the residual's gradient is wanted
    aligned: bool = True


class Device(NamedTuple):
    """What a plan may depend on, besides its problem."""

    backend: str = "cuda"  # Triton's name: "cuda", "hip"
    arch: int | str = 90  # 80, 90, ...; a name such as "gfx942" on other vendors' cards
    sm_count: int = 132
    shared_memory: int = 232448  # bytes a block may have
    warp_size: int = 32

    @property
    def has_warpgroup_dot(self) -> bool:
        """Whether tl.dot takes its operands from shared memory (wgmma, tcgen05), not from
        registers: sm_120 has TMA and mma.sync."""
        return self.backend == "cuda" and self.arch in (90, 100, 103)

    @property
    def has_tma(self) -> bool:
        return self.backend == "cuda" and self.arch >= 90


# What the interpreter plans for, so that it runs what an H200 would.
INTERPRETED = Device()


ITEMSIZE = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "uint8": 1,
    "int32": 4,
    "int64": 8,
}


def accumulator_of(dtype: str) -> str:
    """What sums are kept in, and what per-channel arrays are made of."""
    return "float64" if dtype == "float64" else "float32"


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def is_wide(p: Conv2dProblem) -> bool:
    """Whether an offset passes 32 bits: of an element of a tensor, or of a place outside that a
    filter's tap would have."""
    rows = max(p.H, p.P) + p.pad_h + p.R * p.dil_h + p.stride_h
    columns = max(p.W, p.Q) + p.pad_w + p.S * p.dil_w + p.stride_w
    activations = (p.N + 1) * rows * columns * max(p.C, p.K)
    return activations + p.K * (p.C // p.G) * p.R * p.S + 2**24 >= 2**31


def strides_of(layout: str, C: int, H: int, W: int) -> tuple[int, int, int, int]:
    """Strides of (N, C, H, W) in a densely packed tensor of that layout."""
    if layout == "NHWC":
        return H * W * C, 1, W * C, C
    return C * H * W, H * W, W, 1
