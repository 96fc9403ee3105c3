"""benchmarks/gpu_bench.py, as far as it goes without a GPU: what it would time, and the figures."""

import json
from pathlib import Path

import pytest
import torch

from fastconv.benchmarking import layers
from fastconv.benchmarking.shapes import ConvShape

ROOT = Path(__file__).resolve().parent.parent
LAYER = ConvShape("small", 2, 8, 9, 8, 16, 3, 3, padding=(1, 1), count=3)


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu_bench

    monkeypatch.setattr(gpu_bench, "DEVICE", "cpu")
    monkeypatch.setattr(layers, "TOLERANCE", layers.TOLERANCE)
    saved = torch.backends.cudnn.conv.fp32_precision
    yield gpu_bench
    torch.backends.cudnn.conv.fp32_precision = saved


def test_every_slice_has_its_layers(bench):
    """Of each network, in each type and direction, and no name twice."""
    slices = {what: [name for name, _ in bench.tasks_of(what)] for what in [*bench.WHAT, "choice"]}
    for what, names in slices.items():
        assert names and len(set(names)) == len(names), what
    for mode in ("bfloat16", "float16", "tf32", "float32"):
        for direction in layers.DIRECTIONS:
            names = slices[mode] + slices[f"{mode}-more"]
            networks = {name.split()[0] for name in names if name.endswith(direction)}
            assert networks == {
                *("lenet5", "alexnet", "vgg16", "resnet50", "googlenet", "resnext50"),
                "mobilenet_v2",
            }
    script = (ROOT / "benchmarks" / "gpu.sh").read_text()
    (listed,) = script.partition("benches=(")[2].split(")")[:1]
    assert set(listed.split()) == set(slices)


def test_a_layers_figures(bench):
    ways = lambda: layers.layer_ways(LAYER, "wgrad")  # noqa: E731
    task = bench.Task("resnet50 small wgrad", ways, LAYER, "wgrad", torch.float32)
    figure = bench.measure(task)
    ours = min(figure["us"]["ours"].values())
    # Against a microsecond's 1e6 flops is 1 TFLOP/s; all three tensors move once.
    assert figure["tflops"]["ours"] == pytest.approx(LAYER.flops / ours / 1e6, abs=0.1)
    moved = 4 * (2 * 8 * 9 * 8 + 16 * 8 * 9 + 2 * 16 * 9 * 8)
    assert figure["gb_s"]["ours"] == pytest.approx(moved / ours / 1e3, abs=0.1)
    assert figure["count"] == 3 and figure["row"].endswith("_wgrad")
    means = bench.means({task.name: figure, "max_pool2d forward": {"torch_over_fastconv": 2.0}})
    assert set(means) == {"all", "resnet50 wgrad"}
    assert means["resnet50 wgrad"] == figure["torch_over_fastconv"]


@pytest.mark.parametrize("residual", [False, True])
def test_fused_ways_agree(bench, residual):
    ways = bench.fused_ways(LAYER, residual)
    assert {side for side, _ in ways} == {"ours", "theirs"}


@pytest.mark.parametrize("direction", layers.DIRECTIONS)
def test_the_choice_is_judged(bench, direction):
    figure = bench.judge_choice(LAYER, direction, torch.float32, "ieee")
    assert {figure["picked"], figure["best"]} <= set(figure["us"]) == set(figure["expected_us"])
    assert figure["picked_over_best"] >= 1.0
    said = bench.say_choice({"a": figure | {"picked_over_best": 1.05}, "b": {"error": "none"}})
    assert "1 judged, 1 failed" in said and "on 1 (100%" in said


def test_the_picked_rows_are_near_the_best_where_that_was_measured():
    """Within 10 % on 95 % of the layers: of a sweep on a GPU whose figures were committed."""
    files = list((ROOT / "benchmarks" / "results").glob("*choice*.json"))
    if not files:
        pytest.skip("no GPU has measured it yet")
    for file in files:
        figures = json.loads(file.read_text())["figures"].values()
        ratios = [f["picked_over_best"] for f in figures if "error" not in f]
        near = sum(ratio <= 1.10 for ratio in ratios)
        assert ratios and near >= 0.95 * len(ratios), f"{file.name}: {near} of {len(ratios)}"
