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


@pytest.fixture
def layer_results(request):
    """Where test_layers.py puts (name, direction, shape, Comparison), for the closing table."""
    return request.config.stash[_LAYERS]


def pytest_terminal_summary(terminalreporter, config):
    groups = defaultdict(list)
    for name, direction, layer, comparison in config.stash[_LAYERS]:
        groups[name.split()[0], direction].append((name, layer, comparison))
    if not groups:
        return
    write = terminalreporter.write_line
    terminalreporter.section("PyTorch's time over fastconv's, each in its better layout")
    write(f"{'network':<10} {'':<6} {'layers':>6} {'geomean':>8} {'worst':>6}   worst layer")
    for (network, direction), rows in groups.items():
        ratios = [comparison.speedup.of_medians for _, _, comparison in rows]
        mean = math.exp(math.fsum(map(math.log, ratios)) / len(ratios))
        worst, (name, layer, _) = min(zip(ratios, rows, strict=True), key=lambda pair: pair[0])
        write(
            f"{network:<10} {direction:<6} {len(rows):>6} {mean:>8.2f} {worst:>6.2f}   "
            f"{name.split()[1]} {layer.input} * {layer.weight}"
        )
