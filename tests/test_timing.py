"""The stopwatch, tested with a clock of our own: every expected number is exact."""

import gc
import io
import time

import pytest
import torch

from fastconv.benchmarking import tables, timing
from fastconv.benchmarking.timing import Timing, ratio, time_interleaved


class Machine:
    """Time passes only when a way runs; `slowdown(now)` says how busy the machine is."""

    def __init__(self, monkeypatch, slowdown=lambda now: 1.0):
        self.now = 0.0
        self.slowdown = slowdown
        self.log = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def way(self, name, seconds):
        def run():
            self.log.append(name)
            self.now += seconds * self.slowdown(self.now)

        return run


def test_medians_calls_and_order(monkeypatch):
    machine = Machine(monkeypatch)
    found = time_interleaved(
        {"a": machine.way("a", 0.5), "b": machine.way("b", 0.25), "c": machine.way("c", 2.0)},
        rounds=4, sample_seconds=1.0, warm_up=3,
    )  # fmt: skip
    assert list(found) == ["a", "b", "c"]
    assert {name: t.median for name, t in found.items()} == {"a": 0.5, "b": 0.25, "c": 2.0}
    assert {name: t.calls for name, t in found.items()} == {"a": 2, "b": 4, "c": 1}
    assert all(len(t.samples) == 4 and t.spread == 0 for t in found.values())
    preparation = "aaaaa" + "bbbbb" + "ccccc"  # three to warm up, two to estimate
    rounds = "aabbbbc" + "bbbbcaa" + "caabbbb" + "aabbbbc"  # each begins with the next way
    assert "".join(machine.log) == preparation + rounds


def test_a_time_limit_ends_the_rounds_but_not_before_the_third(monkeypatch):
    for limit, expected in ((0.0, 3), (4.5, 5), (100.0, 9)):
        machine = Machine(monkeypatch)
        found = time_interleaved(
            {"a": machine.way("a", 0.5), "b": machine.way("b", 0.5)},
            rounds=9, sample_seconds=0.5, limit_seconds=limit,
        )  # fmt: skip
        assert [len(t.samples) for t in found.values()] == [expected] * 2


def test_a_drifting_machine_does_not_bend_the_ratio(monkeypatch):
    machine = Machine(monkeypatch, slowdown=lambda now: 1 + now / 20)
    found = time_interleaved(
        {"a": machine.way("a", 0.02), "b": machine.way("b", 0.01)}, rounds=41, sample_seconds=0.01
    )
    assert max(found["a"].samples) > 1.05 * min(found["a"].samples), "it must have drifted"
    of = ratio(found["a"], found["b"])
    assert of.of_medians == pytest.approx(2, rel=2e-3)
    assert of.low == pytest.approx(2, rel=2e-3) and of.high == pytest.approx(2, rel=2e-3)


def test_percentiles_and_spread_are_the_textbooks():
    sample = Timing((5.0, 1.0, 4.0, 2.0, 3.0), 1)
    assert sample.median == 3
    assert [sample.percentile(p) for p in (0, 10, 50, 90, 100)] == pytest.approx(
        [1, 1.4, 3, 4.6, 5]
    )
    assert sample.spread == pytest.approx(3.2 / 3)
    assert Timing((7.0,), 1).percentile(90) == 7


def test_ratio_compares_within_rounds():
    slow, fast = Timing((2.0, 20.0, 4.0), 1), Timing((1.0, 10.0, 2.0), 1)
    of = ratio(slow, fast)
    assert (of.of_medians, of.low, of.high) == (2, 2, 2)
    with pytest.raises(ValueError, match="3 and 1 samples"):
        ratio(slow, Timing((1.0,), 1))


@pytest.mark.parametrize("name", ["rounds", "warm_up"])
def test_no_rounds_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, but is 0"):
        time_interleaved({"a": lambda: None}, **{name: 0})


def test_garbage_collection_rests_and_returns():
    seen = []
    time_interleaved({"a": lambda: seen.append(gc.isenabled())}, rounds=2, sample_seconds=1e-9)
    assert seen[-2:] == [False, False] and gc.isenabled()

    def fail():
        if not gc.isenabled():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        time_interleaved({"a": fail}, rounds=1, sample_seconds=1e-9)
    assert gc.isenabled()


def test_the_real_clock_ticks():
    found = time_interleaved(
        {"nothing": lambda: None, "nap": lambda: time.sleep(0.005)}, rounds=5, sample_seconds=1e-4
    )
    # A nap is never shorter than asked for, however busy the machine is.
    assert min(found["nap"].samples) >= 0.005 and found["nap"].calls == 1
    assert min(found["nothing"].samples) < 0.001 and found["nothing"].calls > 1


class Gpu:
    """torch.cuda as far as the stopwatch sees it: a stream that is a list."""

    def __init__(self, monkeypatch):
        self.now = 0.0  # in ms
        self.log = []
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                gpu.log.append("event")
                self.at = gpu.now

            def elapsed_time(self, end):
                return end.at - self.at

        class Properties:
            L2_cache_size = 1000

        class Buffer:
            def zero_(self):
                gpu.log.append("flush")
                gpu.now += 100

        def empty(size, dtype, device):
            assert size == 4000 and dtype is torch.uint8 and device.type == "cuda"
            return Buffer()

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: gpu.log.append("wait"))
        monkeypatch.setattr(timing.torch, "empty", empty)

    def kernel(self):
        self.log.append("kernel")
        self.now += 3


def test_gpu_times_one_call_with_a_cold_cache_outside_the_window(monkeypatch):
    gpu = Gpu(monkeypatch)
    found = time_interleaved({"a": gpu.kernel}, rounds=2, device="cuda")
    assert found["a"].samples == (0.003, 0.003) and found["a"].calls == 1
    assert gpu.log[-5:] == ["flush", "event", "kernel", "event", "wait"]


def test_gpu_times_many_calls_with_a_warm_cache(monkeypatch):
    gpu = Gpu(monkeypatch)
    found = time_interleaved(
        {"a": gpu.kernel}, rounds=2, device="cuda", cold_cache=False, sample_seconds=0.009
    )
    assert found["a"].samples == pytest.approx((0.003, 0.003)) and found["a"].calls == 3
    assert gpu.log[-6:] == ["event", "kernel", "kernel", "kernel", "event", "wait"]


COLUMNS = [("name", tables.LEFT), ("us", tables.RIGHT)]
ROWS = [["conv[0]", "9"], ["pool", "1234"]]


def test_plain_table_is_aligned():
    assert tables.plain_table("Times", COLUMNS, ROWS).splitlines() == [
        "Times",
        "name       us",
        "-------  ----",
        "conv[0]     9",
        "pool     1234",
    ]


def test_print_table_with_and_without_rich(monkeypatch):
    def printed():
        file = io.StringIO()
        tables.print_table("Times", COLUMNS, ROWS, file)
        return file.getvalue()

    rich = printed()
    monkeypatch.setitem(__import__("sys").modules, "rich", None)
    plain = printed()
    assert plain == tables.plain_table("Times", COLUMNS, ROWS) + "\n"
    assert rich != plain
    for word in ("Times", "name", "conv[0]", "1234"):
        assert word in rich


def test_wide_tables_are_not_wrapped_in_a_file():
    file = io.StringIO()
    tables.print_table("T", [(str(i), tables.LEFT) for i in range(30)], [["x" * 20] * 30], file)
    assert any(line.count("x") == 600 for line in file.getvalue().splitlines())


@pytest.mark.parametrize(
    "seconds, text",
    [
        (1.234e-6, "1.23 us"), (4.56e-5, "45.6 us"), (1.234e-4, "123 us"), (9.994e-4, "999 us"),
        (1.5e-3, "1.5 ms"), (0.0123, "12.3 ms"), (1.5, "1500 ms"),
    ],
)  # fmt: skip
def test_times_are_readable(seconds, text):
    assert tables.microseconds(seconds) == text
