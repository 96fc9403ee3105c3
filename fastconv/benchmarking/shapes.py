"""Shapes that tests and benchmarks share: the layers of every network, and the edges of geometry.

`network(name)` walks a network once and lists its convolutions, poolings and batch norms in order,
equal layers merged with a `count`, so that a benchmark can weigh a layer by how often it runs.
`CONV_EDGES` and `POOL_EDGES` are small problems at the borders of what a kernel may meet: tests run
all of them on every row of the kernel table. Letters are CUTLASS's: N C H W, K R S, P Q.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

Pair = tuple[int, int]


def _extent(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


@dataclass(frozen=True)
class ConvShape:
    """One convolution; `count` says how often the network holds it."""

    name: str
    N: int
    C: int
    H: int
    W: int
    K: int
    R: int
    S: int
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    groups: int = 1
    count: int = 1

    @property
    def P(self) -> int:
        return _extent(self.H, self.R, self.stride[0], self.padding[0], self.dilation[0])

    @property
    def Q(self) -> int:
        return _extent(self.W, self.S, self.stride[1], self.padding[1], self.dilation[1])

    @property
    def input(self) -> tuple[int, int, int, int]:
        return (self.N, self.C, self.H, self.W)

    @property
    def weight(self) -> tuple[int, int, int, int]:
        return (self.K, self.C // self.groups, self.R, self.S)

    @property
    def output(self) -> tuple[int, int, int, int]:
        return (self.N, self.K, self.P, self.Q)

    @property
    def options(self) -> dict:
        """The keyword arguments of functional.conv2d."""
        return {
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": self.groups,
        }

    @property
    def flops(self) -> int:
        """Multiplications and additions of one call, the padding's included."""
        return 2 * self.N * self.K * self.P * self.Q * (self.C // self.groups) * self.R * self.S

    def with_batch(self, N: int) -> ConvShape:
        return replace(self, N=N)


@dataclass(frozen=True)
class PoolShape:
    """One pooling; `kind` is "max", "avg" or "adaptive_avg" (then `kernel` is the output size)."""

    name: str
    kind: str
    N: int
    C: int
    H: int
    W: int
    kernel: Pair
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: bool = False
    count: int = 1

    @property
    def input(self) -> tuple[int, int, int, int]:
        return (self.N, self.C, self.H, self.W)

    @property
    def options(self) -> dict:
        """The arguments of functional.{max,avg,adaptive_avg}_pool2d after the input."""
        if self.kind == "adaptive_avg":
            return {"output_size": self.kernel}
        options = {
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "ceil_mode": self.ceil_mode,
        }
        return options | {"dilation": self.dilation} if self.kind == "max" else options

    def with_batch(self, N: int) -> PoolShape:
        return replace(self, N=N)


@dataclass(frozen=True)
class NormShape:
    name: str
    N: int
    C: int
    H: int
    W: int
    count: int = 1

    @property
    def input(self) -> tuple[int, int, int, int]:
        return (self.N, self.C, self.H, self.W)

    def with_batch(self, N: int) -> NormShape:
        return replace(self, N=N)


def _pair(value: int | Pair) -> Pair:
    return (value, value) if isinstance(value, int) else value


def _merged(layers: list) -> list:
    """Equal layers become one, named as the first of them, with the sum of their counts."""
    seen: dict = {}
    for layer in layers:
        key = replace(layer, name="", count=1)
        known = seen.get(key)
        seen[key] = replace(known, count=known.count + layer.count) if known else layer
    return list(seen.values())


@dataclass
class Network:
    """A walk through a network: each method takes the current C, H, W one layer further."""

    name: str
    C: int
    H: int
    W: int
    N: int = 1
    batch_norm: bool = False
    convs: list[ConvShape] = field(default_factory=list)
    pools: list[PoolShape] = field(default_factory=list)
    norms: list[NormShape] = field(default_factory=list)

    def conv(self, name: str, K: int, kernel, stride=1, padding=0, groups=1) -> Network:
        R, S = _pair(kernel)
        layer = ConvShape(
            *(name, self.N, self.C, self.H, self.W, K, R, S, _pair(stride), _pair(padding)),
            groups=groups,
        )
        self.convs.append(layer)
        self.C, self.H, self.W = K, layer.P, layer.Q
        if self.batch_norm:
            self.norms.append(NormShape(f"{name}.bn", self.N, self.C, self.H, self.W))
        return self

    def pool(self, name: str, kernel, stride, padding=0, kind="max", ceil_mode=False) -> Network:
        kernel, stride, padding = _pair(kernel), _pair(stride), _pair(padding)
        self.pools.append(
            PoolShape(
                *(name, kind, self.N, self.C, self.H, self.W, kernel, stride, padding),
                ceil_mode=ceil_mode,
            )
        )
        self.H, self.W = (
            _ceil_extent(size, k, s, p) if ceil_mode else _extent(size, k, s, p, 1)
            for size, k, s, p in zip((self.H, self.W), kernel, stride, padding, strict=True)
        )
        return self

    def adaptive_pool(self, name: str, size) -> Network:
        size = _pair(size)
        self.pools.append(PoolShape(name, "adaptive_avg", self.N, self.C, self.H, self.W, size))
        self.H, self.W = size
        return self

    def merged(self) -> Network:
        self.convs, self.pools, self.norms = map(_merged, (self.convs, self.pools, self.norms))
        return self

    @property
    def flops(self) -> int:
        """Of all convolutions; the linear layers are torch's."""
        return sum(layer.flops * layer.count for layer in self.convs)


def _ceil_extent(size: int, kernel: int, stride: int, padding: int) -> int:
    out = -(-(size + 2 * padding - kernel) // stride) + 1
    # A last window that would start in the right padding is dropped.
    return out - 1 if (out - 1) * stride >= size + padding else out


def _simple_cnn(N: int) -> Network:
    return Network("simple_cnn", 1, 28, 28, N).conv("conv", 16, 3, padding=1)


def _mnist_cnn(N: int) -> Network:
    net = Network("mnist_cnn", 1, 28, 28, N)
    net.conv("conv1", 32, 3, padding=1).pool("pool1", 2, 2)
    return net.conv("conv2", 64, 3, padding=1).pool("pool2", 2, 2)


def _fashion_cnn(N: int) -> Network:
    net = Network("fashion_cnn", 1, 32, 32, N)
    net.conv("conv1", 16, 3, padding=1).pool("pool1", 2, 2)
    return net.conv("conv2", 32, 3, padding=1).pool("pool2", 2, 2)


def _lenet5(N: int) -> Network:
    net = Network("lenet5", 1, 28, 28, N)
    net.conv("conv1", 6, 5, padding=2).pool("pool1", 2, 2)
    return net.conv("conv2", 16, 5).pool("pool2", 2, 2)


def _alexnet(N: int) -> Network:
    net = Network("alexnet", 3, 224, 224, N)
    net.conv("conv1", 64, 11, stride=4, padding=2).pool("pool1", 3, 2)
    net.conv("conv2", 192, 5, padding=2).pool("pool2", 3, 2)
    for i, K in enumerate((384, 256, 256), start=3):
        net.conv(f"conv{i}", K, 3, padding=1)
    return net.pool("pool5", 3, 2).adaptive_pool("avgpool", 6)


# Filters of each 3x3 layer, stage by stage: configurations A, B, D and E of the paper.
_VGG_STAGES = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}


def _vgg(name: str, N: int, batch_norm: bool = False) -> Network:
    net = Network(f"{name}_bn" if batch_norm else name, 3, 224, 224, N, batch_norm)
    for stage, (depth, K) in enumerate(
        zip(_VGG_STAGES[name], (64, 128, 256, 512, 512), strict=True), start=1
    ):
        for i in range(1, depth + 1):
            net.conv(f"conv{stage}_{i}", K, 3, padding=1)
        net.pool(f"pool{stage}", 2, 2)
    return net.adaptive_pool("avgpool", 7)


# 1x1; 1x1 then 3x3; 1x1 then (torchvision's) 3x3; pooling then 1x1.
_INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32),
    "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64),
    "4b": (160, 112, 224, 24, 64, 64),
    "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64),
    "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128),
    "5b": (384, 192, 384, 48, 128, 128),
}


def _inception(net: Network, name: str) -> None:
    one, red3, three, red5, five, pooled = _INCEPTIONS[name]
    C = net.C

    def branch(suffix: str) -> str:
        net.C = C
        return f"{name}.{suffix}"

    net.conv(branch("1x1"), one, 1)
    net.conv(branch("3x3_reduce"), red3, 1).conv(f"{name}.3x3", three, 3, padding=1)
    net.conv(branch("5x5_reduce"), red5, 1).conv(f"{name}.5x5", five, 3, padding=1)
    net.pool(branch("pool"), 3, 1, 1, ceil_mode=True).conv(f"{name}.pool_proj", pooled, 1)
    net.C = one + three + five + pooled


def _googlenet(N: int) -> Network:
    """torchvision's: BatchNorm, and 3x3 where the paper has 5x5. Without auxiliary classifiers."""
    net = Network("googlenet", 3, 224, 224, N, batch_norm=True)
    net.conv("conv1", 64, 7, 2, 3).pool("pool1", 3, 2, ceil_mode=True)
    net.conv("conv2", 64, 1).conv("conv3", 192, 3, padding=1).pool("pool2", 3, 2, ceil_mode=True)
    for name in _INCEPTIONS:
        _inception(net, name)
        if name == "3b":
            net.pool("pool3", 3, 2, ceil_mode=True)
        elif name == "4e":
            net.pool("pool4", 2, 2, ceil_mode=True)
    return net.adaptive_pool("avgpool", 1)


_RESNET_DEPTHS = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
    "resnext50": (3, 4, 6, 3),
}


def _resnet(name: str, N: int) -> Network:
    """Stride on the 3x3 of a bottleneck, as torchvision has it. ResNeXt-50 (32x4d): that 3x3 is
    twice as wide, in 32 groups."""
    basic = name in ("resnet18", "resnet34")
    wider, groups = (2, 32) if name.startswith("resnext") else (1, 1)
    net = Network(name, 3, 224, 224, N, batch_norm=True)
    net.conv("stem", 64, 7, 2, 3).pool("pool", 3, 2, 1)
    for stage, depth in enumerate(_RESNET_DEPTHS[name], start=1):
        width = 64 * 2 ** (stage - 1)
        for block in range(depth):
            stride = 2 if stage > 1 and block == 0 else 1
            entry = (net.C, net.H, net.W)
            if basic:
                net.conv(f"layer{stage}.conv1", width, 3, stride, 1)
                net.conv(f"layer{stage}.conv2", width, 3, 1, 1)
            else:
                net.conv(f"layer{stage}.conv1", wider * width, 1)
                net.conv(f"layer{stage}.conv2", wider * width, 3, stride, 1, groups)
                net.conv(f"layer{stage}.conv3", 4 * width, 1)
            if stride != 1 or entry[0] != net.C:
                K, (net.C, net.H, net.W) = net.C, entry
                net.conv(f"layer{stage}.downsample", K, 1, stride)
    return net.adaptive_pool("avgpool", 1)


# Expansion, filters, blocks and first stride of each stage.
_MOBILENET_STAGES = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)


def _mobilenet_v2(N: int) -> Network:
    """Inverted residuals: 1x1 to many channels, depthwise 3x3, 1x1 back to few."""
    net = Network("mobilenet_v2", 3, 224, 224, N, batch_norm=True).conv("stem", 32, 3, 2, 1)
    for stage, (expansion, K, depth, first_stride) in enumerate(_MOBILENET_STAGES, start=1):
        for block in range(depth):
            wide = expansion * net.C
            if expansion != 1:
                net.conv(f"stage{stage}.expand", wide, 1)
            stride = first_stride if block == 0 else 1
            net.conv(f"stage{stage}.depthwise", wide, 3, stride, 1, groups=wide)
            net.conv(f"stage{stage}.project", K, 1)
    return net.conv("head", 1280, 1).adaptive_pool("avgpool", 1)


NETWORKS: dict[str, Callable[[int], Network]] = {
    "simple_cnn": _simple_cnn,
    "mnist_cnn": _mnist_cnn,
    "fashion_cnn": _fashion_cnn,
    "lenet5": _lenet5,
    "alexnet": _alexnet,
    **{name: lambda N, name=name: _vgg(name, N) for name in _VGG_STAGES},
    **{f"{name}_bn": lambda N, name=name: _vgg(name, N, True) for name in _VGG_STAGES},
    "googlenet": _googlenet,
    **{name: lambda N, name=name: _resnet(name, N) for name in _RESNET_DEPTHS},
    "mobilenet_v2": _mobilenet_v2,
}


def network(name: str, batch: int = 1) -> Network:
    """The layers of the network called `name` for a batch of `batch` images, equal ones merged."""
    if name not in NETWORKS:
        raise ValueError(f"no network {name!r}; there are {', '.join(NETWORKS)}")
    return NETWORKS[name](batch).merged()


def _edge(name: str, N, C, H, W, K, kernel, stride=1, padding=0, dilation=1, groups=1) -> ConvShape:
    R, S = _pair(kernel)
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    return ConvShape(name, N, C, H, W, K, R, S, stride, padding, dilation, groups)


# Small enough for a slow reference, odd enough to reach every remainder loop: channels around the
# vector lengths 4, 8 and 16 and their multiples, rows and columns that end in mid-tile, borders
# that no tap reaches, and sizes of zero and one.
CONV_EDGES: tuple[ConvShape, ...] = (
    _edge("3x3", 2, 16, 9, 10, 16, 3, padding=1),
    _edge("3x3 no padding", 1, 8, 7, 6, 8, 3),
    _edge("3x3 odd channels", 3, 5, 8, 9, 7, 3, padding=1),
    _edge("one channel", 2, 1, 12, 11, 6, 5, padding=2),
    _edge("three channels, stem", 1, 3, 23, 21, 16, 7, 2, 3),
    _edge("three channels, AlexNet stem", 1, 3, 31, 27, 9, 11, 4, 2),
    _edge("17 to 33 channels", 1, 17, 6, 7, 33, 3, padding=1),
    _edge("64 to 64 channels, 3x3", 1, 64, 5, 6, 64, 3, padding=1),
    _edge("64 to 65 channels, 1x1", 1, 64, 5, 7, 65, 1),
    _edge("wide rows", 1, 4, 3, 70, 5, 3, padding=1),
    _edge("one filter", 2, 6, 6, 6, 1, 3, padding=1),
    _edge("1x1", 2, 16, 6, 5, 24, 1),
    _edge("1x1 odd channels", 3, 7, 5, 5, 3, 1),
    _edge("1x1 stride 2", 1, 16, 7, 8, 8, 1, 2),
    _edge("1x1 padding 1", 1, 4, 5, 5, 4, 1, 1, 1),
    _edge("1x1 stride beyond the input", 1, 3, 4, 4, 5, 1, 7),
    _edge("1xN", 1, 5, 6, 12, 6, (1, 7), 1, (0, 3)),
    _edge("Nx1", 1, 5, 12, 6, 6, (7, 1), 1, (3, 0)),
    _edge("2x2 stride 2", 2, 6, 9, 7, 10, 2, 2),
    _edge("even 4x4", 1, 3, 9, 9, 4, 4, 1, 2),
    _edge("2x3", 1, 4, 8, 9, 6, (2, 3), (2, 1), (0, 1)),
    _edge("stride 2", 2, 8, 9, 8, 12, 3, 2, 1),
    _edge("stride 3 by 2", 1, 4, 11, 9, 5, 3, (3, 2), 1),
    _edge("stride beyond the window", 1, 4, 13, 12, 6, 2, 5, 1),
    _edge("padding beyond the window", 1, 3, 4, 5, 4, 3, 1, 4),
    _edge("padding 5 by 0, stride 2", 1, 4, 4, 9, 3, 3, 2, (5, 0)),
    _edge("dilation 2", 1, 8, 11, 10, 9, 3, 1, 2, 2),
    _edge("dilation 3 by 1, stride 1 by 2", 1, 4, 12, 9, 6, 3, (1, 2), (2, 1), (3, 1)),
    _edge("dilation beyond the input, padded", 1, 3, 3, 3, 4, 3, 1, 6, 5),
    _edge("two groups", 2, 8, 7, 7, 12, 3, padding=1, groups=2),
    _edge("three groups, odd", 1, 9, 6, 7, 15, 3, 2, 1, groups=3),
    _edge("two groups of 9", 2, 18, 7, 9, 32, 3, 3, 1, groups=2),
    _edge("32 groups of 4", 1, 128, 5, 5, 128, 3, padding=1, groups=32),
    _edge("groups, 1x1", 1, 12, 5, 6, 18, 1, groups=6),
    _edge("groups, dilation, stride", 1, 6, 11, 9, 4, 3, 2, 2, 2, 2),
    _edge("depthwise", 2, 20, 8, 9, 20, 3, padding=1, groups=20),
    _edge("depthwise 64", 1, 64, 6, 5, 64, 3, 2, 1, groups=64),
    _edge("depthwise 5x5 dilation", 1, 5, 12, 11, 5, 5, 1, 4, 2, groups=5),
    _edge("depthwise, multiplier 3", 1, 7, 7, 6, 21, 3, padding=1, groups=7),
    _edge("depthwise 31x31", 1, 3, 12, 13, 3, 31, 1, 15, groups=3),
    _edge("one pixel", 1, 16, 1, 1, 16, 1),
    _edge("one pixel, 3x3 padded", 2, 8, 1, 1, 8, 3, padding=1),
    _edge("window of the input's size", 2, 6, 5, 4, 10, (5, 4)),
    _edge("input smaller than the window", 1, 4, 2, 3, 5, 5, 1, 2),
    _edge("one column", 1, 5, 9, 1, 7, 3, 1, 1),
    _edge("one row", 1, 5, 1, 9, 7, 3, 2, 1),
    _edge("large batch", 33, 2, 3, 3, 3, 2),
    _edge("empty batch", 0, 4, 6, 6, 5, 3, padding=1),
)


def _pool_edge(name, C, H, W, kernel, stride=None, padding=0, dilation=1, ceil=False, N=2):
    kernel = _pair(kernel)
    stride = kernel if stride is None else _pair(stride)
    return PoolShape(
        *(name, "max", N, C, H, W, kernel, stride, _pair(padding), _pair(dilation), ceil)
    )


# `kind` is "max"; tests of average pooling reuse those without dilation.
POOL_EDGES: tuple[PoolShape, ...] = (
    _pool_edge("2x2", 6, 8, 8, 2),
    _pool_edge("2x2 odd input", 5, 7, 9, 2),
    _pool_edge("2x2 ceil", 5, 7, 9, 2, ceil=True),
    _pool_edge("3x3 stride 2 padding 1", 16, 11, 12, 3, 2, 1),
    _pool_edge("3x3 stride 2", 17, 13, 13, 3, 2),
    _pool_edge("3x3 stride 2 ceil", 33, 12, 14, 3, 2, ceil=True),
    _pool_edge("3x3 stride 1 padding 1", 8, 6, 7, 3, 1, 1),
    _pool_edge("3x3 stride 3 padding 1 ceil", 3, 8, 7, 3, 3, 1, ceil=True),
    _pool_edge("2x3 stride 1 by 2", 4, 9, 8, (2, 3), (1, 2), (1, 0)),
    _pool_edge("1x1 stride 2", 4, 5, 5, 1, 2),
    _pool_edge("1x4", 3, 4, 9, (1, 4), (1, 3)),
    _pool_edge("stride beyond the window", 3, 11, 11, 2, 4),
    _pool_edge("window 17x17", 2, 18, 20, 17, 1, 8),
    _pool_edge("window of the input's size", 9, 5, 7, (5, 7)),
    _pool_edge("one pixel", 16, 1, 1, 1),
    _pool_edge("one pixel padded", 4, 1, 1, 2, 1, 1),
    _pool_edge("64 channels", 64, 6, 5, 2),
    _pool_edge("wide rows", 1, 4, 67, 3, 2, 1),
    _pool_edge("dilation 2", 5, 11, 12, 3, 1, 1, 2),
    _pool_edge("dilation 2 by 3, ceil", 4, 13, 12, (3, 2), 2, (1, 0), (2, 3), True),
    _pool_edge("empty batch", 3, 6, 6, 2, N=0),
    _pool_edge("ceil drops the last window", 3, 5, 5, 2, 3, 1, ceil=True),
)

# (C, H, W) -> output size of adaptive average pooling.
ADAPTIVE_EDGES: tuple[tuple[tuple[int, int, int, int], Pair], ...] = (
    ((2, 8, 7, 7), (1, 1)),
    ((2, 5, 7, 9), (3, 4)),
    ((1, 16, 4, 6), (7, 7)),
    ((3, 3, 8, 5), (8, 5)),
    ((1, 17, 13, 11), (6, 1)),
    ((2, 64, 3, 2), (2, 2)),
    ((1, 1, 1, 1), (3, 2)),
    ((0, 4, 6, 6), (2, 2)),
)

NORM_EDGES: tuple[tuple[int, int, int, int], ...] = (
    (2, 16, 8, 9),
    (3, 5, 7, 6),
    (1, 17, 4, 4),
    (4, 64, 3, 3),
    (8, 1, 10, 12),
    (2, 3, 1, 1),
    (1, 33, 1, 67),
    (33, 2, 3, 3),
)
