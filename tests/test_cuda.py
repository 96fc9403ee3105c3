"""What only a GPU shows: streams, graphs, several devices, tensors beyond 2^31 elements; and, with
no GPU at all, what is said about a card that a build does not fit and about a launch that fails.

Numbers are judged elsewhere: every test that takes the `backend` fixture or loops over the kernel
table runs on the GPU where there is one.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastconv
import fastconv.functional as ff
import support
from fastconv import _extension
from support import FORMATS

ROOT = Path(__file__).resolve().parent.parent
WITH_ROWS = torch.cuda.is_available() and any(r.backend == "cuda" for r in fastconv.kernels())
needs_gpu = pytest.mark.skipif(
    not WITH_ROWS,
    reason="needs an NVIDIA GPU and a CUDA build of fastconv",
)
needs_two = pytest.mark.skipif(
    not WITH_ROWS or torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs"
)


@pytest.fixture
def cuda():
    """Our own CUDA rows or an error, on the first GPU."""
    with fastconv.backend("cuda"), fastconv.allow_fallback(False):
        yield torch.device("cuda", 0)


def network(device, layout="NCHW", dtype=torch.float32):
    """A step through every operation: (input, function of the input)."""
    generator = torch.Generator().manual_seed(1)

    def r(*size):
        t = torch.randn(size, generator=generator).to(device, dtype)
        return t.contiguous(memory_format=FORMATS[layout]) if len(size) == 4 else t

    w1, b1, w2, w3 = r(16, 8, 3, 3), r(16), r(16, 1, 3, 3), r(24, 16, 1, 1)

    def step(x):
        y = ff.conv2d(x, w1, b1, padding=1)
        y = ff.batch_norm(y, None, None, training=True)
        y = ff.max_pool2d(torch.relu(y), 3, 2, 1)
        y = ff.conv2d(y, w2, padding=1, groups=16)
        y = ff.avg_pool2d(y, 2)
        y = ff.conv2d(y, w3)
        return ff.adaptive_avg_pool2d(y, 1)

    return r(4, 8, 32, 32), step


def step_and_gradient(x, step):
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    out = step(leaf)
    return out.detach(), torch.autograd.grad(out.square().sum(), leaf)[0]


# --- Streams and graphs ---------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("layout", FORMATS)
def test_graph_capture_and_replay(layout, cuda):
    """Forward and backward; a replay reads what the captured tensors hold by then."""
    x, step = network(cuda, layout)
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(step(leaf).square().sum(), leaf)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(leaf)
        (gradient,) = torch.autograd.grad(out.square().sum(), leaf)
    for factor in (1.0, -0.5, 3.0):
        with torch.no_grad():
            leaf.copy_(x * factor)
        graph.replay()
        expected = step_and_gradient(x * factor, step)
        torch.cuda.synchronize()
        assert torch.equal(out, expected[0]) and torch.equal(gradient, expected[1]), factor


@needs_gpu
def test_the_current_stream_is_respected(cuda):
    """The input is written late, on a side stream: a kernel on any other stream reads it too early,
    or its output is read too early."""
    x, step = network(cuda)
    expected = step_and_gradient(x, step)
    late = torch.zeros_like(x)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        got = step_and_gradient(late, step)
        copies = [t.clone() for t in got]
    side.synchronize()
    for a, b in zip(copies, expected, strict=True):
        assert torch.equal(a, b)


@needs_gpu
def test_two_streams_at_once(cuda):
    x, step = network(cuda)
    inputs = [x, -x, 2 * x, x + 1]
    expected = [step_and_gradient(t, step) for t in inputs]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for _ in range(5):
        results = []
        for i, t in enumerate(inputs):
            with torch.cuda.stream(streams[i % 2]):
                results.append(step_and_gradient(t, step))
        torch.cuda.synchronize()
        for got, wanted in zip(results, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


# --- The same bits --------------------------------------------------------------------------------


@needs_gpu
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", support.DTYPES, ids=support.name_of)
def test_twenty_runs_give_the_same_bits(dtype, layout, cuda):
    x, step = network(cuda, layout, dtype)
    first = step_and_gradient(x, step)
    for _ in range(19):
        again = step_and_gradient(x, step)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# --- Devices --------------------------------------------------------------------------------------


@needs_two
def test_a_tensor_on_another_device_than_the_current_one():
    """Kernels, workspaces and results belong to the tensor's device, and the current device stays
    what it was."""
    x, step = network("cuda:0")
    expected = step_and_gradient(x, step)
    other, other_step = network("cuda:1")
    with torch.cuda.device(0), fastconv.backend("cuda"):
        got = step_and_gradient(other, other_step)
        assert torch.cuda.current_device() == 0
    for a, b in zip(got, expected, strict=True):
        assert a.device == torch.device("cuda", 1)
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-4)


@needs_two
def test_two_devices_are_a_device_mismatch():
    x, w = torch.ones(1, 2, 4, 4, device="cuda:0"), torch.ones(3, 2, 3, 3, device="cuda:1")
    with pytest.raises(RuntimeError, match="same device.*cuda:0.*cuda:1"):
        ff.conv2d(x, w)


@needs_gpu
def test_cpu_and_gpu_are_a_device_mismatch():
    x, w = torch.ones(1, 2, 4, 4, device="cuda"), torch.ones(3, 2, 3, 3)
    with pytest.raises(RuntimeError, match="same device.*cuda:0.*cpu"):
        ff.conv2d(x, w)


@needs_gpu
def test_autocast_runs_convolutions_in_16_bits(cuda):
    x, step = network(cuda, "NHWC")
    with torch.autocast("cuda", torch.bfloat16):
        out = step(x)
    assert out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.float(), step(x), rtol=0.1, atol=0.1)


# --- Beyond 2^31 elements -------------------------------------------------------------------------

SIDE = 46344  # SIDE^2 is 326,688 above 2^31, and a multiple of 8


@pytest.fixture
def huge(cuda):
    """One image of one channel and more than 2^31 elements, zero but for its last rows."""
    free, _ = torch.cuda.mem_get_info()
    if free < 30 << 30:
        pytest.skip(f"needs 30 GiB of GPU memory, and {free >> 30} are free")
    x = torch.zeros(1, 1, SIDE, SIDE, device=cuda, dtype=torch.bfloat16)
    assert x.numel() > 2**31
    generator = torch.Generator(device=cuda).manual_seed(2)
    x[..., -8:, :] = torch.randint(-4, 5, (8, SIDE), device=cuda, generator=generator)
    return x


LARGE = {
    "max_pool2d": lambda m, x: m.max_pool2d(x, 2),
    "avg_pool2d": lambda m, x: m.avg_pool2d(x, 2),
    "conv2d": lambda m, x: m.conv2d(x, torch.ones(1, 1, 2, 2, device=x.device, dtype=x.dtype)),
    "depthwise": lambda m, x: m.conv2d(
        x.view(1, 8, -1, SIDE), torch.ones(8, 1, 1, 1, device=x.device, dtype=x.dtype), groups=8
    ),
}


@needs_gpu
@pytest.mark.parametrize("name", LARGE)
def test_more_than_2_31_elements(name, huge):
    """Small integers: the last rows are exact, and what lies before them is zero."""
    with torch.inference_mode():
        out = LARGE[name](ff, huge)
    tail = out[:, -1:, -2:].float().cpu()
    small = huge[..., -8:, :].float().cpu()
    if name == "depthwise":
        assert torch.equal(tail[0, 0], small[0, 0, -2:])
    else:
        assert torch.equal(tail, LARGE[name](F, small)[:, :, -2:])
    assert out.flatten()[: out.numel() - 16 * SIDE].abs().max() == 0


@needs_gpu
def test_batch_norm_of_more_than_2_31_elements(huge):
    with torch.inference_mode():
        mean, var = torch.zeros(1, device="cuda"), torch.ones(1, device="cuda")
        out = ff.batch_norm(huge, mean, var, training=True, momentum=1.0)
    last = huge[..., -8:, :].double()
    expected_mean = last.sum() / huge.numel()
    expected_var = last.square().sum() / huge.numel() - expected_mean**2
    torch.testing.assert_close(mean[0].double(), expected_mean, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(var[0].double(), expected_var, rtol=1e-5, atol=0)
    expected = (last - expected_mean) / (expected_var + 1e-5).sqrt()
    torch.testing.assert_close(out[..., -8:, :].double(), expected, rtol=1e-2, atol=1e-2)


# --- What does not fit, in words; no GPU needed ---------------------------------------------------


@pytest.mark.parametrize(
    "built, capability",
    [
        ("8.0;9.0+PTX", 80),
        ("8.0;9.0+PTX", 86),  # machine code runs on later minor versions
        ("8.0;9.0+PTX", 120),  # PTX on everything later
        ("9.0a", 90),
        ("9.0 9.0a", 90),
        ("10.0f", 103),
        ("Hopper", 75),  # torch's own names for architectures are taken to fit
        ("", 75),
    ],
)
def test_cards_that_a_build_runs_on(built, capability):
    assert _extension.load().refuse_architecture(built, capability, "a card") == ""


@pytest.mark.parametrize(
    "built, capability, said",
    [
        ("8.0;9.0+PTX", 75, "7.5"),
        ("8.0;9.0", 120, "12.0"),
        ("8.6", 80, "8.0"),
        ("9.0a", 100, "10.0"),
        ("9.0a+PTX", 100, "10.0"),  # an `a` architecture's PTX runs nowhere else
        ("10.0f", 120, "12.0"),
    ],
)
def test_other_cards_are_refused_in_a_sentence(built, capability, said):
    sentence = _extension.load().refuse_architecture(built, capability, "NVIDIA T4")
    assert sentence == (
        f"NVIDIA T4 has compute capability {said}, and fastconv's CUDA kernels were built for "
        f"{built}"
    )


def nvcc():
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))


FAILING = """
#include <cstdio>
#include <exception>

#include "cuda/launch.h"

__global__ void nothing() {}

int main() {
  using fastconv::cuda::launch_kernel;
  launch_kernel({"empty_sm80_fprop", 0, 64}, &nothing);  // no blocks: no launch and no error
  try {
    launch_kernel({"planted_sm80_fprop", 7, 4096, nullptr, 100000}, &nothing);
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 0;
  }
  return 1;
}
"""


@pytest.mark.skipif(nvcc() is None, reason="needs nvcc")
def test_a_failed_launch_names_the_kernel_and_cudas_error(tmp_path):
    """4,096 threads a block are four times too many; without a GPU there is none to launch on."""
    source, program = tmp_path / "failing.cu", tmp_path / "failing"
    source.write_text(FAILING)
    command = [nvcc(), "-std=c++17", f"-I{ROOT / 'csrc'}", "-arch=sm_80", str(source)]
    done = subprocess.run([*command, "-o", str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = subprocess.run([str(program)], capture_output=True, text=True)
    assert said.returncode == 0, said.stdout + said.stderr
    for part in ("planted_sm80_fprop: ", "7 blocks of 4096 threads", "100000 bytes", "(cudaError"):
        assert part in said.stdout, said.stdout
