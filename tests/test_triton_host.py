"""The host's side of the Triton kernels: what is said where they cannot run, how a launch is
prepared, and which switches of torch are read."""

import os
import threading
import time
import types

import pytest
import torch

import support
from fastconv import triton_kernels

# Where the rows are closed


BLOCKED = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "triton":
                raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    sys.meta_path.insert(0, Blocker())
"""
ASK = """
    import torch, fastconv
    import fastconv.functional as ff
    from fastconv import triton_kernels
    print("AVAILABLE", triton_kernels.available())
    x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    for ask in (fastconv.backend, "triton"), (fastconv.kernel, "conv2d_igemm_triton_fprop"):
        try:
            ask[0](ask[1])
        except RuntimeError as error:
            print("RAISED", error)
    print("CLOSED", fastconv.explain(x, w).candidates[0].reason)
    ff.conv2d(x, w)
"""


def say(code=ASK, **environment):
    done = support.run_python(code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


NO_TRITON = "Triton is not installed (pip install triton)"
NO_GPU = (
    "there is no GPU, and TRITON_INTERPRET=1, by which Triton runs kernels on CPU tensors, is not "
    "set"
)


def test_without_triton():
    text = say(BLOCKED + ASK, TRITON_INTERPRET="1")
    assert f"AVAILABLE {NO_TRITON}\n" in text
    assert text.count(f"RAISED backend 'triton' is not available: {NO_TRITON}\n") == 2
    assert f"CLOSED {NO_TRITON}\n" in text


def test_with_an_old_triton(tmp_path):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("__version__ = '3.5.1'\n")
    text = say(PYTHONPATH=os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    why = "Triton 3.5.1 is too old (fastconv needs 3.6 or newer)"
    assert f"AVAILABLE {why}\n" in text and f"CLOSED {why}\n" in text
    assert text.count(f"RAISED backend 'triton' is not available: {why}\n") == 2


@pytest.mark.skipif(triton_kernels.version() is None, reason=NO_TRITON)
def test_without_a_gpu():
    text = say(TRITON_INTERPRET="", CUDA_VISIBLE_DEVICES="", HIP_VISIBLE_DEVICES="")
    assert f"AVAILABLE {NO_GPU}\n" in text
    assert text.count(f"RAISED backend 'triton' is not available: {NO_GPU}\n") == 2
    assert "CLOSED runs on CUDA tensors, and on CPU tensors where TRITON_INTERPRET=1\n" in text


@pytest.mark.skipif(triton_kernels.version() is None, reason=NO_TRITON)
def test_with_the_interpreter():
    text = say(
        ASK
        + """
    import sys, torch.nn.functional as F
    with fastconv.backend("triton"):
        assert torch.allclose(ff.conv2d(x, w), F.conv2d(x, w), atol=1e-4)
    assert triton_kernels.gpu_properties
    """,
        TRITON_INTERPRET="1",
    )
    assert "AVAILABLE \n" in text and "RAISED" not in text
    assert "CLOSED runs only when asked for\n" in text


def test_importing_fastconv_imports_no_triton():
    text = say("""
        import sys, torch
        before = "triton" in sys.modules
        import fastconv
        fastconv.kernels()
        print(before or "triton" not in sys.modules)
    """)
    assert text == "True\n"


def test_without_a_c_compiler_the_rows_stay_closed(monkeypatch):
    """Triton builds its launcher in C on first use: what would fail there is refused before."""
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton_kernels.shutil, "which", lambda name: None)
    said = []
    extension = types.SimpleNamespace(refuse_triton=said.append)
    triton_kernels.register(extension)
    assert said == ["Triton needs a C compiler, and none was found (CC, gcc, clang)"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert triton_kernels.available() == said[0]


# Preparing a launch


class Runners:
    """Stands for table.runner_for: counts what is prepared, takes its time."""

    def __init__(self, monkeypatch, seconds=0.0):
        table = pytest.importorskip("fastconv.triton_kernels.table")
        self.made, self.ran = [], []

        def runner_for(row, fields, device):
            time.sleep(seconds)
            self.made.append(fields)
            return self.ran.append

        monkeypatch.setattr(table, "runner_for", runner_for)
        monkeypatch.setattr(triton_kernels, "load", lambda: None)
        monkeypatch.setattr(triton_kernels, "_runners", {})


def test_a_problem_is_prepared_once(monkeypatch):
    runners = Runners(monkeypatch, seconds=0.05)
    work = [
        threading.Thread(target=triton_kernels.launch, args=("row", ("problem",), (i,), -1))
        for i in range(8)
    ]
    for thread in work:
        thread.start()
    for thread in work:
        thread.join()
    assert runners.made == [("problem",)]
    assert sorted(runners.ran) == [(i,) for i in range(8)]


def test_prepared_problems_are_bounded(monkeypatch):
    runners = Runners(monkeypatch)
    monkeypatch.setattr(triton_kernels, "_CAPACITY", 10)
    for i in range(11):
        triton_kernels.launch("row", (i,), (), -1)
    kept = [key[1] for key in triton_kernels._runners]
    assert kept == [(i,) for i in range(5, 11)]
    triton_kernels.launch("row", (10,), (), -1)
    triton_kernels.launch("row", (0,), (), -1)
    assert runners.made == [(i,) for i in (*range(11), 0)]


def test_a_card_of_less_shared_memory_takes_the_next_configuration(monkeypatch):
    """A restriction chooses what comes next, and never reaches the user as an error."""
    from triton.runtime.errors import OutOfResources

    from fastconv.triton_kernels import runtime, table
    from fastconv.triton_kernels.problem import Conv2dProblem

    row, problem = "conv2d_igemm_triton_fprop", Conv2dProblem(8, 64, 28, 28, 256, 3, 3)
    offered = table.ROWS[row].configs_for(problem, runtime.device_of(0))
    fitting = [offered[2:], ()]
    asked = []

    def configured(row, problem, device, config):
        asked.append(config)
        if config not in fitting[0]:
            raise OutOfResources(147456, 101376, "shared memory")
        return config

    monkeypatch.setattr(table, "configured_runner", configured)
    assert table.runner_for(row, tuple(problem), 0) == offered[2]
    assert asked == [None, *offered[:3]]
    fitting[0] = ()
    with pytest.raises(OutOfResources):
        table.runner_for(row, tuple(problem), 0)


# float32 on a GPU


def test_tf32_follows_torchs_switches():
    """Read at each call; set through the old names or the new, in any order."""
    text = say("""
        import torch, fastconv
        from fastconv import _extension
        allowed = _extension.load().conv_may_use_tf32
        backends = torch.backends
        said = [allowed()]  # torch's default: convolutions may
        backends.cudnn.allow_tf32 = False
        said.append(allowed())
        backends.cudnn.allow_tf32 = True
        said.append(allowed())
        backends.cudnn.conv.fp32_precision = "ieee"
        said.append(allowed())
        backends.cudnn.rnn.fp32_precision = "tf32"
        said.append(allowed())
        backends.cudnn.conv.fp32_precision = "tf32"
        said.append(allowed())
        backends.cudnn.conv.fp32_precision = "none"
        backends.fp32_precision = "ieee"
        said.append(allowed())
        backends.fp32_precision = "tf32"
        said.append(allowed())
        print(*map(int, said))
    """)
    assert text == "1 0 1 0 0 1 0 1\n"
