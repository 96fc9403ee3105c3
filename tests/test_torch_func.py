"""torch.func and forward mode: torch's results or an error, never zeros."""

import pytest
import torch
import torch.nn.functional as F

import fastconv
import fastconv.functional as ff
from operations import DOUBLE, OPERATIONS, case, same
from support import outcome


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
