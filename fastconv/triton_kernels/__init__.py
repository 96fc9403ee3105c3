"""The Triton kernels: rows of the one kernel table, behind the same operators and autograd.

``csrc/triton/table.cpp`` says what each row takes and what it is expected to cost;
:mod:`.table` says which kernels it launches. Between the two stand ``csrc/torch/triton.cpp`` and
this file. It imports neither Triton nor a kernel, which take half a second, until one is asked for.
"""

import importlib.util
import itertools
import os
import re
import shutil
import sys
import sysconfig
import threading
from pathlib import Path

import torch

# The function takes the place of its module among this package's attributes.
from fastconv.triton_kernels.autotune import autotune, settle

__all__ = ["autotune", "available", "load", "version"]

OLDEST = (3, 6)


def version() -> str | None:
    """Triton's version, read without importing it; None where it is not installed."""
    if loaded := sys.modules.get("triton"):
        return loaded.__version__
    try:
        spec = importlib.util.find_spec("triton")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    found = re.search(r"__version__ = ['\"]([^'\"]+)", Path(spec.origin).read_text())
    return found[1] if found else "of an unknown version"


def _unusable() -> str:
    """Why no kernel can be compiled, on any machine; empty: they can."""
    found = version()
    if found is None:
        return "Triton is not installed (pip install triton)"
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers and tuple(map(int, numbers.groups())) < OLDEST:
        return f"Triton {found} is too old (fastconv needs {OLDEST[0]}.{OLDEST[1]} or newer)"
    return ""


def _unlaunchable() -> str:
    """Why Triton could not launch what it compiles: it builds its launcher in C on first use."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler, and none was found (CC, gcc, clang)"
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").exists():
        return f"Triton needs Python's headers, and there is no Python.h in {headers}"
    return ""


def _interpreter_is_asked_for() -> bool:
    """As Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")


def available() -> str:
    """Empty when the Triton kernels run here, otherwise one sentence that says why not."""
    if why := _unusable():
        return why
    if _interpreter_is_asked_for():
        if importlib.util.find_spec("numpy") is None:
            return "Triton's interpreter (TRITON_INTERPRET=1) needs NumPy (pip install numpy)"
        return ""
    if torch.cuda.is_available():
        return _unlaunchable()
    return (
        "there is no GPU, and TRITON_INTERPRET=1, by which Triton runs kernels on CPU tensors, "
        "is not set"
    )


def register(extension) -> None:
    """Opens the rows of a compiled extension, or leaves with it the reason why they stay closed."""
    if why := _unusable() or ("" if _interpreter_is_asked_for() else _unlaunchable()):
        extension.refuse_triton(why)
    else:
        extension.register_triton(launch, gpu_properties)
        extension.set_triton_interpreted(_interpreter_is_asked_for())


def load() -> None:
    """Imports Triton and the kernels, which sets for good whether they are interpreted.

    Raises:
        ImportError: where Triton is missing or broken.
    """
    from fastconv import _extension
    from fastconv.triton_kernels import runtime, table  # noqa: F401 - the kernels

    _extension.load().set_triton_interpreted(runtime.interpreted)


def gpu_properties(index: int) -> tuple[int, int, int]:
    """Architecture (90 for sm_90), SMs and bytes of shared memory a block may have."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        # Rows name NVIDIA's architectures; what other cards run is what asks for the least.
        return 80, properties.multi_processor_count, 65536
    arch = 10 * properties.major + properties.minor
    return arch, properties.multi_processor_count, properties.shared_memory_per_block_optin


# --- launching ------------------------------------------------------------------------------------

_CAPACITY = 4096  # problems: more than any net's layers times the image sizes it is fed with
_runners: dict[tuple, object] = {}
_preparing = threading.RLock()


def launch(row: str, problem: tuple, pointers: tuple, device: int) -> None:
    """What the compiled extension calls: runs one row on one problem.

    Args:
        row: its name.
        problem: the fields of a NamedTuple of :mod:`.problem`, in order.
        pointers: addresses, in the order of the Args structs of csrc/core; 0 where there is none.
        device: the GPU's index; -1 for the interpreter.
    """
    runner = _runners.get((row, problem, device))
    if runner is None:
        runner = _prepare(row, problem, pointers, device)
    runner(pointers)


def _prepare(row, problem, pointers, device):
    with _preparing:  # two threads need not compile the same kernel
        key = row, problem, device
        if key in _runners:
            return _runners[key]
        load()
        from fastconv.triton_kernels.table import runner_for

        settled = settle(row, problem, pointers, device)
        runner = runner_for(row, problem, device)
        if settled:
            if len(_runners) >= _CAPACITY:
                for old in list(itertools.islice(_runners, _CAPACITY // 2)):
                    del _runners[old]
            _runners[key] = runner
        return runner


def forget_runners() -> None:
    """Has every problem prepared anew at its next launch; what is compiled stays."""
    with _preparing:
        _runners.clear()
