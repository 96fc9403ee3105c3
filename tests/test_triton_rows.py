"""The Triton kernels as rows of the kernel table: what Python is told of a call, when the rows are
open, and how errors arrive. What the kernels compute is tested with all other rows."""

import ctypes
import os
import sys
import threading

import pytest
import torch

import fastconv
import fastconv.functional as ff
import support
from fastconv import _extension, triton_kernels
from fastconv.triton_kernels import problem
from support import FORMATS

ROWS = [row for row in fastconv.kernels() if row.backend == "triton"]


# What Python is told


def test_fields_are_those_of_the_tuples():
    fields = _extension.load().triton_fields()
    for op, kind in (
        ("conv2d", problem.Conv2dProblem),
        ("pool2d", problem.Pool2dProblem),
        ("batch_norm", problem.BatchNormProblem),
    ):
        assert fields[op][0] == list(kind._fields)
    assert set(fields) == {"conv2d", "pool2d", "batch_norm"}


def test_the_two_halves_of_the_table_agree():
    pytest.importorskip("triton", minversion="3.6")
    from fastconv.triton_kernels import table

    assert sorted(table.ROWS) == sorted(row.name for row in ROWS)


class Call:
    """What a launch was handed, with its names."""

    def __init__(self, row, fields, pointers, device):
        family = "batch_norm" if row.startswith("batch_norm") else "conv2d"
        family = "pool2d" if "_pool2d" in row else family
        problem_fields, pointer_names = _extension.load().triton_fields()[family]
        self.row, self.device = row, device
        self.problem = dict(zip(problem_fields, fields, strict=True))
        self.pointers = dict(zip(pointer_names, pointers, strict=True))
        self.given = {name for name, address in self.pointers.items() if address}


@pytest.fixture
def launches():
    """``launches(function)`` makes function the one that the extension calls, on CPU tensors."""
    extension = _extension.load()

    def replace(function):
        extension.register_triton(function, triton_kernels.gpu_properties)
        extension.set_triton_interpreted(True)

    yield replace
    triton_kernels.register(extension)


@pytest.fixture
def log(launches):
    calls = []
    launches(lambda *arguments: calls.append(Call(*arguments)))
    return calls


class forced:
    """fastconv.kernel(name), or fastconv.backend("triton"), without loading Triton."""

    def __init__(self, name=None):
        self.selection = (None, name, True, "fast") if name else ("triton", None, True, "fast")

    def __enter__(self):
        self.before = _extension.load().get_selection()
        _extension.load().set_selection(*self.selection)

    def __exit__(self, *exception):
        _extension.load().set_selection(*self.before)


def conv_tensors(layout="NCHW", dtype=torch.float32):
    x, w = torch.randn(2, 8, 7, 6, dtype=dtype), torch.randn(4, 4, 3, 2, dtype=dtype)
    return [t.contiguous(memory_format=FORMATS[layout]) for t in (x, w)]


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", support.DTYPES, ids=support.name_of)
def test_convolution(log, layout, dtype):
    x, w = conv_tensors(layout, dtype)
    b = torch.randn(4, dtype=dtype)
    with forced("conv2d_igemm_triton_fprop"):
        out = ff.conv2d(x, w, b, (2, 1), (1, 0), (1, 2), 2)
    (call,) = log
    assert call.row == "conv2d_igemm_triton_fprop" and call.device == -1
    assert call.problem == {
        "N": 2, "C": 8, "H": 7, "W": 6, "K": 4, "R": 3, "S": 2, "stride_h": 2, "stride_w": 1,
        "pad_h": 1, "pad_w": 0, "dil_h": 1, "dil_w": 2, "G": 2, "dtype": support.name_of(dtype),
        "layout": layout, "filter_layout": layout, "tf32": False, "scale": False, "shift": True,
        "residual": False, "activation": "none", "slope": 0.01, "statistics": False,
        "aligned": True,
    }  # fmt: skip
    assert call.given == {"input", "filter", "shift", "out"}
    addresses = (x.data_ptr(), w.data_ptr(), out.data_ptr())
    assert tuple(call.pointers[name] for name in ("input", "filter", "out")) == addresses


def test_gradients_of_a_convolution(log):
    x, w = (t.requires_grad_() for t in conv_tensors())
    b = torch.randn(4, requires_grad=True)
    with forced():
        out = ff.conv2d(x, w, b, groups=2)
    out.sum().backward()
    assert [(c.row, c.given) for c in log] == [
        ("conv2d_igemm_triton_fprop", {"input", "filter", "shift", "out"}),
        ("conv2d_igemm_triton_dgrad", {"grad", "filter", "out"}),
        ("conv2d_igemm_triton_wgrad", {"grad", "input", "out"}),
        ("conv2d_triton_bgrad", {"grad", "out"}),
    ]


def test_an_epilogue(log):
    x, w = conv_tensors("NHWC")
    mean, var = torch.zeros(4), torch.ones(4)
    z = torch.randn(2, 4, 5, 5)
    with forced(), torch.no_grad():
        ff.conv_bn_relu(
            x, w, None, mean, var, None, None, residual=z, groups=2, activation="leaky_relu"
        )
    (call,) = log
    said = {name: call.problem[name] for name in ("scale", "shift", "residual", "activation")}
    assert said == {"scale": True, "shift": True, "residual": True, "activation": "leaky_relu"}
    assert call.given == {"input", "filter", "scale", "shift", "residual", "out"}


def test_unaligned_pointers_are_said_to_be(log):
    x, w = conv_tensors()
    shifted = torch.empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    with forced():
        ff.conv2d(x, w, groups=2)
        ff.conv2d(shifted, w, groups=2)
    assert [call.problem["aligned"] for call in log] == [True, False]


def test_pooling(log):
    x = torch.randn(2, 3, 9, 8, requires_grad=True)
    with forced():
        with torch.no_grad():
            ff.max_pool2d(x, 3, 2, 1)
        ff.max_pool2d(x, 3, 2, 1, ceil_mode=True, return_indices=True)
        ff.max_pool2d(x, (17, 16), 1, (8, 8)).sum().backward()
        ff.avg_pool2d(x, 2, divisor_override=3, count_include_pad=False).sum().backward()
        ff.adaptive_avg_pool2d(x, (3, 2)).sum().backward()
    rows = ["max_pool2d", "max_pool2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"]
    fprops = [call for call in log if call.row.endswith("fprop")]
    assert [call.row for call in fprops] == [f"{row}_triton_fprop" for row in rows]
    assert [call.problem["index"] for call in fprops] == ["none", "int64", "int32", "none", "none"]
    kinds = ["max", "max", "max", "average", "adaptive_average"]
    assert [call.problem["kind"] for call in fprops] == kinds
    assert [call.problem["Q"] for call in fprops] == [4, 5, 9, 4, 2]
    assert fprops[3].problem["divisor_override"] == 3
    assert fprops[3].problem["count_include_pad"] is False
    dgrads = [call for call in log if call.row.endswith("dgrad")]
    assert [call.row for call in dgrads] == [f"{row}_triton_dgrad" for row in rows[2:]]
    assert [call.given for call in dgrads] == [{"grad", "index_in", "out"}] + 2 * [{"grad", "out"}]


def test_batch_norm(log):
    x = torch.randn(3, 4, 5, 5, requires_grad=True)
    w, running = torch.randn(4), (torch.zeros(4), torch.ones(4))
    with forced():
        ff.batch_norm(x, *running, w, None, eps=0.5)
        out = ff.batch_norm(x.detach(), *running, w.requires_grad_(), w.detach(), training=True)
        out.sum().backward()
    inference, training, backward = log
    assert inference.row == training.row == "batch_norm_triton_fprop"
    assert inference.given == {"input", "weight", "mean_in", "var_in", "out"}
    assert inference.problem["eps"] == 0.5 and not inference.problem["training"]
    assert inference.problem["weight"] and not inference.problem["bias"]
    assert training.given == {"input", "weight", "bias", "mean_out", "var_out", "out"}
    assert backward.row == "batch_norm_triton_dgrad" and not backward.problem["out"]
    given = {"input", "grad", "weight", "mean_in", "var_in", "grad_weight", "grad_bias"}
    assert backward.given == given


def test_batch_norm_with_what_follows(log):
    x, residual = (torch.randn(3, 4, 5, 5, requires_grad=True) for _ in range(2))
    with forced():
        for activation in ("relu", "silu"):
            out = ff.batch_norm_relu(
                x, None, None, training=True, residual=residual, activation=activation
            )
            out.sum().backward()
    relu, relu_backward, silu, silu_backward = log
    assert [call.problem["activation"] for call in log] == ["relu"] * 2 + ["silu"] * 2
    assert relu.given == silu.given == {"input", "residual", "mean_out", "var_out", "out"}
    given = {"input", "grad", "mean_in", "var_in", "grad_weight", "grad_bias", "out"}
    assert relu_backward.given >= given | {"grad_residual"}
    assert silu_backward.given == given | {"residual", "grad_residual"}
    for call in log:
        for name in ("weight", "bias", "residual", "output", "out", "grad_residual"):
            assert call.problem[name] == (name in call.given), (call.row, name)


def test_nothing_empty_is_launched(log):
    x, w = torch.randn(0, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)
    with forced():
        out = ff.avg_pool2d(ff.max_pool2d(ff.conv2d(x, w), 2), 1)
        ff.batch_norm(out, None, None, training=True).sum().backward()
    assert log == []


# When the rows are open


def test_they_never_run_unasked_on_a_cpu(log):
    x, w = conv_tensors()
    ff.max_pool2d(ff.conv2d(x, w, groups=2), 2)
    # Another operation's row is asked for, not these.
    with forced("batch_norm_triton_fprop"):
        ff.conv2d(x, w, groups=2)
        with forced("conv2d_igemm_triton_dgrad"):
            assert "triton" not in fastconv.explain(x, w, groups=2).kernel
    assert log == []
    reasons = {c.name: c.reason for c in fastconv.explain(x, w, groups=2).candidates}
    assert reasons["conv2d_igemm_triton_fprop"] == "runs only when asked for"


def test_rows_say_what_they_do_not_take(log):
    x, w = conv_tensors()
    with forced():
        reasons = {c.name: c.reason for c in fastconv.explain(x, w, groups=2).candidates}
        assert reasons["conv2d_depthwise_triton_fprop"] == "C / groups 4, not 1"
        assert reasons["conv1x1_triton_fprop"] == "filter 3x2, not 1x1"
        assert reasons["conv1x1_tma_triton_sm90_fprop"] == "layout NCHW"
        point = torch.randn(4, 8, 1, 1)

        def refused(input, *args, **options):
            found = fastconv.explain(input, point, *args, **options).candidates
            return {c.name: c.reason for c in found}

        assert refused(x, padding=1)["conv1x1_triton_fprop"] == "padding 1, not 0"
        assert refused(x, stride=2)["conv1x1_triton_fprop"] is None
        strided = refused(x, stride=2, direction="dgrad")
        assert strided["conv1x1_triton_dgrad"] == "stride 2, not 1"
        nhwc = x.to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
        point = torch.randn(4, 8, 1, 1, dtype=torch.bfloat16)
        reason = refused(nhwc)["conv1x1_tma_triton_sm90_fprop"]
        assert reason == "K 4, not of 16 bytes' multiple"
        point = torch.randn(16, 8, 1, 1, dtype=torch.bfloat16)
        assert refused(nhwc)["conv1x1_tma_triton_sm90_fprop"] is None
        point = point.double()
        double = refused(nhwc.double())["conv1x1_tma_triton_sm90_fprop"]
        assert double == "dtype float64"


def test_sizes_beyond_int_are_refused(log):
    one = torch.empty(1, 1, 1, 1)
    with forced():
        text = fastconv.explain(one.expand(1, 1, 2**31, 1), one)
    assert text.kernel == "aten"
    reasons = {c.name: c.reason for c in text.candidates}
    assert reasons["conv2d_igemm_triton_fprop"].startswith("padded height 2147483")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter is on")
def test_cpu_tensors_are_refused_with_a_reason():
    reasons = {c.name: c.reason for c in fastconv.explain(*conv_tensors(), groups=2).candidates}
    expected = "runs on CUDA tensors, and on CPU tensors where TRITON_INTERPRET=1"
    if triton_kernels.version() is None:
        expected = "Triton is not installed (pip install triton)"
    assert reasons["conv2d_igemm_triton_fprop"] == expected


# Launching


def test_errors_arrive_as_themselves(launches):
    error = KeyError("said by the launch")

    def fail(*arguments):
        raise error

    launches(fail)
    x, w = conv_tensors()
    with forced(), pytest.raises(KeyError) as caught:
        ff.conv2d(x, w, groups=2)
    assert caught.value is error
    assert any(entry.name == "fail" for entry in caught.traceback)


def test_an_interrupt_passes(launches):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    launches(interrupt)
    x, w = conv_tensors()
    with forced(), pytest.raises(KeyboardInterrupt):
        ff.conv2d(x, w, groups=2)


def test_errors_of_backward_arrive_too(launches):
    def fail_in_backward(row, *arguments):
        if row.endswith("wgrad"):
            raise LookupError(threading.get_ident())

    launches(fail_in_backward)
    x, w = conv_tensors()
    w.requires_grad_()
    with forced():
        out = ff.conv2d(x, w, groups=2)
    seen = []

    def work():
        seen.append(support.outcome(out.sum().backward)[1])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(seen[0], LookupError)
    assert isinstance(support.outcome(out.sum().backward)[1], LookupError)


def test_errors_arrive_from_the_threads_of_autograd(launches):
    """Backward inside backward, deeper than the engine does on one thread (60 levels)."""
    threads = set()

    def fail_in_backward(row, *arguments):
        if row.endswith("wgrad"):
            threads.add(threading.get_ident())
            raise LookupError("deep")

    launches(fail_in_backward)
    x, w = conv_tensors()
    w.requires_grad_()
    with forced():
        innermost = ff.conv2d(x, w, groups=2).sum()

    class Nested(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t, level):
            ctx.level = level
            return t * 1

        @staticmethod
        def backward(ctx, grad):
            if ctx.level == 0:
                innermost.backward()
            else:
                nested(ctx.level - 1)
            return grad, None

    def nested(level):
        with torch.enable_grad():
            Nested.apply(torch.ones(1, requires_grad=True), level).backward()

    with pytest.raises(LookupError, match="deep"):
        nested(70)
    assert threads and threading.get_ident() not in threads


def test_nothing_is_kept_of_a_call(launches):
    seen = []
    launches(lambda *arguments: seen.append(arguments))
    x, w = conv_tensors()
    with forced():
        ff.conv2d(x, w, groups=2)
    _, fields, pointers, _ = seen.pop()
    counts = [sys.getrefcount(fields), sys.getrefcount(pointers)]
    assert counts == [2, 2]  # the name here, and getrefcount's own


# Statistics of BatchNorm from the convolution's epilogue


def conv_bn(x, w, bn_weight=None, bn_bias=None, **options):
    running = x.new_zeros(w.shape[0]), x.new_ones(w.shape[0])
    out = ff.conv_bn_relu(x, w, None, *running, bn_weight, bn_bias, training=True, **options)
    return out, *running


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", support.DTYPES, ids=support.name_of)
def test_a_row_of_statistics_serves_training(launches, layout, dtype):
    """A function stands in for its kernel; the rest is what the two operators give."""
    x, w = conv_tensors(layout, dtype)
    parameters = [torch.randn(4, dtype=dtype) for _ in range(2)]
    y = ff.conv2d(x, w, groups=2)
    wide = y.to(torch.promote_types(dtype, torch.float32))
    calls = []

    def fill(row, fields, pointers, device):
        call = Call(row, fields, pointers, device)
        calls.append(call)
        for name, values in (
            ("out", y.contiguous(memory_format=FORMATS[layout])),
            ("mean_out", wide.mean((0, 2, 3))),
            ("var_out", wide.var((0, 2, 3), unbiased=False)),
        ):
            ctypes.memmove(call.pointers[name], values.data_ptr(), values.nbytes)

    launches(fill)
    tensors = [t.requires_grad_() for t in (x, w, *parameters)]
    expected = conv_bn(*tensors, groups=2)
    assert not calls
    with forced("conv2d_igemm_triton_statistics"):
        got = conv_bn(*tensors, groups=2)
    (call,) = calls
    assert call.row == "conv2d_igemm_triton_statistics" and call.problem["statistics"]
    assert call.given == {"input", "filter", "out", "mean_out", "var_out"}
    grad = torch.randn_like(got[0])
    gradients = (torch.autograd.grad(out[0], tensors, grad) for out in (got, expected))
    for a, b in zip((*got, *next(gradients)), (*expected, *next(gradients)), strict=True):
        torch.testing.assert_close(a, b)


def test_a_row_of_statistics_that_cannot_run_says_why(log):
    x, w = conv_tensors()
    with forced("conv1x1_triton_statistics"), pytest.raises(RuntimeError, match="filter 3x2"):
        conv_bn(x, w, groups=2)


def test_a_forced_convolution_is_not_replaced(log):
    """By the row that would leave the statistics too."""
    x, w = conv_tensors()
    with forced("conv2d_igemm_triton_fprop"):
        conv_bn(x, w, groups=2)
    assert [call.row for call in log] == ["conv2d_igemm_triton_fprop"]


def test_a_forced_backend_takes_its_row_of_statistics(log):
    x, w = torch.randn(8, 64, 28, 28), torch.randn(64, 64, 3, 3)
    with forced():
        conv_bn(x, w, padding=1)
        conv_bn(x[:0], w, padding=1)
    rows = ["conv2d_igemm_triton_statistics", "batch_norm_triton_fprop"]
    assert [call.row for call in log] == rows
    assert not log[1].problem["training"]
