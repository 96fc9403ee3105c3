"""`fastconv train`: what it learns and writes, what it refuses, and several processes."""

import json
import os
import pickle
import re
import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn

import digits
import fastconv
from digits import HELD_OUT, few_pixels, make_folder
from fastconv import __main__ as cli
from fastconv.models import lenet5
from fastconv.training import command
from fastconv.training.batches import Preparation, TensorImages
from fastconv.training.distributed import World
from fastconv.training.metrics import confusion_matrix
from fastconv.training.trainer import Plan, Trainer
from train_runs import assert_same, checkpoint, learn, on_few_digits, refused, run, start

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def few(monkeypatch):
    on_few_digits(monkeypatch)


# ---- a run from end to end ----


def test_a_run_writes_everything(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "load_pixels", lambda source, root: few_pixels())
    out = tmp_path / "new" / "run"
    text = learn(capsys, "--epochs", 2, "--out", out, "--seed", 5)
    assert "100 to learn from, 40 held out, 10 classes" in text
    assert "lenet5, 61,706 parameters, 1x28x28 images, seed 5" in text
    assert "adam, learning rate 0.001, constant, batches of 32, 2 epochs" in text
    names = {"last.pt", "best.pt", "metrics.json", "loss_curve.png", "confusion_matrix.png",
             "feature_maps.png"}  # fmt: skip
    assert set(os.listdir(out)) == names and all(name in text for name in names)
    for name in names:
        if name.endswith("png"):
            assert (out / name).read_bytes().startswith(b"\x89PNG")

    metrics = json.loads((out / "metrics.json").read_text())
    printed = re.findall(
        r"epoch +(\d) +loss (\d\.\d+) +accuracy +(\d+\.\d+) % +held out: loss (\d\.\d+) +"
        r"accuracy +(\d+\.\d+) % +macro F1 (\d\.\d+)",
        text,
    )
    assert len(printed) == len(metrics["epochs"]) == 2
    for numbers, epoch in zip(printed, metrics["epochs"], strict=True):
        judged = epoch["held_out"]
        known = (epoch["number"], epoch["loss"], 100 * epoch["accuracy"], judged["loss"],
                 100 * judged["accuracy"], judged["macro_f1"])  # fmt: skip
        assert [float(n) for n in numbers] == pytest.approx(known, abs=6e-3)
    confusion = torch.tensor(metrics["confusion_matrix"])
    assert confusion.sum() == HELD_OUT and confusion.shape == (10, 10)

    # What was printed is what the weights on the disk are worth.
    model = lenet5()
    model.load_state_dict(checkpoint(out)["model"])
    mean, deviation = few_pixels().statistics
    images = (few_pixels().test_images.float() / 255 - mean) / deviation
    with torch.no_grad():
        predictions = model.eval()(images).argmax(1)
    assert torch.equal(confusion, confusion_matrix(predictions, few_pixels().test_labels, 10))
    lenet5().load_state_dict(torch.load(out / "best.pt", weights_only=True))
    assert "row true, column predicted" in text
    assert (
        f"accuracy {100 * (predictions == few_pixels().test_labels).double().mean():.2f} %, "
        in text
    )


def test_the_same_seed_gives_the_same_bits(few, capsys, tmp_path):
    options = ("--epochs", 1, "--augment", "--model", "fashion_cnn")  # fashion_cnn has dropout
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        learn(capsys, *options, "--seed", seed, "--out", tmp_path / name)
    a, b, c = (checkpoint(tmp_path / name) for name in "abc")
    assert_same(a, b)
    assert not torch.equal(a["model"]["features.0.weight"], c["model"]["features.0.weight"])


def test_names_of_runs(few, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    learn(capsys, "--epochs", 1)
    learn(capsys, "--epochs", 1, "--seed", 1)
    assert sorted(os.listdir("runs")) == ["lenet5-digits", "lenet5-digits-2"]
    learn(capsys, "--epochs", 2, "--resume")
    assert [len(checkpoint(f"runs/{name}")["history"]) for name in os.listdir("runs")].count(2) == 1
    assert len(checkpoint("runs/lenet5-digits-2")["history"]) == 2, "the latest goes on"
    error = refused(capsys, "--epochs", 1, "--out", "runs/lenet5-digits")
    assert "lenet5-digits/last.pt is there already: --resume goes on from it" in error


# ---- folders of images ----


def test_folders_are_read_and_learned(capsys, tmp_path):
    root = make_folder(tmp_path / "images", 4)
    text = learn(
        capsys, "--data", f"folder:{root}", "--model", "resnet18", "--image-size", 32,
        "--epochs", 1, "--out", tmp_path / "out", "--batch-size", 7,
    )  # fmt: skip
    assert "8 to learn from, 8 held out, 2 classes" in text and "3x32x32 images" in text
    state = checkpoint(tmp_path / "out")
    assert state["classes"] == ["green", "red"] and state["model"]["fc.weight"].shape[0] == 2
    assert (tmp_path / "out" / "feature_maps.png").exists()


def test_compile_goes_through_torch_compile(few, capsys, tmp_path, monkeypatch):
    compiled = []

    def compile(model):
        compiled.append(model)
        return real(model, backend="aot_eager")  # the default one calls a compiler for a minute

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile)
    learn(capsys, "--epochs", 1, "--compile", "--out", tmp_path / "a")
    learn(capsys, "--epochs", 1, "--out", tmp_path / "b")
    assert len(compiled) == 1
    a, b = (checkpoint(tmp_path / name)["model"] for name in "ab")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-4, atol=1e-5)


# ---- files that are wrong ----


def _cut(path):
    path.write_bytes(path.read_bytes()[:-2000])


def _flipped(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF  # the zip file's checksum tells
    path.write_bytes(content)


def _text(path):
    path.write_text("not a checkpoint\n" * 100)


def _empty(path):
    path.write_bytes(b"")


def _pickled_object(path):
    torch.save(lenet5(), path)


def _pickle(path):
    path.write_bytes(pickle.dumps({"a": 1}))


@pytest.mark.parametrize("damage", [_cut, _flipped, _text, _empty, _pickled_object, _pickle])
@pytest.mark.parametrize("option", ["--resume", "--weights"])
def test_damaged_files_are_named(capsys, tmp_path, damage, option, few):
    path = tmp_path / "file.pt"
    torch.save(lenet5().state_dict(), path)
    damage(path)
    before = path.read_bytes()
    error = refused(capsys, option, path, "--out", tmp_path / "out")
    assert str(path) in error and "weights_only" not in error and "Traceback" not in error
    assert re.search("damaged|is no state_dict|is no checkpoint", error)
    assert path.read_bytes() == before and not (tmp_path / "out").exists()


WRONG = {
    "a list": ([1, 2], "is no state_dict: it does not hold tensors by name"),
    "numbers": ({"a": 1}, "is no state_dict"),
    "nothing": ({}, "is no state_dict"),
    "wrong keys": ({"a": torch.ones(1)}, "lacks features.0.weight, features.0.bias and 8 more"),
    "unknown key": ({**lenet5().state_dict(), "b": torch.ones(1)}, "has the unknown b"),
    "wrong shape": (
        lenet5(num_classes=7).state_dict(),
        r"classifier.5.weight is \(7, 84\) in .* and \(10, 84\) in the network",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_weights_of_something_else(few, capsys, tmp_path, name):
    content, message = WRONG[name]
    torch.save(content, tmp_path / "w.pt")
    error = refused(capsys, "--weights", tmp_path / "w.pt", "--out", tmp_path / "out")
    assert re.search(message, error) and str(tmp_path / "w.pt") in error
    assert os.listdir(tmp_path) == ["w.pt"]


BAD = {
    "--model lenet6": "there is no network called 'lenet6': did you mean lenet5",
    "--data cifar": "expected digits, mnist, fashion_mnist or folder:PATH, but got 'cifar'",
    "--data fashion": r"got 'fashion' \(did you mean fashion_mnist\?\)",
    "--data folder:nowhere": "there is no folder .*/nowhere",
    "--data mnist --data-root nowhere": "MNIST is not in nowhere/MNIST and torchvision",
    "--resume nowhere.pt": "there is no file nowhere.pt",
    "--weights nowhere.pt": "there is no file nowhere.pt",
    "--out blocked/new": "cannot write to --out blocked/new: .*/blocked is no folder",
    "--epochs 0": "--epochs: must be at least 1, but is 0",
    "--lr 0": "--lr: must be above 0 and finite, but is 0",
    "--lr nan": "--lr: must be above 0 and finite, but is nan",
    "--lr inf": "--lr: must be above 0 and finite, but is inf",
    "--lr fast": "--lr: expected a number, but got 'fast'",
    "--momentum 1": "--momentum: must be at least 0 and below 1, but is 1",
    "--momentum 0.5": "--momentum is for --optimizer sgd, but this one is adam",
    "--optimizer lion": "--optimizer: invalid choice: 'lion'",
    "--num-classes 7": "--num-classes 7, but .* has 10",
    "--image-size 32": "lenet5 does not take images of 1x32x32 .--image-size",
    "--lr 1e30 --optimizer sgd": "loss is no longer a finite number in epoch 1 at learning",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_sentence(capsys, tmp_path, monkeypatch, line):
    def load(source, root):
        return real(source, root) if source == "mnist" else few_pixels()

    real = command.load_pixels
    monkeypatch.setattr(command, "load_pixels", load)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "blocked").write_text("kept")
    status, _, err = run(capsys, "--epochs", "1", "--device", "cpu", *line.split())
    assert status == 2 and err.startswith("fastconv train: ") and err.count("\n") == 1
    assert re.search(BAD[line], err), err
    assert (tmp_path / "blocked").read_text() == "kept"
    assert not list(tmp_path.rglob("*.pt"))


def test_what_is_missing_is_named(few, capsys, tmp_path, monkeypatch):
    for module in ("rich.console", "matplotlib.figure"):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, module, None)
            assert 'pip install "fastconv[demo]"' in refused(capsys, "--out", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "PIL", None)
        error = refused(capsys, "--data", f"folder:{tmp_path}", "--out", tmp_path / "out")
        assert "needs Pillow" in error
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "no permission in" in refused(capsys, "--out", tmp_path / "out")
    assert os.listdir(tmp_path) == []


# ---- several processes ----


def test_two_processes_compute_what_one_does(capsys, tmp_path):
    """torchrun over gloo: the whole batch's gradients, one writer, one printer, one score."""
    digits.write_idx_set(tmp_path, train=49, test=21)
    options = ("train", "--data", "mnist", "--data-root", tmp_path, "--augment", "--optimizer",
               "sgd", "--lr", "0.05", "--batch-size", "16", "--epochs", "2", "--device", "cpu",
               "--out")  # fmt: skip
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    process = start(*torchrun, "-m", "fastconv", *options, tmp_path / "together")
    assert cli.main([*map(str, options), str(tmp_path / "alone")]) == 0
    alone = capsys.readouterr().out
    together, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "1 thread, 2 processes" in together and "2 processes" not in alone
    for out in (alone, together):
        assert len(re.findall("^epoch", out, re.MULTILINE)) == 2
    a, b = checkpoint(tmp_path / "alone"), checkpoint(tmp_path / "together")
    assert len(b["processes"]) == 2
    torch.manual_seed(0)
    for name, before in lenet5().state_dict().items():
        torch.testing.assert_close(b["model"][name], a["model"][name], rtol=1e-4, atol=1e-5)
        assert (a["model"][name] - before).abs().max() > 1e-4, "it has moved"
    for one, two in zip(a["history"], b["history"], strict=True):
        for name in ("loss", "accuracy"):
            assert two[name] == pytest.approx(one[name], rel=1e-4)
    confusions = [
        json.loads((tmp_path / name / "metrics.json").read_text())["confusion_matrix"]
        for name in ("alone", "together")
    ]
    assert confusions[0] == confusions[1] and sum(map(sum, confusions[0])) == 21


def test_shares_are_never_a_single_image():
    with pytest.raises(ValueError, match="2 processes need batches of at least 4 images, .* 3"):
        Trainer(
            lenet5(), TensorImages(torch.zeros(9, 1, 28, 28), torch.zeros(9)),
            TensorImages(torch.zeros(9, 1, 28, 28), torch.zeros(9)),
            Preparation(28, 1, (0.5,), (0.5,)),
            Plan(1, 3, 0.1, "sgd", 0.0, 0.0, "constant", 0), torch.device("cpu"), World(0, 2),
        )  # fmt: skip


def test_sync_bn_is_converted_and_runs_unfused():
    fused = fastconv.ConvBNReLU2d(3, 4, 3, padding=1, activation="silu")
    net = nn.Sequential(fused, fastconv.BatchNorm2d(4))
    x, residual = torch.randn(2, 3, 6, 6), torch.randn(2, 4, 6, 6)
    expected = fused.eval()(x, residual)
    synced = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert type(synced[0].bn) is type(synced[1]) is nn.SyncBatchNorm
    assert list(synced.state_dict()) == list(net.state_dict())
    torch.testing.assert_close(synced[0](x, residual), expected, rtol=1e-4, atol=1e-5)


def test_sync_bn_on_cpus_is_torchs_error(tmp_path):
    """In a group of one process: what torch says when SyncBatchNorm should learn on a CPU."""
    net = nn.SyncBatchNorm.convert_sync_batchnorm(fastconv.ConvBNReLU2d(3, 4, 3))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="SyncBatchNorm expected input tensor to be on GPU"):
            net.train()(torch.randn(2, 3, 6, 6))
    finally:
        dist.destroy_process_group()
