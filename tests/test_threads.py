"""One thread, several, and many Python threads at once: right, and the same bits every time."""

import concurrent.futures
import threading

import pytest
import torch

import fastconv
import fastconv.functional as ff
import support
from fastconv.benchmarking.shapes import CONV_EDGES, ConvShape
from support import FORMATS, conv_case, exact_failure, run_conv

# Enough work for kernels that split it, and odd enough to be split unevenly.
BIG = (
    ConvShape("3x3", 3, 32, 29, 31, 48, 3, 3, (1, 1), (1, 1)),
    ConvShape("1x1", 5, 64, 17, 19, 33, 1, 1),
    ConvShape("depthwise", 2, 67, 23, 21, 67, 3, 3, (2, 2), (1, 1), (1, 1), 67),
    ConvShape("grouped", 1, 24, 37, 11, 36, 5, 3, (1, 2), (2, 1), (1, 1), 4),
    ConvShape("few channels", 7, 3, 41, 43, 8, 7, 7, (2, 2), (3, 3)),
    ConvShape("one image, one filter", 1, 16, 50, 50, 1, 3, 3),
)


def network(seed=0):
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        fastconv.ConvBNReLU2d(3, 16, 3, padding=1),
        fastconv.MaxPool2d(3, 2, 1),
        fastconv.Conv2d(16, 24, 3, groups=2),
        fastconv.AvgPool2d(2),
        fastconv.Conv2d(24, 24, 3, padding=1, groups=24),
        fastconv.AdaptiveAvgPool2d(2),
        fastconv.BatchNorm2d(24),
    )


def step(net, x):
    """Output and all gradients of one training step."""
    net.zero_grad()
    leaf = x.clone().requires_grad_()
    out = net(leaf)
    out.square().sum().backward()
    return [out.detach(), leaf.grad, *(p.grad.clone() for p in net.parameters())]


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("layout", FORMATS)
def test_any_number_of_threads_is_exact(count, layout):
    with support.threads(count):
        for shape in BIG:
            case = conv_case(shape, "integers", torch.float32)
            for direction, got in run_conv(ff.conv2d, case, layout, layout).items():
                failure = exact_failure(got, case.reference[direction])
                assert not failure, f"{shape.name} {direction}: {failure}"


@pytest.mark.parametrize("layout", FORMATS)
def test_one_thread_on_every_edge(layout):
    with support.threads(1):
        for shape in CONV_EDGES:
            case = conv_case(shape, "integers", torch.float32)
            for direction, got in run_conv(ff.conv2d, case, layout, layout).items():
                failure = exact_failure(got, case.reference[direction])
                assert not failure, f"{shape.name} {direction}: {failure}"


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", FORMATS)
def test_a_training_step_gives_the_same_bits_every_time(layout, dtype, count):
    x = torch.randn(4, 3, 33, 35).to(dtype).contiguous(memory_format=FORMATS[layout])
    with support.threads(count):
        runs = [step(network().to(dtype), x) for _ in range(3)]
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert torch.equal(a, b)


def test_many_python_threads_on_one_module():
    """In evaluation a module is read only; each thread has its own input and backward."""
    net = network().eval()
    inputs = [torch.randn(1 + i % 3, 3, 20 + i, 24) for i in range(8)]

    def work(x):
        leaf = x.clone().requires_grad_()
        out = net(leaf)
        return out.detach(), torch.autograd.grad(out.sum(), leaf)[0]

    expected = [work(x) for x in inputs]
    barrier = threading.Barrier(8)

    def together(x):
        barrier.wait()
        return [work(x) for _ in range(5)]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for got, right in zip(pool.map(together, inputs), expected, strict=True):
            for out, grad in got:
                torch.testing.assert_close(out, right[0], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(grad, right[1], rtol=1e-4, atol=1e-5)


def test_what_a_launch_works_in_is_its_threads_own():
    """It is kept for the next launch, whatever that needs: large and small ones, by turns, in
    several threads at once, give what they give alone."""
    net = fastconv.fuse(network().eval())
    inputs = [torch.randn(1, 3, size, 64 + size) for size in (200, 9, 70, 16, 120, 33)]
    with torch.inference_mode():
        expected = [net(x) for x in inputs]

    def work(first):
        with torch.inference_mode():
            order = [(first + i) % len(inputs) for i in range(len(inputs))] * 3
            return all(torch.equal(net(inputs[i]), expected[i]) for i in order)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        assert all(pool.map(work, range(6)))


def test_many_python_threads_with_their_own_selection():
    x, w = torch.randn(2, 4, 12, 12), torch.randn(6, 4, 3, 3)
    expected = torch.nn.functional.conv2d(x, w)
    rows = [r.name for r in support.rows("conv2d", "fprop") if r.backend == "cpu"]
    rows = [name for name in rows if not refused(name, x, w)]
    barrier = threading.Barrier(len(rows))

    def work(name):
        barrier.wait()
        for _ in range(20):
            with fastconv.kernel(name):
                assert fastconv.explain(x, w).kernel == name
                torch.testing.assert_close(ff.conv2d(x, w), expected, rtol=1e-4, atol=1e-4)
        return True

    with concurrent.futures.ThreadPoolExecutor(len(rows)) as pool:
        assert all(pool.map(work, rows))


def refused(name, x, w):
    with fastconv.kernel(name):
        return fastconv.explain(x, w).kernel != name


def test_the_global_lock_is_free_while_a_kernel_runs():
    """Another Python thread makes progress during a long convolution."""
    x, w = torch.randn(8, 64, 64, 64), torch.randn(64, 64, 3, 3)
    ticks, stop = [0], threading.Event()

    def tick():
        while not stop.is_set():
            ticks[0] += 1
            stop.wait(0.001)

    thread = threading.Thread(target=tick)
    thread.start()
    before = ticks[0]
    with fastconv.kernel("conv2d_reference_fprop"):
        ff.conv2d(x[:1], w)
    during = ticks[0] - before
    stop.set()
    thread.join()
    assert during > 2


def test_inside_torchs_own_parallel_regions():
    """A DataLoader's worker, a checkpointed segment, a backward thread: any caller will do."""
    x = torch.randn(2, 3, 24, 24)
    net = network().eval()
    expected = net(x)
    futures = [torch.jit.fork(net, x) for _ in range(4)]
    for future in futures:
        torch.testing.assert_close(torch.jit.wait(future), expected, rtol=1e-4, atol=1e-5)
