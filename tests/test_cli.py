"""The command line as a user meets it: in this process where that is enough, else in its own."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import digits
import fastconv
from fastconv import __main__ as cli
from fastconv import _extension, demo
from fastconv.benchmarking import peers
from fastconv.benchmarking.timing import Timing
from fastconv.models import lenet5
from fastconv.training.loop import evaluate


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def run(capsys, *arguments):
    """Exit status, stdout and stderr of one command."""
    try:
        status = cli.main(list(arguments))
    except SystemExit as stopped:
        status = stopped.code
    return status, *capsys.readouterr()


def start(*arguments, root=None, **environment):
    """`python -m fastconv ...` in a process of its own."""
    root = root or Path(fastconv.__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-m", "fastconv", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        # Where the tests run in the background of a script, SIGINT is ignored, and so here.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


# ---- the frame ----


OPTIONS = {
    "demo": ("--form --epochs --data --data-root --device --seed --plot --save --no-timing"),
    "train": (
        "--model --data --data-root --epochs --stop-after --batch-size --optimizer --lr --momentum "
        "--weight-decay --schedule --augment --seed --device --amp --compile --sync-bn "
        "--num-classes --in-channels --image-size --workers --weights --out --resume"
    ),
    "info": "",
    "explain": (
        "--input --filter --stride --padding --dilation --groups --dtype --layout --direction "
        "--device"
    ),
}


def test_help_lists_exactly_what_works(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    listed = re.findall(r"^    (\w+) ", out, re.MULTILINE)
    assert listed == list(OPTIONS)


@pytest.mark.parametrize("command", OPTIONS)
def test_every_command_has_help(capsys, command):
    status, out, _ = run(capsys, command, "--help")
    assert status == 0
    listed = re.findall(r"^  (--[\w-]+)", out, re.MULTILINE)
    assert listed == OPTIONS[command].split()


def test_version_and_no_command(capsys):
    assert run(capsys, "--version") == (0, f"fastconv {fastconv.__version__}\n", "")
    status, out, err = run(capsys)
    assert status == 2 and out == "" and err.startswith("usage: fastconv")


ERRORS = {
    "learn": "invalid choice: 'learn'",
    "demo --epochs 0": "--epochs: must be at least 1, but is 0",
    "demo --epochs many": "--epochs: expected a number, but got 'many'",
    "demo --seed -1": "--seed: must be at least 0, but is -1",
    "demo --form new": "--form: invalid choice: 'new'",
    "demo --data cifar": "--data: invalid choice: 'cifar'",
    "demo --device cuda": "--device cuda: torch .* finds no GPU",
    "demo --save /nowhere/lenet.pt": "there is no folder /nowhere",
    "demo --plot loss.xls": "must end in .png",
    "explain": "required: --input, --filter",
    "explain --input 1,2,3 --filter 1,2,3,3": "--input: expected N,C,H,W, but got '1,2,3'",
    "explain --input 1,2,8,8 --filter 1,2,x,3": "--filter: expected K,C/G,R,S, but got '1,2,x,3'",
    "explain --input 1,2,8,8 --filter 4,2,3,3 --stride 1,2,3": "--stride: expected a number or two",
    "explain --input 1,2,8,8 --filter 4,2,3,3 --padding best": "--padding: expected a number or",
    "explain --input 1,2,8,8 --filter 4,3,3,3": "expected input.* to have 3 channels, but got 2",
    "explain --input 1,2,8,8 --filter 4,2,3,3 --stride 0": "stride",
    "explain --input 1,2,8,8 --filter 4,2,9,9": "(?i)kernel size",
    "explain --input=-1,2,8,8 --filter 4,2,3,3": "-1",
}


@pytest.mark.parametrize("line", ERRORS)
def test_an_error_is_one_sentence_and_status_2(capsys, monkeypatch, line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run(capsys, *line.split())
    assert status == 2 and out == ""
    assert re.search(ERRORS[line], err) and err.startswith("fastconv")
    assert err.count("\n") == 1, "one line"


# ---- info and explain ----


def test_info_tells_versions_devices_and_every_kernel(capsys):
    status, out, _ = run(capsys, "info")
    assert status == 0
    for word in (fastconv.__version__, torch.__version__, "Python", "triton", "backends", "CPU"):
        assert word in out
    for row in fastconv.kernels():
        assert len(re.findall(rf"\b{row.name}\b", out)) == 1
    assert f"{len(fastconv.kernels())} kernels" in out


def test_info_shows_what_was_built(capsys, monkeypatch):
    facts = {"torch": "2.13.0", "arch_list": ["8.0", "9.0"], "cuda": None, "source_digest": "ab"}
    monkeypatch.setattr(_extension, "facts", facts)
    out = run(capsys, "info")[1]
    assert re.search(r"^  torch +2\.13\.0$", out, re.MULTILINE)
    assert re.search(r"^  arch list +8\.0, 9\.0$", out, re.MULTILINE)
    assert "  cuda " not in out and "source digest" not in out


def test_info_lists_gpus(capsys, monkeypatch):
    class Gpu:
        name, major, minor, multi_processor_count, total_memory = "H200", 9, 0, 132, 141 << 30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Gpu)
    assert "GPU 0" in (out := run(capsys, "info")[1])
    assert "H200, sm_90, 132 SMs, 141 GiB" in out


def test_info_and_explain_need_no_rich(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    status, out, _ = run(capsys, "info")
    assert status == 0 and fastconv.kernels()[0].name in out
    status, out, _ = run(capsys, "explain", "--input", "1,2,8,8", "--filter", "4,2,3,3")
    assert status == 0 and "runs: " in out
    monkeypatch.setitem(sys.modules, "rich.console", None)
    status, out, err = run(capsys, "demo")
    assert status == 2 and 'pip install "fastconv[demo]"' in err and err.count("\n") == 1


def test_explain_says_what_fastconv_explain_says(capsys):
    status, out, _ = run(
        capsys, "explain", "--input", "2,6,9,8", "--filter", "4,3,3,2", "--stride", "2,1",
        "--padding", "1", "--dilation", "1,2", "--groups", "2", "--dtype", "float64",
        "--layout", "nhwc", "--direction", "dgrad",
    )  # fmt: skip
    x = torch.empty(2, 6, 9, 8, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    w = torch.empty(4, 3, 3, 2, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    expected = fastconv.explain(x, w, None, (2, 1), (1, 1), (1, 2), 2, direction="dgrad")
    assert status == 0 and out == expected + "\n"
    sizes = ("--input", "1,2,8,8", "--filter", "4,2,3,3")
    assert run(capsys, "explain", *sizes, "--padding", "same")[0] == 0


def test_a_missing_extension_is_told(tmp_path):
    """A copy of the package without its compiled part."""
    shutil.copytree(
        Path(fastconv.__file__).parent,
        tmp_path / "fastconv",
        ignore=shutil.ignore_patterns("_C*", "__pycache__"),
    )
    program = """if True:
        from fastconv.__main__ import main
        assert main(["info"]) == 0
        assert main("explain --input 1,2,8,8 --filter 4,2,3,3".split()) == 2
        assert main(["demo"]) == 2
        assert main(["train"]) == 2
    """
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    for words in ("cannot be used", "found here: ", "To mend it"):
        assert words in done.stdout
    assert re.search(r"^backends +aten ", done.stdout, re.MULTILINE)
    why = "fastconv's compiled kernels cannot be used: `fastconv info` says why"
    errors = "".join(f"fastconv {command}: {why}\n" for command in ("explain", "demo", "train"))
    assert done.stderr.endswith(errors) and "Traceback" not in done.stderr


def test_the_reader_of_a_pipe_may_leave():
    process = start("info", PYTHONIOENCODING="ascii")
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=120) == 0 and err == ""


# ---- demo ----


@pytest.fixture
def quick(monkeypatch):
    """Few digits, and no time spent on reading them."""
    monkeypatch.setattr(demo, "load_digits", lambda source, root: digits.few())


def test_demo_from_end_to_end(quick, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        demo, "compare", functools.partial(peers.compare, rounds=1, sample_seconds=1e-4)
    )
    saved, plot = tmp_path / "lenet.pt", tmp_path / "loss.png"
    status, out, err = run(
        capsys, "demo", "--epochs", "2", "--device", "cpu", "--seed", "3",
        "--save", str(saved), "--plot", str(plot),
    )  # fmt: skip
    assert status == 0 and err == ""
    assert "640 to learn from, 1,000 held out" in out and "modern form, 61,706 param" in out
    epochs = re.findall(r"epoch +(\d) +loss (\d\.\d+) +train accuracy +(\d+\.\d+) %", out)
    assert [number for number, _, _ in epochs] == ["1", "2"]
    assert float(epochs[1][1]) < float(epochs[0][1]), "the loss falls"
    # What was printed is what the saved weights are worth, in torch.nn's hands.
    twin = peers.torch_twin(lenet5())
    twin.load_state_dict(torch.load(saved, weights_only=True))
    worth = evaluate(twin, digits.few().test_images, digits.few().test_labels)
    found = re.search(r"held out: accuracy (\d+\.\d+) %, macro F1 (0\.\d+)", out)
    assert float(found[1]) == pytest.approx(100 * worth.accuracy, abs=0.11)
    assert float(found[2]) == pytest.approx(worth.macro_f1, abs=0.002)
    assert worth.accuracy > 0.3, "better than guessing"
    for work in peers.WORKS:
        assert len(re.findall(rf"^ *{work} ", out, re.MULTILINE)) == 2
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_demo_of_the_classic_form_without_timing(quick, capsys, monkeypatch):
    monkeypatch.setattr(demo, "compare", None)  # calling it would fail
    status, out, _ = run(capsys, "demo", "--form", "classic", "--epochs", "1", "--no-timing")
    assert status == 0 and "classic form" in out and "torch.nn" not in out


def test_demo_names_a_damaged_file(capsys, tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (raw / f"{name}-ubyte").write_bytes(b"lost")
    status, _, err = run(capsys, "demo", "--data", "mnist", "--data-root", str(tmp_path))
    assert status == 2 and f"{raw / 'train-images-idx3-ubyte'} is damaged" in err
    assert err.count("\n") == 1


def test_full_disk_at_the_end_of_the_demo(quick, capsys, monkeypatch, tmp_path):
    def full(model, path):
        raise OSError(28, f"cannot write {path}: No space left on device")

    monkeypatch.setattr(demo, "save_checkpoint", full)
    path = tmp_path / "lenet.pt"
    status, out, err = run(capsys, "demo", "--epochs", "1", "--no-timing", "--save", str(path))
    assert status == 2 and "held out: accuracy" in out
    assert err.count("\n") == 1 and f"cannot write {path}: No space left" in err


def test_ctrl_c_keeps_what_was_learned(tmp_path):
    path = tmp_path / "lenet.pt"
    digits.write_idx_set(tmp_path)
    process = start(
        *("demo", "--epochs", "1000000", "--save", str(path)),
        *("--data", "mnist", "--data-root", str(tmp_path)),
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if line.startswith("epoch   1 "):
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    out = "".join(lines) + out
    assert process.returncode == 130, err
    assert err == "" and re.search(r"stopped by Ctrl-C after \d+ epochs? and \d+ steps", out)
    assert "held out: accuracy" in out and "macro F1" in out
    lenet5().load_state_dict(torch.load(path, weights_only=True))


def test_ctrl_c_while_loading_or_timing(quick, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "compare", interrupt)
    status, out, _ = run(capsys, "demo", "--epochs", "1")
    assert status == 130 and "held out: accuracy" in out and "stopped by Ctrl-C" in out
    monkeypatch.setattr(demo, "load_digits", interrupt)
    assert run(capsys, "demo")[0] == 130


def comparison(work, batch, ours, theirs):
    ours, theirs = Timing((ours,) * 5, 1), Timing((theirs,) * 5, 1)
    slow = Timing((1.0,) * 5, 1)
    return peers.Comparison(
        work, batch, {"NCHW": slow, "NHWC": ours}, {"NCHW": theirs, "NHWC": slow}
    )


def printed_race(capsys, comparisons):
    demo._print_race(Console(width=200, highlight=False), comparisons)
    return capsys.readouterr().out


def test_the_table_is_honest_about_who_wins(capsys):
    mixed = [comparison("inference", 1, 1e-4, 2e-4), comparison("training step", 64, 4e-3, 1e-3)]
    out = printed_race(capsys, mixed)
    won, lost = (
        line.split() for line in out.splitlines() if line.strip()[:5] in ("infer", "train")
    )
    assert won[1:7] == ["1", "100", "us", "NHWC", "200", "us"] and won[-1] == "fastconv"
    assert "2.00" in won and "0.25" in lost and lost[-1] == "torch.nn"
    assert "torch.nn is faster in: training step at batch 64." in out
    assert "busy" not in out and "to call" not in out
    out = printed_race(capsys, [comparison("inference", 1, 1e-3, 1e-3)])
    assert "Too close, or too noisy, to call: inference at batch 1." in out
    assert "is faster in" not in out


def test_a_busy_machine_is_told(capsys):
    noisy = Timing((1e-3, 1e-3, 2e-3, 4e-3), 1)
    calm = Timing((1e-3,) * 4, 1)
    out = printed_race(capsys, [peers.Comparison("inference", 1, {"NCHW": calm}, {"NCHW": noisy})])
    assert "The machine was busy" in out


@pytest.mark.parametrize(
    "error", [peers.Disagreement("scores: off by 3"), RuntimeError("conv2d [x] would fall back")]
)
def test_what_cannot_be_timed_is_said(quick, capsys, monkeypatch, error):
    def fail(work, *args, **kwargs):
        if work == "training step":
            raise error
        return comparison(work, 1, 1e-3, 1e-3)

    monkeypatch.setattr(demo, "compare", fail)
    status, out, _ = run(capsys, "demo", "--epochs", "1")
    assert status == 0 and "LeNet-5: fastconv beside torch.nn" in out
    for batch in (1, 64):
        assert f"training step at batch {batch} was not timed: {error}\n" in out
    assert "training step  " not in out, "no such row"

    def fail_always(*args, **kwargs):
        raise error

    monkeypatch.setattr(demo, "compare", fail_always)
    status, out, _ = run(capsys, "demo", "--epochs", "1")
    assert status == 0 and "LeNet-5: fastconv beside" not in out
    assert out.count("was not timed") == 4


def test_devices(monkeypatch):
    for available, name in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert demo.choose_device("auto").type == name
        assert demo.choose_device("cpu").type == "cpu"


def test_extension_is_loaded_here():
    assert fastconv.available and _extension.load().cpu_isa() in ("portable", "avx2", "avx512")
