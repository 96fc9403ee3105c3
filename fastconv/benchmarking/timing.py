"""Fair timing of several ways to do the same thing.

A shared machine drifts: a way measured first and another measured a second later see different
clocks. So all ways are timed in turns, round after round, and compared by medians; ratios are taken
within a round, where both sides saw the same machine.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """One way's seconds a call, one sample a round; `calls` were averaged in each sample."""

    samples: tuple[float, ...]
    calls: int

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    def percentile(self, percent: float) -> float:
        """The sample below which `percent` of all samples lie, linear between neighbours."""
        return _percentile(self.samples, percent)

    @property
    def spread(self) -> float:
        """(p90 - p10) / median: above 0.2, distrust small differences."""
        return (self.percentile(90) - self.percentile(10)) / self.median


@dataclass(frozen=True)
class Ratio:
    """How many times as long one way takes as another: of the medians, and 80 % of all rounds."""

    of_medians: float
    low: float
    high: float


def _percentile(samples, percent: float) -> float:
    ordered = sorted(samples)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def ratio(numerator: Timing, denominator: Timing) -> Ratio:
    """The time of one way over the time of another: above 1, the second is faster.

    Raises:
        ValueError: the two were not timed in the same rounds.
    """
    if len(numerator.samples) != len(denominator.samples):
        raise ValueError(
            "a ratio needs two ways timed in the same rounds, but they have "
            f"{len(numerator.samples)} and {len(denominator.samples)} samples"
        )
    rounds = [a / b for a, b in zip(numerator.samples, denominator.samples, strict=True)]
    return Ratio(
        numerator.median / denominator.median, _percentile(rounds, 10), _percentile(rounds, 90)
    )


class _CpuClock:
    """Seconds a call, by the wall clock."""

    def sample(self, fn: Callable[[], object], calls: int) -> float:
        began = time.perf_counter()
        for _ in range(calls):
            fn()
        return (time.perf_counter() - began) / calls


class _CudaClock:
    """Seconds a call on the GPU, between two events on the current stream.

    With `cold_cache`, a buffer of four times the L2 cache is written first, outside the timed
    window: a network's layer finds its input in L2 only sometimes, a loop over one layer always,
    which flatters small shapes. The write also keeps the GPU busy while the host enqueues, so the
    events time the kernels and not the host. It holds for one call a sample.
    """

    def __init__(self, device: torch.device, cold_cache: bool):
        self.device = device
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 1 << 26
        self.flush = (
            torch.empty(4 * cache, dtype=torch.uint8, device=device) if cold_cache else None
        )

    def sample(self, fn: Callable[[], object], calls: int) -> float:
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        if self.flush is not None:
            calls = 1
            self.flush.zero_()
        begin.record()
        for _ in range(calls):
            fn()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3 / calls


def time_interleaved(
    ways: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    sample_seconds: float = 0.01,
    warm_up: int = 3,
    device: torch.device | str = "cpu",
    cold_cache: bool = True,
    limit_seconds: float = math.inf,
) -> dict[str, Timing]:
    """Time every way in turns.

    Each way is called `warm_up` times, then calibrated so that one sample lasts about
    `sample_seconds` (at least one call); then come the rounds, each starting with another way, with
    Python's garbage collector at rest.

    Args:
        ways: name -> a function of no arguments.
        rounds: samples a way.
        sample_seconds: about how long a sample lasts.
        warm_up: calls before anything is timed.
        device: where the ways run; on a GPU, CUDA events are the clock.
        cold_cache: on a GPU, empty the L2 cache before every sample.
        limit_seconds: begin no round after this time, once there are three: on a busy machine
            samples last longer than was planned.

    Returns:
        name -> :class:`Timing`, in the order given.
    """
    for name, value, least in (("rounds", rounds, 1), ("warm_up", warm_up, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, but is {value}")
    device = torch.device(device)
    clock = _CudaClock(device, cold_cache) if device.type == "cuda" else _CpuClock()
    # Without a cold cache a GPU sample averages many calls, as on the CPU.
    one_call = device.type == "cuda" and cold_cache
    calls = {}
    for name, fn in ways.items():
        for _ in range(warm_up):
            fn()
        # The faster of two estimates: an estimate that met a disturbance would make samples short.
        estimate = min(clock.sample(fn, 1), clock.sample(fn, 1))
        calls[name] = 1 if one_call else max(1, round(sample_seconds / max(estimate, 1e-9)))
    samples = {name: [] for name in ways}
    names = list(ways)
    collecting = gc.isenabled()
    gc.disable()
    began = time.perf_counter()
    try:
        for number in range(rounds):
            if number >= 3 and time.perf_counter() - began > limit_seconds:
                break
            first = number % max(len(names), 1)
            for name in names[first:] + names[:first]:
                samples[name].append(clock.sample(ways[name], calls[name]))
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(samples[name]), calls[name]) for name in names}
