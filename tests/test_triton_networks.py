"""Whole networks on Triton kernels alone, forward, backward and a step of training."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastconv
import support

DEVICES = [b.device for b in support.backends() if b.name == "triton"]
pytestmark = pytest.mark.parametrize("device", DEVICES)


class Block(nn.Module):
    """What GoogLeNet and ResNet are made of: 1x1, 3x3/2, depthwise and grouped convolutions,
    BatchNorm, poolings, a residual, channels joined."""

    def __init__(self, layers):
        super().__init__()
        self.stem = layers.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        self.norm = layers.BatchNorm2d(16)
        self.pool = layers.MaxPool2d(3, 2, 1)
        self.reduce = layers.Conv2d(16, 8, 1)
        self.grouped = layers.Conv2d(8, 16, 3, padding=1, groups=2)
        self.depthwise = layers.Conv2d(16, 16, 3, padding=1, groups=16)
        self.average = layers.AvgPool2d(3, 1, 1)
        self.down = layers.Conv2d(32, 24, 3, stride=2, padding=2, dilation=2)
        self.last = layers.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(24, 5)

    def forward(self, x):
        x = self.pool(F.relu(self.norm(self.stem(x))))
        y = F.relu(self.grouped(F.relu(self.reduce(x)))) + x
        y = torch.cat([self.depthwise(y), self.average(y)], 1)
        return self.head(self.last(F.relu(self.down(y))).flatten(1))


def pair(build):
    """(ours, torch's) with the same parameters."""
    torch.manual_seed(3)
    ours, theirs = build(fastconv), build(nn)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def step(model, x, target):
    """Loss, every gradient, and the buffers after one step."""
    loss = F.cross_entropy(model(x), target)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return [loss, *gradients, *model.buffers()]


@pytest.mark.parametrize("layout", support.FORMATS)
def test_every_kind_of_layer_trains(device, layout):
    ours, theirs = pair(Block)
    images = torch.randn(4, 3, 33, 31).to(device, memory_format=support.FORMATS[layout])
    target = torch.arange(4, device=device)
    for model in (ours, theirs):
        model.to(device, memory_format=support.FORMATS[layout])
    with fastconv.backend("triton"):
        got = step(ours, images, target)
    for a, b in zip(got, step(theirs, images, target), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("form", ["modern", "classic"])
def test_lenet5_trains(device, form):
    torch.manual_seed(3)
    model = fastconv.models.lenet5(form=form).to(device)
    images = torch.randn(4, 1, 28, 28, device=device)
    target = torch.arange(4, device=device)
    with fastconv.backend("aten"):
        wanted = step(model, images, target)
    with fastconv.backend("triton"):
        got = step(model, images, target)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_fused_layer_is_one_launch(device):
    """Conv-BN-ReLU with a residual, in inference."""
    layer = fastconv.ConvBNReLU2d(8, 8, 3, padding=1).to(device).eval()
    layer.bn.running_mean.uniform_(-1, 1)
    layer.bn.running_var.uniform_(1, 2)
    x, residual = torch.randn(2, 2, 8, 9, 9, device=device)
    plain = layer.bn(layer.conv(x)) + residual
    with fastconv.backend("triton"), torch.inference_mode():
        got = layer(x, residual=residual)
    torch.testing.assert_close(got, F.relu(plain).detach(), rtol=1e-4, atol=1e-5)


def test_no_kernel_of_torch_runs_behind_the_layers(device):
    """Backward, on autograd's own threads, included."""
    ours, _ = pair(Block)
    ours.to(device)
    images, target = torch.randn(2, 3, 33, 31, device=device), torch.arange(2, device=device)
    with torch.profiler.profile() as profile, fastconv.backend("triton"):
        step(ours, images, target)
    forbidden = (
        "aten::convolution",
        "aten::max_pool2d",
        "aten::native_batch_norm",
        "aten::avg_pool2d",
    )
    ran = [event.key for event in profile.key_averages()]
    assert not [key for key in ran if key.startswith(forbidden)], ran
