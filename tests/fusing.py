"""Small networks to fuse, and what must hold of each that was fused."""

import torch
from torch import nn

import fastconv
from fastconv import surgery


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
