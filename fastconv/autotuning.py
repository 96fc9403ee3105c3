"""Optional autotuning of the choice: the fastest row for a convolution, measured and remembered.

Which row runs is a pure function of the problem and the device, by expected microseconds, unless
:func:`autotune` (or ``FASTCONV_AUTOTUNE=1``) asks for measurements, or an earlier process has left
some in ``autotune.json`` of the cache folder, the file that Triton's configurations are kept in
(:mod:`fastconv.triton_kernels.autotune`). With ``FASTCONV_AUTOTUNE=0`` nothing is measured and
nothing read. Rows add up in different orders, so their results may differ in the last bits.
"""

import contextlib
import functools
import os
import statistics
import time
from typing import NamedTuple

import torch

from fastconv import _extension, triton_kernels
from fastconv._version import __version__
from fastconv.triton_kernels.autotune import GpuTimer, is_captured, records, remember, seconds_asked

ROUNDS = 9


@contextlib.contextmanager
def autotune(seconds: float = 2.0):
    """Inside the block, the first call of each convolution, forward and backward, times the rows of
    the kernel table that can run it, on the tensors of that call; later calls run the fastest, in
    later processes too. Triton rows measure their configurations in the same way.

    It holds for the whole process: backward launches from threads of its own. Calls that are
    captured into a CUDA graph are not measured: warm the model up inside the block first.

    Args:
        seconds: about how long one call may spend on measuring.

    Raises:
        ValueError: unless seconds is positive.
    """
    switch = _extension.load().set_autotuning
    with triton_kernels.autotune(seconds):
        before = switch(True)
        try:
            yield
        finally:
            switch(before)


class _Choice(NamedTuple):
    """What is remembered of a problem."""

    kernel: str


def _device_name(device: int) -> str:
    return "cpu" if device < 0 else torch.cuda.get_device_name(device)


def _launch_of(device: int, key: str) -> dict:
    """What a choice is for, as Triton's are: see triton_kernels/autotune.py."""
    identity = {"fastconv": __version__, "triton": "", "device": _device_name(device)}
    return identity | {"row": "conv2d", "problem": {"key": key}}


def _load(device: int) -> None:
    """Hands the choices in the file to the extension, which asks once for each device."""
    if os.environ.get("FASTCONV_AUTOTUNE") == "0":
        return
    names = None
    for record in records():
        if record["row"] != "conv2d" or record["fastconv"] != __version__:
            continue
        if record["device"] != _device_name(device):
            continue
        if names is None:
            names = {name for name, *_ in _extension.load().kernels()}
        key, kernel = record["problem"].get("key"), record["config"].get("kernel")
        if isinstance(key, str) and kernel in names:
            _extension.load().set_measured_row(device, key, kernel)


def _time_rows(device: int, key: str, names: list[str], run) -> int | None:
    """The index of the row that is the fastest on this call; None where nobody can say now."""
    seconds = seconds_asked()
    if not seconds or is_captured(device):
        return None
    timer = GpuTimer(device) if device >= 0 else _on_the_cpu
    calls = {i: functools.partial(run, i) for i in range(len(names))}
    until = time.monotonic() + seconds
    # The first calls pay for caches, compilers and memory; a row that lacks memory is out.
    calls = {i: call for i, call in calls.items() if _runs(call)}
    samples = []
    while calls and len(samples) < ROUNDS and (not samples or time.monotonic() < until):
        samples.append(timer(list(calls.values())))
    columns = zip(*samples, strict=True)
    medians = {i: statistics.median(column) for i, column in zip(calls, columns, strict=True)}
    if not medians:
        return None
    best = min(medians, key=medians.get)
    _extension.load().set_measured_row(device, key, names[best])
    remember(_launch_of(device, key), _Choice(names[best]), medians[best])
    return best


def _runs(call) -> bool:
    try:
        call()
    except Exception:  # a compiler's, the driver's and torch's own; the chosen row raises it
        return False
    return True


def _on_the_cpu(calls) -> list[float]:
    """Microseconds of each call."""
    times = []
    for call in calls:
        start = time.perf_counter()
        call()
        times.append(1e6 * (time.perf_counter() - start))
    return times


def register() -> None:
    """Tells the extension whom to ask; once, when fastconv is imported."""
    extension = _extension.load()
    extension.register_autotuning(_load, _time_rows)
    if os.environ.get("FASTCONV_AUTOTUNE", "0") not in ("", "0"):
        extension.set_autotuning(True)
