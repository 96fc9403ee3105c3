"""Fixtures and settings of all tests. Helpers: references.py (right answers), support.py, and
the other files here whose names do not begin with test."""

import os
import sys

# pytest imports test files without touching sys.path (importmode=importlib).
sys.path.insert(0, os.path.dirname(__file__))

import hypothesis
import pytest
import torch

# Workers of pytest-xdist share the cores: a thread that waits must not spin on one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Without a GPU the Triton kernels run by Triton's interpreter, which is asked for before Triton is
# imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("FASTCONV_AUTOTUNE", "0")  # nobody's measurements decide what is tested

import fastconv
import support

hypothesis.settings.register_profile(
    "default", max_examples=150, deadline=None, derandomize=True, print_blob=True
)
hypothesis.settings.register_profile("thorough", max_examples=5000, deadline=None)
hypothesis.settings.load_profile("default")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: large sweeps, run by `make test-all`")
    torch.set_num_threads(2)
    torch.backends.cudnn.allow_tf32 = False  # contracts are float32's: test_tf32.py allows it


@pytest.fixture(autouse=True)
def _same_numbers_every_time():
    torch.manual_seed(20)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread():
    """For sweeps of many tiny calls whose point is arithmetic: test_threads.py is about threads."""
    torch.set_num_threads(1)


@pytest.fixture(params=support.backends(), ids=str)
def backend(request):
    """Each backend that runs here, forced; its `device` is where tensors go."""
    with fastconv.backend(request.param.name):
        yield request.param


def pytest_sessionfinish(session):
    workeroutput = getattr(session.config, "workeroutput", None)
    if workeroutput is not None:
        workeroutput["coverage"] = dict(support.coverage)
        workeroutput["emulated_rows"] = sorted(support.emulated_rows_run)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """What a worker of pytest-xdist has covered counts as ours."""
    workeroutput = getattr(node, "workeroutput", {})
    support.coverage.update(workeroutput.get("coverage", {}))
    support.emulated_rows_run.update(workeroutput.get("emulated_rows", ()))


def pytest_terminal_summary(terminalreporter):
    if support.emulated_rows_run and os.environ.get("FASTCONV_EMULATOR_SANITIZE"):
        names = " ".join(sorted(support.emulated_rows_run))
        terminalreporter.write_line(f"emulated rows that ran: {names}")
    if support.coverage:
        terminalreporter.section("what was covered")
        for name, count in sorted(support.coverage.items()):
            terminalreporter.write_line(f"{count:8d}  {name}")
