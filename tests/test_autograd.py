"""Autograd: first and second derivatives, torch.func, forward mode, and what may pass through."""

import pytest
import torch
import torch.nn.functional as F

import fastconv
import fastconv.functional as ff
import support
from support import FORMATS, outcome, run_python

DOUBLE = {"dtype": torch.float64}


def leaf(*size, layout="NCHW", device="cpu"):
    t = torch.randn(size, **DOUBLE)
    if len(size) == 4:
        t = t.contiguous(memory_format=FORMATS[layout])
    return t.to(device).requires_grad_()


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
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_conv2d_derivatives(name, layout, bias, fast, backend):
    tensors, options = conv_inputs(name, layout, backend.device, bias)
    check_derivatives(lambda *t: ff.conv2d(*t, **options), tensors, fast)


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


# the same results as torch's, through every way of asking


def after_norm(f, tensors, residual=None, training=False, activation="relu", recompute=False):
    """batch_norm_relu of 5 tensors or conv_bn_relu of 7; of torch's functions, their parts."""
    if residual is not None:
        residual = residual[: tensors[0].shape[0]]  # one sample alone has the first one's
    options = {"residual": residual, "training": training, "activation": activation}
    if f is ff and len(tensors) == 5:
        return ff.batch_norm_relu(*tensors, **options)
    if f is ff:
        return ff.conv_bn_relu(*tensors, **options, recompute=recompute)
    *conv, mean, var, weight, bias = tensors
    x = f.conv2d(*conv) if len(conv) > 1 else conv[0]
    z = f.batch_norm(x, mean, var, weight, bias, training)
    return getattr(f, activation)(z if residual is None else z + residual)


OPERATIONS = {
    "conv2d": (lambda f, x, w, b: f.conv2d(x, w, b, 2, 1), ((2, 4, 6, 6), (6, 4, 3, 3), (6,))),
    "conv2d grouped": (
        lambda f, x, w, b: f.conv2d(x, w, b, padding=1, groups=2),
        ((2, 4, 6, 6), (6, 2, 3, 3), (6,)),
    ),
    "max_pool2d": (lambda f, x: f.max_pool2d(x, 3, 2, 1), ((2, 4, 7, 6),)),
    "avg_pool2d": (lambda f, x: f.avg_pool2d(x, 3, 2, 1), ((2, 4, 7, 6),)),
    "adaptive_avg_pool2d": (lambda f, x: f.adaptive_avg_pool2d(x, (3, 2)), ((2, 4, 7, 6),)),
    "batch_norm": (
        lambda f, x, w, b: f.batch_norm(x, None, None, w, b, True),
        ((3, 4, 5, 6), (4,), (4,)),
    ),
    "batch_norm_relu": (
        lambda f, x, w, b: after_norm(f, (x, None, None, w, b), training=True),
        ((3, 4, 5, 6), (4,), (4,)),
    ),
    "batch_norm_relu residual": (
        lambda f, x, w, b, r: after_norm(
            f, (x, None, None, w, b), residual=r, training=True, activation="relu6"
        ),
        ((3, 4, 5, 6), (4,), (4,), (3, 4, 5, 6)),
    ),
    "conv_bn_relu": (
        lambda f, x, w, b, v, c: after_norm(
            f, (x, w, b, None, None, v, c), training=True, activation="silu"
        ),
        ((2, 4, 6, 6), (6, 4, 3, 3), (6,), (6,), (6,)),
    ),
    "conv_bn_relu recompute": (
        lambda f, x, w, v, c, r: after_norm(
            f, (x, w, None, None, None, v, c), residual=r, training=True, recompute=True
        ),
        ((2, 4, 6, 6), (6, 4, 3, 3), (6,), (6,), (2, 6, 4, 4)),
    ),
    "conv_bn_relu inference": (
        lambda f, x, w, v, c, r: after_norm(
            f, (x, w, None, v.detach() * 0, v.detach() * 0 + 2, v, c), residual=r
        ),
        ((2, 4, 6, 6), (6, 4, 3, 3), (6,), (6,), (2, 6, 4, 4)),
    ),
    "batch_norm inference": (
        lambda f, x, w, b: f.batch_norm(x, w.detach() * 0, w.detach() * 0 + 2, w, b),
        ((3, 4, 5, 6), (4,), (4,)),
    ),
}


def case(name, device="cpu", dtype=torch.float64):
    function, sizes = OPERATIONS[name]
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(s, generator=generator, **DOUBLE).to(device, dtype) for s in sizes]
    return function, tensors


def same(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


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


@pytest.mark.parametrize("name", OPERATIONS)
def test_torch_func_grad(name, backend):
    function, tensors = case(name, backend.device)

    def loss(f, *t):
        return function(f, *t).square().sum()

    which = tuple(range(len(tensors)))
    ours = torch.func.grad(lambda *t: loss(ff, *t), which)(*tensors)
    theirs = torch.func.grad(lambda *t: loss(F, *t), which)(*tensors)
    for a, b in zip(ours, theirs, strict=True):
        same(a, b)
    value = torch.func.vjp(lambda *t: function(ff, *t), *tensors)[0]
    same(value, function(F, *tensors))


@pytest.mark.parametrize("name", OPERATIONS)
def test_per_sample_gradients_by_vmap_over_grad(name, backend):
    function, (x, *parameters) = case(name, backend.device)

    def loss(f):
        def one(x, *p):
            return function(f, x[None], *p).square().sum()

        return one

    which = tuple(range(len(parameters) + 1))
    in_dims = (0, *[None] * len(parameters))
    ours = torch.func.vmap(torch.func.grad(loss(ff), which), in_dims)(x, *parameters)
    each = [torch.func.grad(loss(F), which)(sample, *parameters) for sample in x]
    for i, got in enumerate(ours):
        same(got, torch.stack([grads[i] for grads in each]))


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("which", ["all", "parameters"])
def test_vmap_over_every_argument(name, which, backend):
    function, tensors = case(name, backend.device)
    batched = [torch.stack([t, t.flip(0), -t]) for t in tensors]
    in_dims = [0] * len(tensors)
    if which == "parameters":
        if len(tensors) == 1:
            pytest.skip("no parameters")
        batched[0], in_dims[0] = tensors[0], None
    ours = torch.func.vmap(lambda *t: function(ff, *t), tuple(in_dims))(*batched)
    for i in range(3):
        one = [b if d is None else b[i] for b, d in zip(batched, in_dims, strict=True)]
        same(ours[i], function(F, *one))


@pytest.mark.parametrize("name", OPERATIONS)
def test_forward_mode_is_torchs_or_an_error(name, backend):
    """Never zeros: a Node without a rule for tangents would drop them without a word."""
    function, tensors = case(name, backend.device)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    expected = torch.func.jvp(lambda *t: function(F, *t), tuple(tensors), tangents)
    for tangent_of in range(len(tensors)):
        only = tuple(t if i == tangent_of else torch.zeros_like(t) for i, t in enumerate(tangents))
        wanted = torch.func.jvp(lambda *t: function(F, *t), tuple(tensors), only)[1]
        ours, error = outcome(torch.func.jvp, lambda *t: function(ff, *t), tuple(tensors), only)
        if error is None:
            same(ours[1], wanted)
        else:
            assert isinstance(error, (NotImplementedError, RuntimeError)), repr(error)
            assert "forward" in str(error).lower(), str(error)
    ours, error = outcome(torch.func.jvp, lambda *t: function(ff, *t), tuple(tensors), tangents)
    if error is None:
        same(ours[0], expected[0])
        same(ours[1], expected[1])


@pytest.mark.parametrize("name", OPERATIONS)
def test_dual_numbers_are_not_dropped(name, backend):
    import torch.autograd.forward_ad as fwd

    function, tensors = case(name, backend.device)
    tangents = [torch.randn_like(t) for t in tensors]

    def attempt(f):
        with fwd.dual_level():
            duals = [fwd.make_dual(t, d) for t, d in zip(tensors, tangents, strict=True)]
            return fwd.unpack_dual(function(f, *duals)).tangent

    ours, error = outcome(attempt, ff)
    if error is None:
        assert ours is not None, "the tangent was dropped"
        same(ours, attempt(F))
    else:
        assert "forward" in str(error).lower(), str(error)


def test_functional_call_and_per_sample_gradients_of_a_model(backend):
    def model(n):
        layers = (
            n.Conv2d(2, 4, 3, padding=1), torch.nn.ReLU(), n.MaxPool2d(2), n.Conv2d(4, 3, 3),
            n.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
        )  # fmt: skip
        return torch.nn.Sequential(*layers).to(backend.device, torch.float64)

    ours, theirs = model(fastconv), model(torch.nn)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(5, 2, 8, 8, device=backend.device, **DOUBLE)
    target = torch.arange(5, device=backend.device) % 3

    def gradients(net):
        parameters = {k: v.detach() for k, v in net.named_parameters()}

        def loss(p, x, t):
            out = torch.func.functional_call(net, p, (x[None],))
            return F.cross_entropy(out, t[None])

        return torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(parameters, x, target)

    got, expected = gradients(ours), gradients(theirs)
    assert list(got) == list(expected)
    for key in got:
        same(got[key], expected[key])


# which gradients are computed, and how often


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


@pytest.mark.parametrize("name", OPERATIONS)
def test_retain_graph_and_freed_graph(name, backend):
    function, tensors = case(name, backend.device)
    leaves = [t.clone().requires_grad_() for t in tensors]
    out = function(ff, *leaves).sum()
    first = torch.autograd.grad(out, leaves, retain_graph=True)
    second = torch.autograd.grad(out, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    if name in ("avg_pool2d", "adaptive_avg_pool2d"):
        return  # they save nothing that could be freed
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves)


@pytest.mark.parametrize("name", ["conv2d", "batch_norm"])
def test_changing_a_saved_tensor_in_place_is_an_error(name, backend):
    function, tensors = case(name, backend.device)
    leaves = [t.clone().requires_grad_() for t in tensors]
    x = leaves[0] * 1
    out = function(ff, x, *leaves[1:])
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("name", OPERATIONS)
def test_no_graph_where_none_is_wanted(name, backend):
    function, tensors = case(name, backend.device)
    assert function(ff, *tensors).grad_fn is None
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.no_grad():
        assert not function(ff, *leaves).requires_grad
    with torch.inference_mode():
        assert function(ff, *leaves).is_inference()
    out = function(ff, *leaves)
    assert out.requires_grad and out.grad_fn is not None and out.is_leaf is False


def test_gradients_accumulate(backend):
    function, tensors = case("conv2d", backend.device)
    leaves = [t.clone().requires_grad_() for t in tensors]
    function(ff, *leaves).sum().backward()
    once = [t.grad.clone() for t in leaves]
    function(ff, *leaves).sum().backward()
    for t, g in zip(leaves, once, strict=True):
        same(t.grad, 2 * g)


def test_one_tensor_in_two_places(backend):
    """As input and as weight at once; as input of two layers."""
    t = leaf(3, 3, 3, 3, device=backend.device)
    u = t.detach().clone().requires_grad_()
    (ours,) = torch.autograd.grad(ff.conv2d(t, t, padding=1).square().sum(), t)
    (theirs,) = torch.autograd.grad(F.conv2d(u, u, padding=1).square().sum(), u)
    same(ours, theirs)


@pytest.mark.parametrize("name", OPERATIONS)
def test_backward_hooks_and_checkpointing(name, backend):
    from torch.utils.checkpoint import checkpoint

    function, tensors = case(name, backend.device)

    def attempt(f):
        leaves = [t.clone().requires_grad_() for t in tensors]
        out = checkpoint(lambda *t: function(f, *t), *leaves, use_reentrant=False)
        out.register_hook(lambda g: 2 * g)
        return torch.autograd.grad(out.square().sum(), leaves)

    for ours, theirs in zip(attempt(ff), attempt(F), strict=True):
        same(ours, theirs)


def test_saved_tensor_hooks_see_what_is_saved(backend):
    function, tensors = case("conv2d", backend.device)
    leaves = [t.clone().requires_grad_() for t in tensors]
    packed = []

    def pack(t):
        packed.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = function(ff, *leaves)
    assert len(packed) >= 2
    same(torch.autograd.grad(out.sum(), leaves)[0], torch.autograd.grad(
        function(F, *leaves).sum(), leaves)[0])  # fmt: skip


# any strides in, forward and backward

FORMS = {
    "sliced rows": lambda t: torch.cat([t, t], 2)[:, :, : t.shape[2]],
    "every other column": lambda t: t.repeat_interleave(2, 3)[..., ::2],
    "sliced channels": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "sliced batch": lambda t: torch.cat([t, t])[t.shape[0] :],
    "transposed": lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
    "N and C swapped": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "channels_last slice": lambda t: torch.cat([t, t], 1).contiguous(
        memory_format=torch.channels_last
    )[:, : t.shape[1]],
    "offset": lambda t: torch.cat([t.new_zeros(3), t.flatten()])[3:].reshape(t.shape),
}


@pytest.mark.parametrize("what", ["input", "grad", "both"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_any_strides(name, form, what, backend):
    function, tensors = case(name, backend.device)
    x, *parameters = tensors
    expected_leaves = [t.clone().requires_grad_() for t in tensors]
    expected = function(F, *expected_leaves)
    grad = torch.randn(expected.shape, **DOUBLE).to(backend.device)
    leaves = [t.clone().requires_grad_() for t in tensors]
    source = FORMS[form](leaves[0]) if what != "grad" else leaves[0]
    out = function(ff, source, *leaves[1:])
    same(out, expected)
    shaped = FORMS[form](grad) if what != "input" else grad
    assert torch.equal(shaped, grad)
    for a, b in zip(
        torch.autograd.grad(out, leaves, shaped),
        torch.autograd.grad(expected, expected_leaves, grad),
        strict=True,
    ):
        same(a, b)


@pytest.mark.parametrize("name", OPERATIONS)
def test_expanded_inputs_and_gradients(name, backend):
    function, (x, *parameters) = case(name, backend.device)
    row = x[:1, :, :1].clone()  # one row for every image and height

    def attempt(f):
        leaves = [t.clone().requires_grad_() for t in (row, *parameters)]
        out = function(f, leaves[0].expand(x.shape), *leaves[1:])
        return out, torch.autograd.grad(out.sum(), leaves)  # sum's gradient is an expanded one

    (ours, our_grads), (theirs, their_grads) = attempt(ff), attempt(F)
    same(ours, theirs)
    for a, b in zip(our_grads, their_grads, strict=True):
        same(a, b)


@pytest.mark.parametrize("form", [f for f in FORMS if f != "offset"])
def test_any_strides_of_the_weight(form, backend):
    function, (x, w, b) = case("conv2d", backend.device)
    ours, theirs = (w.clone().requires_grad_() for _ in range(2))
    out, expected = function(ff, x, FORMS[form](ours), b), function(F, x, theirs, b)
    same(out, expected)
    same(
        torch.autograd.grad(out.sin().sum(), ours)[0],
        torch.autograd.grad(expected.sin().sum(), theirs)[0],
    )


@pytest.mark.parametrize("name", OPERATIONS)
def test_inputs_are_left_as_they_were(name, backend):
    function, tensors = case(name, backend.device)
    before = [t.clone() for t in tensors]
    leaves = [t.requires_grad_() for t in tensors]
    out = function(ff, *leaves)
    grad = torch.randn_like(out)
    kept = grad.clone()
    torch.autograd.grad(out, leaves, grad)
    assert torch.equal(grad, kept)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


# which kernels ran, where

FORBIDDEN = (
    "aten::convolution", "aten::conv2d", "aten::_convolution", "aten::mkldnn_convolution",
    "aten::thnn_conv2d", "aten::_slow_conv2d", "aten::slow_conv", "aten::max_pool2d",
    "aten::avg_pool2d", "aten::adaptive_avg_pool2d", "aten::_adaptive_avg_pool2d",
    "aten::native_batch_norm", "aten::batch_norm", "aten::_batch_norm", "aten::_native_batch_norm",
    "aten::cudnn_", "aten::miopen_",
)  # fmt: skip


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("training", [True, False])
def test_the_profiler_sees_nothing_of_atens(training, layout, backend):
    if backend.name == "aten":
        pytest.skip("aten is forced")
    net = torch.nn.Sequential(
        fastconv.Conv2d(3, 8, 3, padding="same"),
        fastconv.BatchNorm2d(8),
        torch.nn.ReLU(),
        fastconv.MaxPool2d(2),
        fastconv.ConvBNReLU2d(8, 8, 3, padding=1, groups=2),
        fastconv.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
        fastconv.AvgPool2d(2),
        fastconv.AdaptiveAvgPool2d(1),
    ).to(backend.device)
    net.train(training)
    x = torch.randn(2, 3, 12, 12, device=backend.device)
    x = x.contiguous(memory_format=FORMATS[layout]).requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out = net(x)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        first.square().sum().backward()
        with torch.no_grad():
            net(x)
    names = {event.key for event in profile.key_averages()}
    seen = sorted(n for n in names if n.startswith(FORBIDDEN))
    assert not seen, seen
    assert any(n.startswith("fastconv::") for n in names), sorted(names)


def test_backward_runs_on_the_backend_of_forward(backend):
    if backend.name == "aten":
        others = ["cpu"] if backend.device == "cpu" else ["cuda"]
    else:
        others = ["aten"]
    x = torch.randn(1, 3, 6, 6, device=backend.device, requires_grad=True)
    w = torch.randn(4, 3, 3, 3, device=backend.device, requires_grad=True)
    out = ff.conv2d(x, w)
    with fastconv.backend(others[0]):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            out.sum().backward()
    names = {event.key for event in profile.key_averages()}
    aten = any(n.startswith("aten::convolution_backward") for n in names)
    assert aten == (backend.name == "aten"), sorted(names)


def opcheck_samples(device):
    """A few calls of every schema, by name. The test fails when a schema has none."""

    def r(*size, dtype=torch.float32, grad=True, layout="NCHW"):
        t = torch.randn(size, dtype=dtype, device=device)
        if len(size) == 4:
            t = t.contiguous(memory_format=FORMATS[layout])
        return t.requires_grad_(grad)

    def positive(*size):
        return torch.rand(size, device=device) + 0.5

    x, w, b = (2, 4, 6, 5), (6, 2, 3, 3), (6,)
    tail = ([2, 1], [1, 1], [1, 1], 2)
    out = (2, 6, 3, 5)
    window = ([3, 2], [2, 2], [1, 0])
    pooled = (2, 4, 3, 2)
    samples = {name: [] for name in (
        "conv2d", "conv2d_dgrad", "conv2d_wgrad", "conv2d_bgrad", "conv_bn_act", "conv_bn_training",
        "conv2d_act_max_pool2d", "max_pool2d", "max_pool2d_with_offsets", "max_pool2d_with_indices",
        "max_pool2d_backward", "avg_pool2d", "avg_pool2d_backward", "adaptive_avg_pool2d",
        "adaptive_avg_pool2d_backward", "batch_norm_training", "batch_norm_inference",
        "batch_norm_backward",
    )}  # fmt: skip
    for layout, last in (("NCHW", False), ("NHWC", True)):

        def t(*size, layout=layout, grad=True):
            return r(*size, layout=layout, grad=grad)

        samples["conv2d"] += [(t(*x), t(*w), r(*b), *tail), (t(*x), t(*w), None, *tail)]
        samples["conv2d_dgrad"] += [(t(*out), t(*w), list(x), *tail, last)]
        samples["conv2d_wgrad"] += [(t(*out), t(*x), list(w), *tail, last)]
        samples["conv2d_bgrad"] += [(t(*out),)]
        norm, fixed = (r(6, grad=False), positive(6)), (t(*x, grad=False), t(*w, grad=False))
        samples["conv_bn_act"] += [
            (*fixed, None, *norm, None, None, None, 1e-5, *tail, "relu"),
            (*fixed, *norm[:1], *norm, *norm, t(*out, grad=False), 1e-5, *tail, "silu"),
        ]  # fmt: skip
        samples["conv_bn_training"] += [
            (t(*x), t(*w), r(*b), r(6), r(6), None, 1e-5, *tail, "none", False),
            (t(*x), t(*w), None, None, None, None, 1e-3, *tail, "silu", False),
            (t(*x), t(*w), None, r(6), r(6), t(*out), 1e-5, *tail, "relu", False),
            (t(*x), t(*w), r(*b), r(6), r(6), t(*out), 1e-5, *tail, "hardswish", True),
        ]
        samples["conv2d_act_max_pool2d"] += [
            (*fixed, None, *tail, "relu", [2, 2], [], [0, 0]),
            (*fixed, norm[0], *tail, "silu", *window),
            (t(*x), t(*w), r(*b), *tail, "relu", *window),
        ]
        for name in ("max_pool2d", "max_pool2d_with_offsets", "max_pool2d_with_indices"):
            samples[name] += [
                (t(*x), *window, [1, 1], True),
                (t(*x), [2, 2], [], [0, 0], [2, 1], False),
            ]
        big = torch.ops.fastconv.max_pool2d_with_offsets(t(*x, grad=False), *window, [1, 1], False)[
            1
        ]
        samples["max_pool2d_backward"] += [(t(*pooled), big, list(x), *window, [1, 1], False, last)]
        samples["avg_pool2d"] += [
            (t(*x), *window, True, False, None),
            (t(*x), [2, 2], [], [0, 0], False, True, 3),
        ]
        samples["avg_pool2d_backward"] += [(t(*pooled), list(x), *window, False, True, None, last)]
        samples["adaptive_avg_pool2d"] += [(t(*x), [3, 2]), (t(*x), [1, 1])]
        samples["adaptive_avg_pool2d_backward"] += [(t(*pooled), list(x), last)]
        samples["batch_norm_training"] += [
            (t(*x), r(4), r(4), None, 1e-5, "none"),
            (t(*x), None, None, t(*x), 1e-3, "leaky_relu"),
            (t(*x), r(4), r(4), t(*x), 1e-5, "sigmoid"),
        ]
        norm = (r(4, grad=False), positive(4))
        samples["batch_norm_inference"] += [
            (t(*x), r(4), r(4), *norm, None, 1e-5, "relu6"),
            (t(*x), r(4), r(4), *norm, t(*x), 1e-5, "none"),
        ]
        masks = ([True] * 4, [True, False, False, False], [False, True, True, True])
        samples["batch_norm_backward"] += [
            (t(*x), t(*x), r(4), r(4), *norm, *after, training, 1e-5, activation, mask)
            for training in (True, False)
            for mask in masks
            for *after, activation in (
                (None, None, "none"),
                (t(*x), None, "silu"),
                (None, t(*x, grad=False), "relu"),
            )
        ]
    return samples


def registered():
    names = torch._C._dispatch_get_all_op_names()
    return sorted({n.split("::")[1].split(".")[0] for n in names if n.startswith("fastconv::")})


@pytest.mark.parametrize("name", registered())
def test_opcheck(name):
    samples = opcheck_samples("cpu").get(name)
    assert samples, f"no opcheck sample for torch.ops.fastconv.{name}: add one"
    operator = getattr(torch.ops.fastconv, name).default
    for sample in samples:
        torch.library.opcheck(operator, sample)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("layout", FORMATS)
def test_meta_gives_shapes_and_strides(name, layout):
    function, tensors = case(name, dtype=torch.float32)
    tensors = [t.contiguous(memory_format=FORMATS[layout]) if t.dim() == 4 else t for t in tensors]
    real = function(ff, *tensors)
    meta = function(ff, *[t.to("meta") for t in tensors])
    assert meta.device.type == "meta"
    assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)


def test_a_process_that_ends_while_a_graph_lives():
    """Nodes are freed at exit in any order; none may crash."""
    done = run_python("""
        import torch, fastconv
        x = torch.randn(1, 3, 8, 8, requires_grad=True)
        layer = fastconv.Conv2d(3, 4, 3)
        out = fastconv.MaxPool2d(2)(layer(x))
        keep = [out, torch.autograd.grad(out.sum(), x, create_graph=True)]
        print("alive")
    """)
    assert done.returncode == 0 and "alive" in done.stdout, done.stderr


@pytest.mark.parametrize("name", OPERATIONS)
def test_anomaly_mode_and_detach(name, backend):
    function, tensors = case(name, backend.device)
    leaves = [t.clone().requires_grad_() for t in tensors]
    with torch.autograd.detect_anomaly(check_nan=True):
        function(ff, *leaves).sum().backward()
    assert all(t.grad is not None for t in leaves)
    out = function(ff, *leaves).detach()
    assert not out.requires_grad
    assert support.max_error(out, function(F, *tensors).detach()) < 1e-10
