"""What every benchmark shares: the facts of the machine in the results, and a ban on fallbacks.

`pytest benchmarks` runs them; `--benchmark-json FILE` keeps the figures with the versions inside.
"""

import pytest
import torch

import fastconv
from fastconv import _extension


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
