"""Max, average and adaptive average pooling: every row, every edge, and torch's every quirk."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F

import fastconv.functional as ff
import references
import support
from fastconv.benchmarking.shapes import ADAPTIVE_EDGES, POOL_EDGES
from support import (
    DTYPES,
    FORMATS,
    contract_failure,
    exact_failure,
    forced,
    integers,
    max_error,
    must_run,
    name_of,
    normal,
)
from turns import in_turn, interpreted

AVERAGE_EDGES = [s for s in POOL_EDGES if s.dilation == (1, 1)]


def rows(op, direction):
    return [pytest.param(row, id=row.name) for row in support.rows(op, direction)]


def average_options(shape):
    return {k: v for k, v in shape.options.items() if k != "dilation"}


def placed(t, layout, device="cpu"):
    """A copy whose strides follow the layout even where sizes of one would hide it."""
    return torch.empty_like(t, device=device, memory_format=FORMATS[layout]).copy_(t)


def call(function, x, layout, grad=None, device="cpu"):
    """The output, or with `grad` the input's gradient; tuples give their first element's."""
    x = placed(x, layout, device)
    if grad is None:
        return function(x)
    out = function(x.requires_grad_())
    out = out[0] if isinstance(out, tuple) else out
    return torch.autograd.grad(out, x, placed(grad, layout, device))[0]


def sweep(row, dtype, problems):
    """problems: (name, call of the row, judge of its result). Each runs with this row forced."""
    ran, wrong = 0, []
    if interpreted(row) and dtype is not torch.float32:
        # Every fourth, as places and order are float32's: another dtype changes only conversions.
        problems = itertools.islice(problems, 0, None, 4)
    for name, run, judge in problems:
        result, reason = forced(row, run)
        if reason:
            continue
        ran += 1
        failure = judge(result)
        if failure:
            wrong.append(f"{name}: {failure}")
    support.coverage[f"{row.op} {row.direction}: row x problem x dtype x layout"] += ran
    assert not wrong, f"{row.name}, {len(wrong)} of {ran}:\n" + "\n".join(wrong)
    assert not (ran and dtype not in row.dtypes), f"{row.name} does not list {dtype}"
    assert ran or not must_run(row, dtype), f"{row.name} ran nothing"


@functools.cache
def max_case(shape, dtype, values):
    """Input, output and positions. Few values, so that windows tie; in the second form NaN and
    both infinities too, so that some windows hold nothing else."""
    x = integers(shape.input, torch.Generator().manual_seed(1), -3, 3).to(dtype)
    if values == "NaN and infinities":
        x[x == 3], x[x == -3], x[x == -2] = torch.nan, -torch.inf, torch.inf
    geometry = (shape.kernel, shape.stride, shape.padding, shape.dilation, shape.ceil_mode)
    return x, *references.max_pool2d(x, *geometry)


@pytest.mark.parametrize("values", ["ties", "NaN and infinities"])
@pytest.mark.parametrize("row", rows("max_pool2d", "fprop"))
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_max_forward(row, values, dtype, layout):
    device = support.row_device(row)

    def problems():
        for shape in POOL_EDGES:
            x, expected, where = max_case(shape, dtype, values)

            def plain(t, s=shape):
                return ff.max_pool2d(t, **s.options)

            def indexed(t, s=shape):
                return ff.max_pool2d(t, **s.options, return_indices=True)

            def judge_both(result, expected=expected, where=where):
                if result[1].dtype != torch.int64 or not torch.equal(result[1].cpu(), where):
                    return "other indices"
                return exact_failure(result[0], expected)

            slow = interpreted(row) and shape.kernel == (17, 17)
            if slow and values == "ties":
                continue  # the other form ties too
            for grads in (False, True):  # with gradients, positions are kept
                y = placed(x, layout, device).requires_grad_(grads)
                name = f"{shape.name}, requires_grad {grads}"
                if grads or not slow:
                    yield name, lambda f=plain, y=y: f(y), lambda r, e=expected: exact_failure(r, e)
                if not (grads and interpreted(row)):  # the same launch as without gradients
                    yield f"{name}, indices", lambda f=indexed, y=y: f(y), judge_both

    with support.threads(2 if values == "ties" else 1):
        sweep(row, dtype, problems())


@pytest.mark.parametrize("return_indices", [False, True])
@pytest.mark.parametrize("row", rows("max_pool2d", "dgrad"))
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_max_backward(row, return_indices, dtype, layout):
    """Overlapping windows add up in the accumulator's type and round once."""
    device = support.row_device(row)

    def problems():
        for shape in POOL_EDGES:
            x, _, where = max_case(shape, dtype, "NaN and infinities")
            grad = integers(where.shape, torch.Generator().manual_seed(2), -5, 5).to(dtype)
            expected = references.max_pool2d_backward(grad.double(), where, shape.H, shape.W)

            def run(s=shape, x=x, grad=grad):
                def pool(t):
                    return ff.max_pool2d(t, **s.options, return_indices=return_indices)

                return call(pool, x, layout, grad, device)

            yield shape.name, run, lambda r, e=expected: exact_failure(r, e)

    with support.threads(1 if return_indices else 2):
        sweep(row, dtype, problems())


@functools.cache
def average_problems(dtype, backward):
    """(name, ours, input, gradient or None, float64 answer, error of torch's worse layout).
    Divisors of torch's every form."""
    generator, problems = torch.Generator().manual_seed(3), []
    for shape in AVERAGE_EDGES:
        for extra in ({}, {"count_include_pad": False}, {"divisor_override": 4}):
            options = average_options(shape) | extra
            geometry = (shape.kernel, shape.stride, shape.padding, shape.ceil_mode)
            problems.append(
                problem(
                    f"{shape.name}, {extra}",
                    functools.partial(ff.avg_pool2d, **options),
                    functools.partial(F.avg_pool2d, **options),
                    lambda t, g=geometry, e=extra: references.avg_pool2d_sums(t, *g, **e),
                    *(normal(shape.input, generator).to(dtype), generator if backward else None),
                )
            )
    return problems


@functools.cache
def adaptive_problems(dtype, backward):
    generator = torch.Generator().manual_seed(4)
    return [
        problem(
            f"{size} to {out}",
            functools.partial(ff.adaptive_avg_pool2d, output_size=out),
            functools.partial(F.adaptive_avg_pool2d, output_size=out),
            functools.partial(references.adaptive_avg_pool2d_sums, output_size=out),
            *(normal(size, generator).to(dtype), generator if backward else None),
        )
        for size, out in ADAPTIVE_EDGES
    ]


def problem(name, ours, torchs, sums, x, generator):
    size = sums(x.double())[0].shape
    grad = None if generator is None else normal(size, generator).to(x.dtype)
    expected = references.average_extended(
        sums, x.double(), None if grad is None else grad.double()
    )
    peers = [max_error(call(torchs, x, layout, grad), expected) for layout in FORMATS]
    return name, ours, x, grad, expected, max(peers)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "op, problems",
    [
        ("avg_pool2d", average_problems),
        ("adaptive_avg_pool2d", adaptive_problems),
    ],
    ids=["avg_pool2d", "adaptive_avg_pool2d"],
)
@pytest.mark.parametrize("direction", ["fprop", "dgrad"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_average_keeps_the_contract(op, problems, direction, dtype, layout):
    rows = support.rows(op, direction)
    assert rows, f"no row for {op} {direction}"
    for row in rows:
        device = support.row_device(row)
        sweep(
            row,
            dtype,
            (
                (
                    name,
                    functools.partial(call, ours, x, layout, grad, device),
                    functools.partial(contract_failure, reference=expected, peer_error=worst),
                )
                for name, ours, x, grad, expected, worst in in_turn(
                    # Each in one of the two layouts; of other dtypes sweep() leaves some out.
                    problems(dtype, direction == "dgrad"),
                    interpreted(row) and dtype is torch.float32,
                    layout == "NHWC",
                    every=2,
                )
            ),
        )


@pytest.mark.parametrize("row", rows("avg_pool2d", "fprop"))
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_average_of_integers_over_powers_of_two_is_exact(row, dtype, layout):
    def problems():
        for shape in AVERAGE_EDGES:
            options = average_options(shape) | {"divisor_override": 8}
            x = integers(shape.input, torch.Generator().manual_seed(5), -9, 9).to(dtype)
            expected = references.avg_pool2d(
                *(x.double(), shape.kernel, shape.stride, shape.padding, shape.ceil_mode),
                divisor_override=8,
            )

            def run(x=x, options=options):
                pool = lambda t: ff.avg_pool2d(t, **options)  # noqa: E731
                return call(pool, x, layout, None, support.row_device(row))

            yield shape.name, run, lambda r, e=expected: exact_failure(r, e)

    sweep(row, dtype, problems())


@pytest.mark.parametrize("layout", FORMATS)
def test_strides_of_results_are_torch(layout, backend):
    functions = {
        "max": (ff.max_pool2d, F.max_pool2d, (3, 2, 1)),
        "indices": (
            *(ff.max_pool2d, F.max_pool2d),
            (3, 2, 1, 1, False, True),
        ),
        "avg": (ff.avg_pool2d, F.avg_pool2d, (3, 2, 1)),
        "adaptive": (ff.adaptive_avg_pool2d, F.adaptive_avg_pool2d, ((2, 3),)),
        "global": (ff.adaptive_avg_pool2d, F.adaptive_avg_pool2d, (1,)),
    }
    x = torch.randn(2, 5, 7, 8)
    for name, (ours, torchs, args) in functions.items():
        got, expected = (f(placed(x, layout, backend.device), *args) for f in (ours, torchs))
        pairs = zip(got, expected, strict=True) if name == "indices" else [(got, expected)]
        for a, b in pairs:
            assert a.stride() == b.stride(), f"{name}: {a.stride()}, torch's {b.stride()}"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_no_edge_falls_back(dtype, layout, backend):
    if backend.name == "aten":
        pytest.skip("ATen is the fallback")
    places = interpreted(backend), DTYPES.index(dtype), 2 * (layout == "NHWC")
    with support.fastconv.allow_fallback(False):
        for shape in in_turn(POOL_EDGES, *places):
            x = integers(shape.input, torch.Generator().manual_seed(6)).to(dtype)
            x = placed(x, layout, backend.device).requires_grad_()
            ff.max_pool2d(x, **shape.options).sum().backward()
        for shape in in_turn(AVERAGE_EDGES, *places):
            x = torch.ones(shape.input, dtype=dtype, device=backend.device, requires_grad=True)
            ff.avg_pool2d(x, **average_options(shape)).sum().backward()
        for size, out in in_turn(ADAPTIVE_EDGES, *places):
            x = torch.ones(size, dtype=dtype, device=backend.device, requires_grad=True)
            ff.adaptive_avg_pool2d(x, out).sum().backward()


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("return_indices", [False, True])
def test_a_window_that_sees_nothing(return_indices, layout, backend):
    """Taps at -1 and 2 of two rows: -inf, and its gradient goes nowhere. (torch's own backward
    writes it beyond the tensor, so ATen only runs forward here.)"""
    x = placed(torch.arange(8.0).reshape(1, 4, 2, 1), layout, backend.device).requires_grad_()
    out = ff.max_pool2d(x, (2, 1), (1, 1), (1, 0), (3, 1), return_indices=return_indices)
    out = out[0] if return_indices else out
    assert torch.equal(out.cpu(), torch.full((1, 4, 1, 1), -torch.inf))
    if backend.name != "aten":
        assert not torch.autograd.grad(out.sum(), x)[0].any()


def test_a_window_of_more_than_256_keeps_its_position(backend):
    """Positions inside a window of up to 256 elements fit a byte; 17 x 17 do not."""
    x = torch.zeros(1, 2, 21, 22, device=backend.device)
    x[0, 0, 16, 16], x[0, 1, 20, 21] = 1, 1
    x.requires_grad_()
    for kernel, last in ((16, 15), (17, 16), (20, 19)):
        out = ff.max_pool2d(x, kernel, 1)
        (grad,) = torch.autograd.grad(out.sum(), x)
        (expected,) = torch.autograd.grad(F.max_pool2d(x, kernel, 1).sum(), x)
        assert torch.equal(grad, expected), f"window {kernel}, last position {last}"


def test_indices_feed_torchs_unpooling(backend):
    x = torch.rand(2, 3, 8, 6, device=backend.device)
    out, where = ff.max_pool2d(x, 2, return_indices=True)
    restored = F.max_unpool2d(out, where, 2)
    assert torch.equal(restored, F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2))


def test_adaptive_sizes_of_none_and_zero(backend):
    x = torch.rand(2, 3, 7, 6, device=backend.device)
    for size in ((None, 3), (2, None), (None, None), 4, (0, 2)):
        got, expected = ff.adaptive_avg_pool2d(x, size), F.adaptive_avg_pool2d(x, size)
        assert got.shape == expected.shape
        assert torch.allclose(got, expected)


def test_arguments_in_torchs_forms(backend):
    x = torch.rand(2, 3, 9, 8, device=backend.device)
    calls = [
        (ff.max_pool2d, F.max_pool2d, ((2,),), {}),
        (ff.max_pool2d, F.max_pool2d, ([3, 2],), {"stride": [2], "padding": [1, 1]}),
        (ff.max_pool2d, F.max_pool2d, (3, None, 1, 1, True), {}),
        (ff.avg_pool2d, F.avg_pool2d, (3, (2, 1), (1,)), {"ceil_mode": True}),
        (ff.avg_pool2d, F.avg_pool2d, ([2, 3],), {"divisor_override": -3}),
        (ff.avg_pool2d, F.avg_pool2d, (3, 2, 1, True, False), {}),
    ]
    for ours, torchs, args, options in calls:
        assert torch.allclose(ours(x, *args, **options), torchs(x, *args, **options))
