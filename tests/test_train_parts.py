"""What `fastconv train` is made of: folders, batches, augmentation, recipes, a step, pictures."""

import pytest
import torch
from PIL import Image
from torch import nn

from digits import few_pixels, make_folder
from fastconv.models import get_model, lenet5
from fastconv.training import command, trainer
from fastconv.training.batches import Preparation, TensorImages, batches, epoch_order
from fastconv.training.data import DataError
from fastconv.training.distributed import World
from fastconv.training.folder import load_folder
from fastconv.training.interrupts import Interrupts
from fastconv.training.recipes import SCHEDULES, defaults
from fastconv.training.trainer import Plan, Trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(command, "load_pixels", lambda source, root: few_pixels())


def test_folder_layouts(tmp_path):
    train, held_out, classes = load_folder(make_folder(tmp_path / "a", 4), 16, 3, 0)
    assert len(train) == len(held_out) == 8 and classes == ("green", "red")
    image, label = train[0]
    assert image.shape == (3, 16, 16) and image.dtype == torch.uint8 and label == 0
    assert image[1].float().mean() > 100 > image[0].float().mean() + 50, "green"
    root = make_folder(tmp_path / "b", 10, parts=("",))
    (root / "red" / "deeper").mkdir()
    Image.new("L", (9, 9)).save(root / "red" / "deeper" / "X.PNG")
    (root / "red" / "notes.txt").write_text("no image")
    train, held_out, classes = load_folder(root, 16, 1, 0)
    assert (len(train), len(held_out)) == (17, 4)
    assert not set(train.paths) & set(held_out.paths)
    assert load_folder(root, 16, 1, 0)[1].paths == held_out.paths
    assert load_folder(root, 16, 1, 1)[1].paths != held_out.paths
    # Workers and this process read the same.
    order = [torch.tensor([3, 1]), torch.tensor([0])]
    for (a, x), (b, y) in zip(batches(train, order), batches(train, order, 1), strict=True):
        assert torch.equal(a, b) and torch.equal(x, y) and a.shape[1:] == (1, 16, 16)


def test_folders_that_are_wrong(tmp_path):
    root = make_folder(tmp_path / "images", 3)
    bad = root / "train" / "red" / "3.png"
    bad.write_bytes(b"\x89PNG no image")
    train = load_folder(root, 16, 3, 0)[0]
    place = torch.tensor([train.paths.index(str(bad))])
    for workers in (0, 1):
        with pytest.raises(DataError, match=f"cannot read the image {bad}") as error:
            list(batches(train, [place], workers))
        assert "\n" not in str(error.value)
    (root / "val" / "blue").mkdir()
    with pytest.raises(DataError, match="val has a class 'blue' that .*train has not"):
        load_folder(root, 16, 3, 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no folders"):
        load_folder(tmp_path / "empty", 16, 3, 0)
    (tmp_path / "empty" / "red").mkdir()
    with pytest.raises(DataError, match="red has no image"):
        load_folder(tmp_path / "empty", 16, 3, 0)
    Image.new("L", (9, 9)).save(tmp_path / "empty" / "red" / "1.png")
    with pytest.raises(DataError, match="red has one image"):
        load_folder(tmp_path / "empty", 16, 3, 0)
    with pytest.raises(ValueError, match="1, 3 or 4 channels, not 2"):
        load_folder(root, 16, 2, 0)


# ---- the parts ----


def test_every_image_once_an_epoch_and_no_batch_of_one():
    for count, size, least, sizes in (
        (100, 32, 2, [32, 32, 32, 4]), (97, 32, 2, [32, 32, 33]), (96, 32, 2, [32] * 3),
        (10, 64, 2, [10]), (3, 1, 2, [1, 1, 1]), (11, 4, 4, [4, 7]),
    ):  # fmt: skip
        order = epoch_order(count, size, least, 0, 0)
        assert [len(batch) for batch in order] == sizes
        assert sorted(torch.cat(order).tolist()) == list(range(count))
    first = torch.cat(epoch_order(50, 8, 2, 0, 0))
    assert torch.equal(first, torch.cat(epoch_order(50, 8, 2, 0, 0)))
    for other in ((1, 0), (0, 1)):
        assert not torch.equal(first, torch.cat(epoch_order(50, 8, 2, *other)))


def test_preparation_by_hand():
    pixels = torch.full((1, 1, 4, 4), 255, dtype=torch.uint8)
    plain = Preparation(4, 1, (0.5,), (0.25,))(pixels)
    assert plain.dtype == torch.float32 and torch.equal(plain, torch.full((1, 1, 4, 4), 2.0))
    padded = Preparation(5, 3, (0.0,), (1.0,))(pixels)
    assert padded.shape == (1, 3, 5, 5) and padded.sum() == 3 * 16
    assert padded[0, :, 4].sum() == padded[0, :, :, 4].sum() == 0, "padded with black"
    resized = Preparation(8, 3, (0.0, 0.5, 1.0), (1.0, 0.5, 2.0))(pixels)
    assert resized[0, :, 3, 3].tolist() == pytest.approx([1, 1, 0]) and resized.shape[2:] == (8, 8)


def test_augmentation_crops_and_mirrors():
    images = torch.arange(1, 37, dtype=torch.uint8).reshape(1, 1, 6, 6).expand(200, 1, 6, 6)
    prepare = Preparation(6, 1, (0.0,), (1 / 255,), crop=1, flip=True)
    draw = prepare.draw(200, 0, 0, 0)
    out = prepare(images, draw).round().to(torch.uint8)
    frame = nn.functional.pad(images[0, 0], (1, 1, 1, 1))
    windows = [frame[y : y + 6, x : x + 6] for y in range(3) for x in range(3)]
    expected = [side.tolist() for window in windows for side in (window, window.flip(1))]
    seen = [expected.index(one[0].tolist()) for one in out]
    assert set(seen) == set(range(18))
    # A share of the batch is augmented as it is in the whole.
    shared = prepare(images[1::3], draw.share(1, 3)).round().to(torch.uint8)
    assert torch.equal(shared, out[1::3])
    assert torch.equal(prepare(images).round(), images.float()), "not when judging"


def test_digits_are_never_mirrored(few, monkeypatch):
    settings = {"model": "fashion_cnn", "data": "digits", "seed": 0, "augment": None,
                "in_channels": None, "image_size": None}  # fmt: skip
    prepare = command._load(settings, "data", World()).prepare
    assert not prepare.flip and prepare.crop == 0 and prepare.size == 32
    assert (prepare.mean, prepare.deviation) == ((0.286,), (0.353,))
    settings["data"] = "fashion_mnist"
    assert command._load(settings, "data", World()).prepare.flip, "its recipe has flips"
    prepare = command._load({**settings, "augment": False}, "data", World()).prepare
    assert not prepare.flip
    prepare = command._load({**settings, "augment": True}, "data", World()).prepare
    assert prepare.flip and prepare.crop == 4


def test_recipes_of_the_tutorials():
    mnist, fashion = defaults("mnist_cnn"), defaults("fashion_cnn")
    assert (mnist.optimizer, mnist.lr, mnist.momentum) == ("sgd", 1e-3, 0.9)
    assert (mnist.batch_size, mnist.epochs, mnist.statistics) == (64, 5, (0.5, 0.5))
    assert (fashion.optimizer, fashion.batch_size, fashion.epochs) == ("adam", 128, 10)
    assert (fashion.image_size, fashion.statistics, fashion.flip) == (32, (0.286, 0.353), True)
    assert defaults("resnet50").image_size == 224 and defaults("unheard of").optimizer == "adam"
    for name, schedule in SCHEDULES.items():
        assert max(schedule(i / 100) for i in range(101)) == 1
        assert schedule(1.0) == (1 if name == "constant" else pytest.approx(0, abs=1e-12))


def test_auxiliary_classifiers_count_three_tenths():
    logits, aux2, aux1 = torch.randn(3, 4, 5)
    labels = torch.tensor([0, 1, 2, 3])
    loss, scores = trainer._loss((logits, aux2, aux1), labels)
    cross = nn.CrossEntropyLoss(reduction="sum")
    torch.testing.assert_close(
        loss, cross(logits, labels) + 0.3 * (cross(aux2, labels) + cross(aux1, labels))
    )
    assert torch.equal(scores, logits)
    loss, _ = trainer._loss((logits, None, None), labels)
    torch.testing.assert_close(loss, cross(logits, labels))


def test_first_feature_maps_are_the_first_convolutions():
    for name, size in (("lenet5", 28), ("resnet18", 32)):
        model = get_model(name, in_channels=1).train()
        image = torch.randn(1, 1, size, size)
        maps = command.first_feature_maps(model, image)
        first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
        torch.testing.assert_close(maps, first(image)[0].detach())
        assert model.training and not first._forward_hooks
    with pytest.raises(ValueError, match="Flatten has no convolution"):
        command.first_feature_maps(nn.Flatten(), image)


def make_trainer(model, **plan):
    data = TensorImages(few_pixels().train_images, few_pixels().train_labels)
    held_out = TensorImages(few_pixels().test_images, few_pixels().test_labels)
    numbers = {"epochs": 1, "batch_size": 50, "lr": 0.01, "optimizer": "sgd", "momentum": 0.0,
               "weight_decay": 0.0, "schedule": "constant", "seed": 0}  # fmt: skip
    prepare = Preparation(28, 1, (0.5,), (0.5,))
    return Trainer(
        model, data, held_out, prepare, Plan(**{**numbers, **plan}), torch.device("cpu"), World(),
        compile=plan.pop("compile", False),
    )  # fmt: skip


def test_a_step_is_plain_gradient_descent():
    model = lenet5()
    twin = lenet5()
    twin.load_state_dict(model.state_dict())
    one = make_trainer(model, batch_size=100)
    order = one._order(0)[0]
    one.run(Interrupts(), 1, lambda *_: None, lambda *_: None)
    images = (few_pixels().train_images[order].float() / 255 - 0.5) / 0.5
    nn.functional.cross_entropy(twin(images), few_pixels().train_labels[order]).backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs - 0.01 * theirs.grad)
