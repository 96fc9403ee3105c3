"""What every benchmark shares: the facts of the machine in the results, and a ban on fallbacks.

`pytest benchmarks` runs them; `--benchmark-json FILE` keeps the figures with the versions inside.
"""

import math
from collections import defaultdict

import pytest
import torch

import fastconv
from fastconv import _extension

_LAYERS = pytest.StashKey[list]()
_NETWORKS = pytest.StashKey[list]()


def pytest_addoption(parser):
    parser.addoption("--batch", type=int, default=1, help="test_networks.py: images a batch")


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info["fastconv"] = fastconv.__version__
    machine_info["torch"] = torch.__version__
    machine_info["threads"] = torch.get_num_threads()
    machine_info["isa"] = _extension.load().cpu_isa()
    machine_info["gpus"] = [
        torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
    ]


@pytest.fixture(autouse=True)
def _no_fallback():
    """An operation that fell back to ATen would measure the peer."""
    with fastconv.allow_fallback(False):
        yield


def pytest_configure(config):
    config.stash[_LAYERS] = []
    config.stash[_NETWORKS] = []


@pytest.fixture
def layer_results(request):
    """Where test_layers.py puts (name, direction, shape, Comparison), for the closing table."""
    return request.config.stash[_LAYERS]


@pytest.fixture
def network_results(request):
    """Where test_networks.py puts (name, threads, milliseconds by runtime, those left out)."""
    return request.config.stash[_NETWORKS]


def _geomean(ratios):
    return math.exp(math.fsum(map(math.log, ratios)) / len(ratios))


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[_LAYERS]:
        _print_layers(terminalreporter, config)
    if config.stash[_NETWORKS]:
        _print_networks(terminalreporter, config)


def _print_layers(terminalreporter, config):
    groups = defaultdict(list)
    for name, direction, layer, comparison in config.stash[_LAYERS]:
        groups[name.split()[0], direction].append((name, layer, comparison))
    write = terminalreporter.write_line
    terminalreporter.section("PyTorch's time over fastconv's, each in its better layout")
    write(f"{'network':<10} {'':<6} {'layers':>6} {'geomean':>8} {'worst':>6}   worst layer")
    for (network, direction), rows in groups.items():
        ratios = [comparison.speedup.of_medians for _, _, comparison in rows]
        mean = _geomean(ratios)
        worst, (name, layer, _) = min(zip(ratios, rows, strict=True), key=lambda pair: pair[0])
        write(
            f"{network:<10} {direction:<6} {len(rows):>6} {mean:>8.2f} {worst:>6.2f}   "
            f"{name.split()[1]} {layer.input} * {layer.weight}"
        )


def _print_networks(terminalreporter, config):
    """Above 1, fastconv wins."""
    write = terminalreporter.write_line
    terminalreporter.section("every runtime's time over fastconv's, each in its better layout")
    runtimes = ("eager", "compile", "ONNX Runtime", "OpenVINO")
    columns = (*runtimes, "best compiler")
    write(
        f"{'network':<24} {'threads':>7} {'ours, ms':>9} " + " ".join(f"{c:>13}" for c in columns)
    )
    means = defaultdict(list)
    for name, threads, ms, _ in config.stash[_NETWORKS]:
        best = {
            r: min((ms[way] for way in ms if way.startswith(r)), default=None) for r in runtimes
        }
        compilers = [best[r] for r in runtimes[1:] if best[r] is not None]
        best["best compiler"] = min(compilers, default=None)
        ratios = {c: best[c] / ms["fastconv"] for c in columns if best[c] is not None}
        kind = "training" if name.endswith("training") else "inference"
        for column, ratio in ratios.items():
            means[kind, threads, column].append(ratio)
        cells = " ".join(f"{ratios[c]:>13.2f}" if c in ratios else f"{'-':>13}" for c in columns)
        write(f"{name:<24} {threads:>7} {ms['fastconv']:>9.2f} {cells}")
    for kind, threads in dict.fromkeys(key[:2] for key in means):
        found = {c: _geomean(means[kind, threads, c]) for c in columns if means[kind, threads, c]}
        cells = " ".join(f"{found[c]:>13.2f}" if c in found else f"{'-':>13}" for c in columns)
        write(f"{'geometric mean, ' + kind:<24} {threads:>7} {'':>9} {cells}")
    for way, reason in {
        w: r for *_, left in config.stash[_NETWORKS] for w, r in left.items()
    }.items():
        write(f"left out: {way}: {reason}")
