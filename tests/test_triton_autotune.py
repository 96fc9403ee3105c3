"""Autotuning: when configurations are timed, which one then runs, and what is kept of it. A clock
of the test's own says how long they take; the kernels run by Triton's interpreter."""

import errno
import fcntl
import json
import multiprocessing
import os
import sys
import threading
import time
import warnings

import pytest
import torch

import fastconv
import fastconv.functional as ff
from fastconv import triton_kernels

pytest.importorskip("triton", minversion="3.6")

from fastconv.triton_kernels import interpreter, runtime, table  # noqa: E402
from fastconv.triton_kernels.problem import INTERPRETED  # noqa: E402

autotune = sys.modules["fastconv.triton_kernels.autotune"]
pytestmark = pytest.mark.skipif(not runtime.interpreted, reason="needs TRITON_INTERPRET=1")

ROW = "max_pool2d_triton_fprop"


class Tuning:
    """What is timed, by a fake clock: `cost` gives a configuration's microseconds."""

    def __init__(self, folder):
        self.file = folder / "autotune.json"
        self.now = 0.0
        self.compile_time = 0.0
        self.cost = lambda config: 10.0
        self.broken = ()
        self.prepared = []  # configurations, in order; None is choose's
        self.rounds = []

    def runner(self, make, row, problem, device, config):
        self.prepared.append(config)
        self.now += self.compile_time
        if config in self.broken:
            raise RuntimeError("out of resource: shared memory")
        runner = make(row, problem, device, config)

        def run(pointers):
            runner(pointers)

        run.config = config
        return run

    def timer(self, calls):
        self.rounds.append([call.func.config for call in calls])
        for call in calls:
            call()
        times = [self.cost(config) for config in self.rounds[-1]]
        self.now += sum(times) * 1e-6
        return times

    def entries(self):
        return json.loads(self.file.read_text())

    def restart(self):
        """As in a new process."""
        autotune._choices.clear()
        autotune._unwritten.clear()
        autotune._unfinished.clear()
        autotune._warned.clear()
        triton_kernels.forget_runners()
        self.prepared.clear()
        self.rounds.clear()


@pytest.fixture
def tuning(monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path))
    monkeypatch.delenv("FASTCONV_AUTOTUNE", raising=False)
    monkeypatch.setattr(interpreter, "check_overflow", False)
    tuning = Tuning(tmp_path)
    make = table.configured_runner
    monkeypatch.setattr(table, "configured_runner", lambda *a: tuning.runner(make, *a))
    monkeypatch.setattr(autotune, "_clock", lambda: tuning.now)
    monkeypatch.setattr(autotune, "_timer_for", lambda device: lambda: tuning.timer)
    for name in ("_choices", "_unwritten", "_unfinished"):
        monkeypatch.setattr(autotune, name, {})
    monkeypatch.setattr(autotune, "_warned", set())
    triton_kernels.forget_runners()
    yield tuning
    triton_kernels.forget_runners()


X = torch.randn(1, 2, 6, 6)


def pool(x=X):
    with fastconv.backend("triton"):
        return ff.max_pool2d(x, 2)


def configs():
    """The table's entries for pool's problem."""
    problem = table.problem_of(ROW, ("max", 1, 2, 6, 6, 3, 3, 2, 2, 2, 2))
    return table.ROWS[ROW].configs_for(problem, INTERPRETED)


def slow_but(fastest):
    return lambda config: 5.0 if config == fastest else 9.0


# When, and which


def test_nothing_is_timed_unless_it_is_asked_for(tuning):
    pool()
    assert tuning.prepared == [None] and tuning.rounds == []
    assert not tuning.file.exists()


@pytest.mark.parametrize("fastest", range(len(configs())))
@pytest.mark.parametrize("how", ["block", "environment"])
def test_the_fastest_runs(tuning, monkeypatch, fastest, how):
    tuning.cost = slow_but(configs()[fastest])
    if how == "environment":
        monkeypatch.setenv("FASTCONV_AUTOTUNE", "1")
        results = [pool(), pool()]
    else:
        with triton_kernels.autotune():
            results = [pool(), pool()]
    assert tuning.prepared == [*configs(), configs()[fastest]]
    assert tuning.rounds == [list(configs())] * autotune.ROUNDS
    for result in results:
        assert torch.equal(result, torch.nn.functional.max_pool2d(X, 2))
    (entry,) = tuning.entries()
    assert entry["config"] == autotune._fields_of(configs()[fastest])
    assert "why" not in entry["config"]
    assert entry["row"] == ROW and entry["problem"]["W"] == 6 and entry["microseconds"] == 5.0


def test_a_median_is_not_moved_by_a_hiccup(tuning):
    times = {config: [8.0, 8.0, 8.0] for config in configs()}
    times[configs()[-1]] = [7.0, 900.0, 7.0]
    tuning.cost = lambda config: times[config][len(tuning.rounds) % 3]
    with triton_kernels.autotune():
        pool()
    assert tuning.prepared[-1] == configs()[-1]


def test_problems_known_before_the_block_are_timed_too(tuning):
    pool()
    tuning.cost = slow_but(configs()[-1])
    with triton_kernels.autotune():
        pool()
    assert tuning.prepared == [None, *configs(), configs()[-1]]
    pool()
    assert len(tuning.rounds) == autotune.ROUNDS


def test_the_block_holds_for_other_threads_and_ends(tuning):
    with triton_kernels.autotune(), triton_kernels.autotune(seconds=7):
        assert autotune.seconds_asked() == 7
        thread = threading.Thread(target=pool)
        thread.start()
        thread.join()
    assert tuning.rounds
    assert autotune.seconds_asked() == 0
    with pytest.raises(ZeroDivisionError), triton_kernels.autotune():
        1 / 0  # noqa: B018
    assert autotune.seconds_asked() == 0
    with pytest.raises(ValueError, match="positive"), triton_kernels.autotune(seconds=0):
        pass


def test_the_environment_has_the_last_word(tuning, monkeypatch):
    tuning.cost = slow_but(configs()[-1])
    with triton_kernels.autotune():
        pool()
    tuning.restart()
    monkeypatch.setenv("FASTCONV_AUTOTUNE", "0")
    with triton_kernels.autotune():
        pool()
    assert tuning.prepared == [None]


def test_compiling_goes_on_at_the_next_launch(tuning):
    """Where it takes longer than a launch may."""
    tuning.compile_time = 3.0
    with triton_kernels.autotune(seconds=2):
        for launches in range(1, len(configs()) + 1):
            pool()
            tried = [config for config in tuning.prepared if config is not None]
            assert tried[: len(configs())] == list(configs())[:launches]
        assert len(tuning.rounds) == autotune.ROUNDS
        pool()
    assert len(tuning.rounds) == autotune.ROUNDS


def test_measuring_ends_in_time(tuning):
    tuning.cost = lambda config: 0.4e6
    with triton_kernels.autotune(seconds=2):
        pool()
    assert 1 <= len(tuning.rounds) <= 2
    assert tuning.entries()


def test_a_configuration_that_cannot_run_is_dropped(tuning):
    tuning.broken = configs()[:1]
    with triton_kernels.autotune():
        pool()
    assert tuning.rounds[0] == list(configs())[1:]
    tuning.restart()
    tuning.file.unlink()
    tuning.broken = configs()
    with triton_kernels.autotune():
        assert torch.equal(pool(), torch.nn.functional.max_pool2d(X, 2))  # choose's still runs
        pool()
    assert tuning.prepared == [*configs(), None] and not tuning.file.exists()


def test_nothing_is_timed_while_a_graph_is_captured(tuning, monkeypatch):
    with triton_kernels.autotune():
        with monkeypatch.context() as capture:
            capture.setattr(autotune, "is_captured", lambda device: True)
            pool()
            assert tuning.prepared == [None]
        pool()
    assert tuning.rounds


def test_the_interpreter_itself_is_not_timed(tuning, monkeypatch):
    monkeypatch.undo()
    assert autotune._timer_for(-1) is None and autotune._timer_for(0) is not None


def test_an_interrupt_leaves_nothing_half_done(tuning, monkeypatch):
    def interrupt(calls):
        raise KeyboardInterrupt

    with triton_kernels.autotune():
        pool()
        with monkeypatch.context() as broken:
            broken.setattr(tuning, "timer", interrupt)
            with pytest.raises(KeyboardInterrupt):
                pool(torch.randn(1, 2, 8, 8))
        assert len(tuning.entries()) == 1
        pool(torch.randn(1, 2, 8, 8))
    assert len(tuning.entries()) == 2


# What is kept


def test_another_process_runs_what_was_measured(tuning):
    tuning.cost = slow_but(configs()[-1])
    with triton_kernels.autotune():
        pool()
    tuning.restart()
    pool()
    assert tuning.prepared == [configs()[-1]] and not tuning.rounds
    tuning.restart()
    with triton_kernels.autotune():
        pool()
    assert not tuning.rounds
    tuning.restart()
    pool(torch.randn(2, 2, 6, 6))  # another problem
    assert tuning.prepared == [None]


@pytest.mark.parametrize("field", autotune._IDENTITY)
def test_a_choice_is_for_what_it_was_made_for(tuning, field):
    with triton_kernels.autotune():
        pool()
    (entry,) = tuning.entries()
    entry[field] = {**entry["problem"], "N": 2} if field == "problem" else "another"
    tuning.file.write_text(json.dumps([entry]))
    tuning.restart()
    pool()
    assert tuning.prepared == [None]


def test_only_entries_of_the_table_are_run(tuning):
    with triton_kernels.autotune():
        pool()
    (entry,) = tuning.entries()
    for name in entry["config"]:
        entry["config"][name] = 2**40
    tuning.file.write_text(json.dumps([entry]))
    tuning.restart()
    pool()
    assert tuning.prepared == [None]
    with triton_kernels.autotune():
        pool()
    assert tuning.rounds and len(tuning.entries()) == 1


DAMAGED = {
    "empty": b"",
    "cut off": b'[{"fastconv": "0.1',
    "no list": b'{"a": 1}',
    "no records": b'[1, null, "x", {"row": 3}, {"row": "a", "config": [], "problem": {}}]',
    "no text": b"\xff\xfe\x00\x80" * 9,
    "deep": b"[" * 10**6,
    "deep in a record": b'[{"fastconv":"","triton":"","device":"","row":"","config":{},'
    b'"microseconds":1,"problem":' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}]",
    "code": b"__import__('os').abort()",
    "a huge number": b"[" + b"9" * 10_000 + b"]",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_ignored_with_one_warning(tuning, damage):
    tuning.file.write_bytes(DAMAGED[damage])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        pool()
        with triton_kernels.autotune():
            pool()
    assert len([w for w in seen if "autotune.json" in str(w.message)]) == 1
    assert tuning.prepared[0] is None
    tuning.restart()
    pool()
    assert tuning.prepared[0] is not None  # it has been replaced


def test_what_is_no_file_is_not_waited_for(tuning):
    os.mkfifo(tuning.file)
    with pytest.warns(RuntimeWarning, match="no file"):
        pool()


def test_a_file_too_large_is_not_read(tuning, monkeypatch):
    monkeypatch.setattr(autotune, "_LARGEST", 1000)
    tuning.file.write_text("[" + "1," * 1000 + "1]")
    with pytest.warns(RuntimeWarning, match="larger"):
        pool()


def test_the_oldest_choices_go_first(tuning, monkeypatch):
    monkeypatch.setattr(autotune, "_MOST", 2)
    with triton_kernels.autotune():
        for size in (6, 8, 10):
            pool(torch.randn(1, 2, size, 6))
    assert [entry["problem"]["H"] for entry in tuning.entries()] == [8, 10]


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_full_disk_costs_a_warning(tuning, monkeypatch, where):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    tuning.cost = slow_but(configs()[-1])
    with triton_kernels.autotune():
        with monkeypatch.context() as broken:
            broken.setattr(os, where, full)
            with pytest.warns(RuntimeWarning, match="No space left") as seen:
                pool()
                pool(torch.randn(1, 2, 8, 8))
        assert len(seen) == 1
        assert tuning.prepared[len(configs())] == configs()[-1]  # kept in this process
        assert not tuning.file.exists() and not tuning.file.with_suffix(".part").exists()
        pool(torch.randn(1, 2, 10, 10))
    assert len(tuning.entries()) == 3  # and written when there is room


def test_a_folder_that_cannot_be_written_costs_a_warning(tuning, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "file" / "folder"))
    with pytest.warns(RuntimeWarning, match="cannot be written") as seen, triton_kernels.autotune():
        pool()
        pool(torch.randn(1, 2, 8, 8))
    assert len(seen) == 1


def test_a_lock_that_is_never_released_costs_a_warning(tuning, monkeypatch):
    monkeypatch.setattr(autotune, "_PATIENCE", 0.05)
    with tuning.file.with_suffix(".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.warns(RuntimeWarning, match="cannot be written"), triton_kernels.autotune():
            pool()
    assert not tuning.file.exists()


def _write_many(folder, writer):
    os.environ["FASTCONV_CACHE"] = str(folder)
    for i in range(20):
        launch = dict.fromkeys(autotune._IDENTITY, f"{writer} {i}") | {"problem": {}}
        autotune.remember(launch, configs()[0], 1.0)


def test_processes_lose_nothing_of_each_other(tuning, tmp_path):
    """Eighty choices, written twenty at a time by four processes at once; a reader sees a whole
    file at any moment."""
    context = multiprocessing.get_context("fork")
    work = [context.Process(target=_write_many, args=(tmp_path, i)) for i in range(4)]
    for process in work:
        process.start()
    until = time.monotonic() + 60
    while any(process.is_alive() for process in work) and time.monotonic() < until:
        if tuning.file.exists():
            tuning.entries()
    for process in work:
        process.join()
        assert process.exitcode == 0
    assert len(tuning.entries()) == 80
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"autotune.json", "autotune.lock"}
