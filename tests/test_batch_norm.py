"""BatchNorm: every row, training and inference, forward and backward, running statistics."""

import copy
import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

import fastconv
import fastconv.functional as ff
import references
import support
from fastconv.benchmarking.shapes import NORM_EDGES
from support import (
    DTYPES,
    FORMATS,
    assert_exact,
    contract_failure,
    forced,
    integers,
    max_error,
    must_run,
    name_of,
    normal,
    run_python,
)
from turns import in_turn, interpreted, slow

NAMES = ("out", "input", "weight", "bias")


def placed(t, layout, device="cpu"):
    return torch.empty_like(t, device=device, memory_format=FORMATS[layout]).copy_(t)


def make(size, dtype, parameter_dtype=None, offset=0.0, seed=0):
    """input, grad, weight, bias, running mean, running var."""
    generator = torch.Generator().manual_seed(sum(size) + seed)
    parameter_dtype = parameter_dtype or dtype
    x = (normal(size, generator) * 3 + offset).to(dtype)
    grad = normal(size, generator).to(dtype)
    weight, bias, mean = (normal(size[1], generator).to(parameter_dtype) for _ in range(3))
    var = (normal(size[1], generator).abs() + 0.5).to(parameter_dtype)
    return x, grad, weight, bias, mean + offset, var


def run(function, tensors, layout, training, device="cpu", eps=1e-5):
    """Output and the three gradients, by name."""
    x, grad = (placed(t, layout, device) for t in tensors[:2])
    weight, bias, mean, var = (t.to(device).clone() for t in tensors[2:])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    statistics = (None, None) if training else (mean, var)
    out = function(x, *statistics, weight, bias, training, 0.1, eps)
    return dict(zip(NAMES, (out, *torch.autograd.grad(out, leaves, grad)), strict=True))


def reference(tensors, training, eps=1e-5):
    x, grad, weight, bias, *statistics = (t.double() for t in tensors)
    statistics = (None, None) if training else statistics
    answers = references.batch_norm_extended(x, grad, weight, bias, *statistics, eps)
    return dict(zip(NAMES, answers, strict=True))


def peer_errors(tensors, training, expected):
    peers = [run(F.batch_norm, tensors, layout, training) for layout in FORMATS]
    return {name: max(max_error(p[name], expected[name]) for p in peers) for name in NAMES}


@functools.cache
def contract_case(size, dtype, training):
    """Tensors, answers, and PyTorch's errors: the worst of four draws for the few elements of the
    parameters' gradients, which one draw may get right by luck."""
    draws = []
    for seed in range(support.DRAWS):
        tensors = make(size, dtype, seed=seed)
        expected = reference(tensors, training)
        draws.append((tensors, expected, peer_errors(tensors, training, expected)))
    tensors, expected, errors = draws[0]
    for name in NAMES:
        if expected[name].numel() < support.FEW:
            errors[name] = max(e[name] for _, _, e in draws)
    return tensors, expected, errors


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_contract(direction, training, dtype, layout):
    rows = support.rows("batch_norm", direction)
    assert rows
    for row in rows:
        wrong, ran = [], 0
        for size in NORM_EDGES:
            tensors, expected, errors = contract_case(size, dtype, training)
            device = support.row_device(row)
            got, reason = forced(
                row, lambda t=tensors, d=device: run(ff.batch_norm, t, layout, training, d)
            )
            if reason:
                continue
            ran += 1
            names = NAMES[:1] if direction == "fprop" else NAMES[1:]
            failures = [contract_failure(got[n], expected[n], errors[n]) for n in names]
            wrong += [f"{size} {n}: {f}" for n, f in zip(names, failures, strict=True) if f]
        support.coverage[f"batch_norm {direction}: row x size x dtype x layout x mode"] += ran
        assert not wrong, f"{row.name}, {len(wrong)} of {ran}:\n" + "\n".join(wrong)
        assert ran or not must_run(row, dtype), f"{row.name} ran nothing"


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_inference_of_integers_is_exact(dtype, layout, backend):
    """eps = 1 and variances 0, 3 and 15: the roots are 1, 2 and 4."""
    generator = torch.Generator().manual_seed(1)
    for size in NORM_EDGES:
        x = integers(size, generator, -5, 5).to(dtype)
        mean, weight, bias = (integers((size[1],), generator, -3, 3).to(dtype) for _ in range(3))
        var = torch.tensor([0.0, 3.0, 15.0], dtype=dtype)[torch.arange(size[1]) % 3]
        args = [t.to(backend.device) for t in (mean, var, weight, bias)]
        out = ff.batch_norm(placed(x, layout, backend.device), *args, False, 0.1, 1.0)
        expected = references.batch_norm(
            *(t.double() for t in (x, weight, bias, mean, var)), eps=1.0
        )
        assert_exact(out, expected)


@pytest.mark.parametrize("offset", [1e3, 1e4, 1e5])
@pytest.mark.parametrize("layout", FORMATS)
def test_variance_survives_a_large_offset(layout, offset, backend):
    """E[x^2] - E[x]^2 in float32 has no correct digit left of a variance of 9 at 1e5."""
    for size in ((8, 4, 12, 13), (1, 16, 33, 7), (64, 3, 2, 2)):
        tensors = make(size, torch.float32, offset=offset)
        expected = reference(tensors, True)
        errors = peer_errors(tensors, True, expected)
        got = run(ff.batch_norm, tensors, layout, True, backend.device)
        for name in NAMES:
            failure = contract_failure(got[name], expected[name], errors[name])
            assert not failure, f"{size} {name}: {failure}"
        # The mean is rounded to float32, half an ulp of the offset, over a deviation of 3; a value
        # and its mean may both be off.
        allowed = 4 * torch.finfo(torch.float32).eps * offset
        assert max_error(got["out"], expected["out"]) < allowed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("training", [True, False])
def test_16_bit_input_with_float32_parameters(training, layout, dtype, backend):
    tensors = make((4, 10, 6, 7), dtype, torch.float32)
    expected = reference(tensors, training)
    errors = peer_errors(tensors, training, expected)
    got = run(ff.batch_norm, tensors, layout, training, backend.device)
    theirs = run(F.batch_norm, tensors, layout, training)
    for name in NAMES:
        assert got[name].dtype == theirs[name].dtype, name
        failure = contract_failure(got[name], expected[name], errors[name])
        assert not failure, f"{name}: {failure}"


def layers(**options):
    """Ours and torch's with equal, uneven parameters and buffers."""
    ours, theirs = (cls(5, **options) for cls in (fastconv.BatchNorm2d, torch.nn.BatchNorm2d))
    generator = torch.Generator().manual_seed(3)
    for t in ours.state_dict().values():
        if t.is_floating_point():
            t.copy_(torch.rand(t.shape, generator=generator) + 0.5)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def assert_buffers_agree(ours, theirs):
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b, rtol=2e-6, atol=1e-6, msg=name)


OPTIONS = {
    "defaults": {},
    "momentum=None": {"momentum": None},
    "momentum=0": {"momentum": 0.0},
    "momentum=1": {"momentum": 1.0},
    "affine=False": {"affine": False},
    "track_running_stats=False": {"track_running_stats": False},
    "eps=0.5": {"eps": 0.5},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_running_statistics_are_torch(options, backend):
    ours, theirs = layers(**OPTIONS[options])
    ours.to(backend.device)
    generator = torch.Generator().manual_seed(4)
    for step in range(4):
        x = torch.randn(3, 5, 4, 6, generator=generator) * (step + 1) + step
        torch.testing.assert_close(ours(x.to(backend.device)).cpu(), theirs(x))
        assert_buffers_agree(ours, theirs)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(x.to(backend.device)).cpu(), theirs(x))
    assert_buffers_agree(ours, theirs)


def test_functional_updates_the_given_statistics_in_place(backend):
    x = torch.randn(4, 3, 5, 5)
    ours, theirs = ([torch.zeros(3), torch.ones(3)] for _ in range(2))
    ours = [t.to(backend.device) for t in ours]
    for momentum in (0.1, 0.5, 1.0):
        ff.batch_norm(x.to(backend.device), *ours, training=True, momentum=momentum)
        F.batch_norm(x, *theirs, training=True, momentum=momentum)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a.cpu(), b)
    before = [t.clone() for t in ours]
    ff.batch_norm(x.to(backend.device), *ours, training=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=name_of)
def test_statistics_keep_their_dtype(dtype, backend):
    ours, theirs = (layer.to(dtype) for layer in layers())
    ours.to(backend.device)
    x = torch.randn(4, 5, 6, 6).to(dtype)
    out, expected = ours(x.to(backend.device)), theirs(x)
    assert out.dtype == expected.dtype
    for name in ("running_mean", "running_var"):
        a, b = getattr(ours, name), getattr(theirs, name)
        assert a.dtype == b.dtype
        torch.testing.assert_close(a.cpu(), b)


def test_running_statistics_stay_out_of_the_graph(backend):
    layer = fastconv.BatchNorm2d(3).to(backend.device)
    layer(torch.randn(2, 3, 4, 4, device=backend.device, requires_grad=True)).sum().backward()
    for name, buffer in layer.named_buffers():
        assert buffer.grad_fn is None and not buffer.requires_grad, name


def test_variance_of_running_statistics_is_unbiased(backend):
    x = torch.tensor([0.0, 2.0], device=backend.device).reshape(2, 1, 1, 1)
    mean, var = (torch.zeros(1, device=backend.device) for _ in range(2))
    ff.batch_norm(x, mean, var, training=True, momentum=1.0)
    assert (mean.item(), var.item()) == (1.0, 2.0)


@pytest.mark.parametrize("size", [(1, 3, 1, 1), (1, 3)])
def test_one_value_per_channel_is_refused_in_training(size, backend):
    x = torch.ones(size, device=backend.device)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ff.batch_norm(x, None, None, training=True)
    mean, var = torch.zeros(3, device=backend.device), torch.ones(3, device=backend.device)
    torch.testing.assert_close(ff.batch_norm(x, mean, var), F.batch_norm(x, mean, var))
    if x.dim() == 4:
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            fastconv.BatchNorm2d(3).to(x.device)(x)


@pytest.mark.parametrize("size", [(6, 3), (4, 3, 5), (2, 3, 4, 5, 2), (2, 3, 4, 1, 2, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_other_ranks_go_where_torchs_go(size, training, backend):
    x = torch.randn(size).to(backend.device)
    mean, var, weight, bias = (torch.rand(3, device=x.device) + 0.5 for _ in range(4))
    ours = [mean.clone(), var.clone()]
    out = ff.batch_norm(x, *ours, weight, bias, training)
    torch.testing.assert_close(out, F.batch_norm(x, mean, var, weight, bias, training))
    torch.testing.assert_close(ours, [mean, var])


EMPTY = """
    import torch, fastconv
    def attempt(module, size, training):
        x = torch.ones(size, device="DEVICE", requires_grad=True)
        C = size[1] if len(size) > 1 else 0
        mean, var = torch.zeros(C, device=x.device), torch.ones(C, device=x.device)
        weight = torch.ones(C, device=x.device, requires_grad=True)
        try:
            out = module.batch_norm(x, mean, var, weight, None, training)
            out.sum().backward()
        except Exception as error:
            return type(error)
        return out.shape, x.grad.shape, weight.grad.tolist(), mean.tolist(), var.tolist()

    for size in ((0, 3, 4, 4), (2, 3, 0, 4), (0, 3), (0,)):
        for training in (True, False):
            theirs = attempt(torch.nn.functional, size, training)
            with fastconv.backend("BACKEND"):
                ours = attempt(fastconv.functional, size, training)
            print(size, training, "same" if ours == theirs else f"{ours}, torch's {theirs}")
"""


def test_empty_batches_do_as_torchs(backend):
    """No running statistic moves. In a process of its own: there is a division by the count."""
    done = run_python(EMPTY.replace("DEVICE", backend.device).replace("BACKEND", backend.name))
    lines = done.stdout.splitlines()
    wrong = [line for line in lines if not line.endswith("same")]
    assert done.returncode == 0 and len(lines) == 8, f"after {lines}: {done.stderr[-500:]}"
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("layout", FORMATS)
def test_nan_stays_in_its_channel(layout, backend):
    x = torch.randn(2, 4, 5, 5)
    x[0, 1, 2, 3], x[1, 2, 0, 0] = torch.nan, torch.inf
    x = placed(x, layout, backend.device)
    mean, var = torch.zeros(4, device=x.device), torch.ones(4, device=x.device)
    out = ff.batch_norm(x, mean, var, training=True)
    assert out[:, 1:3].isnan().all() and out[:, [0, 3]].isfinite().all()
    assert torch.equal(mean.isfinite().cpu(), torch.tensor([True, False, False, True]))
    assert torch.equal(var.isfinite().cpu(), torch.tensor([True, False, False, True]))


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("training", [True, False])
def test_constant_channels_give_the_bias(layout, training, backend):
    """Variance zero: eps alone stands in the denominator, and the gradient is finite."""
    x = torch.full((3, 2, 4, 4), 7.0)
    x = placed(x, layout, backend.device).requires_grad_()
    bias = torch.tensor([0.25, -2.0], device=x.device)
    mean, var = torch.full((2,), 7.0, device=x.device), torch.zeros(2, device=x.device)
    out = ff.batch_norm(x, mean, var, None, bias, training)
    # x * scale + shift with both factors rounded leaves two ulps of 7 / sqrt(1e-5).
    allowed = 2 * torch.finfo(torch.float32).eps * 7 / 1e-5**0.5
    assert (out - bias[:, None, None]).abs().max() <= allowed
    (grad,) = torch.autograd.grad(out[0, 0, 0, 0], x)
    assert grad.isfinite().all()


@pytest.mark.parametrize("which", range(1, 8))
def test_gradients_of_any_subset(which, backend):
    """Bits of `which`: input, weight, bias."""

    def attempt(function):
        torch.manual_seed(5)
        tensors = [torch.randn(3, 4, 5, 5), torch.rand(4), torch.rand(4)]
        x, weight, bias = (
            t.to(backend.device).requires_grad_(bool(which >> i & 1)) for i, t in enumerate(tensors)
        )
        out = function(x, None, None, weight, bias, True)
        (out * torch.arange(25.0, device=x.device).reshape(5, 5)).sum().backward()
        return [t.grad for t in (x, weight, bias)]

    for ours, theirs in zip(attempt(ff.batch_norm), attempt(F.batch_norm), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_deepcopy_and_one_more_step(backend):
    ours, _ = layers()
    ours.to(backend.device)
    x = torch.randn(4, 5, 3, 3, device=backend.device)
    ours(x)
    twin = copy.deepcopy(ours)
    assert torch.equal(ours(x), twin(x))
    assert ours.num_batches_tracked == twin.num_batches_tracked == 2


@pytest.mark.parametrize("parameters", [None, "same", "float32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_training_backward_in_every_mix_of_dtypes(dtype, parameters, backend):
    """A 16-bit input with no parameters, with its own kind, and with float32's."""
    x = torch.randn(4, 3, 5, 5, device=backend.device).to(dtype).requires_grad_()
    if parameters is None:
        affine = (None, None)
    elif dtype is torch.float64:
        affine = tuple(torch.rand(3, device=backend.device, dtype=dtype) for _ in range(2))
    else:
        kind = dtype if parameters == "same" else torch.float32
        affine = tuple(torch.rand(3, device=backend.device, dtype=kind) for _ in range(2))
    upstream = torch.randn_like(x)
    grad, expected = (
        torch.autograd.grad(function(x, None, None, *affine, True), x, upstream)[0]
        for function in (ff.batch_norm, F.batch_norm)
    )
    assert grad.abs().max() > 0.1
    assert grad.dtype is dtype
    tolerance = 40 * support.eps(dtype)
    assert torch.allclose(grad.float(), expected.float(), atol=tolerance, rtol=tolerance)


# What follows the normalisation: a residual, an activation.

ACTIVATIONS = [name for name in support.ACTIVATIONS if name is not None]
AFTER = [(name, residual) for name in ACTIVATIONS for residual in (False, True)][1:]


def after_cases(sizes, each):
    """(size, activation, residual): every size with `each` of AFTER, which take turns."""
    turns = itertools.cycle(AFTER)
    return [(size, *next(turns)) for size in sizes for _ in range(each)]


def fused(x, mean, var, weight, bias, training, momentum, eps, residual, activation):
    options = {"training": training, "momentum": momentum, "eps": eps}
    return ff.batch_norm_relu(
        x, mean, var, weight, bias, residual=residual, activation=activation, **options
    )


def unfused(x, mean, var, weight, bias, training, momentum, eps, residual, activation):
    z = F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    return support.ACTIVATIONS[activation](z if residual is None else z + residual)


def run_after(function, tensors, residual, activation, layout, training, device="cpu", eps=1e-5):
    """Output and gradients by name, the residual's among them where there is one."""
    if residual is not None:
        residual = placed(residual, layout, device).requires_grad_()
    x, grad = (placed(t, layout, device) for t in tensors[:2])
    weight, bias, mean, var = (t.to(device).clone() for t in tensors[2:])
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    leaves += [] if residual is None else [residual]
    statistics = (None, None) if training else (mean, var)
    out = function(x, *statistics, weight, bias, training, 0.1, eps, residual, activation)
    answers = (out, *torch.autograd.grad(out, leaves, grad))
    return dict(zip((*NAMES, "residual"), answers, strict=False))


def reference_after(tensors, residual, activation, training, eps=1e-5):
    x, grad, weight, bias, *statistics = (t.double() for t in tensors)
    statistics = (None, None) if training else statistics
    residual = None if residual is None else residual.double()
    answers = references.batch_norm_extended(
        x, grad, weight, bias, *statistics, eps, residual, activation
    )
    return dict(zip((*NAMES, "residual"), answers, strict=False))


def without_kinks(tensors, residual, activation, training, dtype):
    """The gradient is zero where rounding decides on which side of a kink an element lies."""
    z = reference_after(tensors, residual, "none", training)["out"]
    for kink in references.KINKS.get(activation, ()):
        margin = max(4 * support.eps(dtype), 1e-5) * max(1, abs(kink))
        tensors[1][(z - kink).abs() < margin] = 0
    return tensors


@functools.cache
def after_case(size, activation, with_residual, dtype, training):
    """As contract_case; where there is one channel, or few, at least 16 of its sums are drawn."""
    draws = []
    for seed in range(max(support.DRAWS, 16 // size[1])):
        tensors = list(make(size, dtype, seed=seed))
        generator = torch.Generator().manual_seed(seed)
        residual = normal(size, generator).to(dtype) if with_residual else None
        tensors = without_kinks(tensors, residual, activation, training, dtype)
        expected = reference_after(tensors, residual, activation, training)
        peers = [
            run_after(unfused, tensors, residual, activation, layout, training)
            for layout in FORMATS
        ]
        errors = {n: max(max_error(p[n], expected[n]) for p in peers) for n in expected}
        draws.append((tensors, residual, expected, errors))
    tensors, residual, expected, errors = draws[0]
    for name in expected:
        if expected[name].numel() < support.FEW:
            errors[name] = max(e for *_, each in draws for n, e in each.items() if n == name)
    return tensors, residual, expected, errors


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_contract_of_what_follows(direction, training, dtype, layout):
    for row in support.rows("batch_norm", direction):
        # One of the two that a size has, and in another mode or layout the other.
        one = interpreted(row) or support.SANITIZED
        cases = after_cases(NORM_EDGES, each=2)
        cases = in_turn(cases, one, training, layout == "NHWC", every=2)
        device, wrong, ran = support.row_device(row), [], 0
        for size, activation, with_residual in cases:
            tensors, residual, expected, errors = after_case(
                size, activation, with_residual, dtype, training
            )
            call = functools.partial(
                run_after, fused, tensors, residual, activation, layout, training, device
            )
            got, reason = forced(row, call)
            if reason:
                continue
            ran += 1
            names = [n for n in expected if (n == "out") == (direction == "fprop")]
            for name in names:
                failure = contract_failure(got[name], expected[name], errors[name])
                if failure:
                    wrong.append(f"{size} {activation} {with_residual} {name}: {failure}")
        support.coverage[f"batch_norm_relu {direction}: row x case x dtype x layout x mode"] += ran
        assert not wrong, f"{row.name}, {len(wrong)} of {ran}:\n" + "\n".join(wrong)
        assert ran or not must_run(row, dtype), f"{row.name} ran nothing"


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_what_follows_is_exact_on_integers(dtype, layout, with_residual, activation, backend):
    """Inference with eps = 1 and variances 0, 3 and 15, forward and backward."""
    generator = torch.Generator().manual_seed(1)
    places = DTYPES.index(dtype), ACTIVATIONS.index(activation), 2 * (layout == "NHWC")
    for size in in_turn(NORM_EDGES, interpreted(backend), *places, with_residual):
        x, grad, residual = (integers(size, generator, -3, 3).to(dtype) for _ in range(3))
        weight, bias, mean = (integers((size[1],), generator, -3, 3).to(dtype) for _ in range(3))
        weight.mul_(4)  # so that z is an integer
        var = torch.tensor([0.0, 3.0, 15.0], dtype=dtype)[torch.arange(size[1]) % 3]
        tensors = (x, grad, weight, bias, mean, var)
        residual = residual if with_residual else None
        got = run_after(
            fused, tensors, residual, activation, layout, False, backend.device, eps=1.0
        )
        expected = reference_after(tensors, residual, activation, False, eps=1.0)
        for name in expected:
            if backend.name != "aten" or name == "out":  # ATen multiplies by a rounded root
                assert_exact(got[name], expected[name])


@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("training", [True, False])
def test_any_subset_of_the_gradients_has_the_same_bits(training, layout, activation):
    """A row may leave work out, and may not change what it leaves in."""
    for row in support.rows("batch_norm", "dgrad"):
        sizes = support.shapes_for(row, torch.float32, (layout, layout), NORM_EDGES[:4])
        for turn, size in enumerate(sizes):
            x, grad, weight, bias, mean, var = make(size, torch.float32)
            residual = torch.flip(x, [0])
            device = support.row_device(row)
            x, grad, residual = (placed(t, layout, device) for t in (x, grad, residual))
            parameters = [t.to(device) for t in (weight, bias, mean, var)]

            def call(mask, x=x, grad=grad, parameters=parameters, residual=residual):
                return torch.ops.fastconv.batch_norm_backward(
                    *(grad, x, *parameters, residual, None, training, 1e-5, activation, mask)
                )

            everything, reason = forced(row, lambda: call([True] * 4))
            assert not reason, reason
            for which in in_turn(range(1, 15), slow(row), turn):
                mask = [bool(which >> i & 1) for i in range(4)]
                some, _ = forced(row, lambda m=mask: call(m))
                wanted = [t if m else None for t, m in zip(everything, mask, strict=True)]
                close = zip(some, wanted, strict=True)
                for a, b in close:
                    assert (a is None) == (b is None)
                    # The residual's gradient, where it is kept, is read back as it was rounded.
                    assert a is None or support.same_bits(a, b), (row.name, size, mask)


def test_derivative_read_off_the_output_is_the_inputs(backend):
    x, grad, weight, bias, mean, var = make((4, 6, 7, 5), torch.float32)
    tensors = [t.to(backend.device) for t in (grad, x, weight, bias, mean, var)]
    for activation in ("relu", "relu6", "leaky_relu"):
        out = torch.ops.fastconv.batch_norm_inference(
            *(*tensors[1:], None, 1e-5, activation),
        )
        for training in (True, False):
            tail = (training, 1e-5, activation, [True] * 4)
            a, b = (
                torch.ops.fastconv.batch_norm_backward(*tensors, None, output, *tail)
                for output in (out, None)
            )
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="derivative of silu cannot be read off its output"):
        torch.ops.fastconv.batch_norm_backward(
            *(*tensors, None, out, True, 1e-5, "silu", [True] * 4)
        )


@pytest.mark.parametrize("size", [(6, 3), (4, 3, 5), (2, 3, 4, 5, 2)])
@pytest.mark.parametrize("training", [True, False])
def test_other_ranks_with_what_follows(size, training, backend):
    x, residual = torch.randn(2, *size).to(backend.device)
    mean, var, weight, bias = (torch.rand(3, device=x.device) + 0.5 for _ in range(4))
    ours = [mean.clone(), var.clone()]
    after = (training, 0.1, 1e-5, residual, "hardswish")
    out = fused(x, *ours, weight, bias, *after)
    torch.testing.assert_close(out, unfused(x, mean, var, weight, bias, *after))
    torch.testing.assert_close(ours, [mean, var])


def test_what_follows_is_refused_where_it_does_not_fit(backend):
    x, channel = torch.randn(2, 3, 4, 4, device=backend.device), torch.ones(3)
    statistics = [t.to(backend.device) for t in (channel * 0, channel)]
    with pytest.raises(ValueError, match="activation must be one of .* but got 'tanh'"):
        ff.batch_norm_relu(x, *statistics, activation="tanh")
    for training in (True, False):
        with pytest.raises(ValueError if training else RuntimeError):
            ff.batch_norm_relu(x[:1, :, :1, :1], None, None, training=training)
    if backend.name == "aten":
        return
    for training in (True, False):
        with pytest.raises(RuntimeError, match=r"residual must have the output's size .*\[1, 3"):
            ff.batch_norm_relu(x, *statistics, residual=x[:1], training=training)
        with pytest.raises(RuntimeError, match="residual has type"):
            ff.batch_norm_relu(x, *statistics, residual=x.double(), training=training)
