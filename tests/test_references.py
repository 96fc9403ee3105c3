"""The references and the shared shapes are themselves checked: against loops, torch, papers."""

import pytest
import torch
import torch.nn.functional as F

import references
from fastconv.benchmarking import shapes
from support import integers, max_error, normal

LOOPED = ("3x3 odd channels", "three groups, odd", "dilation 3 by 1, stride 1 by 2", "Nx1")


def edge(name):
    return next(s for s in shapes.CONV_EDGES if s.name == name)


@pytest.mark.parametrize("name", LOOPED)
def test_convolution_is_the_seven_loops(name):
    shape, generator = edge(name), torch.Generator().manual_seed(1)
    x = integers(shape.with_batch(1).input, generator)
    w = integers(shape.weight, generator)
    got = references.conv2d(x, w, **shape.options)
    assert torch.equal(got, references.conv2d_by_loops(x, w, **shape.options))


@pytest.mark.parametrize("shape", shapes.CONV_EDGES, ids=lambda s: s.name)
def test_convolution_is_torch_float64(shape):
    generator = torch.Generator().manual_seed(2)
    x, w, b = (normal(s, generator) for s in (shape.input, shape.weight, (shape.K,)))
    expected = F.conv2d(x, w, b, **shape.options)
    assert expected.shape == shape.output
    assert max_error(references.conv2d(x, w, b, **shape.options), expected) < 1e-11


@pytest.mark.parametrize("shape", shapes.POOL_EDGES, ids=lambda s: s.name)
def test_pooling_is_torch_float64(shape):
    x = integers(shape.input, torch.Generator().manual_seed(3))
    x[x == 2] = torch.nan
    values, indices = references.max_pool2d(
        x, *list(shape.options.values())[:3], shape.dilation, shape.ceil_mode
    )
    expected, where = F.max_pool2d(x, **shape.options, return_indices=True)
    torch.testing.assert_close(values, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(indices, where)
    if shape.dilation == (1, 1):
        options = {k: v for k, v in shape.options.items() if k != "dilation"}
        y = normal(shape.input, torch.Generator().manual_seed(4))
        for include in (True, False):
            expected = F.avg_pool2d(y, **options, count_include_pad=include)
            got = references.avg_pool2d(
                y, shape.kernel, shape.stride, shape.padding, shape.ceil_mode, include
            )
            assert max_error(got, expected) < 1e-13


@pytest.mark.parametrize("size, out", shapes.ADAPTIVE_EDGES)
def test_adaptive_pooling_is_torch_float64(size, out):
    x = normal(size, torch.Generator().manual_seed(5))
    got = references.adaptive_avg_pool2d(x, out)
    assert max_error(got, F.adaptive_avg_pool2d(x, out)) < 1e-13


@pytest.mark.parametrize("size", shapes.NORM_EDGES)
def test_batch_norm_is_torch_float64(size):
    generator = torch.Generator().manual_seed(6)
    x, w, b = normal(size, generator), normal(size[1], generator), normal(size[1], generator)
    expected = F.batch_norm(x, None, None, w, b, training=True)
    assert max_error(references.batch_norm(x, w, b), expected) < 1e-12


@pytest.mark.parametrize("name", LOOPED)
def test_extended_precision_is_float64_and_more(name):
    shape, generator = edge(name), torch.Generator().manual_seed(7)
    x, w, b, grad = (
        normal(s, generator) for s in (shape.input, shape.weight, (shape.K,), shape.output)
    )
    wide = references.conv2d_extended(x, w, b, grad, **shape.options)
    plain = references.conv2d_gradients(x, w, grad, **shape.options)
    plain = dict(zip(("dgrad", "wgrad", "bgrad"), plain, strict=True))
    plain["fprop"] = references.conv2d(x, w, b, **shape.options)
    for direction, t in plain.items():
        assert 0 < max_error(wide[direction], t) < 1e-13


@pytest.mark.parametrize("out", [(3, 4), (1, 1), (8, 7)])
def test_extended_averages_are_float64_and_more(out):
    generator = torch.Generator().manual_seed(9)
    x = normal((2, 3, 7, 6), generator).requires_grad_()
    for sums in (
        lambda t: references.adaptive_avg_pool2d_sums(t, out),
        lambda t: references.avg_pool2d_sums(t, 3, 2, 1, True, False),
    ):
        total, divisor = sums(x)
        plain, grad = total / divisor, normal(total.shape, generator)
        assert max_error(references.average_extended(sums, x), plain.detach()) < 1e-15
        (expected,) = torch.autograd.grad(plain, x, grad)
        assert max_error(references.average_extended(sums, x, grad), expected) < 1e-14


@pytest.mark.parametrize("training", [True, False])
def test_extended_batch_norm_is_float64_and_more(training):
    generator = torch.Generator().manual_seed(8)
    x, grad = (normal((4, 5, 6, 7), generator) for _ in range(2))
    w, b, mean, var = (normal((5,), generator).abs() + 0.1 for _ in range(4))
    statistics = () if training else (mean, var)
    leaves = [t.requires_grad_() for t in (x, w, b)]
    out = references.batch_norm(*leaves, *statistics)
    plain = (out, *torch.autograd.grad(out, leaves, grad))
    for a, e in zip(references.batch_norm_extended(x, grad, w, b, *statistics), plain, strict=True):
        assert 0 < max_error(a, e.detach()) < 1e-12


# Multiplications of all convolutions of one image, in units of 1e6, from the papers' tables and
# torchvision's documentation (there with the linear layers), and how many convolutions there are.
@pytest.mark.parametrize(
    "name, millions, convolutions",
    [
        ("alexnet", 655.6, 5),
        ("vgg11", 7485.5, 8),
        ("vgg16", 15346.6, 13),
        ("vgg19_bn", 19508.4, 16),
        ("googlenet", 1497.4, 57),
        ("resnet18", 1813.6, 20),
        ("resnet34", 3663.2, 36),
        ("resnet50", 4087.1, 53),
        ("resnet101", 7799.4, 104),
        ("resnet152", 11511.6, 155),
        ("resnext50", 4228.4, 53),
        ("mobilenet_v2", 299.5, 52),
        ("lenet5", 0.3576, 2),
    ],
)
def test_networks_have_their_known_size(name, millions, convolutions):
    network = shapes.network(name)
    assert network.flops / 2e6 == pytest.approx(millions, rel=2e-4)
    assert sum(layer.count for layer in network.convs) == convolutions
    assert shapes.network(name, batch=3).flops == 3 * network.flops


def test_unknown_network_is_named():
    with pytest.raises(ValueError, match="resnet19"):
        shapes.network("resnet19")
