"""summary(): a network's layers in a table, and nothing of the network changed."""

import sys

import pytest
import torch
import torchinfo
from torch import nn

from fastconv import models
from fastconv.models.layer_table import layer_table

SIZES = {
    "lenet5": (1, 1, 28, 28),
    "fashion_cnn": (2, 1, 32, 32),
    "alexnet": (1, 3, 224, 224),
    "vgg16_bn": (4, 3, 224, 224),
    "googlenet": (1, 3, 224, 224),
    "resnet50": (1, 3, 64, 64),
}


class Odd(nn.Module):
    """What networks may do: a list of layers, a layer called twice, a frozen one, one never called,
    a parameter of its own, a tuple and a mapping as outputs, a long name."""

    class WithANameThatIsLongerThanTheColumn(nn.Module):
        def forward(self, x):
            return {"first": x, "last": x[:, :1]}

    class Two(nn.Module):
        def forward(self, x):
            return x, x[:1]

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)])
        self.others = nn.ModuleDict({"a": nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 3)))})
        self.twice = nn.Sequential(nn.Conv2d(3, 3, 3, bias=False), nn.ReLU())
        self.frozen = nn.Conv2d(3, 3, 1).requires_grad_(False)
        self.never = nn.Linear(7, 7)
        self.scale = nn.Parameter(torch.ones(3, 1, 1))
        self.two = self.Two()
        self.named = nn.Sequential(nn.Sequential(self.WithANameThatIsLongerThanTheColumn()))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        x = self.twice(self.others["a"](x))
        x, _ = self.two(self.twice(self.frozen(x)) * self.scale)
        return self.named(x)["last"]


def table(model, size, **options):
    return models.summary(model, size, verbose=0, **options)


def without_torchinfo(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchinfo", None)


def readable(text):
    """torchinfo prints its units by their Python names from Python 3.11 on."""
    for name, unit in (("MEGA", "M"), ("GIGA", "G"), ("TERA", "T")):
        text = text.replace(f"Units.{name}BYTES", unit)
    return text


def build(name):
    if name == "odd":
        return Odd(), (2, 3, 9, 9)
    with torch.device("meta"):
        return models.get_model(name), SIZES[name]


@pytest.mark.parametrize("name", [*SIZES, "odd"])
def test_without_torchinfo_it_prints_what_torchinfo_prints(name, monkeypatch):
    model, size = build(name)
    expected = table(model, size)
    assert isinstance(expected, torchinfo.ModelStatistics)
    without_torchinfo(monkeypatch)
    ours = table(model, size)
    assert str(ours) == readable(str(expected))
    for total in ("params", "mult_adds", "param_bytes", "output_bytes"):
        assert getattr(ours, f"total_{total}") == getattr(expected, f"total_{total}")
    assert ours.trainable_params == expected.trainable_params


def test_lenets_table(monkeypatch):
    without_torchinfo(monkeypatch)
    lines = str(table(models.lenet5(), (64, 1, 28, 28))).splitlines()
    assert lines[1] == f"{'Layer (type:depth-idx)':<41}{'Output Shape':<26}Param #"
    assert f"{'│    └─Conv2d: 2-1':<41}{'[64, 6, 28, 28]':<26}156" in lines
    assert f"{'│    └─Linear: 2-8':<41}{'[64, 120]':<26}48,120" in lines
    assert "Total params: 61,706" in lines and "Non-trainable params: 0" in lines
    # 61,706 parameters; a convolution's work at 28x28 and at 10x10 places.
    mult_adds = 64 * (156 * 28 * 28 + 2_416 * 10 * 10 + 48_120 + 10_164 + 850)
    assert f"Total mult-adds (M): {mult_adds / 1e6:.2f}" in lines
    assert f"Input size (MB): {64 * 28 * 28 * 4 / 1e6:.2f}" in lines


@pytest.mark.parametrize("installed", [True, False])
def test_the_network_stays_as_it_is(installed, monkeypatch):
    if not installed:
        without_torchinfo(monkeypatch)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5)).double()
    model[1].eval()  # frozen, while the rest trains
    before = {key: t.clone() for key, t in model.state_dict().items()}
    random = torch.get_rng_state()
    for size in ((2, 1, 5, 5), (2, 7, 5, 5)):
        try:
            table(model, size)
        except ValueError:
            assert size[1] == 7
    assert [m.training for m in model.modules()] == [True, True, False, True]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(
    "size, error, message",
    [
        ((1, 3, 28, 28), ValueError, r"LeNet5 does not take an input of size \(1, 3, 28, 28\): .+"),
        ((1, 1, 32, 32), ValueError, r"LeNet5 does not take an input of size \(1, 1, 32, 32\): .+"),
        ((28,), ValueError, "LeNet5 does not take"),
        ((1, 1, 0, 28), ValueError, r"sizes in input_size must be at least 1, but got \(1, 1, 0"),
        ((), ValueError, r"must be at least 1, but got \(\)"),
        ((1, 1, 28.0, 28), TypeError, r"tuple of integers, .* but got \(1, 1, 28.0, 28\)"),
        (28, TypeError, "tuple of integers, .* but got 28"),
        ("28", TypeError, "tuple of integers, .* but got '28'"),
        ([(1, 1, 28, 28)], TypeError, "tuple of integers"),
    ],
)
def test_a_wrong_input_size_is_named(size, error, message, installed, monkeypatch):
    if not installed:
        without_torchinfo(monkeypatch)
    with pytest.raises(error, match=message) as caught:
        table(models.lenet5(), size)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("installed", [True, False])
def test_it_prints_unless_told_not_to(installed, monkeypatch, capsys):
    if not installed:
        without_torchinfo(monkeypatch)
    monkeypatch.delattr(sys, "ps1", raising=False)
    found = models.summary(models.lenet5(), [1, 1, 28, 28])
    assert capsys.readouterr().out == f"{found}\n"
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    models.summary(models.lenet5(), (1, 1, 28, 28))
    assert capsys.readouterr().out == ""


def test_a_network_without_parameters(monkeypatch):
    model = nn.Sequential(nn.ReLU(), nn.Flatten())
    expected = readable(str(table(model, (1, 2, 3, 3))))
    without_torchinfo(monkeypatch)
    assert str(table(model, (1, 2, 3, 3))) == expected


def test_layers_that_are_fused_are_listed():
    """A hook on a convolution makes it run by itself, so that its own output is seen."""
    with torch.device("meta"):
        model = models.resnet18().eval()
    rows = layer_table(model, torch.empty(1, 3, 64, 64, device="meta"), 3).rows
    assert [type(row.module).__name__ for row in rows[1:5]] == [
        "Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"
    ]  # fmt: skip
    assert all(row.size for row in rows)
