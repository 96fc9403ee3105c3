"""Gradients of fused operations at single points: kinks, infinities; and in other types."""

import pytest
import torch
import torch.nn.functional as F

import fastconv
import fastconv.functional as ff
from support import ACTIVATIONS


@pytest.mark.parametrize("activation", ["relu", "relu6"])
def test_black_borders_pass_no_gradient(activation):
    """There every result before the activation is exactly 0."""
    x = torch.zeros(2, 3, 16, 16)
    x[:, :, 5:11, 5:11] = torch.randn(2, 3, 6, 6)
    gradients = []
    for run in (
        lambda x, w, b: ff.conv2d_max_pool2d(x, w, b, padding=1, activation=activation),
        lambda x, w, b: F.max_pool2d(getattr(F, activation)(F.conv2d(x, w, b, padding=1)), 2),
    ):
        torch.manual_seed(0)
        w, b = torch.randn(4, 3, 3, 3, requires_grad=True), torch.zeros(4, requires_grad=True)
        given = (x.clone().requires_grad_(), w, b)
        gradients.append(torch.autograd.grad(run(*given).sum(), given))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def at_the_kinks(activation, x, training=False):
    mean, var = torch.zeros(1), torch.ones(1)
    options = {"eps": 0.0, "training": training, "activation": activation}
    return ff.batch_norm_relu(x, mean, var, **options)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_at_the_kinks_are_torchs(activation, twice):
    x = torch.tensor([-3.0, 0, 3, 6]).reshape(1, 1, 2, 2).requires_grad_()
    (ours,) = torch.autograd.grad(at_the_kinks(activation, x).sum(), x, create_graph=twice)
    (theirs,) = torch.autograd.grad(ACTIVATIONS[activation](x).sum(), x)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives_of_evaluation_are_torchs(activation, with_residual):
    """Of piecewise linear activations they are 0, not an error."""
    torch.manual_seed(0)
    norm = torch.randn(3), torch.rand(3) + 0.5
    leaves = [torch.randn(2, 3, 4, 4), torch.randn(3), torch.randn(3)]
    residual = torch.randn(2, 3, 4, 4) if with_residual else None
    results = []
    for fused in (True, False):
        x, w, b = given = [t.double().requires_grad_() for t in leaves]
        r = None if residual is None else residual.double()
        statistics = [t.double() for t in norm]
        if fused:
            y = ff.batch_norm_relu(x, *statistics, w, b, residual=r, activation=activation)
        else:
            z = F.batch_norm(x, *statistics, w, b)
            y = ACTIVATIONS[activation](z if r is None else z + r)
        first = torch.autograd.grad(y.square().sum(), given, create_graph=True)
        results.append(torch.autograd.grad(sum(g.sum() for g in first), given, retain_graph=True))
        (alone,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        unused = torch.autograd.grad(alone.sum(), x, allow_unused=activation in (None, "none"))
        results[-1] += unused
    for ours, theirs in zip(*results, strict=True):
        if ours is None or theirs is None:
            assert ours is theirs
        else:
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["cpu", "aten"])
@pytest.mark.parametrize("twice", [False, True])
def test_an_infinite_gradient_ends_where_the_activation_is_flat(twice, backend):
    x = torch.tensor([-2.0, -1, 1, 2]).reshape(1, 1, 2, 2).requires_grad_()
    grad = torch.tensor([torch.inf, 1, 1, 1]).reshape(1, 1, 2, 2)
    with fastconv.backend(backend):
        y = at_the_kinks("relu", x)
        (dx,) = torch.autograd.grad(y, x, grad, create_graph=twice)
    assert dx.flatten().tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("twice", [False, True])
def test_recompute_where_backward_alone_is_under_autocast(twice):
    layer = fastconv.ConvBNReLU2d(3, 4, 3, recompute=True)
    x = torch.randn(2, 3, 6, 6, requires_grad=True)
    expected = torch.autograd.grad(layer(x).square().sum(), x)
    y = layer(x).square().sum()
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(y, x, create_graph=twice)
    torch.testing.assert_close(found, expected)


def test_batch_norms_gradient_is_at_hand_on_devices_that_are_not_ours():
    for key in ("MPS", "XPU", "PrivateUse1"):
        for name in ("batch_norm_training", "batch_norm_backward"):
            assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"fastconv::{name}", key)
