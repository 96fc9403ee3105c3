"""Convolution, BatchNorm, residual, activation in training: results, memory kept, passes made."""

import copy
import functools
import itertools

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fastconv
import references
import support
from support import (
    ACTIVATIONS,
    FORMATS,
    contract_failure,
    max_error,
    name_of,
    outcome,
    same_bits,
    unfused,
)
from turns import in_turn, slow

CHANNELS, OUT = 6, 7
NAMES = [name for name in ACTIVATIONS if name is not None]


def make_layer(activation="relu", dtype=torch.float32, norm=None, **options):
    """A layer with uneven parameters and buffers; `norm` is BatchNorm2d's arguments."""
    torch.manual_seed(9)
    layer = fastconv.ConvBNReLU2d(CHANNELS, OUT, 3, padding=1, activation=activation, **options)
    if norm is not None:
        layer.bn = fastconv.BatchNorm2d(OUT, **norm)
    for t in layer.bn.state_dict().values():
        if t.is_floating_point():
            t.copy_(torch.rand(t.shape) + 0.5)
    return layer.to(dtype)


def make_step(layer, with_residual, seed=0):
    """Input, gradient of the output and residual. The gradient is zero where rounding decides on
    which side of an activation's kink an element lies."""
    dtype = layer.conv.weight.dtype
    generator = torch.Generator().manual_seed(seed)
    x, grad, residual = (
        torch.randn(4, c, 9, 8, generator=generator).to(dtype) for c in (CHANNELS, OUT, OUT)
    )
    conv, bn = unfused(layer).parts.double()
    with torch.no_grad():
        z = bn(conv(x.double())) + (residual.double() if with_residual else 0)
    for kink in references.KINKS.get(layer.activation, ()):
        margin = max(4 * support.eps(dtype), 1e-5) * max(1, abs(kink))
        grad[(z - kink).abs() < margin] = 0
    return x, grad, residual if with_residual else None


def placed(step, dtype=None, layout="NCHW", device="cpu"):
    def place(t):
        if t is None:
            return None
        like = torch.empty_like(t, dtype=dtype, device=device, memory_format=FORMATS[layout])
        return like.copy_(t)

    return tuple(map(place, step))


def results(call, modules, step):
    """Output, gradients and, after the step, buffers: by name."""
    x, grad, residual = step
    leaves = {"input": x.detach().requires_grad_(), **dict(modules.named_parameters())}
    if residual is not None:
        leaves["residual"] = residual.detach().requires_grad_()
    out = call(leaves["input"], leaves.get("residual"))
    out.backward(grad.to(out.dtype))
    found = {"out": out.detach(), **{name: t.grad for name, t in leaves.items()}}
    return found | {name: t.clone() for name, t in modules.named_buffers()}


def of_layer(layer, step):
    layer = copy.deepcopy(layer)
    return results(layer, layer, step)


def of_parts(layer, step, dtype=None):
    """The same of torch.nn's modules."""
    call = unfused(layer)
    conv, bn = call.parts.to(dtype or layer.conv.weight.dtype)
    return results(call, nn.ModuleDict({"conv": conv, "bn": bn}), step)


def torch_errors(layer, step, expected):
    peers = [of_parts(layer, placed(step, layout=layout)) for layout in FORMATS]
    return {n: max(max_error(p[n], expected[n]) for p in peers) for n in expected}


@functools.cache  # every backend is held to it
def judged(activation, dtype, bias, training, with_residual):
    """A layer, a step, its float64 answers and torch's errors: of results with few elements, which
    one draw may get right by luck, the worst of four draws."""
    layer, draws = make_layer(activation, dtype, bias=bias).train(training), []
    for seed in range(support.DRAWS):
        step = make_step(layer, with_residual, seed)
        expected = of_parts(layer, placed(step, torch.float64), torch.float64)
        draws.append((step, expected, torch_errors(layer, step, expected)))
    step, expected, errors = draws[0]
    for name in expected:
        if expected[name].numel() < support.FEW:
            errors[name] = max(each[name] for *_, each in draws)
    return layer, step, expected, errors


def failures(got, expected, errors):
    assert list(got) == list(expected)
    found = {}
    for name, t in got.items():
        if t.is_floating_point():
            found[name] = contract_failure(t, expected[name], errors[name])
        else:
            assert torch.equal(t.cpu(), expected[name]), name
    return {name: failure for name, failure in found.items() if failure}


@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_contract(dtype, activation, with_residual, backend):
    """Output, every gradient and the running statistics, in training and frozen."""
    place = NAMES.index(activation) + with_residual + 2 * (dtype is torch.bfloat16)
    for turn, (bias, training) in enumerate(itertools.product((True, False), repeat=2), place):
        made, *answers = judged(activation, dtype, bias, training, with_residual)
        layer, (step, expected, errors) = copy.deepcopy(made), answers
        ways = itertools.product(FORMATS, (False, True))
        for layout, recompute in in_turn(ways, slow(backend), turn):
            layer.recompute = recompute
            layer.to(backend.device)
            got = of_layer(layer, placed(step, layout=layout, device=backend.device))
            wrong = failures(got, expected, errors)
            assert not wrong, (bias, training, layout, recompute, wrong)
            support.coverage["conv_bn_relu in training: case x layout x recompute"] += 1


def assert_same_step(layer, with_residual, backend, place):
    """As torch.nn's in float64, where only the order of sums differs."""
    step, device = make_step(layer, with_residual), backend.device
    expected = of_parts(layer, step)
    for layout in in_turn(FORMATS, slow(backend), place, every=2):
        got = of_layer(layer.to(device), placed(step, layout=layout, device=device))
        assert list(got) == list(expected)
        for name, t in got.items():
            torch.testing.assert_close(t.cpu(), expected[name], rtol=1e-9, atol=1e-10, msg=name)


NORMS = {
    "momentum=None": {"momentum": None},
    "affine=False": {"affine": False},
    "track_running_stats=False": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
    "eps=0.5": {"eps": 0.5},
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
def test_kinds_of_batch_norm(norm, recompute, backend):
    cases = (("relu", True), ("silu", False), ("hardswish", True))
    for place, (activation, with_residual) in enumerate(cases, list(NORMS).index(norm)):
        layer = make_layer(activation, torch.float64, NORMS[norm], recompute=recompute)
        assert_same_step(layer, with_residual, backend, place)


@pytest.mark.parametrize("activation", NAMES)
@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
def test_frozen_statistics_in_a_training_layer(activation, recompute, backend):
    """bn.eval() in a layer that trains: statistics stand, parameters learn."""
    for with_residual in (True, False):
        layer = make_layer(activation, torch.float64, recompute=recompute)
        layer.bn.eval()
        assert_same_step(layer, with_residual, backend, NAMES.index(activation) + with_residual)


def test_running_statistics_over_several_steps(backend):
    for norm, recompute in itertools.product(({}, {"momentum": None}), (True, False)):
        layer = make_layer(norm=norm, recompute=recompute).to(backend.device)
        call = unfused(layer)
        for seed in range(3):
            x = torch.randn(3, CHANNELS, 5, 6, device=backend.device) * (seed + 1) + seed
            layer(x), call(x)
        for a, b in zip(layer.bn.buffers(), call.parts[1].buffers(), strict=True):
            torch.testing.assert_close(a, b)
        assert layer.bn.num_batches_tracked == 3


@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_autocast(activation, with_residual):
    """Under autocast a bfloat16 convolution meets float32 parameters of the BatchNorm."""
    for training, recompute in itertools.product((True, False), repeat=2):
        layer = make_layer(activation, recompute=recompute).train(training)
        layer.conv.weight.data = layer.conv.weight.data.bfloat16().float()
        step = make_step(layer, with_residual)
        x, grad, residual = (None if t is None else t.bfloat16().float() for t in step)
        step = (x, grad * (grad.abs() > 0.1), None if residual is None else residual.bfloat16())
        expected = of_parts(layer, placed(step, torch.float64), torch.float64)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got, theirs = of_layer(layer, step), of_parts(layer, step)
        assert list(got) == list(expected)
        for name in got:
            assert got[name].dtype is theirs[name].dtype, name
            scale = expected[name].abs().max().item()
            allowed = 2 * max_error(theirs[name], expected[name]) + 2**-7 * scale
            # One element on the other side of zero may move a sum by as much as its gradient.
            allowed += 0.1 if activation == "relu" and name not in ("out",) else 0
            assert max_error(got[name], expected[name]) <= allowed, (training, name)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "hooks"])
@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
def test_gradient_checkpointing(recompute, reentrant, backend):
    """The same bits as without; the running statistics move twice, as torch.nn's do. (The sine
    keeps something: with hooks, torch ends the second forward with the last tensor kept.)"""
    layer = make_layer(recompute=recompute)
    step = placed(make_step(layer, True), device=backend.device)
    layer.to(backend.device)
    twin = copy.deepcopy(layer)
    plain = results(lambda *tensors: twin(*tensors).sin(), twin, step)
    found = []
    for call, modules in ((layer, layer), (unfused(layer), None)):

        def checkpointed(x, residual, call=call):
            return checkpoint(lambda *t: call(*t).sin(), x, residual, use_reentrant=reentrant)

        modules = modules or nn.ModuleDict(zip(("conv", "bn"), call.parts, strict=True))
        found.append(results(checkpointed, modules, step))
    ours, theirs = found
    moved = ("bn.running_mean", "bn.running_var", "bn.num_batches_tracked")
    for name in ours:
        if name in moved:
            torch.testing.assert_close(ours[name], theirs[name])
        else:
            assert same_bits(ours[name], plain[name]), name
    assert ours["bn.num_batches_tracked"] == 2


@pytest.mark.parametrize("activation", NAMES)
def test_recomputing_changes_no_bit(activation):
    """The convolution that backward computes again is the one of forward, on the same row."""
    for row in (None, "conv2d_reference_fprop"):
        assert row is None or row in {r.name for r in support.rows("conv2d", "fprop")}
        found = []
        for recompute in (False, True):
            layer = make_layer(activation, recompute=recompute)
            x, grad, residual = make_step(layer, True)
            leaves = [x.requires_grad_(), residual.requires_grad_(), *layer.parameters()]
            with fastconv.kernel(row) if row else fastconv.backend("cpu"):
                out = layer(x, residual)
            found.append(torch.autograd.grad(out, leaves, grad))
        assert same_bits(*found), row


def test_the_same_call_gives_the_same_bits(backend):
    for activation, recompute in (("relu", False), ("silu", True)):
        layer = make_layer(activation, recompute=recompute)
        step = placed(make_step(layer, True), device=backend.device)
        layer.to(backend.device)
        first = of_layer(layer, step)
        for threads in (2, 2) if backend.name == "aten" else (1, 2, 2):
            with support.threads(threads):
                assert same_bits(of_layer(layer, step), first)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
def test_unbatched_input(training, recompute, backend):
    layer = make_layer(dtype=torch.float64, recompute=recompute).train(training)
    x, grad, residual = placed(make_step(layer, True), device=backend.device)
    layer.to(backend.device)
    unbatched = of_layer(layer, (x[0], grad[0], residual[0]))
    batched = of_layer(layer, (x[:1], grad[:1], residual[:1]))
    for name, t in unbatched.items():
        expected = batched[name]
        torch.testing.assert_close(t, expected[0] if t.dim() == 3 else expected, msg=name)


@pytest.mark.parametrize("recompute", [True, False])
def test_one_value_per_channel_is_torchs_error(recompute, backend):
    layer = fastconv.ConvBNReLU2d(2, 3, 3, recompute=recompute).to(backend.device)
    call, x = unfused(layer), torch.ones(1, 2, 3, 3, device=backend.device)
    (_, ours), (_, theirs) = outcome(layer, x), outcome(call, x)
    assert type(ours) is type(theirs) is ValueError and str(ours) == str(theirs)
    for a, b in zip(layer.bn.buffers(), call.parts[1].buffers(), strict=True):
        assert torch.equal(a, b)
    layer.bn.eval()
    assert layer(x).isfinite().all()


@pytest.mark.parametrize("training", [True, False])
def test_a_residual_that_does_not_fit(training, backend):
    layer = make_layer().to(backend.device).train(training)
    x, residual = (torch.randn(2, c, 5, 5, device=backend.device) for c in (CHANNELS, OUT))
    if backend.name == "aten" and not training:
        return
    with pytest.raises(RuntimeError, match="conv_bn_relu: residual must have the output's size"):
        layer(x, residual[:, :, :4])


@pytest.mark.parametrize("training", [True, False])
def test_a_residual_of_another_type_promotes(training, backend):
    """As the addition of the modules one by one does; the function refuses it."""
    layer = make_layer("relu6").to(backend.device).train(training)
    x, residual = (torch.randn(2, c, 5, 5, device=backend.device) for c in (CHANNELS, OUT))
    twin = unfused(copy.deepcopy(layer))
    ours, theirs = layer(x, residual.double()), twin(x, residual.double())
    assert ours.dtype == theirs.dtype == torch.float64
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    if backend.name == "aten" and not training:
        return
    bn, geometry = layer.bn, {"padding": layer.conv.padding, "training": training}
    statistics = bn.running_mean, bn.running_var, bn.weight, bn.bias
    with pytest.raises(RuntimeError, match="conv_bn_relu: residual has type"):
        fastconv.functional.conv_bn_relu(
            x, layer.conv.weight, None, *statistics, residual=residual.double(), **geometry
        )


@pytest.mark.parametrize("wanted", range(1, 16))
def test_gradients_of_any_subset(wanted):
    """Bits of `wanted`: input, convolution's weight, BatchNorm's, residual."""
    for recompute in (False, True):
        layer = make_layer("relu6", torch.float64, recompute=recompute)
        everything = of_layer(layer, make_step(layer, True))
        twin = copy.deepcopy(layer).requires_grad_(False)
        x, grad, residual = make_step(layer, True)
        leaves = {"input": x, "conv.weight": twin.conv.weight, "bn.weight": twin.bn.weight}
        leaves["residual"] = residual
        for i, t in enumerate(leaves.values()):
            t.requires_grad_(bool(wanted >> i & 1))
        twin(x, residual).backward(grad)
        for name, t in leaves.items():
            assert (t.grad is not None) == t.requires_grad, name
            assert t.grad is None or same_bits(t.grad, everything[name]), name


@pytest.mark.parametrize("training", [True, False], ids=["train", "frozen"])
@pytest.mark.parametrize("recompute", [True, False], ids=["recompute", "keep"])
def test_torch_compile(recompute, training):
    """Dynamo and AOTAutograd trace forward and backward into one graph each."""
    layer = make_layer("silu", torch.float64, recompute=recompute).train(training)
    step = make_step(layer, True)
    expected = of_layer(layer, step)
    twin = copy.deepcopy(layer)
    got = results(torch.compile(twin, backend="aot_eager", fullgraph=True), twin, step)
    for name, t in got.items():
        torch.testing.assert_close(t, expected[name], msg=name)


# ---- what is kept for backward ----


class Parts(nn.Module):
    """torch.nn's convolution, BatchNorm and ReLU in place, as torchvision has them."""

    def __init__(self, *args, activation="relu", **options):
        super().__init__()
        self.conv = nn.Conv2d(*args, bias=False, **options)
        self.bn = nn.BatchNorm2d(args[1])
        self.relu = nn.ReLU(inplace=True) if activation else nn.Identity()

    def forward(self, input, residual=None):
        z = self.bn(self.conv(input))
        if residual is not None:
            z += residual
        return self.relu(z)


class Block(nn.Module):
    def __init__(self, unit, inputs, outputs, stride):
        super().__init__()
        self.first = unit(inputs, outputs, 3, stride=stride, padding=1)
        self.second = unit(outputs, outputs, 3, padding=1)
        shortcut = stride != 1 or inputs != outputs
        self.shortcut = (
            unit(inputs, outputs, 1, stride=stride, activation=None) if shortcut else nn.Identity()
        )

    def forward(self, x):
        return self.second(self.first(x), self.shortcut(x))


def resnet(unit):
    """ResNet-18's stem and stages at an eighth of its widths."""
    blocks = [
        Block(unit, inputs, outputs, stride)
        for inputs, outputs, stride in (
            *((8, 8, 1), (8, 8, 1), (8, 16, 2), (16, 16, 1)),
            *((16, 32, 2), (32, 32, 1), (32, 64, 2), (64, 64, 1)),
        )
    ]
    return nn.Sequential(unit(3, 8, 7, stride=2, padding=3), *blocks)


def recomputing(*args, **options):
    return fastconv.ConvBNReLU2d(*args, recompute=True, **options)


NETWORKS = {
    "ConvBNReLU2d": (lambda unit: unit(16, 16, 3, padding=1), (4, 16, 24, 24)),
    "ResNet-18, narrow": (resnet, (4, 3, 128, 128)),
}


def saved_bytes(network, x):
    """Of the distinct storages that forward keeps for backward, parameters and buffers aside."""
    there = [t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())]
    storages = {}

    def pack(t):
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = network(*x)
    assert out.requires_grad
    return sum(s.nbytes() for address, s in storages.items() if address not in there)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("name", NETWORKS)
def test_bytes_kept_for_backward(name, autocast):
    build, size = NETWORKS[name]
    x = torch.randn(size)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        peer, ours, again = (
            saved_bytes(build(unit), [x.clone().requires_grad_()])
            for unit in (Parts, fastconv.ConvBNReLU2d, recomputing)
        )
    for label, count in (("", ours), (", recompute", again)):
        kind = name + label + (", autocast" if autocast else "")
        support.coverage[f"saved bytes, % of torch.nn's: {kind}"] = round(100 * count / peer)
    assert ours <= peer
    assert again <= 0.6 * peer


STATISTICS = 2 * 16 * 4  # mean and variance of 16 channels


@pytest.mark.parametrize("activation", NAMES)
def test_what_one_layer_keeps(activation):
    """The input and the convolution's output; with a residual the output or the residual."""
    size = 4 * (2 * 16 * 24 * 24)
    for with_residual, recompute in itertools.product((False, True), repeat=2):
        layer = fastconv.ConvBNReLU2d(
            16, 16, 3, padding=1, activation=activation, recompute=recompute
        )
        x, residual = (torch.randn(2, 16, 24, 24).requires_grad_() for _ in range(2))
        kept = saved_bytes(layer, [x, residual] if with_residual else [x])
        wanted = 1 + (not recompute) + (with_residual and activation != "none")
        assert kept == wanted * size + STATISTICS, (with_residual, recompute)


def test_frozen_batch_norm_keeps_as_much():
    for training in (True, False):
        layer = fastconv.ConvBNReLU2d(16, 16, 3, padding=1).train(training)
        kept = saved_bytes(layer, [torch.randn(2, 16, 24, 24, requires_grad=True)])
        assert kept == 2 * 4 * (2 * 16 * 24 * 24) + (STATISTICS if training else 0)


# ---- passes over memory ----

# Of operators that read an argument twice (a BatchNorm first sums, then computes; the two gradients
# of a convolution both read its gradient), the arguments' positions; -1 - i for a result that the
# operator reads again, as often as it is listed.
AGAIN = {
    "aten::native_batch_norm": (0,),
    "aten::native_batch_norm_backward": (0, 1),
    "aten::convolution_backward": (0,),
    "fastconv::batch_norm_training": (0,),
    # The convolution's result: for its sums, and for the output.
    "fastconv::conv_bn_training": (-2, -2),
    "fastconv::batch_norm_backward": (0, 1),
}
# The residual's gradient is read again instead of the output's.
AGAIN_WITH_RESIDUAL = (1, -4)


class Passes(TorchDispatchMode):
    """Adds the bytes that operators read and write, of tensors larger than parameters are."""

    LARGE = 50_000

    def __init__(self):
        super().__init__()
        self.bytes = 0
        self.seen = set()

    def size(self, t):
        large = isinstance(t, torch.Tensor) and t.numel() >= self.LARGE
        return t.nbytes if large else 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name, results = function._schema.name, tree_leaves(out)
        if function.is_view or name in ("aten::detach", "aten::empty_like"):
            return out
        self.seen.add(name)
        again = AGAIN.get(name, ())
        if name == "fastconv::batch_norm_backward" and results[3] is not None:
            again = AGAIN_WITH_RESIDUAL
        self.bytes += sum(map(self.size, (*tree_leaves(args), *results)))
        self.bytes += sum(self.size(args[i] if i >= 0 else results[-1 - i]) for i in again)
        return out


def passes(unit, with_residual):
    """Forward's and backward's, in units of one activation tensor."""
    x, grad, residual = (torch.randn(4, 32, 32, 32) for _ in range(3))
    layer = unit(32, 32, 3, padding=1)
    x, residual = (t.requires_grad_() for t in (x, residual))
    with Passes() as forward:
        out = layer(x, residual if with_residual else None)
    leaves = [x, residual] if with_residual else [x]
    with Passes() as backward:
        torch.autograd.grad(out, [*leaves, *layer.parameters()], grad)
    assert any("batch_norm" in name or "conv_bn" in name for name in forward.seen), forward.seen
    assert any("batch_norm" in name for name in backward.seen), backward.seen
    return [count.bytes / x.nbytes for count in (forward, backward)]


@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])
def test_passes_over_memory(with_residual):
    ours, theirs = (passes(unit, with_residual) for unit in (fastconv.ConvBNReLU2d, Parts))
    label = "with a residual" if with_residual else "without"
    for way, a, b in zip(("forward", "backward"), ours, theirs, strict=True):
        assert a == int(a) and b == int(b), (a, b)
        support.coverage[f"passes over memory, {way}, {label}: ours"] = int(a)
        support.coverage[f"passes over memory, {way}, {label}: torch.nn's"] = int(b)
        assert a < b, way
