"""The networks: torchvision's where torchvision has them, the papers' and tutorials' elsewhere."""

import functools
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastconv
from fastconv import models
from fastconv.benchmarking import peers
from fastconv.models import resnet, vgg
from networks import OTHERS, PARAMETERS, SMALL, count, flat, on_meta, theirs
from zoo import torchvision

pytestmark = pytest.mark.usefixtures("one_thread")


# Names


def test_every_network_is_listed():
    assert models.list_models() == sorted(PARAMETERS | OTHERS)
    for name in models.list_models():
        assert getattr(models, name).__name__ == name and getattr(models, name).__doc__


def test_a_network_by_its_name():
    model = models.get_model("LeNet5", num_classes=3, form="classic")
    assert isinstance(model, models.LeNet5)
    assert model.classifier[-1].out_features == 3


@pytest.mark.parametrize(
    "name, message",
    [
        ("resnet19", "no network called 'resnet19': did you mean resnet1.*resnet1"),
        ("VGG-16", "no network called 'VGG-16': did you mean vgg16"),
        ("llama", "no network called 'llama': there are alexnet, fashion_cnn, .* vgg19_bn"),
        (None, "no network called None"),
    ],
)
def test_an_unknown_name_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        models.get_model(name)


@pytest.mark.parametrize("name", models.list_models())
def test_an_unknown_argument_is_named(name):
    with pytest.raises(TypeError, match="unexpected keyword argument 'widht'"):
        models.get_model(name, widht=2)


# Shapes


@pytest.mark.parametrize("name", models.list_models())
def test_parameters_are_the_papers(name):
    assert count(on_meta(name)) == (PARAMETERS | OTHERS)[name]


def test_variants_have_the_papers_parameters():
    assert count(on_meta("alexnet", lrn=True)) == PARAMETERS["alexnet"]
    assert count(on_meta("googlenet", aux_logits=False)) == 6_624_904
    assert count(on_meta("googlenet", paper=True)) == 13_378_280
    assert count(on_meta("googlenet", paper=True, aux_logits=False)) == 6_998_552


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("config", [{}, {"num_classes": 7}], ids=str)
def test_state_dict_is_torchvisions(name, config):
    ours = on_meta(name, **config)
    with torch.device("meta"):
        torchvisions = theirs(name, **config)
    got, expected = ours.state_dict(), torchvisions.state_dict()
    assert list(got) == list(expected)
    assert [t.shape for t in got.values()] == [t.shape for t in expected.values()]
    ours.load_state_dict(expected, strict=True, assign=True)
    torchvisions.load_state_dict(got, strict=True, assign=True)


@pytest.mark.parametrize("name", models.list_models())
def test_in_channels_and_num_classes(name):
    size = SMALL.get(name, 224)
    model = on_meta(name, num_classes=5, in_channels=2).eval()
    first = next(layer for layer in model.modules() if isinstance(layer, nn.Conv2d))
    assert first.in_channels == 2
    assert model(torch.empty(3, 2, size, size, device="meta")).shape == (3, 5)
    for argument in ("num_classes", "in_channels"):
        with pytest.raises(ValueError, match=f"{argument} must be at least 1, but got 0"):
            models.get_model(name, **{argument: 0})


@pytest.mark.parametrize("name", models.list_models())
def test_every_layer_is_ours(name):
    plain = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.BatchNorm2d)
    assert not [layer for layer in on_meta(name).modules() if type(layer) in plain]


@pytest.mark.parametrize("name", ["alexnet", "vgg13", "vgg16_bn", "vgg11_lrn", "fashion_cnn"])
def test_dropout(name):
    dropouts = [m.p for m in on_meta(name, dropout=0.25).modules() if isinstance(m, nn.Dropout)]
    assert dropouts and set(dropouts) == {0.25}


def kernel_sizes(model):
    return [m.kernel_size[0] for m in model.modules() if isinstance(m, nn.Conv2d)]


def test_originals_variants():
    assert kernel_sizes(on_meta("vgg16_c")) == [3] * 6 + [1] + [3] * 2 + [1] + [3] * 2 + [1]
    norms = [
        (i, m)
        for name, config in (("alexnet", {"lrn": True}), ("vgg11_lrn", {}))
        for i, m in enumerate(on_meta(name, **config).features)
        if isinstance(m, nn.LocalResponseNorm)
    ]
    assert [i for i, _ in norms] == [2, 6, 2]
    assert all((m.size, m.alpha, m.beta, m.k) == (5, 1e-4, 0.75, 2.0) for _, m in norms)
    paper = on_meta("googlenet", paper=True)
    assert kernel_sizes(paper).count(5) == 9 and kernel_sizes(on_meta("googlenet")).count(5) == 0
    assert not any(isinstance(m, nn.BatchNorm2d) for m in paper.modules())
    assert [type(m) for m in paper.maxpool1] == [fastconv.MaxPool2d, nn.LocalResponseNorm]
    assert [type(m) for m in paper.maxpool2] == [nn.LocalResponseNorm, fastconv.MaxPool2d]
    assert paper.aux1.pool(torch.empty(1, 512, 14, 14)).shape == (1, 512, 4, 4)


# Numbers


@pytest.fixture
def narrow(monkeypatch):
    """AlexNet's and VGG's linear layers hold half a gigabyte: here 64 features instead of 4096."""

    class Linear(nn.Linear):
        def __init__(self, *sizes):
            super().__init__(*(64 if size == 4096 else size for size in sizes))

    monkeypatch.setattr(nn, "Linear", Linear)


def with_bottlenecks(module):
    """A ResNet of one bottleneck a stage."""
    return lambda **config: module.ResNet(module.Bottleneck, [1, 1, 1, 1], **config)


@pytest.mark.parametrize(
    "name, size, config",
    [
        ("resnet18", 64, {}),
        ("bottlenecks", 64, {"num_classes": 10, "zero_init_residual": True}),
        ("googlenet", 64, {"num_classes": 10, "transform_input": True}),
        ("alexnet", 63, {"num_classes": 10}),
        ("vgg11", 32, {"num_classes": 10}),
        ("vgg13_bn", 32, {"num_classes": 10, "dropout": 0.3}),
    ],
)
def test_starts_trains_and_infers_as_torchvisions(name, size, config, narrow):
    """The same seed gives the same weights; then outputs, gradients and statistics agree. float64:
    statistics of eight numbers a channel amplify float32's last bit to percents."""
    ours, torchvisions = (
        (with_bottlenecks(resnet), with_bottlenecks(torchvision.models.resnet))
        if name == "bottlenecks"
        else (functools.partial(build, name) for build in (models.get_model, theirs))
    )
    pair = []
    for build in (ours, torchvisions):
        torch.manual_seed(3)
        pair.append(build(**config))
    ours, torchvisions = pair
    for (key, a), b in zip(
        ours.state_dict().items(), torchvisions.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), key
    images = torch.randn(2, 3, size, size, dtype=torch.float64)
    outputs = []
    for model in pair:
        model.double().train()
        torch.manual_seed(5)  # of dropout
        trained = flat(model(images))
        trained.square().sum().backward()
        with torch.no_grad():
            outputs.append((trained, model.eval()(images)))
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    for (key, a), b in zip(ours.named_parameters(), torchvisions.parameters(), strict=True):
        assert (a.grad - b.grad).norm() <= 1e-6 * b.grad.norm() + 1e-12, key
    for a, b in zip(ours.buffers(), torchvisions.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layout", peers.LAYOUTS)
def test_vgg_features_in_float32(layout):
    torch.manual_seed(3)
    ours = vgg.make_layers(vgg.CONFIGURATIONS["A"], batch_norm=True)
    torch.manual_seed(3)
    torchvisions = torchvision.models.vgg.make_layers(vgg.CONFIGURATIONS["A"], batch_norm=True)
    images = torch.randn(2, 3, 32, 32).contiguous(memory_format=peers.LAYOUTS[layout])
    for training in (True, False):
        for model in (ours, torchvisions):
            model.train(training).to(memory_format=peers.LAYOUTS[layout])
        torch.testing.assert_close(ours(images), torchvisions(images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name, size, config",
    [
        ("vgg11_lrn", 32, {}),
        ("vgg16_c", 32, {}),
        ("alexnet", 63, {"lrn": True}),
        ("googlenet", 224, {"paper": True, "aux_logits": False}),
    ],
)
def test_originals_variants_compute_what_torch_computes(name, size, config, narrow):
    model = models.get_model(name, num_classes=4, in_channels=1, **config).eval()
    images = torch.randn(1, 1, size, size)
    with torch.no_grad():
        expected = peers.torch_twin(model)(images)
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", [*SMALL, "googlenet"])
def test_learns_a_batch(name):
    """GoogLeNet in the paper's form, with nothing to normalise: its start must let it learn."""
    torch.manual_seed(3)
    paper = name == "googlenet"
    size, config = (32, {"paper": True}) if paper else (SMALL[name], {"in_channels": 1})
    model = models.get_model(name, num_classes=4, **config)
    channels = 3 if paper else 1
    images, labels = torch.randn(4, channels, size, size), torch.arange(4)
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-4 if paper else 1e-3)

    def loss_of(logits, *auxiliary):
        return sum(
            weight * F.cross_entropy(scores, labels)
            for scores, weight in zip((logits, *auxiliary), (1, 0.3, 0.3), strict=False)
        )

    for _ in range(18):
        output = model.train()(images)
        optimiser.zero_grad()
        loss_of(*(output if paper else [output])).backward()
        optimiser.step()
    with torch.no_grad():
        loss = loss_of(model.eval()(images)).item()
    assert loss < 0.85 * math.log(4), "no better than equal scores for all"


def test_googlenet_returns_what_torchvisions_returns():
    model = models.googlenet(num_classes=3).train()
    images = torch.randn(2, 3, 32, 32)
    output = model(images)
    assert isinstance(output, models.GoogLeNetOutputs)
    assert output._fields == torchvision.models.GoogLeNetOutputs._fields
    assert all(scores.shape == (2, 3) for scores in output)
    assert model.eval()(images).shape == (2, 3)
    assert models.googlenet(num_classes=3, aux_logits=False).train()(images).shape == (2, 3)
    with pytest.raises(ValueError, match="transform_input needs in_channels=3, but got 1"):
        models.googlenet(in_channels=1, transform_input=True)


def test_resnet_takes_torchvisions_arguments():
    ours = inspect.signature(models.ResNet).parameters
    expected = inspect.signature(torchvision.models.ResNet).parameters
    assert list(ours) == [*expected, "in_channels"]
    config = {"groups": 2, "width_per_group": 16, "num_classes": 3}
    config["replace_stride_with_dilation"] = (False, True, True)
    state = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], norm_layer=nn.BatchNorm2d, **config
    ).eval()
    model = models.ResNet(resnet.Bottleneck, (1, 1, 1, 1), **config).eval()
    model.load_state_dict(state.state_dict())
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(images), state(images), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="have 3 elements, but got .True, False."):
        models.resnet18(replace_stride_with_dilation=(True, False))
    with pytest.raises(ValueError, match="a BasicBlock has groups=1"):
        models.resnet18(groups=2)
