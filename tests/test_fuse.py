"""fuse: which chains of layers become one kernel, and which must not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastconv
from fastconv import surgery
from fusing import Net, bn, check, conv, image, reason

ACTIVATIONS = {
    "ReLU": [nn.ReLU(), nn.ReLU(inplace=True), F.relu, F.relu_, torch.relu, torch.relu_,
             lambda x: x.relu(), lambda x: x.relu_(), lambda x: F.relu(x, inplace=True),
             lambda x: F.relu(x, True), fastconv.functional.relu],
    "ReLU6": [nn.ReLU6(), nn.ReLU6(inplace=True), F.relu6],
    "SiLU": [nn.SiLU(), nn.SiLU(inplace=True), F.silu],
    "Hardswish": [nn.Hardswish(), nn.Hardswish(inplace=True), F.hardswish],
    "Sigmoid": [nn.Sigmoid(), torch.sigmoid, F.sigmoid, lambda x: x.sigmoid(), torch.sigmoid_],
    "LeakyReLU": [nn.LeakyReLU(), nn.LeakyReLU(0.01, inplace=True), F.leaky_relu,
                  lambda x: F.leaky_relu(x, 0.01), lambda x: F.leaky_relu(x, negative_slope=0.01)],
}  # fmt: skip
SPELLINGS = [
    pytest.param(name, act, id=f"{name}{i}")
    for name, spellings in ACTIVATIONS.items()
    for i, act in enumerate(spellings)
]


@pytest.mark.parametrize("name, act", SPELLINGS)
def test_every_spelling_of_an_activation(name, act):
    layers = {"act": act} if isinstance(act, nn.Module) else {}
    run = (lambda m, y: m.act(y)) if layers else (lambda m, y: act(y))
    check(Net(lambda m, x: run(m, m.bn(m.conv(x))), **layers), exactly={"conv": f"Conv-BN-{name}"})
    check(Net(lambda m, x: run(m, m.conv(x)), **layers), exactly={"conv": f"Conv-{name}"})
    body = Net(lambda m, x: run(m, m.bn(m.conv(x)) + x), **layers)
    check(body, exactly={"conv": f"Conv-BN-add-{name}"})


@pytest.mark.parametrize("slope", [0.2, 0.0])
def test_leaky_relu_of_another_slope_stays(slope):
    net = Net(lambda m, x: F.leaky_relu(m.bn(m.conv(x)), slope))
    check(net, exactly={"conv": "Conv-BN"})
    check(nn.Sequential(conv(), bn(), nn.LeakyReLU(slope)), exactly={"0": "Conv-BN"})
    net = nn.Sequential(conv(), nn.LeakyReLU(slope))
    assert reason(net, "0") == "followed by LeakyReLU"


def add_in_place(a, b):
    a += b
    return a


@pytest.mark.parametrize(
    "add",
    [lambda y, x: y + x, lambda y, x: x + y, add_in_place, torch.add, lambda y, x: torch.add(x, y),
     lambda y, x: y.add(x), lambda y, x: y.add_(x), lambda y, x: x.add(y)],
    ids=["y+x", "x+y", "y+=x", "torch.add(y,x)", "torch.add(x,y)", "add", "add_", "x.add"],
)  # fmt: skip
def test_every_spelling_of_a_residual(add):
    net = Net(lambda m, x: F.relu(add(m.bn(m.conv(x)), x)))
    check(net, exactly={"conv": "Conv-BN-add-ReLU"})
    check(Net(lambda m, x: add(m.bn(m.conv(x)), x)), exactly={"conv": "Conv-BN-add"})


def test_additions_that_are_none_of_the_kernels():
    check(Net(lambda m, x: torch.add(m.bn(m.conv(x)), x, alpha=2)), exactly={"conv": "Conv-BN"})
    check(Net(lambda m, x: m.bn(m.conv(x)) + 1), exactly={"conv": "Conv-BN"})

    def twice(m, x):
        y = m.bn(m.conv(x))
        return y + y

    check(Net(twice), exactly={"conv": "Conv-BN"})


def test_adding_to_the_residual_in_place_changes_it():
    def body(m, x):
        shortcut = m.conv2(x)
        other_name = shortcut
        shortcut += m.bn(m.conv(x))
        return other_name, m.bn2(shortcut)

    found = check(Net(body))
    assert found["conv"] == "Conv-BN"
    assert "in place to a tensor" in reason(Net(body))


def test_adding_in_place_to_what_nobody_else_reads():
    def body(m, x):
        y = m.conv2(x) * 2
        y += m.bn(m.conv(x))
        return m.relu(y)

    check(Net(body), exactly={"conv": "Conv-BN-add-ReLU"})


def test_an_input_changed_in_place_is_changed():
    def body(m, x):
        other_name = x
        x += m.bn(m.conv(x))
        return m.relu(m.conv2(other_name))

    check(Net(body), exactly={"conv": "Conv-BN", "conv2": "Conv-ReLU"})


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 1, 6, 7), (4, 6, 7), (1,), (3, 2, 4, 6, 7)])
def test_a_residual_that_is_broadcast(shape):
    other = nn.Parameter(torch.randn(shape))
    check(Net(lambda m, x: F.relu(m.bn(m.conv(x)) + m.other), other=other))
    check(Net(lambda m, x: F.relu(m.bn(x) + m.other), other=other))


def test_a_residual_of_another_dtype():
    check(Net(lambda m, x: F.silu(m.bn(m.conv(x)) + x.double())))
    check(Net(lambda m, x: F.silu(m.bn(x) + x.double())))


def test_two_convolutions_added():
    """ResNet's shortcut, RepVGG's branches: one takes the other as its residual."""
    net = Net(lambda m, x: F.relu(m.bn(m.conv(x)) + m.bn2(m.conv2(x))))
    check(net, exactly={"conv": "Conv-BN-add-ReLU", "conv2": "Conv-BN"})


def test_the_convolutions_input_changed_before_the_addition():
    """The kernel runs where the residual is added: the convolution's input must still be there."""

    def body(m, x):
        x = x * 1
        y = m.bn(m.conv(x))
        x = F.relu_(x)
        return F.relu(y + x)

    check(Net(body), exactly={"conv": "Conv-BN"})
    assert "changes its input in place before" in reason(Net(body))


def test_a_view_of_the_convolutions_input_changed_before_the_addition():
    def body(m, x):
        x = x * 1
        y = m.bn(m.conv(x))
        flat = m.name(x).flatten(1)
        flat[:, :3] = 7
        return y + m.conv2(m.inplace(x))

    check(Net(body, name=nn.Identity()), exactly={"conv": "Conv-BN", "conv2": "Conv-add"})


def test_changes_in_place_elsewhere_do_not_matter():
    def body(m, x):
        other = m.inplace(m.bn2(x))
        y = m.bn(m.conv(other))
        third = m.inplace(m.conv2(x))
        return m.inplace(y + third)

    wanted = {"conv": "Conv-BN-add-ReLU", "conv2": "Conv-ReLU", "bn2": "BN-ReLU"}
    check(Net(body), exactly=wanted)


def test_the_residual_changed_in_place_before_and_after():
    def body(m, x):
        shortcut = F.relu_(m.conv2(x))
        y = m.bn(m.conv(x)) + shortcut
        shortcut.mul_(3)
        return m.inplace(y), shortcut

    check(Net(body), exactly={"conv": "Conv-BN-add-ReLU", "conv2": "Conv-ReLU"})


def test_an_activation_in_place_whose_input_is_read_again():
    def body(m, x):
        y = m.bn(m.conv(x))
        F.relu_(y)
        return y + 1

    check(Net(body), exactly={"conv": "Conv-BN"})


@pytest.mark.parametrize("where", ["convolution", "norm", "addition"])
def test_results_that_are_used_elsewhere_too(where):
    def body(m, x):
        a = m.conv(x)
        b = m.bn(a)
        c = b + x
        kept = {"convolution": a, "norm": b, "addition": c}[where]
        return F.relu(c), kept * 2

    wanted = {
        "convolution": {"bn": "BN-add-ReLU"},
        "norm": {"conv": "Conv-BN"},
        "addition": {"conv": "Conv-BN-add"},
    }
    check(Net(body), exactly=wanted[where])
    assert reason(Net(body)) == "its output is read 2 times"


def test_activation_before_norm_is_not_folded():
    found = check(Net(lambda m, x: m.bn(m.relu(m.conv(x)))), exactly={"conv": "Conv-ReLU"})
    assert found["bn"] == "BatchNorm2d"
    net = Net(lambda m, x: m.inplace(m.bn(m.relu(m.conv(x))) + x))
    check(net, exactly={"conv": "Conv-ReLU", "bn": "BN-add-ReLU"})


@pytest.mark.parametrize("tracks", [True, False])
def test_norms_without_fixed_statistics(tracks):
    net = Net(lambda m, x: m.relu(m.norm(m.conv(x))), norm=bn(track_running_stats=tracks)).eval()
    net.norm.train(tracks)
    why = "BatchNorm is in training mode" if tracks else "BatchNorm tracks no statistics"
    fused = fastconv.fuse(net)
    assert not surgery.report(fused).fused
    x = image()
    torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-5)
    entries = {entry.name: entry.reason for entry in surgery.report(fused).entries}
    assert entries["conv"] == entries["norm"] == why


@pytest.mark.parametrize("name, act", SPELLINGS)
def test_norms_alone_take_an_activation(name, act):
    """Networks that normalise before they convolve."""
    layers = {"act": act} if isinstance(act, nn.Module) else {}
    run = (lambda m, y: m.act(y)) if layers else (lambda m, y: act(y))
    check(Net(lambda m, x: run(m, m.bn(x * 1)), **layers), exactly={"bn": f"BN-{name}"})
    check(Net(lambda m, x: run(m, m.bn(x) + x), **layers), exactly={"bn": f"BN-add-{name}"})


def test_a_norms_input_changed_before_the_addition():
    def body(m, x):
        x = x * 1
        y = m.bn(x)
        return y + x.relu_()

    check(Net(body), exactly={})
    assert "relu_ changes its input in place" in reason(Net(body), "bn")


def test_a_norm_without_factors():
    check(Net(lambda m, x: m.norm(m.conv(x)), norm=bn_plain()), exactly={"conv": "Conv-BN"})


def bn_plain():
    norm = nn.BatchNorm2d(4, affine=False, eps=1e-2)
    norm.running_mean.uniform_(-1, 1)
    return norm


def test_a_norm_of_another_channel_count_fails_as_before():
    net = nn.Sequential(conv(), bn(5)).eval()
    assert reason(net, "0") == "BatchNorm has 5 channels, not 4"
    with pytest.raises(RuntimeError, match="5"):
        fastconv.fuse(net)(image())


@pytest.mark.parametrize("layer", ["conv", "bn", "relu"])
def test_layers_with_hooks_are_left_alone(layer):
    net, calls = Net(lambda m, x: m.relu(m.bn(m.conv(x)))), []
    getattr(net, layer).register_forward_hook(lambda *_: calls.append(layer))
    fused = {"conv": {"bn": "BN-ReLU"}, "bn": {}, "relu": {"conv": "Conv-BN"}}[layer]
    check(net, exactly=fused)
    assert calls == [layer, layer]


def test_containers_with_hooks_are_called():
    inner, calls = nn.Sequential(conv(), bn(), nn.ReLU()), []
    inner.register_forward_hook(lambda *_: calls.append(1))
    net = nn.Sequential(inner, conv(), nn.ReLU())
    check(net, exactly={"0.0": "Conv-BN-ReLU", "1": "Conv-ReLU"})
    assert calls == [1, 1]
    net.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    check(net, exactly={"0.0": "Conv-BN-ReLU", "1": "Conv-ReLU"})


def test_parametrized_convolutions_are_left_alone():
    net = Net(lambda m, x: m.relu(m.bn(m.conv(x))))
    nn.utils.parametrizations.spectral_norm(net.conv)
    check(net, exactly={"bn": "BN-ReLU"})
    assert reason(net) == "parametrized, or a subclass"


def test_shared_layers():
    """One convolution called twice, one activation everywhere, with two norms."""
    net = Net(lambda m, x: m.relu(m.bn2(m.conv(m.relu(m.bn(m.conv(x)))))))
    fused = fastconv.fuse(net.eval())
    assert [e.became for e in surgery.report(fused).fused] == ["Conv-BN-ReLU"] * 2
    check(net)


@pytest.mark.parametrize("idle", [nn.Identity(), nn.Dropout(0.5), nn.Dropout2d(0.5, inplace=True)])
def test_what_does_nothing_in_evaluation_is_stepped_over(idle):
    net = Net(lambda m, x: m.relu(m.idle(m.bn(m.idle(m.conv(x)))) + x), idle=idle)
    check(net, exactly={"conv": "Conv-BN-add-ReLU"})


def test_dropout_as_a_function():
    net = Net(lambda m, x: m.relu(F.dropout(m.bn(m.conv(x)), 0.5, m.training)))
    check(net, exactly={"conv": "Conv-BN-ReLU"})


@pytest.mark.parametrize("options", [
    {"padding_mode": "reflect"}, {"padding_mode": "circular"}, {"padding": "same", "dilation": 2},
    {"stride": 2}, {"groups": 4, "padding": (2, 1)}, {"bias": False}, {"padding": "valid"},
    {"padding": "same", "kernel_size": (2, 4), "padding_mode": "replicate"},
], ids=str)  # fmt: skip
def test_every_geometry(options):
    layer = nn.Conv2d(4, 4, **({"kernel_size": 3, "padding": 1} | options))
    check(nn.Sequential(layer, bn(), nn.ReLU()), exactly={"0": "Conv-BN-ReLU"})
    check(nn.Sequential(layer, nn.ReLU(), nn.MaxPool2d(2)), exactly={"0": "Conv-ReLU-MaxPool"})
    net = Net(lambda m, x: m.relu(m.bn(m.layer(x)) + m.layer(x)), layer=layer)
    check(net, exactly={"layer": "Conv-BN-add-ReLU"})


def test_pooling():
    check(nn.Sequential(conv(), nn.MaxPool2d(3, 2, 1)), exactly={"0": "Conv-MaxPool"})
    pooled = nn.Sequential(conv(), nn.SiLU(), nn.MaxPool2d(2, ceil_mode=True))
    check(pooled, exactly={"0": "Conv-SiLU"})
    assert "ceil_mode" in reason(pooled, "0")
    after_norm = nn.Sequential(conv(), bn(), nn.ReLU(), nn.MaxPool2d(2))
    check(after_norm, exactly={"0": "Conv-BN-ReLU-MaxPool"})
    net = Net(lambda m, x: m.pool(m.relu(m.conv(x) + m.conv2(x))), pool=nn.MaxPool2d(2)).eval()
    check(net, exactly={"conv": "Conv-add-ReLU"})
    assert "launch of its own" in reason(net)
    check(nn.Sequential(conv(), nn.MaxPool2d(2, return_indices=True)), exactly={})


def test_functions_become_ours():
    def body(m, x):
        x = F.avg_pool2d(F.max_pool2d(m.relu(m.bn(m.conv(x))), 2, stride=1), 2, 1)
        return F.adaptive_avg_pool2d(F.conv2d(x, m.conv2.weight), (1, 2))

    net = Net(body).eval()
    check(net, exactly={"conv": "Conv-BN-ReLU"})
    fused = fastconv.fuse(net)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        fused(image())
    ran = {event.key for event in profile.key_averages()}
    assert not [key for key in ran if key.startswith(("aten::conv", "aten::max_p", "aten::avg_p"))]


def test_subclasses_stay():
    class Own(nn.Conv2d):
        def forward(self, x):
            return 2 * super().forward(x)

    net = nn.Sequential(Own(4, 4, 1), bn(), nn.ReLU(), conv(), nn.ReLU())
    check(net, exactly={"1": "BN-ReLU", "3": "Conv-ReLU"})
    assert reason(net, "0") == "a subclass of Conv2d, with code of its own"
