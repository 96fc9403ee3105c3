"""The kernel table, the choice and the ways to force it."""

import threading

import pytest
import torch

import fastconv
import fastconv.functional as ff
import support
from fastconv import triton_kernels
from fastconv.benchmarking.shapes import CONV_EDGES
from support import DTYPES, FORMATS

OWN = [b for b in support.backends() if b.name != "aten"]


def tensors(layout="NCHW", dtype=torch.float32, device="cpu", requires_grad=False):
    x, w = torch.randn(2, 4, 6, 6), torch.randn(8, 4, 3, 3)
    return [
        t.to(device, dtype).contiguous(memory_format=FORMATS[layout]).requires_grad_(requires_grad)
        for t in (x, w)
    ]


def test_the_table_has_unique_names_and_known_columns():
    table = fastconv.kernels()
    assert len({row.name for row in table}) == len(table) > 0
    for row in table:
        assert row.op in (
            "conv2d", "conv2d_max_pool2d", "conv2d_statistics", "max_pool2d", "avg_pool2d",
            "adaptive_avg_pool2d", "batch_norm",
        )  # fmt: skip
        assert row.direction in ("fprop", "dgrad", "wgrad", "bgrad")
        assert row.backend in ("cuda", "triton", "cpu", "emulator")
        assert row.arch in ("portable", "avx2", "avx512") or row.arch.startswith("sm_")
        assert row.dtypes and set(row.dtypes) <= set(DTYPES)
        assert row.layouts and set(row.layouts) <= set(FORMATS)
        convolves = row.op in ("conv2d", "conv2d_statistics")
        assert row.name.startswith(("conv2d_", "conv1x1_") if convolves else row.op)
        assert (row.op.rsplit("_", 1)[-1] if "statistics" in row.op else row.direction) in (
            row.name.split("_")
        )


def test_every_operation_and_direction_ends_in_a_general_row():
    table = [row for row in fastconv.kernels() if row.backend == "cpu"]
    for op, directions in {
        "conv2d": ("fprop", "dgrad", "wgrad", "bgrad"),
        "max_pool2d": ("fprop", "dgrad"),
        "avg_pool2d": ("fprop", "dgrad"),
        "adaptive_avg_pool2d": ("fprop", "dgrad"),
        "batch_norm": ("fprop", "dgrad"),
    }.items():
        for direction in directions:
            rows = [r for r in table if (r.op, r.direction) == (op, direction)]
            assert rows, f"{op} {direction}"
            last = rows[-1]
            assert last.arch == "portable"
            assert set(last.dtypes) == set(DTYPES) and set(last.layouts) == set(FORMATS)


@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad", "bgrad"])
@pytest.mark.parametrize("layout", FORMATS)
def test_explain_names_the_row_and_a_reason_for_each_other(direction, layout):
    text = fastconv.explain(*tensors(layout), None, 1, 1, direction=direction)
    rows = [r for r in fastconv.kernels() if (r.op, r.direction) == ("conv2d", direction)]
    assert isinstance(text, str) and text.kernel in text
    assert [c.name for c in text.candidates] == [r.name for r in rows]
    for candidate in text.candidates:
        assert candidate.name in text
        if candidate.name == text.kernel:
            assert candidate.reason is None
        else:
            line = next(line for line in text.splitlines() if candidate.name in line)
            said = line.split(candidate.name, 1)[1].strip(" :")
            assert said, f"nothing is said of {candidate.name}"
            if candidate.reason is not None:
                assert candidate.reason in said
    chosen = next(r for r in rows if r.name == text.kernel)
    assert text.backend == chosen.backend
    open_rows = [c for c in text.candidates if c.reason is None]
    assert min(c.cost_us for c in open_rows) == next(
        c.cost_us for c in open_rows if c.name == text.kernel
    )


@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad", "bgrad"])
def test_explain_agrees_with_what_a_forced_row_does(direction):
    """A row that explain calls able runs when forced; one that it refuses raises that reason."""
    for shape in CONV_EDGES[::4]:
        case = support.conv_case(shape, "integers", torch.float32)
        text = fastconv.explain(case.input, case.weight, direction=direction, **shape.options)
        for candidate in text.candidates:
            row = next(r for r in fastconv.kernels() if r.name == candidate.name)

            def run(case=case):
                return support.run_conv(ff.conv2d, case, "NCHW", "NCHW", (direction,))

            if row.backend not in ("cpu", "emulator"):
                assert candidate.reason
                continue
            _, reason = support.forced(row, run)
            assert (reason or None) == candidate.reason or row.backend == "emulator", shape.name


def test_explain_reads_only_shapes():
    x, w = (t.to("meta") for t in tensors())
    assert fastconv.explain(x, w).candidates is not None
    big = torch.empty(1, 1, 1, 1).expand(64, 512, 512, 512)
    assert fastconv.explain(big, torch.empty(1, 1, 1, 1).expand(512, 512, 3, 3), padding=1).kernel


def test_explain_says_what_is_forced():
    x, w = tensors()
    name = fastconv.explain(x, w).candidates[-1].name
    with fastconv.kernel(name):
        text = fastconv.explain(x, w)
    assert text.kernel == name
    assert all(name in c.reason for c in text.candidates if c.name != name)
    with fastconv.backend("aten"):
        text = fastconv.explain(x, w)
    assert text.kernel == text.backend == "aten" and "aten" in text


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_explain_says_that_aten_runs_what_we_do_not(dtype):
    text = fastconv.explain(*(t.to(dtype) for t in tensors()))
    assert text.kernel == "aten"
    assert str(dtype).removeprefix("torch.") in text.lower() or "Complex" in text or "Long" in text


def test_explain_refuses_what_conv2d_refuses():
    x, w = tensors()
    with pytest.raises(RuntimeError, match="groups=3"):
        fastconv.explain(x, w, groups=3)
    with pytest.raises(RuntimeError, match="-1"):
        fastconv.explain(x, w, padding=-1)
    with pytest.raises(ValueError, match="sideways"):
        fastconv.explain(x, w, direction="sideways")


def test_explain_takes_what_conv2d_takes():
    x, w = tensors()
    assert fastconv.explain(x, w, torch.zeros(8), padding="same").kernel
    assert fastconv.explain(x[0], w, None, (1, 2), padding="valid").kernel
    assert fastconv.explain(x, w[:, :2], groups=2, dilation=2).kernel
    assert "(2, 4, 6, 6)" in fastconv.explain(x, w)


# Names


@pytest.mark.parametrize("scope, known", [
    (fastconv.backend, "cpu"),
    (fastconv.kernel, "conv2d_reference_fprop"),
])  # fmt: skip
def test_unknown_names_are_named_with_what_is_close(scope, known):
    wrong = known + "x"
    with pytest.raises(ValueError) as caught, scope(wrong):
        raise AssertionError("entered")
    assert repr(wrong) in str(caught.value)
    assert known in str(caught.value)
    for bad in (None, 3, b"cpu", "", "CPU "):
        with pytest.raises((ValueError, TypeError)), scope(bad):
            raise AssertionError("entered")
    assert_nothing_is_forced()


def test_a_backend_that_is_not_built_says_so():
    built = {row.backend for row in fastconv.kernels()} | {"aten"}
    for name in {"cuda", "triton", "cpu", "emulator", "aten"} - built:
        with pytest.raises(RuntimeError, match=name), fastconv.backend(name):
            raise AssertionError("entered")
    assert_nothing_is_forced()


def assert_nothing_is_forced():
    x, w = tensors()
    text = fastconv.explain(x, w)
    assert text.backend != "aten"
    assert "forced" not in text
    ff.conv2d(x.to(torch.complex64), w.to(torch.complex64))  # the fallback is allowed


# Nesting, ends and errors


def ran(function, *args):
    """The aten operators seen by the profiler while function runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function(*args)
    names = {event.key for event in profile.key_averages()}
    return any(n.startswith(("aten::convolution", "aten::_convolution")) for n in names)


def test_scopes_nest_and_end():
    x, w = tensors()
    names = [c.name for c in fastconv.explain(x, w).candidates if c.reason is None]
    if len(names) < 2:
        pytest.skip("one row alone")
    default = fastconv.explain(x, w).kernel
    with fastconv.kernel(names[0]):
        assert fastconv.explain(x, w).kernel == names[0]
        with fastconv.kernel(names[-1]):
            assert fastconv.explain(x, w).kernel == names[-1]
            with fastconv.backend("aten"):
                assert fastconv.explain(x, w).kernel == "aten"
                with fastconv.backend("cpu"):
                    assert fastconv.explain(x, w).kernel == names[-1]
                assert fastconv.explain(x, w).kernel == "aten"
            assert fastconv.explain(x, w).kernel == names[-1]
        assert fastconv.explain(x, w).kernel == names[0]
    assert fastconv.explain(x, w).kernel == default
    assert_nothing_is_forced()


@pytest.mark.parametrize("scope", [
    lambda: fastconv.backend("aten"),
    lambda: fastconv.kernel("conv2d_reference_fprop"),
    lambda: fastconv.allow_fallback(False),
    lambda: fastconv.winograd("off"),
])  # fmt: skip
def test_scopes_end_when_an_exception_leaves_them(scope):
    with pytest.raises(KeyError), scope():
        raise KeyError
    with pytest.raises(RuntimeError), scope():
        ff.conv2d(torch.ones(1, 1, 2, 2), torch.ones(1, 2, 3, 3))
    assert_nothing_is_forced()


def test_one_scope_object_may_be_entered_again():
    x, w = tensors()
    scope = fastconv.backend("aten")
    for _ in range(2):
        with scope:
            with scope:
                assert fastconv.explain(x, w).kernel == "aten"
            assert fastconv.explain(x, w).kernel == "aten"
        assert fastconv.explain(x, w).kernel != "aten"


def test_scopes_decorate_functions():
    @fastconv.backend("aten")
    def forced(x, w):
        return fastconv.explain(x, w).kernel

    assert forced(*tensors()) == "aten"
    assert_nothing_is_forced()


def test_a_forced_kernel_binds_its_own_operation_alone():
    x, w = tensors()
    row = next(r for r in support.rows("conv2d", "fprop"))
    with fastconv.kernel(row.name):
        y = torch.randn(1, 2, 6, 6, requires_grad=True)
        out = ff.batch_norm(ff.avg_pool2d(ff.max_pool2d(y, 2), 1), None, None, training=True)
        torch.autograd.grad(out.sum(), y)
        assert fastconv.explain(x, w, direction="wgrad").kernel != row.name


def test_a_forced_kernel_that_cannot_run_says_why():
    """Nothing else takes its place: a benchmark would measure another kernel."""
    refusals = 0
    for row in fastconv.kernels():
        if (row.op, row.direction) != ("conv2d", "fprop"):
            continue
        if row.backend == "triton" and triton_kernels.available():
            continue  # kernel() itself refuses: see test_triton_host.py
        for shape in CONV_EDGES:
            case = support.conv_case(shape, "integers", torch.float32)
            text = None
            with fastconv.kernel(row.name):
                text = fastconv.explain(case.input, case.weight, **shape.options)
                if text.kernel == row.name:
                    continue
                reason = next(c.reason for c in text.candidates if c.name == row.name)
                with pytest.raises(RuntimeError) as caught:
                    ff.conv2d(case.input, case.weight, **shape.options)
            assert row.name in str(caught.value) and reason in str(caught.value)
            refusals += 1
            break
    support.coverage["choice: rows that refused a shape with a reason"] += refusals


# allow_fallback


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.int64])
def test_no_fallback_makes_foreign_dtypes_an_error(dtype):
    x, w = (torch.ones(s).to(dtype) for s in ((1, 2, 5, 5), (3, 2, 3, 3)))
    expected = torch.nn.functional.conv2d(x, w)
    assert torch.equal(ff.conv2d(x, w), expected)
    with fastconv.allow_fallback(False):
        with pytest.raises(RuntimeError, match="allow_fallback"):
            ff.conv2d(x, w)
        with fastconv.allow_fallback(True):
            assert torch.equal(ff.conv2d(x, w), expected)
        with pytest.raises(RuntimeError, match="allow_fallback"):
            ff.conv2d(x, w)
        with fastconv.backend("aten"):
            assert torch.equal(ff.conv2d(x, w), expected)
    assert torch.equal(ff.conv2d(x, w), expected)


@pytest.mark.parametrize("call", [
    lambda x: ff.max_pool2d(x.int(), 2),
    lambda x: ff.max_pool2d(x.int(), 2, return_indices=True),
    lambda x: ff.avg_pool2d(x.long(), 2),
], ids=["max_pool2d", "max_pool2d with indices", "avg_pool2d"])  # fmt: skip
def test_no_fallback_for_integer_pooling(call):
    x = torch.ones(1, 2, 6, 6)
    call(x)
    with fastconv.allow_fallback(False), pytest.raises(RuntimeError, match="allow_fallback"):
        call(x)


@pytest.mark.parametrize("backend", OWN, ids=str)
def test_a_forced_backend_refuses_what_it_cannot(backend):
    x = torch.ones(1, 2, 5, 5, dtype=torch.complex64, device=backend.device)
    with fastconv.backend(backend.name), pytest.raises(RuntimeError, match=backend.name):
        ff.conv2d(x, x[:, :, :3, :3])


def test_allow_fallback_as_a_call_holds_from_now_on():
    """In a thread of its own: what is set dies with the thread."""
    seen = []

    def work():
        fastconv.allow_fallback(False)
        x = torch.ones(1, 1, 3, 3, dtype=torch.int64)
        seen.append(support.outcome(ff.conv2d, x, x)[1])
        fastconv.allow_fallback(True)
        seen.append(support.outcome(ff.conv2d, x, x)[1])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(seen[0], RuntimeError) and seen[1] is None
    assert_nothing_is_forced()


def test_double_backward_needs_no_fallback():
    x, w = tensors(requires_grad=True)
    with fastconv.allow_fallback(False):
        out = ff.conv2d(x, w, padding=1)
        gradients = torch.autograd.grad(out.square().sum(), (x, w), create_graph=True)
        sum(g.square().sum() for g in gradients).backward()


# Threads, and backward


def test_what_is_forced_is_the_threads_own():
    x, w = tensors()
    seen, entered, done = [], threading.Event(), threading.Event()

    def other():
        with fastconv.backend("aten"):
            entered.set()
            done.wait(10)
            seen.append(fastconv.explain(x, w).kernel)

    thread = threading.Thread(target=other)
    thread.start()
    assert entered.wait(10)
    assert fastconv.explain(x, w).kernel != "aten"
    done.set()
    thread.join()
    assert seen == ["aten"]


def test_backward_uses_what_forward_was_told():
    """Also on another thread, after the block, and under another backend."""
    for forward, backward in (("aten", "cpu"), ("cpu", "aten")):
        x, w = tensors(requires_grad=True)
        with fastconv.backend(forward):
            out = ff.conv2d(x, w)

        def work(out=out, backward=backward):
            with fastconv.backend(backward):
                out.sum().backward()

        results = []

        def run(work=work, results=results):
            results.append(ran(work))

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert results == [forward == "aten"], (forward, backward)


def test_a_forced_gradient_kernel_is_remembered_by_the_graph():
    """dgrad alone is forced in forward; backward runs it when nothing is forced any more."""
    rows = [r for r in support.rows("conv2d", "dgrad") if r.backend == "cpu"]
    x, w = tensors(requires_grad=True)
    results = []
    for row in rows:
        with fastconv.kernel(row.name):
            out = ff.conv2d(x, w)
            refused = fastconv.explain(x, w, direction="dgrad").kernel != row.name
        gradient, error = support.outcome(torch.autograd.grad, out.sum(), x)
        if refused:
            assert row.name in str(error)
        else:
            results.append(gradient[0])
    assert all(torch.allclose(r, results[0], atol=1e-5) for r in results)


@pytest.mark.skipif(bool(support.emulator_missing()), reason="the emulator does not run here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
@pytest.mark.parametrize("size", [(2, 8, 0, 5), (2, 8, 5, 0), (0, 8, 5, 5)], ids=str)
def test_an_empty_axis_divides_nothing(size, direction, dtype):
    x, w = torch.empty(size, dtype=dtype), torch.empty(8, 8, 3, 3, dtype=dtype)
    with fastconv.backend("emulator"):
        found = fastconv.explain(x, w, padding=2, stride=2, direction=direction)
    assert found.backend == "emulator"
