"""fuse on models that do what torch.fx does not see: each gave a wrong result, or none, once."""

import collections
import pickle

import pytest
import torch
from torch import nn

import fastconv
from fastconv import surgery
from fusing import Net, bn, check, conv, image


class Scaled:
    """A forward of the instance's own, as wrappers that dispatch layers set it."""

    def __init__(self, layer):
        self.layer = layer

    def __call__(self, x):
        return type(self.layer).forward(self.layer, x) * 2


@pytest.mark.parametrize("at", range(5))
def test_a_forward_of_the_instances_own_runs(at):
    net = nn.Sequential(conv(), bn(), nn.ReLU(), nn.Dropout(), nn.MaxPool2d(2)).eval()
    net[at].forward = Scaled(net[at])
    fused = fastconv.fuse(net, inplace=True)
    x = image()
    expected = x
    for layer in net:
        expected = layer(expected)
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-5)


def test_a_change_in_place_inside_a_container_that_is_called():
    short = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    short.register_forward_hook(lambda *given: None)

    def body(m, x):
        x = x * 1
        out = m.conv(x)
        return out + m.short(x)

    check(Net(body, short=short))


def test_a_child_called_parts():
    def body(m, x):
        y = m.relu(m.bn(m.conv(x)))
        return m.parts[0](y) * m.parts[1](y)

    net = Net(body, parts=nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)]))
    check(net, exactly={"conv": "Conv-BN-ReLU"})


class Pyramid(nn.Module):
    """Its forward depends on a value, which no tracer knows."""

    def __init__(self, kind):
        super().__init__()
        self.conv, self.kind = conv(), kind

    def forward(self, x):
        y = self.conv(x) if x.sum() < 1e9 else x
        return {"list": [x, y], "tensor": y}[self.kind]


@pytest.mark.parametrize("kind", ["list", "tensor"])
def test_the_type_of_what_an_untraced_module_returns(kind):
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Pyramid(kind)
            self.head = nn.Sequential(conv(), bn(), nn.ReLU())

        def forward(self, x):
            found = self.backbone(x)
            if isinstance(found, torch.Tensor):
                found = [found]
            return self.head(found[-1])

    check(Detector())


def test_required_arguments_that_are_no_tensors():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv(), bn()

        def forward(self, x, skip):
            if isinstance(x, list):
                x = x[0] + x[1]
            y = self.bn(self.conv(x))
            return y if skip is None else y + skip

    net = Block().eval()
    fused = fastconv.fuse(net)
    x, skip = image(), image()
    for given in ((x, skip), (x, None), ([x, x], skip), ([x, x], None)):
        torch.testing.assert_close(fused(*given), net(*given), rtol=1e-4, atol=1e-5)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = fused

        def forward(self, x):
            return self.block(x=x, skip=x)

    x = image()
    traced = torch.fx.symbolic_trace(Outer())
    torch.testing.assert_close(traced(x), net(x, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["list", "dict", "deque", "child"])
def test_what_a_forward_records_goes_on_being_recorded(kind):
    def record(m, y):
        if kind == "dict":
            m.seen["y"] = y
        elif kind == "child":
            m.relu.seen = y
        else:
            m.seen.append(y)
        return y

    net = Net(lambda m, x: record(m, m.relu(m.bn(m.conv(x)))))
    net.seen = {"list": [], "dict": {}, "deque": collections.deque()}.get(kind)
    net.relu.seen = None
    fused = fastconv.fuse(net.eval(), inplace=True)
    assert not net.seen and net.relu.seen is None  # no proxy stayed behind
    y = fused(image())
    seen = {"dict": lambda: net.seen["y"], "child": lambda: net.relu.seen}
    assert seen.get(kind, lambda: net.seen[-1])() is y
    pickle.dumps(net.seen)


@pytest.mark.parametrize("name, groups", [("resnet18", 20), ("vgg11_bn", 8)])
def test_our_own_networks_fuse(name, groups):
    net = fastconv.models.get_model(name, num_classes=3).eval()
    fused = fastconv.fuse(net)
    assert sum("Conv-BN" in e.became for e in surgery.report(fused).fused) == groups
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(fused(x), net(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", [None, "relu", "silu", "leaky_relu"])
def test_conv_bn_relu_is_traced_as_its_layers(activation):
    net = nn.Sequential(fastconv.ConvBNReLU2d(4, 4, 3, activation=activation)).eval()
    traced = torch.fx.symbolic_trace(net)
    x = image()
    torch.testing.assert_close(traced(x), net(x), rtol=1e-4, atol=1e-5)


def test_export_of_a_fused_model_with_sizes_left_open():
    net = fastconv.fuse(nn.Sequential(conv(), bn(), nn.ReLU()).eval())
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(net, (image(),), dynamic_shapes={"input": {0: batch}})
    x = torch.randn(5, 4, 6, 7)
    torch.testing.assert_close(exported.module()(x), net(x))


def test_summary_of_a_fused_model_counts_every_layer():
    net = fastconv.models.lenet5()
    plain = fastconv.models.summary(net, (1, 1, 28, 28), verbose=0)
    fused = fastconv.fuse(net)
    found = fastconv.models.summary(fused, (1, 1, 28, 28), verbose=0)
    assert found.total_mult_adds == plain.total_mult_adds
    assert surgery.report(fused).fused and "forward" in vars(fused) | vars(fused.features)


def test_the_report_says_which_calls_run_fused():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv(), bn()

        def forward(self, x, skip=None):
            y = self.bn(self.conv(x))
            return y if skip is None else y + skip

    notes = surgery.report(fastconv.fuse(Block().eval())).notes
    assert notes == ["The model runs fused where it is called with skip=None."]


@pytest.mark.parametrize("hooked", [False, True])
def test_a_residual_of_another_type_promotes_with_or_without_hooks(hooked):
    layer = fastconv.ConvBNReLU2d(4, 4, 3, padding=1).eval()
    if hooked:
        layer.conv.register_forward_hook(lambda *given: None)
    x, residual = image(), 1000 * image()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x, residual)
        z = layer.bn(layer.conv(x)) + residual
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, z.relu())
