"""A fused model is still a model: its weights, modes, copies, dtypes, compilers and report."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastconv
from fastconv import surgery
from fastconv.modules.inference import FusedConv2d
from fusing import Net, bn, conv, image


def model():
    """A residual network, small."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), bn(), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        Net(lambda m, x: m.inplace(m.bn2(m.conv2(m.inplace(m.bn(m.conv(x))))) + x)),
        nn.Conv2d(4, 5, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    ).eval()  # fmt: skip


def pictures():
    return torch.randn(2, 3, 11, 12)


KERNELS = {
    "Conv-BN-ReLU-MaxPool": 1,
    "Conv-BN-ReLU": 1,
    "Conv-BN-add-ReLU": 1,
    "Conv-SiLU": 1,
}


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
