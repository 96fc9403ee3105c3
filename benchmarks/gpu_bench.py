"""fastconv beside cuDNN on a GPU, layer by layer, in a JSON file that a later call continues.

    python benchmarks/gpu_bench.py float32 | bfloat16 | triton | inductor | other --json FILE
                                   [--seconds N]

float32 and bfloat16: every convolution of the networks, forward and both gradients, each side in
its better layout. triton: the same in bfloat16 for ResNet-50 and VGG-16, by the Triton kernels
alone; inductor: their forward against torch.compile's max-autotune. other: poolings, BatchNorm and
the fused small-net operator. PyTorch runs as well as it can: cudnn.benchmark is on; float32 is
float32 on both sides, TF32 off. Times are medians between CUDA events with a cold L2 cache, in
turns (fastconv/benchmarking/timing.py), and what is computed is compared before it is timed. Ends
with status 3 when the time ran out first.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import fastconv
import fastconv.functional as ff
from fastconv.benchmarking import layers
from fastconv.benchmarking.timing import time_interleaved

BATCHES = {"lenet5": 256, "alexnet": 128, "vgg16": 32, "resnet50": 64, "googlenet": 64}
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
FORMATS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def machine() -> dict:
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "fastconv": fastconv.__version__,
        "arch_list": fastconv._extension.facts.get("arch_list"),
    }


def convolutions(dtype):
    """(name, function that returns ways to time) of every layer and direction."""
    layers.TOLERANCE = TOLERANCES[dtype]
    for network, batch in BATCHES.items():
        for name, layer in layers.layers_of([network], batch).items():
            for direction in layers.DIRECTIONS:

                def ways(layer=layer, direction=direction):
                    return layers.layer_ways(layer, direction, dtype, "cuda")

                yield f"{name} {direction}", ways


def triton_convolutions(directions):
    """ResNet-50's and VGG-16's layers in bfloat16, ours by the Triton kernels alone."""
    layers.TOLERANCE = TOLERANCES[torch.bfloat16]
    for network in ("resnet50", "vgg16"):
        for name, layer in layers.layers_of([network], BATCHES[network]).items():
            for direction in directions:

                def ways(layer=layer, direction=direction):
                    with fastconv.backend("triton"):
                        found = layers.layer_ways(layer, direction, torch.bfloat16, "cuda")
                    return {
                        key: fastconv.backend("triton")(way) if key[0] == "ours" else way
                        for key, way in found.items()
                    }

                yield f"{name} {direction}", ways


def inductor_convolutions():
    """The same layers forward, beside what torch.compile makes of them, in NHWC."""
    for name, ways in triton_convolutions(["fprop"]):

        def with_inductor(ways=ways):
            found = ways()
            theirs = torch.compile(found["theirs", "NHWC"], mode="max-autotune-no-cudagraphs")
            theirs()
            return {("ours", "NHWC"): found["ours", "NHWC"], ("theirs", "NHWC"): theirs}

        yield name, with_inductor


def calls(function, size, backward):
    """Ways to compute function(module, x), or its gradient, in both layouts."""
    ways = {}
    for layout, memory_format in FORMATS.items():
        for side, module in (("ours", ff), ("theirs", F)):
            x = torch.randn(size, device="cuda", dtype=torch.bfloat16)
            x = x.contiguous(memory_format=memory_format)
            if not backward:

                def run(module=module, x=x):
                    with torch.inference_mode():
                        return function(module, x)

            else:
                x.requires_grad_()
                out = function(module, x)
                grad = torch.ones_like(out)

                def run(out=out, x=x, grad=grad):
                    return torch.autograd.grad(out, x, grad, retain_graph=True)[0]

            ways[side, layout] = run
    return ways


OTHERS = {
    "max_pool2d 3x3/2": (lambda m, x: m.max_pool2d(x, 3, 2, 1), (64, 64, 112, 112)),
    "avg_pool2d 3x3/1": (lambda m, x: m.avg_pool2d(x, 3, 1, 1), (64, 192, 28, 28)),
    "global average 7x7": (lambda m, x: m.adaptive_avg_pool2d(x, 1), (256, 2048, 7, 7)),
    "batch_norm training": (
        lambda m, x: m.batch_norm(x, None, None, training=True),
        (64, 256, 56, 56),
    ),
    "batch_norm training, late": (
        lambda m, x: m.batch_norm(x, None, None, training=True),
        (64, 2048, 7, 7),
    ),
}


def small_net(batch):
    """LeNet-5's two fused layers."""
    w1, w2 = (
        torch.randn(size, device="cuda", dtype=torch.float32)
        for size in ((6, 1, 5, 5), (16, 6, 5, 5))
    )
    x = torch.randn(batch, 1, 28, 28, device="cuda")

    def ours():
        with torch.inference_mode():
            return ff.conv2d_max_pool2d(ff.conv2d_max_pool2d(x, w1, padding=2), w2)

    def theirs():
        with torch.inference_mode():
            y = F.max_pool2d(F.relu(F.conv2d(x, w1, padding=2)), 2)
            return F.max_pool2d(F.relu(F.conv2d(y, w2)), 2)

    return {("ours", "NCHW"): ours, ("theirs", "NCHW"): theirs}


def others():
    for name, (function, size) in OTHERS.items():
        for backward in (False, True):

            def ways(function=function, size=size, backward=backward):
                return calls(function, size, backward)

            yield f"{name} {'backward' if backward else 'forward'}", ways
    for batch in (1, 256):
        yield f"lenet5 conv-relu-pool x 2, batch {batch}", lambda b=batch: small_net(b)


def measure(ways) -> dict:
    timings = time_interleaved(ways, rounds=15, device="cuda")
    us = {side: {} for side in ("ours", "theirs")}
    for (side, layout), timing in timings.items():
        us[side][layout] = round(1e6 * timing.median, 2)
    best = {side: min(figures.values()) for side, figures in us.items()}
    return {"us": us, "torch_over_fastconv": round(best["theirs"] / best["ours"], 3)}


WHAT = {
    "float32": lambda: convolutions(torch.float32),
    "bfloat16": lambda: convolutions(torch.bfloat16),
    "triton": lambda: triton_convolutions(layers.DIRECTIONS),
    "inductor": inductor_convolutions,
    "other": others,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=tuple(WHAT))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=400, help="begin nothing after this time")
    arguments = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.manual_seed(0)
    kept = {"machine": machine(), "what": arguments.what, "figures": {}}
    if arguments.json.exists():
        kept["figures"] = json.loads(arguments.json.read_text())["figures"]
    figures = kept["figures"]
    todo = WHAT[arguments.what]()
    began, complete = time.monotonic(), True
    with fastconv.allow_fallback(False):
        for name, ways in todo:
            if name in figures and "error" not in figures[name]:
                continue
            if time.monotonic() - began > arguments.seconds:
                complete = False
                break
            try:
                figures[name] = measure(ways())
            except Exception as error:  # the next layer is another problem
                figures[name] = {"error": f"{type(error).__name__}: {error}"}
            print(name, json.dumps(figures[name]), flush=True)
            arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    ratios = [f["torch_over_fastconv"] for f in figures.values() if "error" not in f]
    wrong = len(figures) - len(ratios)
    mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan
    print(f"{len(ratios)} timed, {wrong} failed, geometric mean of torch / fastconv {mean:.3f}")
    return 1 if wrong else 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
