"""The choice on GPUs that need not be there: the table's own C++ is asked (gpu_choices.py)."""

import math
from pathlib import Path

import pytest

import fastconv
from fastconv.benchmarking.layers import DIRECTIONS, layers_of
from fastconv.benchmarking.shapes import network

ROOT = Path(__file__).resolve().parent.parent
CUDA = ROOT / "csrc" / "cuda"
pytestmark = pytest.mark.skipif(not CUDA.is_dir(), reason="the tests were taken out of their tree")
# On paper: bfloat16 and TF32 TFLOP/s of dense tensors, float32 without tensor cores, TB/s.
PEAKS = {"A100": (312, 156, 19.5, 2.0), "H200": (989, 495, 67, 4.8)}


@pytest.fixture(scope="module")
def ask():
    """ask(layers, direction, **how) -> a Choice a layer."""
    if why := fastconv.emulator.available():
        pytest.skip(why)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        import gpu_choices

    def asking(layers, direction="fprop", **how):
        return gpu_choices.choices(gpu_choices.query(layer, direction, **how) for layer in layers)

    return asking


def dense(name, batch):
    """The network's 3x3 layers from 128 channels on: arithmetic, not memory, takes their time."""
    found = [layer for layer in network(name, batch).convs if layer.R == 3]
    return [layer for layer in found if min(layer.C, layer.K) >= 128]


def kernels(choices):
    return [choice.kernel for choice in choices]


@pytest.mark.parametrize("triton", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_h200_runs_dense_layers_by_wgmma(ask, dtype, triton):
    for layers, directions in (
        (dense("resnet50", 64), ("fprop", "dgrad")),
        (dense("vgg16", 32), DIRECTIONS),
    ):
        for direction in directions:
            picked = kernels(ask(layers, direction, dtype=dtype, triton=triton))
            assert all("_sm90_" in name and "triton" not in name for name in picked), picked


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a100_runs_dense_layers_by_mma_sync(ask, dtype, direction):
    layers = dense("resnet50", 64) + dense("vgg16", 32)
    picked = kernels(ask(layers, direction, dtype=dtype, gpu="A100", triton=False))
    assert all("igemm" in name and "_sm80_" in name for name in picked), picked


@pytest.mark.parametrize("gpu", ["A100", "RTX 4090", "B200"])
def test_only_a_9_0_card_runs_sm_90a(ask, gpu):
    layers = list(layers_of(["resnet50"], 64).values())
    for direction in DIRECTIONS:
        for choice in ask(layers, direction, gpu=gpu):
            hopper = [c for c in choice.candidates if "_sm90_" in c.name and "triton" not in c.name]
            assert hopper and {c.reason for c in hopper} == {"needs sm_90a"}


@pytest.mark.parametrize("gpu", ["A100", "H200"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_strict_float32_is_three_products_on_tensor_cores(ask, gpu, direction):
    """... where the layer is large, not FFMA; and TF32, where it is allowed, is faster still."""
    layers = dense("resnet50", 64) + dense("vgg16", 32)
    strict, tf32 = (
        ask(layers, direction, gpu=gpu, dtype="float32", tf32=tf32, triton=False)
        for tf32 in (False, True)
    )
    assert all("igemm" in name for name in kernels(strict)), kernels(strict)
    assert all("igemm" in name for name in kernels(tf32)), kernels(tf32)
    assert all(a.cost_us > b.cost_us for a, b in zip(strict, tf32, strict=True))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("triton", [False, True])
def test_depthwise_layers_go_to_depthwise_rows(ask, layout, triton):
    layers = [layer for layer in network("mobilenet_v2", 64).convs if layer.groups > 1]
    for direction in DIRECTIONS:
        picked = kernels(ask(layers, direction, layout=layout, triton=triton))
        assert all("depthwise" in name for name in picked), picked


@pytest.mark.parametrize("batch", [1, 16, 256])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_one_channel_is_nothing_for_hopper_kernels(ask, dtype, batch):
    """LeNet's first layer: TMA and wgmma would copy and multiply mostly zeros."""
    for direction in DIRECTIONS:
        layer = network("lenet5", batch).convs[0]
        picked = kernels(ask([layer], direction, dtype=dtype, triton=False))
        assert not [name for name in picked if "_sm90_" in name], picked


@pytest.mark.parametrize("gpu", PEAKS)
@pytest.mark.parametrize("dtype", ["bfloat16", "tf32", "float32"])
def test_no_row_promises_more_than_the_gpu_has(ask, gpu, dtype):
    bf16, tf32, plain, bandwidth = PEAKS[gpu]
    tflops = {"bfloat16": bf16, "tf32": tf32, "float32": tf32 / 3}[dtype]
    layers = [*network("resnet50", 64).convs, *network("vgg16", 32).convs]
    how = {"dtype": "bfloat16"} if dtype == "bfloat16" else {"dtype": "float32"}
    for direction in DIRECTIONS:
        answers = ask(layers, direction, gpu=gpu, tf32=dtype == "tf32", **how)
        for layer, choice in zip(layers, answers, strict=True):
            size = 2 if dtype == "bfloat16" else 4
            memory = size * math.prod(layer.output) / bandwidth / 1e6
            for row in choice.candidates:
                tensor_cores = any(kind in row.name for kind in ("igemm", "triton", "conv1x1_sm90"))
                peak = tflops if tensor_cores else plain
                least = max(memory, layer.flops / peak / 1e6)
                # One clock and one bandwidth an SM stand for all GPUs (csrc/core/estimate.h).
                assert row.reason or row.cost_us >= least / 1.4, (layer.name, direction, row)
