"""First and second derivatives: against finite differences, and against torch's."""

import pytest
import torch
import torch.nn.functional as F

import fastconv.functional as ff
from operations import DOUBLE, OPERATIONS, case, leaf, same
from support import FORMATS
from turns import in_turn, interpreted

CONVOLUTIONS = {
    "plain": ((2, 3, 5, 4), (4, 3, 3, 2), {}),
    "padding and stride": ((1, 2, 5, 6), (3, 2, 3, 3), {"padding": (2, 1), "stride": (2, 1)}),
    "dilation": ((1, 2, 6, 7), (2, 2, 2, 3), {"dilation": (3, 2), "padding": 1}),
    "groups": ((1, 4, 4, 5), (6, 2, 2, 2), {"groups": 2, "stride": 2, "padding": 1}),
    "depthwise": ((2, 3, 4, 4), (3, 1, 3, 3), {"groups": 3, "padding": 1}),
    "1x1": ((2, 3, 3, 3), (2, 3, 1, 1), {}),
    "1x1 stride 2": ((1, 2, 4, 5), (3, 2, 1, 1), {"stride": 2}),
    "unread border": ((1, 2, 6, 6), (2, 2, 2, 2), {"stride": 3}),
    "unbatched": ((2, 4, 5), (3, 2, 3, 3), {"padding": 1}),
}

POOLS = {
    "max 2": lambda x: ff.max_pool2d(x, 2),
    "max 3/2 padded": lambda x: ff.max_pool2d(x, 3, 2, 1),
    "max dilated, ceil": lambda x: ff.max_pool2d(x, 2, 2, 0, 2, True),
    "max with indices": lambda x: ff.max_pool2d(x, 3, 2, return_indices=True)[0],
    "avg 2": lambda x: ff.avg_pool2d(x, 2),
    "avg 3/2 padded": lambda x: ff.avg_pool2d(x, 3, 2, 1, True, False),
    "avg divisor": lambda x: ff.avg_pool2d(x, 2, 1, divisor_override=3),
    "adaptive": lambda x: ff.adaptive_avg_pool2d(x, (3, 2)),
    "global": lambda x: ff.adaptive_avg_pool2d(x, 1),
}


def conv_inputs(name, layout, device, bias=True):
    size, weight, options = CONVOLUTIONS[name]
    tensors = [
        leaf(*size, layout=layout, device=device),
        leaf(*weight, layout=layout, device=device),
    ]
    if bias:
        tensors.append(leaf(weight[0], device=device))
    return tensors, options


# Fast mode compares random projections of the Jacobians; `make test-all` compares every entry.
MODES = pytest.mark.parametrize(
    "fast",
    [pytest.param(True, id="projected"), pytest.param(False, id="full", marks=pytest.mark.slow)],
)


def check_derivatives(function, tensors, fast):
    assert torch.autograd.gradcheck(function, tensors, nondet_tol=0.0, fast_mode=fast)
    assert torch.autograd.gradgradcheck(function, tensors, nondet_tol=0.0, fast_mode=fast)


@MODES
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d_derivatives(name, layout, fast, backend):
    places = list(CONVOLUTIONS).index(name), layout == "NHWC"
    for bias in in_turn((True, False), interpreted(backend), *places, every=2):
        tensors, options = conv_inputs(name, layout, backend.device, bias)
        check_derivatives(lambda *t: ff.conv2d(*t, **options), tensors, fast)  # noqa: B023


@MODES
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", POOLS)
def test_pooling_derivatives(name, layout, fast, backend):
    # Distinct values, so that no finite difference changes a maximum.
    x = torch.randperm(2 * 2 * 6 * 5).reshape(2, 2, 6, 5).to(**DOUBLE)
    x = x.contiguous(memory_format=FORMATS[layout]).to(backend.device).requires_grad_()
    check_derivatives(POOLS[name], [x], fast)


@MODES
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", FORMATS)
def test_batch_norm_derivatives(layout, training, affine, fast, backend):
    x = leaf(3, 2, 3, 4, layout=layout, device=backend.device)
    mean, var = torch.rand(2, 2, device=backend.device, **DOUBLE)
    statistics = (None, None) if training else (mean, var + 0.5)
    parameters = [leaf(2, device=backend.device) for _ in range(2)] if affine else []

    def function(x, weight=None, bias=None):
        return ff.batch_norm(x, *statistics, weight, bias, training)

    check_derivatives(function, [x, *parameters], fast)


@MODES
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_conv_bn_relu_derivatives(training, residual, fast, backend):
    tensors, options = conv_inputs("padding and stride", "NCHW", backend.device)
    x, weight, bias = tensors
    gamma, beta = (leaf(3, device=backend.device) for _ in range(2))
    out_size = F.conv2d(x, weight, **options).shape
    extra = [leaf(*out_size, device=backend.device)] if residual else []
    mean, var = torch.rand(2, 3, device=backend.device, **DOUBLE)

    def function(x, weight, bias, gamma, beta, residual=None):
        # No statistics in training: gradcheck calls again and again.
        statistics = (None, None) if training else (mean, var + 0.5)
        return ff.conv_bn_relu(
            *(x, weight, bias, *statistics, gamma, beta),
            residual=residual, training=training, activation="silu", **options,
        )  # fmt: skip

    check_derivatives(function, [x, weight, bias, gamma, beta, *extra], fast)


@pytest.mark.parametrize("name", OPERATIONS)
def test_double_backward_is_torch(name, backend):
    function, tensors = case(name, backend.device)

    def second(f):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = function(f, *leaves)
        grad = torch.ones_like(out).cos_().requires_grad_()
        first = torch.autograd.grad(out, leaves, grad, create_graph=True)
        mixed = sum((g * g.detach().sin()).sum() for g in first)
        return first + torch.autograd.grad(mixed, [*leaves, grad], allow_unused=True)

    for ours, theirs in zip(second(ff), second(F), strict=True):
        zero = torch.zeros(())  # an unused gradient and a zero one are the same derivative
        ours, theirs = (zero if g is None else g for g in (ours, theirs))
        if ours.shape != theirs.shape:
            assert not ours.any() and not theirs.any()
        else:
            same(ours, theirs)


@pytest.mark.parametrize("which", range(1, 8))
def test_gradients_of_any_subset(which, backend):
    """Bits of `which`: input, weight, bias."""
    function, tensors = case("conv2d", backend.device)

    def attempt(f):
        leaves = [t.clone().requires_grad_(bool(which >> i & 1)) for i, t in enumerate(tensors)]
        function(f, *leaves).sin().sum().backward()
        return [t.grad for t in leaves]

    for ours, theirs in zip(attempt(ff), attempt(F), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            same(ours, theirs)
