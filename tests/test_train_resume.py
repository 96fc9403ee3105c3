"""`fastconv train --resume`: goes on exactly, after signals too, and refuses what does not fit."""

import errno
import os
import re
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from digits import few_pixels, make_folder
from fastconv import __main__ as cli
from fastconv.training import command, files, trainer
from fastconv.training.interrupts import Interrupts
from fastconv.training.trainer import Trainer
from train_runs import assert_same, checkpoint, learn, on_few_digits, refused, run, start

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def few(monkeypatch):
    on_few_digits(monkeypatch)


@pytest.fixture(scope="module")
def _stopped(tmp_path_factory):
    """The folder of a run that stopped after one of three epochs."""
    out = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patched:
        on_few_digits(patched)
        line = f"train --epochs 3 --stop-after 1 --schedule cosine --batch-size 32 --out {out}"
        assert cli.main([*line.split(), "--device", "cpu"]) == 0
    return out


@pytest.fixture
def stopped(few, _stopped, tmp_path, capsys):
    """That folder's copy, and the run's data."""
    shutil.copytree(_stopped, tmp_path / "stopped")
    return tmp_path / "stopped"


@pytest.mark.parametrize(
    "options",
    [
        ("--model", "fashion_cnn", "--augment", "--optimizer", "adamw"),  # dropout draws numbers
        ("--optimizer", "sgd", "--lr", "0.05", "--schedule", "one-cycle", "--amp"),
        ("--schedule", "cosine", "--amp", "float16"),  # a gradient scaler that counts steps
    ],
    ids=["dropout", "sgd bfloat16", "float16"],
)
def test_two_epochs_and_two_more_are_four(few, capsys, tmp_path, options):
    options = (*options, "--epochs", 4)
    learn(capsys, *options, "--out", tmp_path / "whole")
    learn(capsys, *options, "--out", tmp_path / "parts", "--stop-after", 2)
    assert len(checkpoint(tmp_path / "parts")["history"]) == 2
    text = learn(capsys, "--resume", tmp_path / "parts" / "last.pt", "--batch-size", 32)
    assert re.findall(r"^epoch +(\d)", text, re.MULTILINE) == ["3", "4"]
    whole = checkpoint(tmp_path / "whole")
    assert_same(whole, checkpoint(tmp_path / "parts"))
    both = [(tmp_path / folder / "best.pt").read_bytes() for folder in ("whole", "parts")]
    assert both[0] == both[1]
    assert (len(whole["scaler"]) > 0) == ("float16" in options)


def test_a_constant_rate_can_go_on_for_longer(few, capsys, tmp_path):
    learn(capsys, "--epochs", 2, "--out", tmp_path / "whole")
    learn(capsys, "--epochs", 1, "--out", tmp_path / "parts")
    learn(capsys, "--epochs", 2, "--out", tmp_path / "parts", "--resume")
    a, b = (checkpoint(tmp_path / name) for name in ("whole", "parts"))
    assert_same(a, b)
    before = (tmp_path / "parts" / "last.pt").read_bytes()
    text = learn(capsys, "--out", tmp_path / "parts", "--resume")
    assert "all 2 epochs are done" in text
    assert (tmp_path / "parts" / "last.pt").read_bytes() == before


# ---- signals ----


@pytest.mark.parametrize("moment", ["second step of epoch 2", "last step", "evaluation"])
def test_a_signal_between_any_two_steps(few, capsys, tmp_path, monkeypatch, moment):
    options = ("--model", "fashion_cnn", "--augment", "--epochs", 2)
    learn(capsys, *options, "--out", tmp_path / "whole")
    step, score = Trainer._step, trainer.score

    def interrupting_step(self, number, *rest):
        step(self, number, *rest)
        wanted = {"second step of epoch 2": (1, 1), "last step": (0, 3)}.get(moment)
        if (self.position.epoch, number) == wanted:
            signal.raise_signal(signal.SIGINT)

    def interrupting_score(*args):
        signal.raise_signal(signal.SIGINT)
        return score(*args)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_step", interrupting_step)
        if moment == "evaluation":
            patched.setattr(trainer, "score", interrupting_score)
        status, out, err = run(
            capsys, "--device", "cpu", "--batch-size", 32, *options, "--out", tmp_path / "parts"
        )
    assert status == 130 and err == ""
    epoch, steps = {"second step of epoch 2": (2, 2)}.get(moment, (1, 4))
    assert f"stopped by Ctrl-C in epoch {epoch} after {steps} of 4 steps" in out
    assert f"--resume {tmp_path}/parts/last.pt goes on" in out
    learn(capsys, "--out", tmp_path / "parts", "--resume")
    assert_same(checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "parts"))


def test_signals():
    before = signal.getsignal(signal.SIGINT)  # a background job's is ignored
    with pytest.raises(KeyboardInterrupt), Interrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.received == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    with pytest.raises(SystemExit) as stopped, Interrupts() as interrupts:
        signal.raise_signal(signal.SIGTERM)
        assert interrupts.received == signal.SIGTERM
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.code == 143
    with Interrupts(patient=True) as interrupts:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    assert interrupts.received == signal.SIGINT
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_as_a_user_presses_it(capsys, tmp_path):
    make_folder(tmp_path / "images", 3)
    out = tmp_path / "out"
    process = start(
        *("-m", "fastconv", "train", "--data", f"folder:{tmp_path / 'images'}", "--workers", 1),
        *("--epochs", 100000, "--out", out, "--in-channels", 1, "--device", "cpu"),
    )
    assert any(line.startswith("epoch   1 ") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == "" and "stopped by Ctrl-C" in rest, err
    epochs = len(checkpoint(out)["history"])
    assert epochs >= 1
    text = learn(capsys, "--resume", out / "last.pt", "--stop-after", 1, "--batch-size", 64)
    assert re.search(rf"^epoch +{epochs + 1} ", text, re.MULTILINE)


# ---- what a resumed run is held to ----


@pytest.mark.parametrize(
    "options, message",
    [
        (("--model", "simple_cnn"), "--model simple_cnn was given, but .* trained with lenet5"),
        (("--lr", "0.5"), "--lr 0.5 was given, but .* trained with 0.001"),
        (("--epochs", "5"), "--epochs 5 was given, .* 3, whose cosine schedule ends there"),
        (("--amp",), "--amp bfloat16 was given, but .* trained with None"),
        (("--weights", "w.pt"), "--resume and --weights exclude each other"),
    ],
)
def test_a_resumed_run_cannot_be_another(stopped, capsys, options, message):
    before = (stopped / "last.pt").read_bytes()
    error = refused(capsys, "--resume", stopped / "last.pt", *options)
    assert re.search(message, error)
    assert (stopped / "last.pt").read_bytes() == before


def test_a_resumed_run_takes_nobodys_place(stopped, capsys, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "last.pt").write_text("kept")
    error = refused(capsys, "--resume", stopped / "last.pt", "--out", tmp_path / "other")
    assert "other/last.pt is there already" in error
    assert (tmp_path / "other" / "last.pt").read_text() == "kept"
    learn(capsys, "--resume", stopped / "last.pt", "--out", tmp_path / "new")
    assert len(checkpoint(tmp_path / "new")["history"]) == 3


def test_resuming_on_other_data(stopped, capsys, monkeypatch):
    less = replace(few_pixels(), train_images=few_pixels().train_images[:99])
    less = replace(less, train_labels=few_pixels().train_labels[:99])
    monkeypatch.setattr(command, "load_pixels", lambda source, root: less)
    error = refused(capsys, "--resume", stopped / "last.pt")
    assert re.search(r"trained with images .*: \[100, 40\], but now it is \[99, 40\]", error)
    state = checkpoint(stopped)
    state["processes"] *= 2
    torch.save(state, stopped / "last.pt")
    monkeypatch.setattr(command, "load_pixels", lambda source, root: few_pixels())
    error = refused(capsys, "--resume", stopped / "last.pt")
    assert "trained with processes: 2, but now it is 1" in error


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("optimizer"), "is damaged: it has no 'optimizer'"),
        (lambda state: state["arguments"].pop("lr"), "does not say how it was trained"),
        (lambda state: state.update(version=9), "a checkpoint of version 9, this is version 1"),
        (lambda state: state.update(optimizer={}), "is damaged: 'param_groups'"),
        (lambda state: state["model"].pop("features.0.bias"), "lacks features.0.bias"),
        (lambda state: state["processes"].clear(), "processes: 0, but now it is 1"),
        (lambda state: state.update(kind="else"), "is no checkpoint of fastconv train"),
    ],
)
def test_checkpoints_that_lack_something(stopped, capsys, change, message):
    state = checkpoint(stopped)
    change(state)
    torch.save(state, stopped / "last.pt")
    before = (stopped / "last.pt").read_bytes()
    assert message in refused(capsys, "--resume", stopped / "last.pt")
    assert (stopped / "last.pt").read_bytes() == before


def test_a_state_dict_is_no_checkpoint_but_starts_one(stopped, capsys, tmp_path):
    best, last = stopped / "best.pt", stopped / "last.pt"
    assert "--weights starts from weights" in refused(capsys, "--resume", best)
    for path in (best, last):  # either holds weights
        out = tmp_path / path.stem
        learn(capsys, "--weights", path, "--epochs", 1, "--lr", 1e-12, "--out", out)
        for name, value in checkpoint(out)["model"].items():
            torch.testing.assert_close(value, checkpoint(stopped)["model"][name])


# ---- what must not cost the last checkpoint ----


def test_lost_numbers_keep_the_last_checkpoint(stopped, capsys, monkeypatch):
    before = (stopped / "last.pt").read_bytes()
    lost = trainer._loss

    def loss(output, labels):
        total, scores = lost(output, labels)
        return total * float("inf"), scores

    with monkeypatch.context() as patched:
        patched.setattr(trainer, "_loss", loss)
        error = refused(capsys, "--resume", stopped / "last.pt")
    assert "the loss is no longer a finite number in epoch 2" in error and "is kept" in error
    assert (stopped / "last.pt").read_bytes() == before
    learn(capsys, "--resume", stopped / "last.pt", "--stop-after", 1)


def test_a_full_disk_keeps_the_old_checkpoint(stopped, capsys, monkeypatch):
    before = {name: (stopped / name).read_bytes() for name in os.listdir(stopped)}

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(files.os, "fsync", full)
        error = refused(capsys, "--resume", stopped / "last.pt")
    assert re.search(r"cannot write .*\.pt: No space left on device", error)
    assert {name: (stopped / name).read_bytes() for name in os.listdir(stopped)} == before
