"""LeNet-5 is the network of the book, and has an exact twin of torch.nn's layers."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastconv
from fastconv.benchmarking import peers
from fastconv.benchmarking.timing import Timing
from fastconv.models import LeNet5, lenet5

FORMS = ("modern", "classic")


@pytest.fixture(autouse=True)
def _one_thread():
    # Small layers gain nothing from a second thread, and lose a lot on a busy machine.
    torch.set_num_threads(1)


def batch(n=4, channels=1, classes=10):
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(n, channels, 28, 28, generator=generator)
    return images, torch.randint(classes, (n,), generator=generator)


@pytest.mark.parametrize("form", FORMS)
def test_layers_are_the_books(form):
    model = lenet5(form=form)
    pool = fastconv.MaxPool2d if form == "modern" else fastconv.AvgPool2d
    activation = nn.ReLU if form == "modern" else nn.Sigmoid
    conv1, act1, pool1, conv2, act2, pool2 = model.features
    assert [type(layer) for layer in model.features] == [
        fastconv.Conv2d, activation, pool, fastconv.Conv2d, activation, pool
    ]  # fmt: skip
    assert [type(layer) for layer in model.classifier] == [
        nn.Flatten, nn.Linear, activation, nn.Linear, activation, nn.Linear
    ]  # fmt: skip
    assert (conv1.in_channels, conv1.out_channels) == (1, 6)
    assert (conv1.kernel_size, conv1.padding, conv1.stride) == ((5, 5), (2, 2), (1, 1))
    assert (conv2.in_channels, conv2.out_channels) == (6, 16)
    assert (conv2.kernel_size, conv2.padding, conv2.stride) == ((5, 5), (0, 0), (1, 1))
    assert (pool1.kernel_size, pool1.stride) == (pool2.kernel_size, pool2.stride) == (2, 2)
    linears = [layer for layer in model.classifier if isinstance(layer, nn.Linear)]
    assert [(linear.in_features, linear.out_features) for linear in linears] == [
        (400, 120), (120, 84), (84, 10)
    ]  # fmt: skip
    assert sum(p.numel() for p in model.parameters()) == 61_706


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels, classes", [(1, 10), (3, 7)])
def test_shapes_along_the_way(form, channels, classes):
    model = lenet5(classes, channels, form=form)
    images, _ = batch(2, channels)
    sizes = []
    x = images
    for layer in (*model.features, *model.classifier):
        x = layer(x)
        if not isinstance(layer, (nn.ReLU, nn.Sigmoid)):
            sizes.append(tuple(x.shape[1:]))
    assert sizes == [
        (6, 28, 28), (6, 14, 14), (16, 10, 10), (16, 5, 5), (400,), (120,), (84,), (classes,)
    ]  # fmt: skip
    torch.testing.assert_close(model(images), x)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"form": "post-modern"}, "form must be .* but got 'post-modern'"),
        ({"form": None}, "form must be .* but got None"),
        ({"num_classes": 0}, "num_classes must be at least 1, but got 0"),
        ({"in_channels": -2}, "in_channels must be at least 1, but got -2"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        lenet5(**arguments)


def test_modern_starts_as_torch_would_start_it():
    torch.manual_seed(5)
    model = lenet5()
    torch.manual_seed(5)
    conv = nn.Conv2d(1, 6, kernel_size=5, padding=2)
    assert torch.equal(model.features[0].weight, conv.weight)


def test_copies_and_pickles():
    model = lenet5(form="classic").eval()
    images, _ = batch()
    expected = model(images)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(copied, LeNet5)
        assert torch.equal(copied(images), expected)


@pytest.mark.parametrize("form", FORMS)
def test_twin_has_torchs_layers_and_the_same_weights(form):
    model = lenet5(form=form)
    twin = peers.torch_twin(model)
    ours = [type(layer) for layer in model.features]
    theirs = [type(layer) for layer in twin.features]
    assert all(layer.__module__.startswith("torch.nn") for layer in theirs)
    assert [layer.__name__ for layer in ours] == [layer.__name__ for layer in theirs]
    assert type(model.features[0]) is fastconv.Conv2d, "the original must stay what it was"
    assert list(model.state_dict()) == list(twin.state_dict())
    # Both ways, and nothing shared.
    with torch.no_grad():
        twin.features[0].weight.add_(1)
    assert not torch.equal(model.features[0].weight, twin.features[0].weight)
    model.load_state_dict(twin.state_dict())
    lenet5(form=form).load_state_dict(model.state_dict())
    peers.torch_twin(lenet5(form=form)).load_state_dict(model.state_dict())
    assert torch.equal(model.features[0].weight, twin.features[0].weight)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", peers.LAYOUTS)
def test_twin_gives_the_same_scores_loss_and_gradients(form, layout):
    model = lenet5(form=form).to(memory_format=peers.LAYOUTS[layout])
    images, labels = batch(8)
    images = images.contiguous(memory_format=peers.LAYOUTS[layout])
    with fastconv.allow_fallback(False):
        for work in peers.WORKS:
            peers.assert_same(work, model, peers.torch_twin(model), images, labels, tolerance=1e-5)


def test_a_layer_without_a_twin_is_refused():
    with pytest.raises(TypeError, match="0 is a ConvBNReLU2d, which torch.nn does not have"):
        peers.torch_twin(nn.Sequential(fastconv.ConvBNReLU2d(1, 2, 3)))


@pytest.mark.parametrize("value", [1.01, float("nan")])
def test_a_wrong_weight_is_noticed(value):
    model = lenet5()
    twin = peers.torch_twin(model)
    with torch.no_grad():
        model.features[3].weight.mul_(value)
    with pytest.raises(peers.Disagreement, match="scores: off by"):
        peers.assert_same("inference", model, twin, *batch())
    with pytest.raises(peers.Disagreement, match="off by"):
        peers.assert_same("training step", model, twin, *batch())


def test_a_wrong_gradient_is_noticed():
    model = lenet5()
    twin = peers.torch_twin(model)
    model.features[3].weight.register_hook(lambda grad: grad * 1.001)
    with pytest.raises(peers.Disagreement, match="gradient of features.3.weight: off by"):
        peers.assert_same("training step", model, twin, *batch())


def test_a_wrong_shape_is_noticed():
    with pytest.raises(peers.Disagreement, match=r"scores: shape \(4, 9\), not \(4, 10\)"):
        peers.assert_same("inference", lenet5(9), lenet5(10), *batch())


@pytest.mark.parametrize("work", peers.WORKS)
def test_comparison_times_both_sides_in_both_layouts(work):
    model = lenet5()
    before = copy.deepcopy(model.state_dict())
    found = peers.compare(work, model, *batch(4), rounds=2, sample_seconds=1e-4)
    assert (found.work, found.batch) == (work, 4)
    assert set(found.ours) == set(found.theirs) == {"NCHW", "NHWC"}
    for timing in (*found.ours.values(), *found.theirs.values()):
        assert len(timing.samples) == 2 and timing.median > 0
    assert found.winner in ("fastconv", "torch.nn", "neither")
    assert model.training and all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_unknown_work_is_named():
    with pytest.raises(ValueError, match="one of inference, training step, but got 'rest'"):
        peers.compare("rest", lenet5(), *batch())


class Complex(nn.Module):
    """Computes in complex numbers, which no kernel of ours does: it falls back to ATen."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(10, 1, 28, 28))

    def forward(self, x):
        return fastconv.functional.conv2d(x.cfloat(), self.weight.cfloat()).real.flatten(1)


def test_the_peer_is_never_measured_as_ours():
    assert Complex()(batch()[0]).shape == (4, 10), "without the ban it falls back"
    with pytest.raises(RuntimeError, match="would fall back to ATen"):
        peers.compare("inference", Complex(), *batch(), rounds=1, sample_seconds=1e-4)
    assert Complex()(batch()[0]).shape == (4, 10), "the ban must end with the comparison"


def test_the_winner_must_win_nine_rounds_of_ten():
    def comparison(ours, theirs):
        slow = Timing((9.0,) * 10, 1)
        return peers.Comparison(
            "inference", 1,
            {"NCHW": slow, "NHWC": Timing(tuple(ours), 1)},
            {"NCHW": Timing(tuple(theirs), 1), "NHWC": slow},
        )  # fmt: skip

    faster = comparison([1.0] * 10, [2.0] * 10)
    assert (faster.our_layout, faster.their_layout) == ("NHWC", "NCHW")
    assert faster.speedup.of_medians == 2 and faster.winner == "fastconv"
    assert comparison([2.0] * 10, [1.0] * 10).winner == "torch.nn"
    assert comparison([1.0] * 10, [0.5] * 3 + [2.0] * 7).winner == "neither"
