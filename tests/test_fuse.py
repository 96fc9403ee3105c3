"""fuse: which chains become one kernel, which must not, and that nothing else changes."""

import copy
import io
import pickle
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastconv
from fastconv import surgery
from fastconv.modules.inference import FusedConv2d


def bn(channels=4, **options):
    """Statistics and factors that a wrong fold would not survive."""
    norm = nn.BatchNorm2d(channels, **options)
    if norm.running_mean is not None:
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(norm.weight, -1.5, 1.5)
    nn.init.uniform_(norm.bias, -0.5, 0.5)
    return norm


def conv(channels=4, **options):
    return nn.Conv2d(channels, 4, 3, padding=1, **options)


class Net(nn.Module):
    """Two convolutions, two BatchNorms, an activation, and a forward given as a function."""

    def __init__(self, body, **layers):
        super().__init__()
        self.conv, self.bn, self.conv2, self.bn2 = conv(), bn(), conv(), bn()
        self.relu, self.inplace = nn.ReLU(), nn.ReLU(inplace=True)
        self.body = body
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x):
        return self.body(self, x)


def image():
    return torch.randn(2, 4, 6, 7)


def check(model, *inputs, exactly=None, grad=False):
    """fuse(model) computes what the model does; returns {layer: what it became}."""
    model.eval()
    inputs = inputs or (image(),)
    fused = fastconv.fuse(model)
    keep, given = [i.clone() for i in inputs], [i.clone() for i in inputs]
    with torch.set_grad_enabled(grad):
        expected, got = model(*keep), fused(*given)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert type(got) is type(expected)
    for a, b in zip(given, keep, strict=True):
        torch.testing.assert_close(a, b)  # changed where the model changes it
    assert list(fused.state_dict()) == list(model.state_dict())
    found = {entry.name: entry.became for entry in surgery.report(fused).entries}
    if exactly is not None:
        assert {k: v for k, v in found.items() if "-" in v} == exactly, surgery.report(fused)
    return found


def reason(model, name="conv"):
    entries = surgery.report(fastconv.fuse(model.eval())).entries
    return next(entry.reason for entry in entries if entry.name == name)


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
    found = check(after_norm, exactly={"0": "Conv-BN-ReLU"})
    assert found["3"] == "MaxPool2d" and "launch of its own" in reason(after_norm, "0")
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


class Branching(nn.Module):
    """A forward that depends on its input's values: torch.fx cannot trace it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(), bn(), nn.ReLU())
        self.rest = nn.ModuleList([nn.Sequential(conv(), bn()), conv()])

    def forward(self, x):
        y = self.stem(x)
        return self.rest[0](y) if x.sum() > 0 else self.rest[1](y)


@pytest.mark.parametrize("sign", [1, -1])
def test_models_that_cannot_be_traced_are_fused_inside(sign):
    wanted = {"stem.0": "Conv-BN-ReLU", "rest.0.0": "Conv-BN"}
    check(Branching(), sign * image().abs(), exactly=wanted)
    lone = reason(Branching(), "rest.1")
    assert "in the model, a Branching that is not traced" in lone and "control flow" in lone
    inside = nn.Sequential(conv(), nn.ReLU(), Branching())
    wanted = {"0": "Conv-ReLU", **{f"2.{name}": became for name, became in wanted.items()}}
    check(inside, sign * image().abs(), exactly=wanted)


class GivesUp(nn.Module):
    """Reads its weight and hands a value on, then branches on its input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x, kept=None):
        y = x * self.weight
        if kept is not None:
            kept.append(y)
        return y if y.sum() > 0 else -y


def test_what_a_forward_left_before_it_was_given_up():
    def weight(m, x):
        return m.relu(m.conv(m.odd(x) * m.odd.weight))

    check(Net(weight, odd=GivesUp()), exactly={"conv": "Conv-ReLU"})

    def listed(m, x):
        kept = []
        y = m.stem(m.odd(x, kept))
        return y + kept[0]

    stem = nn.Sequential(conv(), nn.ReLU())
    check(Net(listed, odd=GivesUp(), stem=stem), exactly={"stem.0": "Conv-ReLU"})


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.calls, self.last = conv(), bn(), 0, None

    def forward(self, x):
        self.calls += 1
        self.last = x
        return self.bn(self.conv(x))


@pytest.mark.parametrize("nested", [False, True])
def test_a_forward_that_changes_its_module_goes_on_doing_so(nested):
    net = nn.Sequential(Counting(), conv(), nn.ReLU()) if nested else Counting()
    fused = fastconv.fuse(net.eval())
    counter, x = (fused[0] if nested else fused), image()
    assert counter.calls == 0 and counter.last is None, "tracing must leave nothing behind"
    fused(x), fused(x)
    assert counter.calls == 2 and counter.last is x
    assert "changes its own calls, last" in reason(net, "0.conv" if nested else "conv")


def context_of_no_gradients(m, x):
    with torch.no_grad():
        return m.relu(m.conv(x))


def branch_on_type(m, x):
    return m.relu(m.conv(x)) if isinstance(x, torch.Tensor) else m.relu(m.conv(x[0]))


def test_a_forward_that_asks_for_a_tensor_gets_the_right_branch():
    check(Net(branch_on_type), exactly={"conv": "Conv-ReLU"})


def test_gradients_switched_off_stay_off():
    fused = fastconv.fuse(Net(context_of_no_gradients).eval())
    assert not fused(image()).requires_grad


def test_random_numbers_stay_random():
    net = Net(lambda m, x: m.relu(m.conv(x)) + torch.rand(2, 4, 6, 7)).eval()
    fused, x = fastconv.fuse(net), image()
    assert not torch.equal(fused(x), fused(x))


def test_optional_arguments():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv(), bn()

        def forward(self, x, mask=None, *, scale=1.0):
            y = F.relu(self.bn(self.conv(x)))
            return (y if mask is None else y * mask) * scale

    net = Masked().eval()
    fused = fastconv.fuse(net)
    assert [entry.became for entry in surgery.report(fused).entries] == ["Conv-BN-ReLU"]
    x = image()
    mask = torch.rand(2, 4, 6, 7)
    calls = [((x,), {}), ((), {"x": x}), ((x, mask), {}), ((x,), {"mask": mask}), ((x, None), {}),
             ((x,), {"scale": 3.0}), ((x,), {"mask": None, "scale": 2.0})]  # fmt: skip
    for args, kwargs in calls:
        torch.testing.assert_close(fused(*args, **kwargs), net(*args, **kwargs))
    for args, kwargs in [((), {}), ((x, None, 1.0), {}), ((x,), {"x": x}), ((x,), {"other": 1})]:
        with pytest.raises(TypeError, match="forward"):
            fused(*args, **kwargs)


def test_outputs_keep_their_structure():
    def body(m, x):
        y = m.relu(m.conv(x))
        return OrderedDict(out=y, all=[y, (x, None)])

    check(Net(body), exactly={"conv": "Conv-ReLU"})


def test_buffers_and_parameters_used_directly():
    net = Net(lambda m, x: m.relu(m.conv(x)) * m.scale + m.shift)
    net.register_buffer("scale", torch.rand(4, 1, 1))
    net.shift = nn.Parameter(torch.rand(4, 1, 1))
    check(net, exactly={"conv": "Conv-ReLU"})
    fused = fastconv.fuse(net)
    fused.scale = torch.ones(4, 1, 1)
    fused.double()  # makes new tensors
    x = image().double()
    torch.testing.assert_close(fused(x), F.relu(fused.conv(x)) + fused.shift)


def model():
    """A residual network, small."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), bn(), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        Net(lambda m, x: m.inplace(m.bn2(m.conv2(m.inplace(m.bn(m.conv(x))))) + x)),
        nn.Conv2d(4, 5, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    ).eval()  # fmt: skip


def pictures():
    return torch.randn(2, 3, 11, 12)


KERNELS = {"Conv-BN-ReLU": 2, "Conv-BN-add-ReLU": 1, "Conv-SiLU": 1}


def test_weights_are_untouched_and_read_at_each_call():
    net, x = model(), pictures()
    fused = fastconv.fuse(net)
    for (name, a), b in zip(net.state_dict().items(), fused.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    other = model()
    fused.load_state_dict(other.state_dict())
    torch.testing.assert_close(fused(x), other(x), rtol=1e-4, atol=1e-5)


def test_in_place_and_copy():
    net, x = model(), pictures()
    expected = net(x)
    fused = fastconv.fuse(net)
    assert type(fused) is type(net) and "forward" not in vars(net) and type(net[0]) is nn.Conv2d
    assert fastconv.fuse(net, inplace=True) is net and "forward" in vars(net)
    for _ in range(2):
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)
        assert sum(surgery.report(net).counts[name] for name in KERNELS) == 4
        fastconv.fuse(net, inplace=True)
    back = fastconv.revert(net)
    assert [type(m) for m in back.modules()] == [type(m) for m in model().modules()]
    assert "forward" not in vars(back) and not surgery.report(back).fused
    torch.testing.assert_close(back(x), expected)


def test_training_mode():
    net, x = model(), pictures()
    fused = fastconv.fuse(net.train())
    assert net.training and not fused.training
    assert "was in training mode" in surgery.report(fused).notes[0]
    fused.train()
    twin = fastconv.convert(net)
    torch.testing.assert_close(fused(x), twin(x))
    torch.testing.assert_close(fused[1].running_mean, twin[1].running_mean)
    fused.eval()
    fused[1].train()  # a single layer: its statistics are the batch's
    twin.eval()[1].train()
    torch.testing.assert_close(fused(x), twin(x))
    torch.testing.assert_close(fused.eval()(x), twin.eval()(x), rtol=1e-4, atol=1e-5)


def test_gradients_through_it():
    net, x = model(), pictures()
    fused = fastconv.fuse(net)
    for m in (net, fused):
        m(x).square().sum().backward()
    for a, b in zip(fused.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_and_files(way):
    fused, x = fastconv.fuse(model()), pictures()
    if way == "deepcopy":
        other = copy.deepcopy(fused)
    elif way == "pickle":
        with pytest.raises((pickle.PicklingError, AttributeError)):
            pickle.dumps(fused)  # `model` holds a function that cannot be pickled
        fused = fastconv.fuse(picklable())
        other = pickle.loads(pickle.dumps(fused))
    else:
        fused, file = fastconv.fuse(picklable()), io.BytesIO()
        torch.save(fused, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    torch.testing.assert_close(other(x), fused(x))
    assert str(surgery.report(other)) == str(surgery.report(fused))
    with torch.no_grad():
        next(other.parameters()).zero_()
    assert not torch.allclose(other(x), fused(x)), "a copy reads its own weights"


def picklable():
    return nn.Sequential(nn.Conv2d(3, 4, 3), bn(), nn.ReLU(), nn.Flatten(), Branching2()).eval()


class Branching2(nn.Module):
    def forward(self, x):
        return F.adaptive_avg_pool2d(x.unflatten(1, (4, -1, 1)), 1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    net, x = model(), pictures()
    fused = fastconv.fuse(net).to(dtype)
    with torch.inference_mode():
        got = fused(x.to(dtype))
    assert got.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float64 else 0.05
    torch.testing.assert_close(got.float(), net(x), rtol=tolerance, atol=tolerance)


def test_norms_in_another_dtype():
    net = nn.Sequential(conv(), bn(), nn.ReLU()).eval().to(torch.bfloat16)
    net[1].float()
    x = image().to(torch.bfloat16)
    torch.testing.assert_close(fastconv.fuse(net)(x), net(x), rtol=0.05, atol=0.05)


def test_autocast():
    net, x = model(), pictures()
    fused = fastconv.fuse(net)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        got, expected = fused(x), net(x)
    assert got.dtype is expected.dtype
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


def test_channels_last():
    net = nn.Sequential(conv(), bn(), nn.ReLU(), conv()).to(memory_format=torch.channels_last)
    x = image().contiguous(memory_format=torch.channels_last)
    fused = fastconv.fuse(net.eval())
    got, expected = fused(x), net(x)
    assert got.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_unbatched_images():
    check(Net(lambda m, x: m.relu(m.conv2(m.relu(m.conv(x))) + x)), image()[0])


def test_names_of_layers_are_free():
    """Such names are methods of torch.nn's containers."""
    layers = OrderedDict(keys=conv(), items=bn(), type_=nn.ReLU(), values=conv(), a_b=nn.SiLU())
    check(nn.Sequential(layers), exactly={"keys": "Conv-BN-ReLU", "values": "Conv-SiLU"})


def test_torch_compile():
    net, x = model(), pictures()
    fused = fastconv.fuse(net)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), net(x), rtol=1e-4, atol=1e-5)
        with torch.profiler.profile() as profile:
            compiled(x)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["fastconv::conv_bn_act"] == 4


def test_what_torch_compile_has_wrapped():
    net, x = model(), pictures()
    compiled = torch.compile(net, backend="eager")
    with torch.inference_mode():
        expected = compiled(x)
        assert fastconv.fuse(compiled, inplace=True) is compiled
        compiled(x)  # compiled anew
        with torch.profiler.profile() as profile:
            torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["fastconv::conv_bn_act"] == 4


def test_torch_export():
    net, x = model(), pictures()
    exported = torch.export.export(fastconv.fuse(net), (x,)).module()
    torch.testing.assert_close(exported(x), net(x), rtol=1e-4, atol=1e-5)


def test_torch_jit_trace():
    net, x = model(), pictures()
    traced = torch.jit.trace(fastconv.fuse(net), x)
    torch.testing.assert_close(traced(x), net(x), rtol=1e-4, atol=1e-5)


def test_torch_fx_sees_the_models_own_layers():
    fused, x = fastconv.fuse(model()), pictures()
    outer = torch.fx.symbolic_trace(nn.Sequential(fused))
    torch.testing.assert_close(outer(x), fused(x), rtol=1e-4, atol=1e-5)


def test_one_launch_a_group():
    fused, x = fastconv.fuse(model()), pictures()
    with torch.inference_mode(), torch.profiler.profile() as profile:
        fused(x)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["fastconv::conv_bn_act"] == 4
    for key in ("fastconv::conv2d", "aten::relu", "aten::relu_", "aten::silu", "aten::batch_norm"):
        assert key not in calls


def test_fused_models_run_everywhere(backend):
    net, x = model(), pictures()
    expected = net(x)
    fused = fastconv.fuse(net).to(backend.device)
    with torch.inference_mode():
        got = fused(x.to(backend.device))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)


def test_the_report_is_a_table():
    fused = fastconv.fuse(nn.Sequential(conv(), bn(), nn.GELU(), conv(), nn.ReLU()).eval())
    report = surgery.report(fused)
    assert [entry.name for entry in report.fused] == ["0", "3"] and report.left == []
    lines = str(report).splitlines()
    assert lines[0].split() == ["layer", "was", "became", "left", "alone,", "why"]
    assert lines[1].split() == ["0", "Conv2d", "Conv-BN", "followed", "by", "GELU"]
    assert lines[2].split() == ["3", "Conv2d", "Conv-ReLU"]
    assert lines[3] == "1 Conv-BN, 1 Conv-ReLU"
    assert str(surgery.report(nn.Linear(2, 2))).endswith("no layers")


def test_a_fused_layer_shows_what_it_is():
    layer = FusedConv2d(conv(), bn(), "relu")
    assert "activation='relu'" in repr(layer) and "BatchNorm2d" in repr(layer)
    with pytest.raises(ValueError, match="activation must be one of .* but got 'gelu'"):
        FusedConv2d(conv(), None, "gelu")
