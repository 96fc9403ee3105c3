"""Runs of `fastconv train`: called here or in a process of their own, and what they leave."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

import fastconv
from digits import few_pixels
from fastconv import __main__ as cli
from fastconv.training import command


def on_few_digits(patch):
    """Few digits, and no time spent on pictures."""
    patch.setattr(command, "load_pixels", lambda source, root: few_pixels())
    patch.setattr(command, "_draw", lambda trainer, classes, out: None)


def run(capsys, *arguments):
    """Exit status, stdout and stderr of one `fastconv train`."""
    try:
        status = cli.main(["train", *map(str, arguments)])
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


def learn(capsys, *arguments):
    """Of a run that succeeds: what it printed."""
    status, out, err = run(capsys, "--device", "cpu", "--batch-size", 32, *arguments)
    assert (status, err) == (0, "")
    return out


def refused(capsys, *arguments):
    """Of a run that fails: its one sentence."""
    status, out, err = run(capsys, "--device", "cpu", *arguments)
    assert status == 2 and err.startswith("fastconv train: ") and err.count("\n") == 1, err
    return err


def checkpoint(folder):
    return torch.load(Path(folder) / "last.pt", weights_only=True)


def assert_same(a, b, path=""):
    """Equal to the last bit, whatever they hold; how long it took aside."""
    assert type(a) is type(b), path
    if isinstance(a, dict):
        assert list(a) == list(b), path
        for name in a:
            if name != "seconds":
                assert_same(a[name], b[name], f"{path}.{name}")
    elif isinstance(a, list):
        assert len(a) == len(b), path
        for place, (one, other) in enumerate(zip(a, b, strict=True)):
            assert_same(one, other, f"{path}[{place}]")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    else:
        assert a == b, path


def start(*arguments, **environment):
    """`python ARGUMENTS` in a process of its own, whose Ctrl-C works in background jobs too."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(fastconv.__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
