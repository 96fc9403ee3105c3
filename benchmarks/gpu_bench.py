"""fastconv beside cuDNN on a GPU, layer by layer, in a JSON file that a later call continues.

    python benchmarks/gpu_bench.py WHAT --json FILE [--seconds N]

WHAT is one of
    bfloat16, float16, tf32, float32   every convolution of ResNet-50 and VGG-16, forward and both
                            gradients, each side in its better layout; float32 is float32 on both
                            sides; tf32 lets both round their operands to TF32
    bfloat16-more, ...      the same of LeNet-5, AlexNet, GoogLeNet, ResNeXt-50 and MobileNetV2
    fused                   convolution, BatchNorm, ReLU and residual of inference as one call, in
                            bfloat16, beside cuDNN's fused call with the BatchNorm folded
    choice                  every row of the table that can run a layer, and which one is picked
    triton, inductor        ResNet-50 and VGG-16 in bfloat16 by the Triton kernels alone, beside
                            cuDNN, and beside torch.compile's max-autotune
    other                   poolings, BatchNorm and the fused small-net operator
PyTorch runs as well as it can: cudnn.benchmark is on, and channels_last is among its layouts. Times
are medians between CUDA events with a cold L2 cache, in turns (fastconv/benchmarking/timing.py),
and what is computed is compared before it is timed. Ends with status 3 when the time ran out first.
"""

import argparse
import functools
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

import fastconv
import fastconv.functional as ff
from fastconv.benchmarking import layers
from fastconv.benchmarking.shapes import ConvShape
from fastconv.benchmarking.timing import time_interleaved

DEVICE = "cuda"  # a test says "cpu"
GOAL = {"resnet50": 64, "vgg16": 32}  # network: batch
MORE = {"lenet5": 256, "alexnet": 128, "googlenet": 64, "resnext50": 64, "mobilenet_v2": 64}
# Of the largest result: some ten roundings of the type.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
TF32_TOLERANCE = 4e-3
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


@dataclass(frozen=True)
class Task:
    """One figure to take. `ways()` makes what is timed; the layer, where there is one, says what
    work that is."""

    name: str
    ways: Callable[[], dict]
    layer: ConvShape | None = None
    direction: str = "fprop"
    dtype: torch.dtype = torch.bfloat16
    tensors: int = 3  # of input, filter, output: those that are read or written, once each


def layers_and_directions(networks, directions=layers.DIRECTIONS):
    for network, batch in networks.items():
        for name, layer in layers.layers_of([network], batch).items():
            for direction in directions:
                yield f"{name} {direction}", layer, direction


def convolutions(networks, dtype, precision="ieee"):
    """Every layer and direction."""
    torch.backends.cudnn.conv.fp32_precision = precision
    layers.TOLERANCE = TF32_TOLERANCE if precision == "tf32" else TOLERANCES[dtype]
    for name, layer, direction in layers_and_directions(networks):
        ways = functools.partial(layers.layer_ways, layer, direction, dtype, DEVICE)
        yield Task(name, ways, layer, direction, dtype)


def fused_ways(layer, residual):
    """Inference's convolution, BatchNorm, (residual,) ReLU, in NHWC."""
    x, w, skip = (
        t.contiguous(memory_format=torch.channels_last)
        for t in layers.layer_tensors(layer, torch.bfloat16, DEVICE)
    )
    mean, var, weight, bias = (torch.rand(layer.K, device=DEVICE) + 0.5 for _ in range(4))
    norm = (mean, var, weight, bias)
    skip = skip if residual else None
    scale = weight / (var + 1e-5).sqrt()
    folded = (
        (w.float() * scale.view(-1, 1, 1, 1)).to(w).contiguous(memory_format=torch.channels_last)
    )
    shift = (bias - mean * scale).to(w)
    place = (layer.stride, layer.padding, layer.dilation, layer.groups)

    def ours():
        with torch.inference_mode():
            return ff.conv_bn_relu(x, w, None, *norm, residual=skip, **layer.options)

    def separate():
        with torch.inference_mode():
            y = F.conv2d(x, folded, shift, **layer.options)
            return F.relu_(y if skip is None else y.add_(skip))

    def together():
        with torch.inference_mode():
            if skip is None:
                return torch.cudnn_convolution_relu(x, folded, shift, *place)
            return torch.cudnn_convolution_add_relu(x, folded, skip, 1.0, shift, *place)

    layers.assert_close(layer.name, ours(), separate(), TOLERANCES[torch.bfloat16])
    ways = {("ours", "NHWC"): ours, ("theirs", "NHWC"): separate}
    try:
        together()
    except RuntimeError:  # cuDNN has no fused form of every layer
        return ways
    return ways | {("theirs", "NHWC fused"): together}


def fused_convolutions():
    for name, layer, _ in layers_and_directions(GOAL | MORE, ["fprop"]):
        residual = name.startswith("resne") and name.endswith("conv3 fprop")
        ways = functools.partial(fused_ways, layer, residual)
        yield Task(f"{name} fused", ways, layer, tensors=4 if residual else 3)


def triton_ways(layer, direction):
    with fastconv.backend("triton"):
        found = layers.layer_ways(layer, direction, torch.bfloat16, DEVICE)
    return {
        key: fastconv.backend("triton")(way) if key[0] == "ours" else way
        for key, way in found.items()
    }


def triton_convolutions(directions):
    """ResNet-50's and VGG-16's layers in bfloat16, ours by the Triton kernels alone."""
    layers.TOLERANCE = TOLERANCES[torch.bfloat16]
    for name, layer, direction in layers_and_directions(GOAL, directions):
        yield Task(name, functools.partial(triton_ways, layer, direction), layer, direction)


def with_inductor(task):
    found = task.ways()
    theirs = torch.compile(found["theirs", "NHWC"], mode="max-autotune-no-cudagraphs")
    theirs()
    return {("ours", "NHWC"): found["ours", "NHWC"], ("theirs", "NHWC"): theirs}


def inductor_convolutions():
    """The same layers forward, beside what torch.compile makes of them, in NHWC."""
    for task in triton_convolutions(["fprop"]):
        yield replace(task, ways=functools.partial(with_inductor, task))


def calls(function, size, backward):
    """Ways to compute function(module, x), or its gradient, in both layouts."""
    ways = {}
    for layout, memory_format in FORMATS.items():
        for side, module in (("ours", ff), ("theirs", F)):
            x = torch.randn(size, device=DEVICE, dtype=torch.bfloat16)
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
        torch.randn(size, device=DEVICE, dtype=torch.float32)
        for size in ((6, 1, 5, 5), (16, 6, 5, 5))
    )
    x = torch.randn(batch, 1, 28, 28, device=DEVICE)

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
            ways = functools.partial(calls, function, size, backward)
            yield Task(f"{name} {'backward' if backward else 'forward'}", ways)
    for batch in (1, 256):
        name = f"lenet5 conv-relu-pool x 2, batch {batch}"
        yield Task(name, functools.partial(small_net, batch))


def row_of(task, layout) -> str:
    """The row that the task's layer runs on."""
    x, w, _ = (
        torch.empty(size, device=DEVICE, dtype=task.dtype, memory_format=FORMATS[layout])
        for size in (task.layer.input, task.layer.weight, task.layer.output)
    )
    return fastconv.explain(x, w, direction=task.direction, **task.layer.options).kernel


def measure(task) -> dict:
    timings = time_interleaved(task.ways(), rounds=15, device=DEVICE)
    us = {side: {} for side in ("ours", "theirs")}
    for (side, layout), timing in timings.items():
        us[side][layout] = round(1e6 * timing.median, 2)
    best = {side: min(figures.values()) for side, figures in us.items()}
    figure = {"us": us, "torch_over_fastconv": round(best["theirs"] / best["ours"], 3)}
    if (layer := task.layer) is not None:
        sizes = (layer.input, layer.weight, layer.output, layer.output)[: task.tensors]
        moved = task.dtype.itemsize * sum(map(math.prod, sizes))
        figure |= {
            "tflops": {side: round(layer.flops / t / 1e6, 1) for side, t in best.items()},
            "gb_s": {side: round(moved / t / 1e3, 1) for side, t in best.items()},
            "count": layer.count,
        }
        if "fused" not in task.name:
            figure["row"] = row_of(task, min(us["ours"], key=us["ours"].get))
    return figure


# ---- the choice ----------------------------------------------------------------------------------

# A row that takes this many times the best one's time is not timed again.
HOPELESS = 4


def choices():
    """Layers, directions and types among which the choice is judged, in NHWC."""
    for mode, dtype, precision in (
        ("bfloat16", torch.bfloat16, "ieee"),
        ("tf32", torch.float32, "tf32"),
        ("float32", torch.float32, "ieee"),
    ):
        networks = GOAL | (MORE if mode == "bfloat16" else {})
        for name, layer, direction in layers_and_directions(networks):
            run = functools.partial(judge_choice, layer, direction, dtype, precision)
            yield f"{name} {mode}", run


def judge_choice(layer, direction, dtype, precision) -> dict:
    """Every row that can run the layer, timed; the picked one beside the best."""
    torch.backends.cudnn.conv.fp32_precision = precision
    x, w, grad = (
        t.contiguous(memory_format=torch.channels_last)
        for t in layers.layer_tensors(layer, dtype, DEVICE)
    )
    told = fastconv.explain(x, w, direction=direction, **layer.options)
    expected = {c.name: c.cost_us for c in told.candidates if c.reason is None}
    ways = {}
    for name in expected:
        with fastconv.kernel(name):
            leaves = (t.detach().clone() for t in (x, w, grad))
            way = layers.direction_call(ff.conv2d, direction, layer, *leaves)
        ways[name] = fastconv.kernel(name)(way)
    results = {name: way() for name, way in ways.items()}
    # The last row is the general one, and in float32 whatever the switch says.
    reference, tolerance = results[list(results)[-1]], TOLERANCES[dtype]
    for name, result in results.items():
        tolerance = TF32_TOLERANCE if precision == "tf32" else TOLERANCES[dtype]
        layers.assert_close(f"{layer.name} {direction} {name}", result, reference, tolerance)
    del results, reference
    # Twice: the first call of a Triton row has compiled it, the first of any has loaded it.
    once = time_interleaved(ways, rounds=1, warm_up=1, device=DEVICE)
    least = min(timing.median for timing in once.values())
    close = {name: ways[name] for name in ways if once[name].median <= HOPELESS * least}
    close[told.kernel] = ways[told.kernel]
    timings = once | time_interleaved(close, rounds=11, device=DEVICE)
    us = {name: round(1e6 * timing.median, 2) for name, timing in timings.items()}
    best = min(close, key=us.get)
    return {
        "picked": told.kernel,
        "best": best,
        "picked_over_best": round(us[told.kernel] / us[best], 3),
        "us": us,
        "expected_us": {name: round(cost, 2) for name, cost in expected.items()},
    }


def say_choice(figures) -> str:
    ratios = [f["picked_over_best"] for f in figures.values() if "error" not in f]
    near = sum(ratio <= 1.10 for ratio in ratios)
    return (
        f"{len(ratios)} judged, {len(figures) - len(ratios)} failed: the picked row is within 10 % "
        f"of the best on {near} ({near / max(len(ratios), 1):.0%}; the goal is 95 %), "
        f"geometric mean of picked / best {geometric_mean(ratios):.3f}"
    )


# ---- all of them ---------------------------------------------------------------------------------


def geometric_mean(ratios) -> float:
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan


def means(figures) -> dict[str, float]:
    """Of torch / fastconv: of all, and of each network and direction ("resnet50 fprop")."""
    groups: dict[str, list[float]] = {"all": []}
    for name, figure in figures.items():
        if "error" not in figure:
            words = name.split()
            for group in ("all", f"{words[0]} {words[-1]}") if "count" in figure else ("all",):
                groups.setdefault(group, []).append(figure["torch_over_fastconv"])
    return {group: round(geometric_mean(ratios), 3) for group, ratios in groups.items() if ratios}


def say_means(figures) -> str:
    wrong = sum("error" in figure for figure in figures.values())
    lines = [f"{group:<24} {mean:.3f}" for group, mean in means(figures).items()]
    return "\n".join(
        [
            "torch's time over fastconv's, geometric means:",
            *lines,
            f"{len(figures) - wrong} timed, {wrong} failed, geometric mean of torch / fastconv "
            f"{means(figures).get('all', math.nan):.3f}",
        ]
    )


MODES = {
    "bfloat16": (torch.bfloat16,),
    "float16": (torch.float16,),
    "tf32": (torch.float32, "tf32"),
    "float32": (torch.float32,),
}
WHAT = {
    **{mode: functools.partial(convolutions, GOAL, *how) for mode, how in MODES.items()},
    **{f"{mode}-more": functools.partial(convolutions, MORE, *how) for mode, how in MODES.items()},
    "fused": fused_convolutions,
    "triton": lambda: triton_convolutions(layers.DIRECTIONS),
    "inductor": inductor_convolutions,
    "other": others,
}


def tasks_of(what):
    """(name, function that takes the figure)."""
    if what == "choice":
        return choices()
    return ((task.name, functools.partial(measure, task)) for task in WHAT[what]())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=(*WHAT, "choice"))
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
    began, complete = time.monotonic(), True
    with fastconv.allow_fallback(False):
        for name, take in tasks_of(arguments.what):
            if name in figures and "error" not in figures[name]:
                continue
            if time.monotonic() - began > arguments.seconds:
                complete = False
                break
            try:
                figures[name] = take()
            except Exception as error:  # the next layer is another problem
                figures[name] = {"error": f"{type(error).__name__}: {error}"}
            print(name, json.dumps(figures[name]), flush=True)
            if arguments.what != "choice":
                kept["geometric_means"] = means(figures)
            arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    print(say_choice(figures) if arguments.what == "choice" else say_means(figures))
    failed = any("error" in figure for figure in figures.values())
    return 1 if failed else 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
