"""Autograd: what graphs save and free, gradients in any strides, and which kernels ran."""

import pytest
import torch
import torch.nn.functional as F

import fastconv
import fastconv.functional as ff
import support
from operations import DOUBLE, OPERATIONS, case, leaf, same
from support import FORMATS, run_python
from turns import in_turn, interpreted


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_any_strides(name, form, backend):
    places = list(OPERATIONS).index(name), list(FORMS).index(form)
    for what in in_turn(("input", "grad", "both"), interpreted(backend), *places, every=3):
        check_strides(name, form, what, backend)


def check_strides(name, form, what, backend):
    function, tensors = case(name, backend.device)
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
