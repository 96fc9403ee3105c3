"""Rows chosen by measurement (fastconv.autotune), on the CPU: a stopwatch of our own says which row
is the fastest, so that the test knows which one must run, in this process and in the next."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch

import fastconv
import fastconv.functional as ff
from fastconv import _extension, autotuning

# The function `autotune` has taken the place of the module.
remembered = sys.modules["fastconv.triton_kernels.autotune"]

X, W = torch.randn(2, 8, 12, 12), torch.randn(8, 8, 3, 3)


class Stopwatch:
    """Times are what `microseconds` says of a row's index; the rows do run."""

    def __init__(self, folder):
        self.file = folder / "autotune.json"
        self.rounds = 0
        self.microseconds = lambda index: 10.0 + index

    def __call__(self, calls):
        self.rounds += 1
        for call in calls:
            call()
        return [self.microseconds(call.args[0]) for call in calls]


@pytest.fixture
def stopwatch(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTCONV_AUTOTUNE")
    stopwatch = Stopwatch(tmp_path)
    monkeypatch.setattr(autotuning, "_on_the_cpu", stopwatch)
    for name in ("_choices", "_unwritten"):
        monkeypatch.setattr(remembered, name, {})
    monkeypatch.setattr(remembered, "_warned", set())
    yield stopwatch
    for record in remembered.records():
        if "key" in record["problem"]:
            _extension.load().set_measured_row(-1, record["problem"]["key"], "")


def able(direction="fprop", x=X, w=W):
    """The rows that could run, cheapest first, hopeless ones left out as C++ does."""
    found = [c for c in fastconv.explain(x, w, direction=direction).candidates if not c.reason]
    native = [c for c in found if not c.name.endswith("_emulated") and "_triton_" not in c.name]
    least = min(c.cost_us for c in native)
    return [c.name for c in native if c.cost_us <= 10 * least]


def test_the_fastest_row_runs_from_then_on(stopwatch):
    expected = fastconv.explain(X, W)
    slowest = able()[-1]
    assert slowest != expected.kernel
    plain = ff.conv2d(X, W)
    stopwatch.microseconds = lambda index: 10.0 - index
    with fastconv.autotune():
        tuned = ff.conv2d(X, W)
    assert stopwatch.rounds == autotuning.ROUNDS
    found = fastconv.explain(X, W)
    assert found.kernel == slowest and "the fastest when it was measured" in found
    torch.testing.assert_close(tuned, plain)
    with fastconv.kernel(slowest):
        assert torch.equal(tuned, ff.conv2d(X, W))
    assert torch.equal(tuned, ff.conv2d(X, W))
    with fastconv.autotune():
        ff.conv2d(X, W)
    assert stopwatch.rounds == autotuning.ROUNDS, "a problem is measured once"


def test_other_problems_are_not_concerned(stopwatch):
    stopwatch.microseconds = lambda index: 10.0 - index
    with fastconv.autotune():
        ff.conv2d(X, W)
    for x, w in (
        (X[:1], W),
        (X.double(), W.double()),
        (X.contiguous(memory_format=torch.channels_last), W),
    ):
        assert "when it was measured" not in fastconv.explain(x, w)
    assert "when it was measured" not in fastconv.explain(X, W, direction="dgrad")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    assert "when it was measured" not in fastconv.explain(X, W)


def test_gradients_are_measured_too(stopwatch):
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    y = torch.conv2d(X.double(), W.double())
    stopwatch.microseconds = lambda index: 10.0 - index
    with fastconv.autotune():
        ff.conv2d(x, w).sum().backward()
    for direction in ("dgrad", "wgrad"):
        found = fastconv.explain(X, W, direction=direction)
        assert found.kernel == able(direction)[-1]
    xd, wd = X.double().requires_grad_(), W.double().requires_grad_()
    torch.conv2d(xd, wd).sum().backward()
    torch.testing.assert_close(x.grad.double(), xd.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), wd.grad, rtol=1e-5, atol=1e-4)
    assert y.shape == ff.conv2d(x, w).shape


def test_what_is_forced_stays_forced(stopwatch):
    stopwatch.microseconds = lambda index: 10.0 - index
    first = able()[0]
    with fastconv.autotune():
        with fastconv.kernel(first):
            ff.conv2d(X, W)
        with fastconv.backend("aten"):
            ff.conv2d(X, W)
        assert not stopwatch.rounds
        ff.conv2d(X, W)
    with fastconv.kernel(first):
        assert fastconv.explain(X, W).kernel == first
    with fastconv.backend("aten"):
        assert fastconv.explain(X, W).kernel == "aten"


def test_a_row_that_fails_is_left_out(stopwatch, monkeypatch):
    slowest = len(able()) - 1
    monkeypatch.setattr(autotuning, "_runs", lambda call: call.args[0] != slowest)
    stopwatch.microseconds = lambda index: 10.0 - index
    with fastconv.autotune():
        ff.conv2d(X, W)
    assert fastconv.explain(X, W).kernel == able()[slowest - 1]


def test_an_interrupt_reaches_the_user_and_nothing_is_kept(stopwatch):
    def interrupted(index):
        raise KeyboardInterrupt

    stopwatch.microseconds = interrupted
    with fastconv.autotune(), pytest.raises(KeyboardInterrupt):
        ff.conv2d(X, W)
    assert not stopwatch.file.exists()
    assert "when it was measured" not in fastconv.explain(X, W)


def test_it_holds_for_all_threads_and_ends(stopwatch):
    with fastconv.autotune():
        thread = threading.Thread(target=ff.conv2d, args=(X, W))
        thread.start()
        thread.join()
    assert stopwatch.rounds == autotuning.ROUNDS
    ff.conv2d(X[:1], W)
    assert stopwatch.rounds == autotuning.ROUNDS
    with pytest.raises(ValueError, match="positive"), fastconv.autotune(seconds=-1):
        pass


NEXT = """
import sys, torch, fastconv
x, w = torch.empty(2, 8, 12, 12), torch.empty(8, 8, 3, 3)
torch.set_num_threads(int(sys.argv[1]))
fastconv.functional.conv2d(x, w)
print(fastconv.explain(x, w).kernel)
"""


def next_process(**environment):
    command = [sys.executable, "-P", "-c", NEXT, str(torch.get_num_threads())]
    environment = os.environ | environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_the_next_process_remembers(stopwatch):
    expected = fastconv.explain(X, W).kernel
    stopwatch.microseconds = lambda index: 10.0 - index
    with fastconv.autotune():
        ff.conv2d(X, W)
    measured = able()[-1]
    (record,) = json.loads(stopwatch.file.read_text())
    assert record["config"] == {"kernel": measured} and record["device"] == "cpu"
    assert "N=2 C=8" in record["problem"]["key"]
    assert next_process() == (measured, "")
    assert next_process(FASTCONV_AUTOTUNE="0") == (expected, "")
    # Whatever else is in the file is passed over.
    for changed in (
        {"config": {"kernel": "no_such_row"}}, {"problem": {"key": 5}}, {"device": "other"},
        {"fastconv": "0.0"}, {"problem": {}}, {"config": {}},
    ):  # fmt: skip
        stopwatch.file.write_text(json.dumps([record | changed]))
        assert next_process() == (expected, "")
    stopwatch.file.write_text("[{]")
    kernel, warning = next_process()
    assert kernel == expected and "is ignored" in warning
    assert next_process(FASTCONV_AUTOTUNE="1")[0] in able()
