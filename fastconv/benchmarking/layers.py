"""One convolution of a network beside PyTorch's: forward, and each gradient, in both layouts."""

import torch
import torch.nn.functional as F

import fastconv.functional
from fastconv.benchmarking.peers import LAYOUTS, Comparison, assert_close
from fastconv.benchmarking.shapes import NETWORKS, ConvShape, network
from fastconv.benchmarking.timing import time_interleaved

DIRECTIONS = ("fprop", "dgrad", "wgrad")
# Rounding error of a long float32 sum, relative to the largest result: 1e-4 is far above it and far
# below any real mistake.
TOLERANCE = 1e-4


def layers_of(names, batch: int) -> dict[str, ConvShape]:
    """ "network layer" -> shape, of the named networks; a shape that two share stands once."""
    found: dict[str, ConvShape] = {}
    seen = set()
    for name in names:
        if name not in NETWORKS:
            raise ValueError(f"no network {name!r}; there are {', '.join(NETWORKS)}")
        for layer in network(name, batch).convs:
            key = (layer.input, layer.weight, *layer.options.values())
            if key not in seen:
                seen.add(key)
                found[f"{name} {layer.name}"] = layer
    return found


def layer_tensors(layer: ConvShape, dtype=torch.float32, device="cpu"):
    """Input, filter and output gradient: normal numbers, the same each time."""
    generator = torch.Generator(device).manual_seed(0)
    return [
        torch.randn(size, generator=generator, device=device).to(dtype)
        for size in (layer.input, layer.weight, layer.output)
    ]


def direction_call(conv2d, direction: str, layer: ConvShape, x, w, grad):
    """A function of no arguments that computes one direction through `conv2d`'s autograd."""
    if direction == "fprop":

        def forward():
            with torch.inference_mode():
                return conv2d(x, w, None, **layer.options)

        return forward
    wanted = (x if direction == "dgrad" else w).requires_grad_()
    out = conv2d(x, w, None, **layer.options)

    def backward():
        return torch.autograd.grad(out, wanted, grad, retain_graph=True)[0]

    return backward


def layer_ways(
    layer: ConvShape, direction: str, dtype=torch.float32, device="cpu"
) -> dict[tuple[str, str], object]:
    """("ours" or "theirs", layout) -> a function that computes `direction` of `layer`.

    Every way has its own copies of the same numbers, and the results are compared here.

    Raises:
        Disagreement: fastconv and PyTorch do not compute the same.
    """
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, but got {direction!r}")
    x, w, grad = layer_tensors(layer, dtype, device)
    ways = {}
    for layout, memory_format in LAYOUTS.items():
        for side, conv2d in (("ours", fastconv.functional.conv2d), ("theirs", F.conv2d)):
            copies = (t.clone(memory_format=memory_format) for t in (x, w, grad))
            ways[side, layout] = direction_call(conv2d, direction, layer, *copies)
        what = f"{layer.name} {direction} {layout}"
        assert_close(what, ways["ours", layout](), ways["theirs", layout](), TOLERANCE)
    return ways


def compare_layer(
    layer: ConvShape, ways: dict, *, rounds: int = 7, sample_seconds: float = 0.005, device="cpu"
) -> Comparison:
    """Time what :func:`layer_ways` returned, all four in turns."""
    timings = time_interleaved(
        ways, rounds=rounds, sample_seconds=sample_seconds, warm_up=1, device=device
    )
    ours, theirs = (
        {layout: timings[side, layout] for layout in LAYOUTS} for side in ("ours", "theirs")
    )
    return Comparison(layer.name, layer.N, ours, theirs)
