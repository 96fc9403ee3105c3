"""Optional autotuning: the fastest entry of a kernel's table, measured once and remembered.

Nobody is made to wait for it. What a kernel runs is the entry that its `choose` names, a pure
function, unless ``FASTCONV_AUTOTUNE=1`` or :func:`autotune` asks for measurements, or an earlier
process has left one in ``autotune.json`` of the cache folder (``FASTCONV_CACHE``, or ``fastconv``
in the user's cache directory). With ``FASTCONV_AUTOTUNE=0`` nothing is measured and no file is
read. Entries add up in different orders, so their results may differ in the last bits.
"""

import contextlib
import fcntl
import functools
import json
import os
import stat
import statistics
import threading
import time
import warnings
from pathlib import Path

import torch

from fastconv._version import __version__

SECONDS = 2.0
ROUNDS = 9


@contextlib.contextmanager
def autotune(seconds: float = SECONDS):
    """Inside the block, the first launches of each problem measure the kernel's configurations, on
    the tensors of the call, and later launches run the fastest, in later processes too.

    It holds for the whole process: backward launches from threads of its own.

    Args:
        seconds: about how long one launch may spend. Compiling takes longer than measuring, and
            where it exceeds its half of the time it goes on at the next launch of that problem.
    """
    if not seconds > 0:
        raise ValueError(f"autotune: seconds must be positive, got {seconds}")
    from fastconv import triton_kernels

    _blocks.append(seconds)
    triton_kernels.forget_runners()  # those that were prepared without measuring
    try:
        yield
    finally:
        _blocks.remove(seconds)


_blocks: list[float] = []


def seconds_asked() -> float:
    """How long a launch may spend on measuring; 0: nobody has asked."""
    asked = os.environ.get("FASTCONV_AUTOTUNE", "")
    if asked == "0":
        return 0.0
    return max(_blocks, default=SECONDS if asked else 0.0)


# --- measuring ------------------------------------------------------------------------------------

# By launch: a runner for each configuration tried so far, None for those that cannot run.
_unfinished: dict[tuple, dict] = {}
_clock = time.monotonic


def settle(row: str, fields: tuple, pointers: tuple, device: int) -> bool:
    """Measures a row's configurations on a call, where that is asked for and has not been done.

    Kernels only read their inputs and write their outputs whole, so that they may run again and
    again on the tensors of a call.

    Returns:
        Whether nothing is left to be measured.
    """
    seconds = seconds_asked()
    if not seconds:
        return True
    from fastconv.triton_kernels import runtime, table

    kernel, problem = table.ROWS[row], table.problem_of(row, fields)
    configs = kernel.configs_for(problem, runtime.device_of(device))
    timer_of = _timer_for(device)
    if timer_of is None or len(configs) < 2 or stored_choice(kernel, problem, device) is not None:
        return True
    if is_captured(device):  # into a graph, which would hold every launch
        return False
    runners = _unfinished.setdefault((row, fields, device), {})
    until = _clock() + seconds / 2
    for config in configs:
        if config not in runners:
            if _clock() >= until:
                return False
            runners[config] = _tried(table.configured_runner, row, problem, device, config)
    _unfinished.pop((row, fields, device))
    times = _measure(runners, pointers, timer_of(), seconds / 2)
    if times:
        fastest = min(times, key=times.get)
        remember(_launch_of(kernel, problem, device), fastest, times[fastest])
    return True


def is_captured(device: int) -> bool:
    return device >= 0 and torch.cuda.is_current_stream_capturing()


def _tried(function, *arguments):
    """What the function returns; None where a configuration does not compile or does not fit."""
    try:
        return function(*arguments)
    except Exception:  # Triton's, the driver's and torch's own; choose's configuration raises it
        return None


def _measure(runners: dict, pointers: tuple, timer, seconds: float) -> dict:
    """Median microseconds of each configuration that runs, over interleaved rounds: whatever else
    the GPU does, and its clock, slow all of them."""
    until = _clock() + seconds
    ready = {}
    for config, run in runners.items():
        if run and _tried(lambda run=run: run(pointers) or True):
            ready[config] = functools.partial(run, pointers)
    samples = []
    while ready and len(samples) < ROUNDS and (not samples or _clock() < until):
        samples.append(timer(list(ready.values())))
    columns = zip(*samples, strict=True)
    return {c: statistics.median(column) for c, column in zip(ready, columns, strict=True)}


def _timer_for(device: int):
    """What makes a timer for a GPU: a function of calls, that gives the microseconds of each. None
    for the interpreter, whose times say nothing."""
    return None if device < 0 else functools.partial(GpuTimer, device)


class GpuTimer:
    """By CUDA events, on the current stream. Before each call as much memory is written as empties
    L2 twice: in a net, others' tensors are there; and the GPU is busy until the call is queued."""

    def __init__(self, index: int):
        size = 4 * torch.cuda.get_device_properties(index).L2_cache_size
        try:
            self.other = torch.empty(size, dtype=torch.uint8, device=f"cuda:{index}")
        except torch.cuda.OutOfMemoryError:
            self.other = torch.empty(0, dtype=torch.uint8, device=f"cuda:{index}")

    def __call__(self, calls) -> list[float]:
        events = []
        for call in calls:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.other.zero_()
            start.record()
            call()
            end.record()
            events.append((start, end))
        events[-1][1].synchronize()
        return [1e3 * start.elapsed_time(end) for start, end in events]


# --- remembering ----------------------------------------------------------------------------------

_LARGEST = 2**26  # bytes: a file beyond is not ours
_MOST = 20_000  # choices: the oldest go first
_PATIENCE = 2.0  # seconds, for another process that writes

# By file: the choices in it and those of this process, by what they are for.
_choices: dict[Path, dict[str, dict]] = {}
_unwritten: dict[Path, dict[str, dict]] = {}
_remembering = threading.Lock()
_IDENTITY = ("fastconv", "triton", "device", "row", "problem")


def stored_choice(kernel, problem, device: int):
    """The configuration that was measured to be the fastest; None where none was, or where it is
    no entry of the kernel's table for the problem."""
    if os.environ.get("FASTCONV_AUTOTUNE") == "0":
        return None
    choices = _choices_in(_file())
    if not choices:
        return None
    record = choices.get(_key(_launch_of(kernel, problem, device)))
    if record is None:
        return None
    from fastconv.triton_kernels import runtime

    configs = kernel.configs_for(problem, runtime.device_of(device))
    return next((c for c in configs if _fields_of(c) == record["config"]), None)


def _file() -> Path:
    named = os.environ.get("FASTCONV_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return (Path(named) if named else Path(base) / "fastconv") / "autotune.json"


def _launch_of(kernel, problem, device: int) -> dict:
    """What a choice is for."""
    import triton

    return {
        "fastconv": __version__,
        "triton": triton.__version__,
        "device": "cpu" if device < 0 else torch.cuda.get_device_name(device),
        "row": kernel.name,
        "problem": problem._asdict(),
    }


def _key(record: dict) -> str:
    return json.dumps([record[name] for name in _IDENTITY], sort_keys=True)


def _fields_of(config) -> dict:
    """As they come back from JSON: without the reason, which may be reworded."""
    return json.loads(json.dumps({k: v for k, v in config._asdict().items() if k != "why"}))


def remember(launch: dict, config, microseconds: float) -> None:
    record = launch | {"config": _fields_of(config), "microseconds": round(microseconds, 3)}
    path, key = _file(), _key(launch)
    with _remembering:
        _choices_in(path)[key] = record
        _unwritten.setdefault(path, {})[key] = record
        _write(path)


def records() -> list[dict]:
    """All that is remembered, of whatever version, device and problem."""
    return list(_choices_in(_file()).values())


def _choices_in(path: Path) -> dict[str, dict]:
    if path not in _choices:
        _choices[path] = _read(path)
    return _choices[path]


def _read(path: Path) -> dict[str, dict]:
    """What the file holds. It is data, and of no one that is to be trusted: whatever in it is not
    as we write it is passed over."""
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ValueError("it is no file")
            text = file.read(_LARGEST + 1)
        if len(text) > _LARGEST:
            raise ValueError(f"it is larger than {_LARGEST} bytes")
        records = json.loads(text)
        if not isinstance(records, list):
            raise ValueError("it holds no list")
        choices = {_key(record): record for record in records if _is_choice(record)}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        _warn("read", path, f"{path} cannot be read and is ignored: {error}")
        return {}
    if len(choices) < len(records):
        _warn("read", path, f"{path} holds {len(records) - len(choices)} entries that are ignored")
    return choices


def _open_without_waiting(path, flags):
    return os.open(path, flags | os.O_NONBLOCK)  # a pipe would wait for its writer


def _is_choice(record) -> bool:
    """One that `remember` may have made: flat, for what is nested deeply cannot be written."""
    if not isinstance(record, dict) or record.keys() != {*_IDENTITY, "config", "microseconds"}:
        return False
    nested = record["problem"], record["config"]
    if not all(isinstance(fields, dict) for fields in nested):
        return False
    flat = [value for key, value in record.items() if key not in ("problem", "config")]
    flat += [value for fields in nested for value in fields.values()]
    return all(isinstance(value, str | int | float) for value in flat)


def _write(path: Path) -> None:
    """Adds what this process has measured to the file, which is whole at any moment; what cannot
    be written now is tried again with the next choice."""
    part = path.with_suffix(".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(".lock")):
            try:
                merged = _read(path)
                for key, record in _unwritten[path].items():
                    merged.pop(key, None)  # to the end: the youngest
                    merged[key] = record
                with part.open("w") as file:
                    json.dump(list(merged.values())[-_MOST:], file, indent=1)
                    file.flush()
                    os.fsync(file.fileno())  # a crash must not leave a name without its bytes
                os.replace(part, path)
                _choices[path] = merged
            finally:
                part.unlink(missing_ok=True)
        _unwritten[path].clear()
    except OSError as error:
        _warn("write", path, f"what was measured cannot be written to {path}: {error}")


@contextlib.contextmanager
def _locked(path: Path):
    """One process at a time."""
    with path.open("w") as lock:
        until = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.01)
        yield


_warned: set[tuple] = set()


def _warn(doing: str, path: Path, text: str) -> None:
    """Once for a file."""
    if (doing, path) not in _warned:
        _warned.add((doing, path))
        warnings.warn(f"fastconv: {text}", RuntimeWarning, stacklevel=2)
