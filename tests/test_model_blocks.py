"""The networks' blocks: convolution and BatchNorm as one operation, with torchvision's keys."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastconv
from fastconv import models
from fastconv.benchmarking import peers
from fastconv.models import resnet, vgg
from fastconv.models.googlenet import Inception
from networks import SMALL, flat
from zoo import torchvision

pytestmark = pytest.mark.usefixtures("one_thread")


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
