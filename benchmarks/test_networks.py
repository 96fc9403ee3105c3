"""Whole networks through fastconv.fuse on a CPU, beside every runtime that is installed.

All of a network are timed in turns in one process, after their results have been compared with
PyTorch's; PyTorch and torch.compile in both layouts, the better of which counts. ONNX Runtime (with
onnx and onnxscript) and OpenVINO take part where they are installed. The last table has the ratios
and their geometric means. `-k "resnet50 and 1-thread"` picks some, `--batch 8` changes the batch.
The training steps are those of fastconv's layers, beside torch.nn's.
"""

import math
import sys
from pathlib import Path

import pytest
import torch

import fastconv
from fastconv import models
from fastconv.benchmarking import peers, runtimes
from fastconv.benchmarking.timing import time_interleaved

NETWORKS = ("resnet18", "resnet50", "vgg16", "vgg16_bn", "alexnet", "googlenet", "mobilenet_v2")
TRAINED = {"lenet5": (64, 1, 28, 28), "resnet18": (8, 3, 224, 224)}
# Fifty layers of float32, of which some runtimes fold BatchNorm into the weights, some transform
# 3x3 convolutions; a real mistake is of the size of the scores.
TOLERANCE = 1e-3
# BatchNorm of few values amplifies the last bit: PyTorch's two layouts differ by 0.1 of the largest
# element in some gradient of ResNet-18. tests/test_zoo.py compares gradients, in float64.
GRADIENTS = {"lenet5": 1e-4, "resnet18": 0.3}

threaded = pytest.mark.parametrize("threads", [1, 2], ids=lambda n: f"{n}-thread")


@pytest.fixture
def threads_set(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    yield threads
    torch.set_num_threads(before)


def build(name):
    """The network with statistics and factors that a wrong fold would not survive."""
    torch.manual_seed(0)
    model = mobilenet_v2() if name == "mobilenet_v2" else models.get_model(name)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.7, 1.4)
            torch.nn.init.uniform_(module.weight, 0.8, 1.2)
            torch.nn.init.uniform_(module.bias, -0.1, 0.1)
    return model.eval()


def mobilenet_v2():
    tests = str(Path(__file__).resolve().parents[1] / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    zoo = pytest.importorskip("zoo", reason="torchvision and timm are not installed")
    return zoo.torchvision.models.mobilenet_v2(weights=None)


@threaded
@pytest.mark.parametrize("name", NETWORKS)
def test_inference(benchmark, network_results, pytestconfig, name, threads, threads_set):
    batch = pytestconfig.getoption("--batch")
    images = torch.randn(batch, 3, 224, 224)
    model = build(name)
    ours = peers.inference_step(fastconv.fuse(model), images)
    ways, left_out = runtimes.ways_of(peers.torch_twin(model), images, threads)
    expected = ways["eager NCHW"]()
    for way, run in {"fastconv": ours, **ways}.items():
        peers.assert_close(f"{name}: {way}", run(), expected, TOLERANCE)
    timings = time_interleaved(
        {"fastconv": ours, **ways}, rounds=15, sample_seconds=0.05, limit_seconds=45
    )
    milliseconds = {way: 1e3 * timing.median for way, timing in timings.items()}
    network_results.append((f"{name} x{batch}", threads, milliseconds, left_out))
    benchmark.group = f"{name}, batch {batch}, {threads} threads"
    benchmark.extra_info.update(
        batch=batch,
        threads=threads,
        milliseconds=milliseconds,
        spread={way: timing.spread for way, timing in timings.items()},
        left_out=left_out,
        versions=runtimes.versions(),
    )
    # The row of pytest-benchmark's own table: fastconv timed by itself.
    benchmark.pedantic(ours, rounds=3, warmup_rounds=1)


@threaded
@pytest.mark.parametrize("name", TRAINED)
def test_training_step(benchmark, network_results, name, threads, threads_set):
    size = TRAINED[name]
    torch.manual_seed(0)
    images = torch.randn(size)
    model = models.get_model(name, num_classes=10)
    found = peers.compare(
        "training step",
        model,
        images,
        torch.arange(size[0]) % 10,
        rounds=11,
        limit_seconds=60,
        tolerance=GRADIENTS[name],
    )
    milliseconds = {"fastconv": 1e3 * found.ours[found.our_layout].median}
    for layout, timing in found.theirs.items():
        milliseconds[f"eager {layout}"] = 1e3 * timing.median
    network_results.append((f"{name} x{size[0]} training", threads, milliseconds, {}))
    benchmark.group = f"{name} training step, batch {size[0]}, {threads} threads"
    benchmark.extra_info.update(
        batch=size[0], threads=threads, milliseconds=milliseconds, our_layout=found.our_layout
    )
    memory_format = peers.LAYOUTS[found.our_layout]
    step = peers.training_step(
        model.to(memory_format=memory_format),
        images.contiguous(memory_format=memory_format),
        torch.arange(size[0]) % 10,
    )
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    assert math.isfinite(step())
