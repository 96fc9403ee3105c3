"""Bad input: torch's exception type and the offending value; never a crash, never a wrong tensor.

Each case is given to torch.nn.functional first, and the types are compared, so that a new torch
moves the expectation with it. What could end the process runs in one of its own.
"""

import functools
import subprocess

import pytest
import torch
import torch.nn.functional as F

import fastconv
import fastconv.functional as ff
from support import outcome, run_python


def ones(*size, dtype=torch.float32, device="cpu"):
    return torch.ones(size, dtype=dtype, device=device)


IMAGE, FILTER = (2, 4, 6, 5), (6, 4, 3, 3)


def conv(x=IMAGE, w=FILTER, b=None, **options):
    """A call of conv2d: sizes become tensors of ones."""
    x, w, b = (ones(*t) if isinstance(t, tuple) else t for t in (x, w, b))
    return lambda f: f.conv2d(x, w, b, **options)


def pool(name, *args, x=IMAGE, **options):
    x = ones(*x) if isinstance(x, tuple) else x
    return lambda f: getattr(f, name)(x, *args, **options)


def norm(x=IMAGE, mean=4, var=4, weight=None, bias=None, **options):
    tensors = [
        ones(*t) if isinstance(t, tuple) else ones(t) if isinstance(t, int) else t
        for t in (x, mean, var, weight, bias)
    ]
    return lambda f: f.batch_norm(*tensors, **options)


# name: (call, what the message must hold)
CONV = {
    "rank 2 input": (conv(x=(6, 5)), ["6, 5"]),
    "rank 5 input": (conv(x=(1, 2, 4, 6, 5)), ["1, 2, 4, 6, 5"]),
    "rank 0 input": (conv(x=()), []),
    "rank 1 input": (conv(x=(4,)), ["4"]),
    "rank 1 weight": (conv(w=(4,)), ["4"]),
    "rank 2 weight": (conv(w=(6, 4)), ["6, 4"]),
    "rank 3 weight": (conv(w=(6, 4, 3)), ["6, 4, 3"]),
    "rank 5 weight": (conv(w=(6, 4, 3, 3, 3)), ["6, 4, 3, 3, 3"]),
    "rank 2 bias": (conv(b=(6, 1)), ["6, 1"]),
    "rank 0 bias": (conv(b=()), ["6"]),
    "wrong bias size": (conv(b=(5,)), ["5", "6"]),
    "wrong channels": (conv(x=(2, 3, 6, 5)), ["to have 4 channels", "got 3 channels"]),
    "wrong channels, unbatched": (conv(x=(3, 6, 5)), ["4", "3"]),
    "wrong channels with groups": (conv(groups=2), ["groups=2", "8", "4"]),
    "groups do not divide the filters": (
        conv(x=(1, 8, 6, 6), w=(6, 2, 3, 3), groups=4),
        ["groups=4", "6"],
    ),
    "more groups than filters": (conv(x=(1, 8, 6, 6), w=(6, 1, 3, 3), groups=8), ["groups=8"]),
    "groups 0": (conv(groups=0), ["0"]),
    "groups -2": (conv(groups=-2), ["-2"]),
    "stride 0": (conv(stride=0), ["0"]),
    "stride (1, 0)": (conv(stride=(1, 0)), ["1, 0"]),
    "stride -3": (conv(stride=-3), ["-3"]),
    "padding -1": (conv(padding=-1), ["-1"]),
    "padding (0, -2)": (conv(padding=(0, -2)), ["-2"]),
    "dilation 0": (conv(dilation=0), ["0"]),
    "dilation -2": (conv(dilation=(1, -2)), ["-2"]),
    "window larger than the input": (conv(x=(2, 4, 2, 5)), ["2", "3"]),
    "window larger than the padded input": (conv(w=(6, 4, 3, 9), padding=1), ["7", "9"]),
    "dilated window larger than the input": (conv(dilation=(3, 1)), ["6", "7"]),
    "empty input": (conv(x=(2, 4, 0, 5)), ["0"]),
    "empty filter": (conv(w=(6, 4, 0, 3)), ["0"]),
    "no filters": (conv(w=(0, 4, 3, 3)), None),
    "zero channels": (conv(x=(2, 0, 6, 5), w=(6, 0, 3, 3)), None),
    "zero channels in the input alone": (conv(x=(2, 0, 6, 5)), ["4", "0"]),
    "integer input": (conv(x=ones(*IMAGE, dtype=torch.int64)), ["ong"]),
    "float64 weight": (conv(w=ones(*FILTER, dtype=torch.float64)), ["ouble"]),
    "half input": (conv(x=ones(*IMAGE, dtype=torch.float16)), ["alf"]),
    "bfloat16 bias": (conv(b=ones(6, dtype=torch.bfloat16)), ["BFloat16"]),
    "complex bias": (conv(b=ones(6, dtype=torch.complex64)), ["omplex"]),
    "boolean tensors": (
        conv(x=ones(*IMAGE, dtype=torch.bool), w=ones(*FILTER, dtype=torch.bool)),
        ["ool"],
    ),
    "uint8 tensors": (
        conv(x=ones(*IMAGE, dtype=torch.uint8), w=ones(*FILTER, dtype=torch.uint8)),
        None,
    ),
    "weight on meta": (conv(w=ones(*FILTER, device="meta")), None),
    "input on meta": (conv(x=ones(*IMAGE, device="meta")), None),
    "three strides": (conv(stride=(1, 1, 1)), ["1, 1, 1"]),
    "three paddings": (conv(padding=(1, 1, 1)), ["1, 1, 1"]),
    "three dilations": (conv(dilation=(1, 1, 1)), ["1, 1, 1"]),
    "no strides": (conv(stride=()), []),
    "no paddings": (conv(padding=()), []),
    "padding 'SAME'": (conv(padding="SAME"), ["SAME"]),
    "padding 'same' with stride": (conv(padding="same", stride=2), ["2"]),
    "padding 'same' with rank 2": (conv(x=(6, 5), padding="same"), ["6, 5"]),
    "stride None": (conv(stride=None), []),
    "stride 1.5": (conv(stride=1.5), ["1.5"]),
    "stride 'a'": (conv(stride="a"), []),
    "padding None": (conv(padding=None), []),
    "groups 1.5": (conv(groups=1.5), []),
    "groups None": (conv(groups=None), []),
    "list input": (conv(x=[1.0, 2.0]), []),
    "weight None": (lambda f: f.conv2d(ones(*IMAGE), None), []),
    "bias 0": (conv(b=0), []),
    "unknown argument": (conv(padding_mode="zeros"), ["padding_mode"]),
    "sparse input": (conv(x=ones(*IMAGE).to_sparse()), None),
}
BIG = 2**62

POOLS = {}
for _name in ("max_pool2d", "avg_pool2d"):
    POOLS |= {
        f"{_name} window 0": (pool(_name, 0), ["0"]),
        f"{_name} window -2": (pool(_name, -2), ["-2"]),
        f"{_name} window (2, 0)": (pool(_name, (2, 0)), ["2, 0"]),
        f"{_name} window (1, 2, 3)": (pool(_name, (1, 2, 3)), ["1, 2, 3"]),
        f"{_name} window ()": (pool(_name, ()), []),
        f"{_name} window None": (pool(_name, None), []),
        f"{_name} window 2.5": (pool(_name, 2.5), []),
        f"{_name} window larger than input": (pool(_name, 7), ["7"]),
        f"{_name} stride 0": (pool(_name, 2, 0), ["0"]),
        f"{_name} stride -1": (pool(_name, 2, -1), ["-1"]),
        f"{_name} stride (1, 1, 1)": (pool(_name, 2, (1, 1, 1)), ["1, 1, 1"]),
        f"{_name} padding -1": (pool(_name, 2, 2, -1), ["-1"]),
        f"{_name} padding 2": (pool(_name, 3, 1, 2), ["2", "3"]),
        f"{_name} padding (0, 0, 0)": (pool(_name, 3, 1, (0, 0, 0)), ["0, 0, 0"]),
        f"{_name} rank 2": (pool(_name, 2, x=(6, 5)), ["6, 5"]),
        f"{_name} rank 5": (pool(_name, 2, x=(1, 1, 1, 6, 5)), ["1, 1, 1, 6, 5"]),
        f"{_name} no rows": (pool(_name, 2, x=(2, 4, 0, 5)), ["2, 4, 0, 5"]),
        f"{_name} no channels": (pool(_name, 2, x=(2, 0, 6, 5)), ["2, 0, 6, 5"]),
        f"{_name} no channels, unbatched": (pool(_name, 2, x=(0, 6, 5)), ["0, 6, 5"]),
        f"{_name} boolean": (pool(_name, 2, x=ones(*IMAGE, dtype=torch.bool)), ["ool"]),
        f"{_name} complex": (pool(_name, 2, x=ones(*IMAGE, dtype=torch.complex64)), []),
        f"{_name} list": (pool(_name, 2, x=[1.0]), []),
        f"{_name} unknown argument": (pool(_name, 2, padding_mode="x"), ["padding_mode"]),
        f"{_name} window 2^62": (pool(_name, BIG), None),
        f"{_name} stride 2^63": (pool(_name, 2, 2**63), None),
        f"{_name} padding 2^62": (pool(_name, 3, 1, BIG), None),
        f"{_name} sparse": (pool(_name, 2, x=ones(*IMAGE).to_sparse()), None),
    }
POOLS |= {
    "max_pool2d dilation 0": (pool("max_pool2d", 2, 2, 0, 0), ["0"]),
    "max_pool2d dilation -1": (pool("max_pool2d", 2, 2, 0, -1), ["-1"]),
    "max_pool2d dilation (1, 2, 3)": (pool("max_pool2d", 2, 2, 0, (1, 2, 3)), ["1, 2, 3"]),
    "max_pool2d dilated beyond the input": (pool("max_pool2d", 2, 2, 0, 9), []),
    "max_pool2d dilation 2^62": (pool("max_pool2d", 3, 1, 0, BIG), None),
    "avg_pool2d divisor 0": (pool("avg_pool2d", 2, divisor_override=0), ["0"]),
    "avg_pool2d divisor 1.5": (pool("avg_pool2d", 2, divisor_override=1.5), []),
    "avg_pool2d int32": (pool("avg_pool2d", 2, x=ones(*IMAGE, dtype=torch.int32)), []),
    "adaptive size -1": (pool("adaptive_avg_pool2d", (2, -1)), ["-1"]),
    "adaptive three sizes": (pool("adaptive_avg_pool2d", (2, 2, 2)), []),
    "adaptive one size": (pool("adaptive_avg_pool2d", (2,)), []),
    "adaptive no size": (pool("adaptive_avg_pool2d", ()), []),
    "adaptive None": (pool("adaptive_avg_pool2d", None), []),
    "adaptive 1.5": (pool("adaptive_avg_pool2d", 1.5), []),
    "adaptive rank 2": (pool("adaptive_avg_pool2d", 2, x=(6, 5)), []),
    "adaptive rank 5": (pool("adaptive_avg_pool2d", 2, x=(1, 1, 1, 6, 5)), ["1, 1, 1, 6, 5"]),
    "adaptive no rows": (pool("adaptive_avg_pool2d", 2, x=(2, 4, 0, 5)), ["2, 4, 0, 5"]),
    "adaptive integers": (
        pool("adaptive_avg_pool2d", 2, x=ones(*IMAGE, dtype=torch.int64)),
        ["ong"],
    ),
    "adaptive list": (pool("adaptive_avg_pool2d", 2, x=[1.0]), []),
    "adaptive 2^62": (pool("adaptive_avg_pool2d", BIG), None),
}

NORMS = {
    "mean of 3": (norm(mean=3), ["3", "4"]),
    "var of 5": (norm(var=5), ["5", "4"]),
    "weight of 3": (norm(weight=3), ["3", "4"]),
    "bias of 1": (norm(bias=1), ["1", "4"]),
    "mean of 3 in training": (norm(mean=3, training=True), ["3", "4"]),
    "var of 5 in training": (norm(var=5, training=True), ["5", "4"]),
    "weight of 3 in training": (norm(weight=3, training=True), ["3", "4"]),
    "no statistics in evaluation": (norm(mean=None, var=None), []),
    "mean alone in evaluation": (norm(var=None), []),
    "rank 1": (norm(x=(4,)), None),
    "rank 0": (norm(x=()), None),
    "one value": (norm(x=(1, 4, 1, 1), training=True), ["1, 4, 1, 1"]),
    "eps 0 in training": (norm(training=True, eps=0.0), None),
    "eps -1": (norm(eps=-1.0), None),
    "eps -1 in training": (norm(eps=-1.0, training=True), None),
    "eps None": (norm(eps=None), []),
    "momentum None": (norm(momentum=None, training=True), []),
    "momentum 'a'": (norm(momentum="a", training=True), []),
    "integer input": (norm(x=ones(*IMAGE, dtype=torch.int64)), []),
    "integer input in training": (
        norm(x=ones(*IMAGE, dtype=torch.int64), mean=None, var=None, training=True),
        [],
    ),
    "float64 weight": (norm(weight=ones(4, dtype=torch.float64)), ["ouble"]),
    "float64 statistics": (norm(mean=ones(4, dtype=torch.float64)), ["ouble"]),
    "half weight": (norm(weight=ones(4, dtype=torch.float16)), ["alf"]),
    "half weight, float32 bias": (
        norm(
            x=ones(*IMAGE, dtype=torch.float16),
            mean=ones(4, dtype=torch.float16),
            var=ones(4, dtype=torch.float16),
            weight=ones(4, dtype=torch.float16),
            bias=ones(4),
        ),
        None,
    ),
    "weight on meta": (norm(weight=ones(4, device="meta")), None),
    "mean on meta": (norm(mean=ones(4, device="meta")), None),
    "rank 2 weight": (norm(weight=ones(2, 2)), None),
    "list input": (norm(x=[1.0]), []),
    "list weight": (norm(weight=[1.0] * 4), []),
    "number as mean": (norm(mean=ones(4), var="a"), []),
    "unknown argument": (norm(affine=True), ["affine"]),
}


# Where torch lets a mistake pass, or refuses it by an accident of Python: what we may say instead.
STRICTER = {
    "weight on meta": RuntimeError,  # torch answers with a tensor on meta, which holds no numbers
    "input on meta": RuntimeError,
    "zero channels": RuntimeError,  # torch loses the bias and gives as many channels as went in: 0
    "adaptive list": TypeError,  # torch: AttributeError, 'list' object has no attribute 'size'
}


def same_as_torch(call, expected_values, name):
    """Same exception type as torch's and the values in the message, or the same result."""
    theirs, expected = outcome(call, F)
    ours, error = outcome(call, ff)
    if name in STRICTER and type(error) is STRICTER[name]:
        return
    assert type(error) is type(expected), f"{error!r}\ntorch's: {expected!r}"
    if expected is None:
        torch.testing.assert_close(ours, theirs, equal_nan=True)
        return
    for value in expected_values or []:
        assert value in str(error), f"{value!r} is not in: {error}\ntorch's: {expected}"


@pytest.mark.parametrize("name", CONV)
def test_conv2d(name):
    same_as_torch(*CONV[name], name)


@pytest.mark.parametrize("name", POOLS)
def test_pooling(name):
    same_as_torch(*POOLS[name], name)


@pytest.mark.parametrize("name", NORMS)
def test_batch_norm(name):
    same_as_torch(*NORMS[name], name)


@pytest.mark.parametrize("name", [n for n in CONV if n not in ("sparse input", "boolean tensors")])
def test_conv2d_where_gradients_are_asked_for(name):
    """The checks stand before the graph is built."""
    call, values = CONV[name]
    with torch.enable_grad():
        same_as_torch(lambda f: call(_WithGradients(f)), values, name)


class _WithGradients:
    def __init__(self, module):
        self._module = module

    def conv2d(self, *tensors, **options):
        leaves = [
            t.detach().requires_grad_()
            if isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex())
            else t
            for t in tensors
        ]
        return self._module.conv2d(*leaves, **options).detach()


CODE = """
    import resource
    import torch
    import {module} as f
    # An absurd size must fail for its own sake, not eat the machine first.
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + (2 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    x, w = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 3, 3)
    for call in {calls}:
        try:
            out = eval("f." + call)
            print("result", tuple(out.shape), out.sum().item(), flush=True)
        except Exception as error:
            print(type(error).__name__, str(error).splitlines()[0], flush=True)
"""
# What exceeds a machine's memory or 63 bits: the exception alone, in a process of its own.
ABSURD = {
    "conv2d padding 2^62": "conv2d(x, w, padding=2**62)",
    "conv2d padding 2^63 - 1": "conv2d(x, w, padding=2**63 - 1)",
    "conv2d padding 2^40": "conv2d(x, w, padding=2**40)",
    "conv2d padding 2^30": "conv2d(x, w, padding=2**30)",
    "conv2d padding 2^31": "conv2d(x, w, padding=(2**31, 0), stride=(2**33, 1))",
    "conv2d padding 2^19": "conv2d(x, w, padding=2**19)",
    "conv2d dilation 2^62": "conv2d(x, w, dilation=2**62)",
    "conv2d dilation 2^63 - 1": "conv2d(x, w, dilation=2**63 - 1, padding=2**61)",
    "conv2d groups 2^62": "conv2d(x, w, groups=2**62)",
    "conv2d groups 2^61": "conv2d(x, w.expand(2**61, 1, 3, 3), groups=2**61)",
    "conv2d stride 2^63": "conv2d(x, w, stride=2**63)",
    "conv2d stride 2^62": "conv2d(x, w, stride=2**62)",
    "conv2d expanded batch": "conv2d(x.expand(2**40, 1, 4, 4), w)",
    "conv2d expanded filters": "conv2d(x, w.expand(2**38, 1, 3, 3))",
    "max_pool2d window 2^62": "max_pool2d(x, 2**62, 1, 2**61)",
    "max_pool2d padding 2^62": "max_pool2d(x, 2**62, 1, 2**62)",
    "max_pool2d padding 2^30": "max_pool2d(x, 2**31, 1, 2**30)",
    "max_pool2d dilation 2^62": "max_pool2d(x, 2, 1, 0, 2**62)",
    "max_pool2d stride 2^63": "max_pool2d(x, 2, 2**63)",
    "max_pool2d stride 2^62": "max_pool2d(x, 2, 2**62, ceil_mode=True)",
    "max_pool2d expanded batch": "max_pool2d(x.expand(2**40, 1, 4, 4), 2)",
    "avg_pool2d window 2^62": "avg_pool2d(x, 2**62, 1, 2**61)",
    "avg_pool2d padding 2^30": "avg_pool2d(x, 2**31, 1, 2**30)",
    "avg_pool2d divisor 2^63": "avg_pool2d(x, 2, divisor_override=2**63)",
    "adaptive_avg_pool2d 2^62": "adaptive_avg_pool2d(x, 2**62)",
    "adaptive_avg_pool2d 2^30": "adaptive_avg_pool2d(x, 2**30)",
    "adaptive_avg_pool2d 2^31 by 1": "adaptive_avg_pool2d(x, (2**40, 1))",
    "batch_norm expanded": "batch_norm(x.expand(2**40, 1, 4, 4), None, None, training=True)",
}


# Shape and sum of all elements where torch says "value cannot be converted to type int".
WIDE_RESULTS = {
    "max_pool2d window 2^62": "(1, 1, 5, 5) 25.0",
    "max_pool2d padding 2^30": "(1, 1, 5, 5) 25.0",
    "max_pool2d stride 2^62": "(1, 1, 1, 1) 1.0",
    "avg_pool2d window 2^62": f"(1, 1, 5, 5) {25 * 16 / 2.0**124}",  # or refused: 2^124 elements
    "avg_pool2d padding 2^30": f"(1, 1, 5, 5) {25 * 16 / 2.0**62}",
}


@functools.cache
def absurd_outcomes(module):
    """Each call's outcome by name, from as few processes as do not end before their time."""
    names, lines = list(ABSURD), []
    while len(lines) < len(names):
        calls = [ABSURD[name] for name in names[len(lines) :]]
        code = CODE.replace("{module}", module).replace("{calls}", repr(calls))
        try:
            done = run_python(code, timeout=30)
            text, end = done.stdout, f"ended the process with {done.returncode}"
        except subprocess.TimeoutExpired as late:
            text, end = (late.stdout or b"").decode(), "ended after 30 seconds"
        lines += text.splitlines()
        if len(lines) < len(names):
            lines.append(end)
    return dict(zip(names, lines, strict=True))


@pytest.mark.parametrize("name", ABSURD)
def test_absurd_sizes(name):
    """torch's outcome at once; where torch crashes or wraps around, a RuntimeError or a result."""
    ours = absurd_outcomes("fastconv.functional")[name]
    theirs = absurd_outcomes("torch.nn.functional")[name]
    kind, torchs = ours.split()[0], theirs.split()[0]
    assert kind != "ended", ours
    if kind == "result":
        # Ours counts with 64 bits where some of torch's kernels take 32: no error, but right.
        expected = theirs if torchs == "result" else f"result {WIDE_RESULTS.get(name)}"
        assert ours == expected, f"{ours}\ntorch's: {theirs}"
    elif torchs in ("ended", "result"):
        assert kind == "RuntimeError", f"{ours}\ntorch's: {theirs}"
    else:
        assert kind == torchs, f"{ours}\ntorch's: {theirs}"


CRASHES_TORCH = """
    import torch, fastconv.functional as f
    x = torch.randn(1, 4, 4, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.randn(16, 2, 1, 1).contiguous(memory_format=torch.channels_last).requires_grad_()
    out = f.conv2d(x, w, None, (1, 2), (1, 1), (2, 3), 2)
    out.sum().backward()
    print(tuple(out.shape), bool(x.grad.isfinite().all()), bool(w.grad.isfinite().all()))
"""


def test_a_valid_problem_that_ends_torchs_process():
    done = run_python(CRASHES_TORCH)
    assert done.stdout.strip() == "(1, 16, 6, 2) True True", done.stderr


# the layers

LAYERS = {
    "groups that do not divide in_channels": (lambda n: n.Conv2d(3, 4, 3, groups=2), ["groups"]),
    "groups that do not divide out_channels": (lambda n: n.Conv2d(4, 3, 3, groups=2), ["groups"]),
    "groups 0": (lambda n: n.Conv2d(4, 4, 3, groups=0), []),
    "padding mode": (lambda n: n.Conv2d(1, 1, 3, padding_mode="mirror"), ["mirror"]),
    "padding word": (lambda n: n.Conv2d(1, 1, 3, padding="SAME"), ["SAME"]),
    "'same' with stride": (lambda n: n.Conv2d(1, 1, 3, stride=2, padding="same"), []),
    "negative channels": (lambda n: n.Conv2d(-1, 1, 3), ["-"]),
    "kernel size None": (lambda n: n.Conv2d(1, 1, None), []),
    "kernel size 'a'": (lambda n: n.Conv2d(1, 1, "a"), []),
    "no arguments": (lambda n: n.Conv2d(), []),
    "unknown argument": (lambda n: n.Conv2d(1, 1, 3, activation="relu"), ["activation"]),
    "rank 2 input": (lambda n: n.Conv2d(1, 1, 3)(ones(6, 6)), ["6, 6"]),
    "wrong channels": (lambda n: n.Conv2d(2, 1, 3)(ones(1, 3, 6, 6)), ["2", "3"]),
    "reflection beyond the input": (
        lambda n: n.Conv2d(1, 1, 3, padding=6, padding_mode="reflect")(ones(1, 1, 5, 5)),
        ["6"],
    ),
    "circular beyond the input": (
        lambda n: n.Conv2d(1, 1, 3, padding=7, padding_mode="circular")(ones(1, 1, 5, 5)),
        [],
    ),
    "three kernel sizes": (lambda n: n.Conv2d(1, 1, (3, 3, 3))(ones(1, 1, 5, 5)), []),
    "max pool without a size": (lambda n: n.MaxPool2d(), []),
    "max pool padding": (lambda n: n.MaxPool2d(2, padding=2)(ones(1, 1, 5, 5)), ["2"]),
    "avg pool divisor": (lambda n: n.AvgPool2d(2, divisor_override=0)(ones(1, 1, 5, 5)), []),
    "adaptive sizes": (lambda n: n.AdaptiveAvgPool2d((1, 2, 3))(ones(1, 1, 5, 5)), []),
    "batch norm rank 3": (lambda n: n.BatchNorm2d(3)(ones(2, 3, 4)), ["3D"]),
    "batch norm channels": (lambda n: n.BatchNorm2d(3)(ones(2, 4, 4, 4)), ["3", "4"]),
    "batch norm channels in eval": (lambda n: n.BatchNorm2d(3).eval()(ones(2, 4, 4, 4)), ["3"]),
    "batch norm one value": (lambda n: n.BatchNorm2d(3)(ones(1, 3, 1, 1)), ["1, 3, 1, 1"]),
    "batch norm dtype": (
        lambda n: n.BatchNorm2d(3).double()(ones(2, 3, 4, 4)),
        ["ouble"],
    ),
    "batch norm -1 features": (lambda n: n.BatchNorm2d(-1), []),
    "state_dict of another size": (
        lambda n: n.Conv2d(1, 2, 3).load_state_dict(n.Conv2d(1, 3, 3).state_dict()),
        ["3, 1, 3, 3", "2, 1, 3, 3"],
    ),
    "state_dict with a missing key": (
        lambda n: n.BatchNorm2d(2).load_state_dict({"weight": ones(2)}),
        ["running_mean"],
    ),
}


class _Namespace:
    """torch.nn's names: ours, or torch's own."""

    def __init__(self, module):
        for name in ("Conv2d", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "BatchNorm2d"):
            setattr(self, name, getattr(module, name))


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name):
    call, values = LAYERS[name]
    _, expected = outcome(call, _Namespace(torch.nn))
    _, error = outcome(call, _Namespace(fastconv))
    assert expected is not None or values == [], "torch takes it: no case for this list"
    assert type(error) is type(expected), f"{error!r}\ntorch's: {expected!r}"
    for value in values if expected is not None else []:
        assert value in str(error), f"{value!r} is not in: {error}\ntorch's: {expected}"


def fused(x=IMAGE, w=FILTER, bias=None, mean=6, var=6, gamma=None, beta=None, **options):
    tensors = [
        ones(*t) if isinstance(t, tuple) else ones(t) if isinstance(t, int) else t
        for t in (x, w, bias, mean, var, gamma, beta)
    ]
    return lambda: ff.conv_bn_relu(*tensors, **options)


FUSED = {
    "activation": (fused(activation="gelu"), ValueError, ["gelu", "relu"]),
    "residual of another size": (fused(residual=ones(2, 6, 4, 4)), RuntimeError, ["2, 6, 4, 3"]),
    "residual of another dtype": (
        fused(residual=ones(2, 6, 4, 3, dtype=torch.float64)),
        RuntimeError,
        ["ouble"],
    ),
    "residual that would broadcast": (fused(residual=ones(6, 1, 1)), RuntimeError, ["6, 1, 1"]),
    "residual on meta": (
        fused(residual=ones(2, 6, 4, 3, device="meta")),
        RuntimeError,
        ["meta"],
    ),
    "mean of 4": (fused(mean=4), RuntimeError, ["4", "6"]),
    "weight of 4": (fused(gamma=4), RuntimeError, ["4", "6"]),
    "channels": (fused(x=(2, 3, 6, 5)), RuntimeError, ["3", "4"]),
    "stride 0": (fused(stride=0), RuntimeError, ["0"]),
    "dtype": (fused(w=ones(*FILTER, dtype=torch.float64)), RuntimeError, ["ouble"]),
    "number as residual": (fused(residual=1.0), TypeError, ["residual"]),
}


@pytest.mark.parametrize("name", FUSED)
def test_conv_bn_relu(name):
    call, kind, values = FUSED[name]
    with pytest.raises(kind) as caught:
        call()
    for value in values:
        assert value in str(caught.value), f"{value!r} is not in: {caught.value}"


TRAINING_FUSED = ("activation", "residual of another size", "channels", "stride 0", "weight of 4")


@pytest.mark.parametrize("name", TRAINING_FUSED)
def test_conv_bn_relu_in_training(name):
    options = {
        "activation": {"activation": "gelu"},
        "residual of another size": {"residual": ones(2, 6, 4, 4)},
        "channels": {"x": (2, 3, 6, 5)},
        "stride 0": {"stride": 0},
        "weight of 4": {"gamma": 4},
    }[name]
    _, kind, values = FUSED[name]
    statistics = [torch.zeros(6), torch.ones(6)]
    with pytest.raises(kind) as caught:
        fused(mean=statistics[0], var=statistics[1], training=True, **options)()
    for value in values:
        assert value in str(caught.value), f"{value!r} is not in: {caught.value}"
    # A refused call leaves no trace in the running statistics.
    assert torch.equal(statistics[0], torch.zeros(6)) and torch.equal(statistics[1], torch.ones(6))


def test_a_refused_training_step_leaves_the_statistics_alone():
    layer = fastconv.BatchNorm2d(3)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for bad in (ones(2, 4, 4, 4), ones(2, 3, 4, 4, dtype=torch.float64), ones(2, 3, 4)):
        with pytest.raises((RuntimeError, ValueError)):
            layer(bad)
    for key in ("running_mean", "running_var"):
        assert torch.equal(before[key], layer.state_dict()[key])


def test_backward_refuses_a_gradient_of_another_size():
    x = ones(1, 2, 5, 5).requires_grad_()
    for function in (
        lambda f: f.conv2d(x, ones(3, 2, 3, 3)),
        lambda f: f.max_pool2d(x, 2),
        lambda f: f.avg_pool2d(x, 2),
        lambda f: f.adaptive_avg_pool2d(x, 2),
        lambda f: f.batch_norm(x, None, None, training=True),
    ):
        _, expected = outcome(lambda g=function: g(F).backward(ones(1, 1, 2, 2)))
        _, error = outcome(lambda g=function: g(ff).backward(ones(1, 1, 2, 2)))
        assert type(error) is type(expected), f"{error!r}, torch's {expected!r}"
