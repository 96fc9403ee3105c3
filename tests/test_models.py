"""The networks: torchvision's where torchvision has them, the papers' and tutorials' elsewhere."""

import copy
import functools
import inspect
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastconv
from fastconv import models
from fastconv.benchmarking import peers
from fastconv.models import pretrained, resnet, vgg
from fastconv.models.googlenet import Inception
from zoo import torchvision

# Parameters, as the papers' authors, torchvision or Caffe count them; ours to compute in the last.
PARAMETERS = {
    "alexnet": 61_100_840,
    "googlenet": 13_004_888,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
}
OTHERS = {
    "vgg11_lrn": 132_863_336,
    "vgg16_c": 133_638_952,
    "lenet5": 61_706,
    "simple_cnn": 10 * 16 * 28 * 28 + 10 + 16 * 9 + 16,
    "mnist_cnn": 320 + 18_496 + 200_768 + 650,
    "fashion_cnn": 160 + 4_640 + 131_136 + 650,
}
SMALL = {"lenet5": 28, "simple_cnn": 28, "mnist_cnn": 28, "fashion_cnn": 32}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def on_meta(name, **config):
    """Neither memory nor time for weights."""
    with torch.device("meta"):
        return models.get_model(name, **config)


def theirs(name, **config):
    if name == "googlenet":
        config.setdefault("init_weights", True)
    return getattr(torchvision.models, name)(**config)


def count(model):
    return sum(p.numel() for p in model.parameters())


def flat(output):
    return torch.cat(list(output)) if isinstance(output, tuple) else output


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


# Weights


@pytest.fixture
def download(monkeypatch):
    """In place of torchvision's: hands out `download.state`, and remembers what it was asked."""

    def fake(url, *args, **options):
        fake.calls.append((url, args, options))
        return fake.state

    fake.calls = []
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fake)
    return fake


@pytest.mark.parametrize(
    "spelling",
    [
        torchvision.models.ResNet18_Weights.IMAGENET1K_V1,
        "DEFAULT",
        "IMAGENET1K_V1",
        "ResNet18_Weights.IMAGENET1K_V1",
    ],
    ids=str,
)
def test_weights_are_torchvisions(spelling, download):
    source = theirs("resnet18").eval()
    download.state = source.state_dict()
    model = models.resnet18(weights=spelling, progress=False).eval()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, download.state[key]), key
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    assert download.calls == [(url, (), {"progress": False, "check_hash": True})]


def test_weights_are_loaded_strictly(download):
    download.state = theirs("resnet18").state_dict()
    del download.state["bn1.bias"]
    with pytest.raises(RuntimeError, match="Missing key.*bn1.bias"):
        models.resnet18(weights="DEFAULT")


@pytest.mark.parametrize("old", [{"pretrained": True}, {"weights": True}], ids=str)
def test_the_old_spelling_warns(old, download):
    download.state = theirs("resnet18").state_dict()
    with pytest.warns(UserWarning, match="resnet18: .* is deprecated.*weights='IMAGENET1K_V1'"):
        model = models.resnet18(**old)
    assert torch.equal(model.conv1.weight, download.state["conv1.weight"])
    with pytest.warns(UserWarning, match="weights=None"):
        models.resnet18(**dict.fromkeys(old, False))
    assert len(download.calls) == 1
    with pytest.raises(TypeError, match="weights or pretrained, not both"):
        models.resnet18(weights="DEFAULT", pretrained=True)


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_networks_weights_are_found(name, monkeypatch):
    loaded = []
    monkeypatch.setattr(pretrained, "load", lambda model, weights, progress: loaded.append(weights))
    model = on_meta(name, weights="DEFAULT")
    assert loaded == [torchvision.models.get_model_weights(name).DEFAULT]
    assert count(model) == (6_624_904 if name == "googlenet" else PARAMETERS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on_meta(name, pretrained=True)
    assert loaded[1] is torchvision.models.get_model_weights(name).IMAGENET1K_V1


def test_weights_of_features_alone(monkeypatch):
    monkeypatch.setattr(pretrained, "load", lambda model, weights, progress: None)
    model = on_meta("vgg16", weights="IMAGENET1K_FEATURES", num_classes=5)
    assert model.classifier[-1].out_features == 5


def test_googlenets_weights(download):
    source = theirs("googlenet").eval()
    download.state = source.state_dict()
    model = models.googlenet(weights="DEFAULT").eval()
    assert (model.transform_input, model.aux_logits, model.aux1) == (True, False, None)
    images = torch.randn(1, 3, 32, 32)
    source.transform_input = True
    torch.testing.assert_close(model(images), source(images), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="auxiliary classifiers are not pretrained"):
        model = models.googlenet(weights="DEFAULT", aux_logits=True, transform_input=False)
    assert model.aux_logits and not model.transform_input
    assert torch.equal(model.aux1.fc1.weight, download.state["aux1.fc1.weight"])


@pytest.mark.parametrize(
    "name, config, error, message",
    [
        ("resnet18", {"weights": "DEFAULT", "num_classes": 10}, ValueError,
         "num_classes must be 1000 for ResNet18_Weights.IMAGENET1K_V1, but got 10"),
        ("vgg16", {"weights": "DEFAULT", "in_channels": 1}, ValueError,
         "in_channels must be 3 for VGG16_Weights.IMAGENET1K_V1, but got 1"),
        ("googlenet", {"weights": "DEFAULT", "num_classes": 2}, ValueError,
         "num_classes must be 1000"),
        ("alexnet", {"weights": "V7"}, ValueError,
         "alexnet has no weights called 'V7': there are IMAGENET1K_V1, DEFAULT"),
        ("resnet18", {"weights": "ResNet50_Weights.DEFAULT"}, ValueError,
         "resnet18 has no weights called 'ResNet50_Weights.DEFAULT'"),
        ("resnet18", {"weights": torchvision.models.ResNet50_Weights.DEFAULT}, TypeError,
         "a member of ResNet18_Weights, but got ResNet50_Weights.IMAGENET1K_V2"),
        ("resnet18", {"weights": 10}, TypeError, "weights must be None, .* but got 10"),
        ("vgg16_c", {"weights": "DEFAULT"}, ValueError, "vgg16_c has no pretrained weights"),
        ("vgg11_lrn", {"pretrained": True}, ValueError, "vgg11_lrn has no pretrained weights"),
        ("alexnet", {"lrn": True, "weights": "DEFAULT"}, ValueError,
         r"alexnet\(lrn=True\) has no pretrained weights"),
        ("googlenet", {"paper": True, "weights": "DEFAULT"}, ValueError,
         r"googlenet\(paper=True\) has no pretrained weights"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(name, config, error, message, download):
    with pytest.raises(error, match=message):
        models.get_model(name, **config)
    assert not download.calls


class Broken:
    """A torchvision whose import fails, as one that was built for another torch does."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            raise RuntimeError("operator torchvision::nms\ndoes not exist")


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_a_torchvision_that_cannot_be_imported(name, monkeypatch):
    sys = pretrained.importlib.sys
    for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    message = f"the weights of {name} come from torchvision, which cannot be imported .RuntimeError"
    with pytest.raises(ImportError, match=message) as caught:
        models.get_model(name, weights="DEFAULT")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as where it is not installed
    with pytest.raises(ImportError, match=r"cannot be imported \(.*torchvision"):
        models.get_model(name, weights="DEFAULT")
    assert count(on_meta(name, weights=None)) == PARAMETERS[name], "needed for weights alone"


# Convolution and BatchNorm as one operation, with torchvision's keys


def operators(function):
    """Names of the operators that function() runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return [e.key for e in profile.key_averages() for _ in range(e.count)]


def blocks():
    """What the networks are made of, small; each with its number of convolutions."""
    down = fastconv.modules.ConvSequential(resnet.conv1x1(8, 16, 2), fastconv.BatchNorm2d(16))
    return {
        "basic": (resnet.BasicBlock(8, 8), 2),
        "downsample": (resnet.Bottleneck(8, 4, 2, down), 4),
        "inception": (Inception(8, 4, 4, 8, 4, 4, 4), 6),
        "vgg": (vgg.make_layers([8, "M", 4], batch_norm=True, in_channels=8), 2),
    }


BLOCKS = list(blocks())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_are_their_modules_one_by_one(name, training, backend):
    block, _ = blocks()[name]
    block.to(backend.device).train(training)
    twin = peers.torch_twin(block)
    inputs = [torch.randn(2, 8, 6, 6, device=backend.device).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    ours, expected = block(inputs[0]), twin(inputs[1])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    for out in (ours, expected):
        out.sin().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-3, atol=1e-4)
    for (key, a), b in zip(block.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=key)
    for a, b in zip(block.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["simple_cnn", "mnist_cnn", "fashion_cnn"])
def test_small_networks_on_every_backend(name, backend):
    model = models.get_model(name, num_classes=3).to(backend.device).eval()
    twin = peers.torch_twin(model)
    images = torch.randn(1, 1, SMALL[name], SMALL[name], device=backend.device)
    labels = torch.ones(1, dtype=torch.long, device=backend.device)
    losses = [F.cross_entropy(net(images), labels) for net in (model, twin)]
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-5)
    ours, expected = (
        torch.autograd.grad(loss, list(net.parameters()))
        for loss, net in zip(losses, (model, twin), strict=True)
    )
    torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_copies_and_pickles(name):
    """The files of AlexNet and GoogLeNet share their names with constructors."""
    block = blocks()[name][0].eval()
    x = torch.randn(1, 8, 6, 6)
    for copied in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert type(copied) is type(block)
        assert torch.equal(copied(x), block(x))


@pytest.mark.parametrize("name", BLOCKS)
def test_inference_is_one_operator_a_convolution(name):
    block, convolutions = blocks()[name]
    images = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        seen = operators(lambda: block.eval()(images))
    assert seen.count("fastconv::conv_bn_act") == convolutions
    assert not [op for op in seen if "batch_norm" in op or "relu" in op]


def parametrized(block):
    nn.utils.parametrizations.weight_norm(block.conv1)


def weight_norm(block):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        nn.utils.weight_norm(block.conv1)


def own_forward(block):
    block.bn2.forward = lambda x: x * 2


def padding_mode(block):
    block.conv1.padding_mode = "reflect"


def subclass(block):
    class Half(fastconv.Conv2d):
        def forward(self, x):
            return super().forward(x) / 2

    block.conv2.__class__ = Half


def frozen_norm(block):
    block.bn1 = torchvision.ops.FrozenBatchNorm2d(8)


def other_activation(block):
    block.relu = nn.LeakyReLU(0.3)


CHANGES = [parametrized, weight_norm, own_forward, padding_mode, subclass, frozen_norm]
CHANGES.append(other_activation)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_modules_are_called_one_by_one(change, training):
    block, twin = resnet.BasicBlock(8, 8), resnet.BasicBlock(8, 8)
    for model in (block, twin):
        change(model)
        model.train(training)
    twin.load_state_dict(block.state_dict())
    x = torch.randn(2, 8, 6, 6)
    out = twin.relu(twin.bn1(twin.conv1(x)))
    expected = twin.relu(twin.bn2(twin.conv2(out)) + x)
    torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        fused = operators(lambda: block.eval()(x)).count("fastconv::conv_bn_act")
    # Both convolutions end in the block's one activation.
    assert fused == (0 if change is other_activation else 1)


@pytest.mark.parametrize(
    "activation, fused",
    [
        (nn.ReLU(inplace=True), True),
        (nn.ReLU6(), True),
        (nn.SiLU(), True),
        (nn.Hardswish(), True),
        (nn.Sigmoid(), True),
        (nn.LeakyReLU(), True),
        (nn.LeakyReLU(0.3), False),
        (nn.GELU(), False),
    ],
    ids=repr,
)
def test_activations_that_follow(activation, fused):
    layers = fastconv.Conv2d(3, 4, 3), fastconv.BatchNorm2d(4), activation, nn.Tanh()
    model = fastconv.modules.ConvSequential(*layers).eval()
    x = torch.randn(2, 3, 6, 6)
    expected = nn.Sequential(*layers)(x)
    called = []
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
        forward = type(activation).forward
        with pytest.MonkeyPatch.context() as patch:
            spy = lambda self, x: called.append(self) or forward(self, x)  # noqa: E731
            patch.setattr(type(activation), "forward", spy)
            model(x)
    assert called == ([] if fused else [activation])


@pytest.mark.parametrize("where", ["conv1", "bn1", "conv2", "bn2", "relu"])
@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_hooks_fire(where, kind):
    block = resnet.BasicBlock(8, 8)
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    expected = copy.deepcopy(block)(x)
    seen = []
    block.relu.inplace = "backward" not in kind  # torch refuses the two together
    module = getattr(block, where)
    handle = getattr(module, f"register_{kind}")(lambda *arguments: seen.append(arguments[0]))
    out = block(x)
    out.sum().backward()
    assert seen == [module] * (2 if where == "relu" else 1)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    handle.remove()
    block(x).sum().backward()
    with torch.no_grad():
        assert operators(lambda: block.eval()(x)).count("fastconv::conv_bn_act") == 2


def test_hooks_on_every_module_fire():
    model = models.resnet18().eval()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.append(type(m)))
    try:
        model(torch.randn(1, 3, 32, 32))
    finally:
        handle.remove()
    assert seen.count(fastconv.Conv2d) == seen.count(fastconv.BatchNorm2d) == 20


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_synchronised_batch_norm_is_called(training, monkeypatch):
    """Without other processes it computes what BatchNorm computes."""
    called, forward = [], nn.SyncBatchNorm.forward
    spy = lambda self, x: called.append(self) or forward(self, x)  # noqa: E731
    monkeypatch.setattr(nn.SyncBatchNorm, "forward", spy)
    model = nn.Sequential(blocks()["downsample"][0], fastconv.ConvBNReLU2d(16, 4, 3, padding=1))
    model.train(training)
    images = torch.randn(2, 8, 8, 8)
    synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    torch.testing.assert_close(synchronised(images), model(images), rtol=1e-4, atol=1e-5)
    for a, b in zip(synchronised.buffers(), model.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert len(called) == 5


@pytest.mark.parametrize(
    "activation", ["relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid", "none", None]
)
def test_the_fused_layers_hooks_fire_too(activation):
    layer = fastconv.ConvBNReLU2d(3, 4, 3, activation=activation)
    x, seen = torch.randn(2, 3, 6, 6), []
    expected = copy.deepcopy(layer)(x)
    layer.conv.register_forward_hook(lambda *arguments: seen.append(arguments[2]))
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)
    assert len(seen) == 1 and layer.bn.num_batches_tracked == 1


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_unbatched_images_are_refused_as_torch_refuses_them(name):
    with pytest.raises(ValueError, match=r"expected 4D input \(got 3D input\)"):
        models.get_model(name)(torch.randn(3, 32, 32))


def test_a_sequence_is_a_sequence():
    features = vgg.make_layers([8, 4, "M"], batch_norm=True).eval()
    assert isinstance(features, nn.Sequential) and len(features) == 7
    x = torch.randn(1, 3, 6, 6)
    expected = x
    for i, layer in enumerate(features, start=1):
        expected = layer(expected)
        torch.testing.assert_close(features[:i](x), expected, rtol=1e-5, atol=1e-5)


def test_torch_fx_sees_the_modules():
    """Whoever traces finds what torchvision's network shows, and the feature extractors work."""
    model = models.resnet18(num_classes=3).eval()

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return super().is_leaf_module(module, name) or isinstance(
                module, (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d)
            )

    graph = Tracer().trace(model)
    called = [node.target for node in graph.nodes if node.op == "call_module"]
    assert called[:4] == ["conv1", "bn1", "relu", "maxpool"]
    images = torch.randn(1, 3, 32, 32)
    extractor = torchvision.models.feature_extraction.create_feature_extractor(
        model, {"layer1": "first", "fc": "last"}
    )
    torch.testing.assert_close(extractor(images)["last"], model(images), rtol=1e-4, atol=1e-5)
    assert extractor(images)["first"].shape == (1, 64, 8, 8)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_torch_compile_takes_it_whole(training):
    model = nn.Sequential(blocks()["basic"][0], blocks()["vgg"][0]).train(training)
    x = torch.randn(2, 8, 6, 6)
    expected = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected(x), rtol=1e-4, atol=1e-5)
    for a, b in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_nothing_falls_back_to_aten(name):
    model = models.get_model(name, num_classes=3)
    images = torch.randn(2, 3, 32, 32)
    with fastconv.allow_fallback(False):
        flat(model(images)).sum().backward()
        with torch.no_grad():
            model.eval()(images)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast(training):
    block = resnet.BasicBlock(8, 8).train(training)
    twin = peers.torch_twin(block)
    x = torch.randn(2, 8, 6, 6, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, expected = block(x), twin(x)
    assert ours.dtype is expected.dtype
    torch.testing.assert_close(ours, expected, rtol=3e-2, atol=3e-2)
