"""LeNet-5 on the CPU: its operators and the whole network, fastconv beside torch.nn.

Results are compared before they are timed. A group of the report is one piece of work; its rows are
the two sides in both layouts, and the side's best row is what counts.
"""

import pytest
import torch
import torch.nn.functional as F

import fastconv.functional as ff
from fastconv.benchmarking import peers
from fastconv.benchmarking.shapes import network
from fastconv.models import lenet5

SIDES = {"fastconv": ff, "torch": F}
BATCHES = (1, 64)

layouts = pytest.mark.parametrize("layout", peers.LAYOUTS)
sides = pytest.mark.parametrize("side", SIDES)
batches = pytest.mark.parametrize("batch", BATCHES, ids=lambda n: f"batch{n}")


def tensor(*sizes, layout):
    memory_format = peers.LAYOUTS[layout]
    made = torch.randn(sizes, generator=torch.Generator().manual_seed(0))
    return made.contiguous(memory_format=memory_format).requires_grad_()


def time(benchmark, group, run):
    benchmark.group = group
    benchmark.pedantic(run, rounds=30, iterations=5, warmup_rounds=3)


def time_operator(benchmark, name, direction, functions, side, inputs):
    """Time one operator forward, or its backward alone, after comparing both sides' results."""

    def backward(fn):
        result = fn()
        grad = torch.ones_like(result)
        return lambda: torch.autograd.grad(result, inputs, grad, retain_graph=True)

    def forward(fn):
        def run():
            with torch.inference_mode():
                return fn()

        return run

    make = backward if direction == "backward" else forward
    runs = {each: make(fn) for each, fn in functions.items()}
    torch.testing.assert_close(runs["fastconv"](), runs["torch"](), rtol=1e-4, atol=1e-4)
    time(benchmark, f"{name} {direction}", runs[side])


@sides
@layouts
@batches
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("conv", network("lenet5").convs, ids=lambda conv: conv.name)
def test_convolution(benchmark, conv, direction, batch, layout, side):
    conv = conv.with_batch(batch)
    inputs = [tensor(*sizes, layout=layout) for sizes in (conv.input, conv.weight)]
    functions = {
        each: lambda module=module: module.conv2d(*inputs, **conv.options)
        for each, module in SIDES.items()
    }
    name = f"{conv.name}, batch {batch}"
    time_operator(benchmark, name, direction, functions, side, inputs)


@sides
@layouts
@batches
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("kind", ["max_pool2d", "avg_pool2d"])
@pytest.mark.parametrize("pool", network("lenet5").pools, ids=lambda pool: pool.name)
def test_pooling(benchmark, pool, kind, direction, batch, layout, side):
    inputs = [tensor(batch, *pool.input[1:], layout=layout)]
    functions = {
        each: lambda module=module: getattr(module, kind)(*inputs, 2)
        for each, module in SIDES.items()
    }
    name = f"{pool.name} {kind}, batch {batch}"
    time_operator(benchmark, name, direction, functions, side, inputs)


@sides
@layouts
@batches
@pytest.mark.parametrize("work", peers.WORKS)
@pytest.mark.parametrize("form", ["modern", "classic"])
def test_network(benchmark, form, work, batch, layout, side):
    torch.manual_seed(0)
    ours = lenet5(form=form).to(memory_format=peers.LAYOUTS[layout])
    theirs = peers.torch_twin(ours)
    images = tensor(batch, 1, 28, 28, layout=layout).detach()
    labels = torch.arange(batch) % 10
    peers.assert_same(work, ours, theirs, images, labels)
    model = {"fastconv": ours, "torch": theirs}[side]
    if work == "inference":
        step = peers.inference_step(model, images)
    else:
        step = peers.training_step(model, images, labels)
    time(benchmark, f"lenet5 {form} {work}, batch {batch}", step)
