"""fuse on a CPU: NCHW outside, channels_last inside, and nobody sees it."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastconv
import zoo
from fastconv.surgery import layout
from fusing import Net, bn, conv, image

NHWC = torch.channels_last


@pytest.fixture
def conversions(monkeypatch):
    """The names of the conversions that run."""
    seen = []
    plain = layout._copy

    def counted(value):
        was_nchw = value.dim() == 4 and value.permute(0, 3, 1, 2).is_contiguous()
        seen.append("NHWC" if was_nchw else "NCHW")
        return plain(value)

    monkeypatch.setattr(layout, "_copy", counted)
    return seen


def twice(m, x):
    return m.relu(m.bn2(m.conv2(m.relu(m.bn(m.conv(x))))))


def stack(*heads):
    """Enough convolutions, then what is asked for."""
    body = [layer for _ in range(4) for layer in (conv(), bn(), nn.ReLU())]
    return nn.Sequential(*body, *heads).eval()


def same(got, expected):
    """Values, and the memory format: the strides of what is larger than 1."""
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5, check_stride=True)


def run(model, x, grad=False):
    fused = fastconv.fuse(model.eval())
    with torch.set_grad_enabled(grad):
        same(fused(x), model(x))
    return fused


@pytest.mark.parametrize("grad", [False, True])
def test_one_conversion_at_each_end(conversions, grad):
    run(stack(nn.MaxPool2d(2), conv(), nn.Hardswish(), nn.AvgPool2d(2, 1)), image(), grad)
    assert conversions == ["NHWC", "NCHW"]


def test_every_convolution_sees_channels_last():
    fused, seen = fastconv.fuse(stack(nn.AvgPool2d(2), conv(), nn.ReLU())), []
    plain = torch.ops.fastconv.conv_bn_act.default

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            out = op(*args, **(kwargs or {}))
            if op in (plain, torch.ops.fastconv.avg_pool2d.default):
                seen.append((args[0], out))
            return out

    with torch.inference_mode(False), torch.no_grad(), Watch():
        out = fused(image())
    assert len(seen) == 6 and out.is_contiguous()
    assert all(t.is_contiguous(memory_format=NHWC) for pair in seen for t in pair)


@pytest.mark.parametrize("what", ["input", "filters"])
def test_channels_last_from_outside_stays(conversions, what):
    model, x = stack(), image()
    if what == "input":
        x = x.contiguous(memory_format=NHWC)
    else:
        model.to(memory_format=NHWC)
    fused = run(model, x)
    assert conversions == [] and fused(x).is_contiguous(memory_format=NHWC)


def test_weights_keep_their_strides():
    model = stack()
    fused = fastconv.fuse(model)
    for a, b in zip(model.state_dict().values(), fused.state_dict().values(), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    fused.to(memory_format=NHWC)  # afterwards: what fuse knew is read again
    assert fused(image()).is_contiguous(memory_format=NHWC)


def test_few_convolutions_stay_as_they_are(conversions):
    run(nn.Sequential(conv(), nn.ReLU()), image())
    run(nn.Sequential(conv(), nn.ReLU(), nn.Flatten(2), nn.Unflatten(2, (6, 7)), conv()), image())
    assert conversions == []


@pytest.mark.parametrize(
    "view",
    [lambda x: x.view(x.size(0), -1), lambda x: torch.flatten(x, 1),
     lambda x: x.view(x.size(0), x.size(1), -1).mean(-1), lambda x: x.transpose(1, 2).contiguous(),
     lambda x: torch.as_strided(x, (5, 5), (7, 1))],
)  # fmt: skip
def test_what_looks_at_strides_sees_nchw(view, conversions):
    run(Net(lambda m, x: view(twice(m, twice(m, x)))), image())
    assert conversions == ["NHWC", "NCHW"]


def test_joins_and_products_keep_channels_last(conversions):
    class Excite(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (conv() for _ in range(5))
            self.last = nn.Conv2d(8, 4, 1)
            self.scale = nn.Parameter(torch.randn(4, 1, 1))
            self.pool = nn.AdaptiveAvgPool2d(1)

        def forward(self, x):
            y = torch.cat([self.a(x), F.gelu(self.b(x))], dim=1)
            y = self.last(y) * self.scale
            y = y * torch.sigmoid(self.c(self.pool(y)))
            y = F.interpolate(y, scale_factor=2, mode="nearest")
            return self.d(y) + F.hardsigmoid(self.e(F.interpolate(y, size=y.shape[2:])))

    run(Excite(), image())
    assert conversions == ["NHWC", "NCHW"]


def test_two_inputs_and_several_outputs(conversions):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(conv() for _ in range(8))

        def forward(self, x, z):
            x = self.layers[1](self.layers[0](x).relu()).relu()
            z = self.layers[3](self.layers[2](z).relu()).relu()
            y = self.layers[5](self.layers[4](x + z).relu()).relu()
            w = self.layers[7](self.layers[6](y).relu()).relu()
            return {"x": x, "pair": (w, w.mean((2, 3)))}

    model = Two().eval()
    x, z = image(), image()
    fused = fastconv.fuse(model)
    with torch.no_grad():
        got, expected = fused(x, z), model(x, z)
    same(got["x"], expected["x"])
    same(got["pair"], expected["pair"])
    assert conversions == ["NHWC", "NHWC", "NCHW", "NCHW"]
    conversions.clear()
    fused(x, z.contiguous(memory_format=NHWC))
    run(nn.Sequential(*[conv() for _ in range(5)]), image()[0])
    assert conversions == []


def change_the_input(m, x):
    y = twice(m, twice(m, x))
    x.mul_(2)
    return y + x


def change_a_result_that_is_read_again(m, x):
    y = twice(m, twice(m, x))
    flat = y.view(-1)
    flat[:3] = 7
    return y * 2, flat


def change_an_alias(m, x):
    y = twice(m, twice(m, x))
    z = y.view(y.shape)
    z.add_(1)
    return m.conv(y), z


@pytest.mark.parametrize(
    "body", [change_the_input, change_a_result_that_is_read_again, change_an_alias]
)
def test_changes_in_place_are_seen(body, conversions):
    model, x = Net(body).eval(), image()
    fused, other = fastconv.fuse(model), x.clone()
    with torch.no_grad():
        same(fused(other), model(x))
    same(other, x)
    assert conversions == []


def test_a_change_in_place_of_what_nobody_else_reads(conversions):
    run(stack(nn.Flatten(), nn.Dropout(0.5, inplace=True), nn.ReLU(inplace=True)), image())
    assert conversions == ["NHWC", "NCHW"]


@pytest.mark.parametrize("size", [(2, 1, 6, 7), (1, 4, 1, 1), (3, 1, 1, 1), (2, 4, 1, 5)], ids=str)
def test_sizes_of_one(size, conversions):
    """Strides do not tell the memory formats of these apart: those of the results must."""
    first = nn.Conv2d(size[1], 4, 3, padding=(1, 2))
    fused = run(nn.Sequential(first, *stack()), torch.randn(size))
    assert conversions
    if size[0] > 1:
        y = fused(torch.randn(size))
        assert y.stride() == y.contiguous().clone(memory_format=torch.contiguous_format).stride()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype, conversions):
    model, x = stack().to(dtype), image().to(dtype)
    tolerance = 1e-5 if dtype is torch.float64 else 0.1
    with torch.inference_mode():
        got, expected = fastconv.fuse(model)(x), model(x)
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance, check_stride=True)
    assert conversions == ["NHWC", "NCHW"]


def test_gradients_through_it(conversions):
    model, x = stack(nn.MaxPool2d(2), nn.Flatten()).double(), image().double()
    fused = fastconv.fuse(model)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    for m, leaf in zip((model, fused), leaves, strict=True):
        m(leaf).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    for a, b in zip(fused.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
    assert conversions == ["NHWC", "NCHW"]


def test_copies_files_and_training(conversions):
    model, x = stack(), image()
    fused = fastconv.fuse(model)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        same(other(x), fused(x))
    assert conversions == ["NHWC", "NCHW"] * 4
    conversions.clear()
    reverted = fastconv.revert(fused)
    fused.train()(x), reverted(x)
    assert conversions == []


def test_transforms_and_compilers():
    fused, x = fastconv.fuse(stack(nn.MaxPool2d(2))), image()
    with torch.no_grad():
        expected = fused(x)
        mapped = torch.vmap(fused)(torch.stack([x, x]))
        same(mapped[1], expected)
        same(torch.compile(fused, backend="eager", fullgraph=True)(x), expected)
        same(torch.export.export(fused, (x,)).module()(x), expected)
        same(torch.jit.trace(fused, x)(x), expected)


def test_networks_of_others_convert_twice(conversions, one_thread):
    for name in ("mobilenet_v2", "squeezenet1_1", "efficientnet_b0", "densenet121"):
        model = zoo.torchvision.models.get_model(name, weights=None, num_classes=4)
        conversions.clear()
        run(model, torch.randn(1, 3, 48, 48))
        assert conversions[0] == "NHWC" and len(conversions) == 2, name
