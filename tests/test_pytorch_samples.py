"""PyTorch's own samples, run against fastconv: its operator tests, error inputs and module tests.

They live in torch.testing._internal, which changes between versions: what a version lacks is
counted, not required, but each list must have something in it. The counts are printed at the end.
"""

import contextlib
import functools
import itertools
import os
import re

import pytest
import torch

import fastconv
import fastconv.functional as ff
import support
from support import contract_failure, max_error, name_of, outcome

common = pytest.importorskip("torch.testing._internal.common_methods_invocations")
modules = pytest.importorskip("torch.testing._internal.common_modules")

OPERATIONS = {
    "nn.functional.conv2d": ff.conv2d,
    "nn.functional.max_pool2d": ff.max_pool2d,
    "nn.functional.avg_pool2d": ff.avg_pool2d,
    "nn.functional.adaptive_avg_pool2d": ff.adaptive_avg_pool2d,
    "nn.functional.batch_norm": ff.batch_norm,
}
LAYERS = {
    "nn.Conv2d": fastconv.Conv2d,
    "nn.MaxPool2d": fastconv.MaxPool2d,
    "nn.AvgPool2d": fastconv.AvgPool2d,
    "nn.AdaptiveAvgPool2d": fastconv.AdaptiveAvgPool2d,
    "nn.BatchNorm2d": fastconv.BatchNorm2d,
}
# (relative, absolute): two roundings of a result near one, and for float32 the order of short sums.
TOLERANCE = {
    torch.float32: (1e-5, 1e-5),
    torch.float64: (1e-10, 1e-10),
    torch.complex64: (1e-5, 1e-5),
    torch.complex128: (1e-10, 1e-10),
    torch.float16: (4e-3, 4e-3),
    torch.bfloat16: (3e-2, 3e-2),
}


def operators():
    """Every variant of ours in op_db that torch itself has on this device."""
    for info in common.op_db:
        if info.name in OPERATIONS and info.dtypes:
            yield pytest.param(info, id=info.full_name if hasattr(info, "full_name") else info.name)


def operator_dtypes():
    """(operator, dtype, step): float32 in full, of the 1,440 samples that max_pool2d has every
    eleventh in each other dtype; the rest of those in `make test-all`."""
    for param in operators():
        (info,) = param.values
        for dtype in sorted(info.dtypes, key=str):
            many = info.name == "nn.functional.max_pool2d" and dtype is not torch.float32
            name = f"{param.id}-{name_of(dtype)}"
            yield pytest.param(info, dtype, 11 if many else 1, id=name)
            if many:
                yield pytest.param(info, dtype, 1, id=f"{name}-all", marks=pytest.mark.slow)


def test_every_operation_has_samples():
    assert {p.values[0].name for p in operators()} == set(OPERATIONS)
    assert {info.name for info in modules.module_db} >= set(LAYERS)


def leaves(values):
    """The tensors of a sample that ask for gradients, depth first."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if value.requires_grad:
                yield value
        elif isinstance(value, (list, tuple)):
            yield from leaves(value)


def copies(sample):
    """A sample's arguments with tensors of their own, for functions that write to them."""

    def copy(value):
        if isinstance(value, torch.Tensor):
            return value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, (list, tuple)):
            return type(value)(map(copy, value))
        return value

    kwargs = {k: copy(v) for k, v in sample.kwargs.items()}
    return [copy(sample.input), *map(copy, sample.args)], kwargs


def tensors_of(out):
    return [out] if isinstance(out, torch.Tensor) else list(out)


def run_with_gradients(function, sample):
    """Outputs, gradients, and the arguments afterwards (batch_norm writes to its statistics)."""
    args, kwargs = copies(sample)
    out = tensors_of(function(*args, **kwargs))
    wanted = list(leaves([*args, *kwargs.values()]))
    differentiable = [t for t in out if t.requires_grad]
    gradients = []
    if wanted and differentiable:
        generator = torch.Generator().manual_seed(1)
        grads = [torch.randn(t.shape, generator=generator).to(t) for t in differentiable]
        gradients = list(torch.autograd.grad(differentiable, wanted, grads, allow_unused=True))
    rest = [a.detach() for a in [*args, *kwargs.values()] if isinstance(a, torch.Tensor)]
    return out, gradients, rest


def assert_alike(ours, theirs, dtype, what, exact=None):
    """`what` is printed only on a failure: the text of a sample holds all its numbers. `exact`
    gives float64 answers: a 16-bit result may be further from torch's than the tolerance where
    torch's own is off (it sums some of them in 16 bits), and is then judged by the contract."""
    assert len(ours) == len(theirs), what
    rtol, atol = TOLERANCE.get(dtype, (0, 0))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a is None) == (b is None), what
        if a is not None:
            assert (a.dtype, a.shape) == (b.dtype, b.shape), what
            if torch.equal(a, b):
                continue
            if exact is not None and not torch.allclose(a, b, rtol, atol, equal_nan=True):
                right = exact()[i].detach()
                failure = contract_failure(a, right, max_error(b, right))
                assert not failure, (failure, what)
                continue
            torch.testing.assert_close(
                *(a, b), rtol=rtol, atol=atol, equal_nan=True, msg=lambda m: f"{what}: {m}"
            )


def exact_results(function, sample, which):
    def double(value):
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value.detach().double().requires_grad_(value.requires_grad)
        return value

    wide = sample.transform(double)
    return run_with_gradients(function, wide)[which]


def samples(info, dtype, step, requires_grad, device="cpu"):
    every = info.sample_inputs(device, dtype, requires_grad=requires_grad)
    return itertools.islice(every, 0, None, step)


@pytest.mark.parametrize("info, dtype, step", list(operator_dtypes()))
def test_samples(info, dtype, step):
    """Forward, and backward where torch has one for the dtype."""
    gradients = dtype in info.backward_dtypes and (dtype.is_floating_point or dtype.is_complex)
    ran = 0
    for sample in samples(info, dtype, step, gradients):
        theirs, error = outcome(run_with_gradients, info.op, sample)
        if error is not None:  # torch cannot either: the same type of exception is asked for
            _, ours = outcome(run_with_gradients, OPERATIONS[info.name], sample)
            assert type(ours) is type(error), f"{sample}: {ours!r}, torch's {error!r}"
            support.coverage[f"op_db {info.name}: samples that torch refuses too"] += 1
            continue
        ours = run_with_gradients(OPERATIONS[info.name], sample)
        for i, what in enumerate(("output", "gradient", "argument")):
            exact = None
            if dtype in (torch.float16, torch.bfloat16):
                exact = functools.partial(exact_results, info.op, sample, i)
            assert_alike(ours[i], theirs[i], dtype, (what, sample), exact)
        ran += 1
    assert ran
    support.coverage[f"op_db {info.name}: samples, {name_of(dtype)}"] += ran


@pytest.mark.parametrize("info", list(operators()))
@pytest.mark.parametrize("device", [b.device for b in support.backends() if b.name == "triton"])
def test_float32_samples_on_triton(info, device):
    """Forward and backward, on Triton kernels alone."""
    ran = 0
    for sample in samples(info, torch.float32, 1, requires_grad=True, device=device):
        theirs, error = outcome(run_with_gradients, info.op, sample)
        if error is not None:
            continue  # test_samples compares what is raised
        with fastconv.backend("triton"):
            ours = run_with_gradients(OPERATIONS[info.name], sample)
        for a, b in zip(ours, theirs, strict=True):
            assert_alike(a, b, torch.float32, sample)
        ran += 1
    assert ran
    support.coverage[f"op_db {info.name}: samples, float32, Triton"] += ran


@pytest.mark.parametrize("info", list(operators()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_samples_in_channels_last(info, dtype):
    ran = 0
    many = info.name == "nn.functional.max_pool2d"
    for sample in samples(info, dtype, 7 if many else 1, requires_grad=True):
        if sample.input.dim() != 4:
            continue
        x = sample.input.detach().contiguous(memory_format=torch.channels_last)
        sample.input = x.requires_grad_()

        def both(function, sample=sample):
            args, kwargs = copies(sample)
            args[0] = args[0].detach().contiguous(memory_format=torch.channels_last)
            args[0].requires_grad_()
            out = tensors_of(function(*args, **kwargs))
            grads = [torch.ones_like(t) for t in out if t.requires_grad]
            return out, torch.autograd.grad([t for t in out if t.requires_grad], args[0], grads)

        for a, b in zip(both(OPERATIONS[info.name]), both(info.op), strict=True):
            assert_alike(a, b, dtype, sample)
        ran += 1
    assert ran
    support.coverage[f"op_db {info.name}: samples in channels_last"] += ran


@pytest.mark.parametrize("info", list(operators()))
def test_error_inputs(info):
    if info.error_inputs_func is None:
        assert info.name == "nn.functional.batch_norm"  # torch lists none
        return
    ran = 0
    for error_input in info.error_inputs("cpu"):
        sample = error_input.sample_input
        with pytest.raises(error_input.error_type, match=error_input.error_regex):
            OPERATIONS[info.name](sample.input, *sample.args, **sample.kwargs)
        ran += 1
    assert ran
    support.coverage[f"op_db {info.name}: error inputs"] += ran


def layer_infos():
    for info in modules.module_db:
        if info.name in LAYERS:
            yield pytest.param(info, id=info.name)


def module_inputs(info, dtype, training, requires_grad=True):
    options = {"device": "cpu", "dtype": dtype, "training": training}
    return info.module_inputs_func(info, requires_grad=requires_grad, **options)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("info", list(layer_infos()))
def test_module_inputs(info, dtype, training):
    ran = 0
    for sample in module_inputs(info, dtype, training):
        if sample.forward_input is None:
            continue
        build = sample.constructor_input
        pair = []
        for cls in (LAYERS[info.name], info.module_cls):
            torch.manual_seed(1)
            layer = cls(*build.args, **build.kwargs)
            layer = layer.to(dtype=dtype).train(training)
            call = torch.testing._internal.common_utils.freeze_rng_state
            with call() if callable(call) else contextlib.nullcontext():
                torch.manual_seed(2)
                inputs = [
                    t.detach().clone().requires_grad_() if isinstance(t, torch.Tensor) else t
                    for t in sample.forward_input.args
                ]
                out = tensors_of(layer(*inputs, **sample.forward_input.kwargs))
                wanted = [t for t in [*inputs, *layer.parameters()] if isinstance(t, torch.Tensor)]
                loss = sum(t.square().sum() for t in out if t.requires_grad)
                gradients = torch.autograd.grad(loss, wanted, allow_unused=True)
            pair.append((out, list(gradients), list(layer.state_dict().values())))
            if sample.reference_fn is not None and dtype is torch.float64:
                plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs]
                if not isinstance(layer, torch.nn.BatchNorm2d):
                    expected = sample.reference_fn(layer, *plain)
                    assert_alike(out[:1], tensors_of(expected)[:1], dtype, sample.desc)
        for ours, theirs in zip(*pair, strict=True):
            assert_alike(ours, theirs, dtype, (info.name, build.args, build.kwargs))
        ran += 1
    assert ran
    support.coverage[f"module_db {info.name}: inputs"] += ran


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("info", list(layer_infos()))
def test_module_error_inputs(info, training):
    if info.module_error_inputs_func is None:
        return  # torch lists none for this layer
    options = {"device": "cpu", "dtype": torch.float32, "requires_grad": False}
    for error in info.module_error_inputs_func(info, training=training, **options):
        sample = error.module_error_input
        build, forward = sample.constructor_input, sample.forward_input

        def attempt(cls, build=build, forward=forward, error=error):
            layer = cls(*build.args, **build.kwargs).train(training)
            if error.error_on is modules.ModuleErrorEnum.FORWARD_ERROR:
                layer(*forward.args, **forward.kwargs)

        _, raised = outcome(attempt, LAYERS[info.name])
        # Some entries hold for training alone: in evaluation torch says another thing, or nothing.
        _, expected = outcome(attempt, info.module_cls)
        assert type(raised) is type(expected), f"{build.args} {build.kwargs}: {raised!r}"
        if expected is None or not re.search(error.error_regex, str(expected)):
            assert not training, f"torch's own {expected!r}"
            continue
        assert isinstance(raised, error.error_type)
        assert re.search(error.error_regex, str(raised)), str(raised)
        support.coverage[f"module_db {info.name}: error inputs"] += 1


def test_the_lists_were_not_empty():
    """Runs last in this file: counts what the tests above have done."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("other workers have done a part of it; the summary at the end has the counts")
    counts = support.coverage
    if not any(key.startswith("op_db") for key in counts):
        pytest.skip("run with the whole file")
    for name in OPERATIONS:
        assert counts[f"op_db {name}: samples, float32"] > 0
    for name in LAYERS:
        assert counts[f"module_db {name}: inputs"] > 0
    for name in OPERATIONS.keys() - {"nn.functional.batch_norm"}:
        assert counts[f"op_db {name}: error inputs"] > 0
    assert counts["module_db nn.BatchNorm2d: error inputs"] > 0
