"""Every convolution row of the kernel table, forced, over every edge shape, dtype and layout.

(a) Small integers: every partial sum is exact in float32, so the result must be the float64
    reference rounded once, bit for bit, whatever the order of the sums.
(b) Normal random numbers: the contract of DESIGN.md, at most twice the error of PyTorch's worse
    layout plus one rounding.
A row may refuse a shape only with a reason, and only when another row takes it.
"""

import functools

import pytest
import torch

import fastconv
import fastconv.functional as ff
import references
import support
from fastconv.benchmarking.shapes import CONV_EDGES, ConvShape
from support import (
    DTYPES,
    FORMATS,
    LAYOUT_PAIRS,
    contract_failure,
    conv_case,
    exact_failure,
    forced,
    integers_failure,
    is_rough,
    must_run,
    name_of,
    run_conv,
)
from turns import interpreted, slow

TABLE = [
    row
    for direction in ("fprop", "dgrad", "wgrad", "bgrad")
    for row in support.rows("conv2d", direction)
]
ROWS = [pytest.param(row, id=row.name) for row in TABLE]
# Contracts are about arithmetic, not borders: a few shapes with long and short sums suffice.
RANDOM = {
    "3x3", "3x3 odd channels", "three channels, stem", "64 to 65 channels, 1x1",
    "64 to 64 channels, 3x3", "stride 2", "dilation 2", "32 groups of 4", "three groups, odd",
    "depthwise", "depthwise 31x31", "1xN", "padding beyond the window",
}  # fmt: skip
RANDOM_SHAPES = [shape for shape in CONV_EDGES if shape.name in RANDOM]
# One for each kind of row.
FEW = [s for s in RANDOM_SHAPES if s.name in ("3x3", "64 to 65 channels, 1x1", "depthwise")]


def sweep(row, kind, dtype, layouts, shapes, judge):
    """Runs a row on every shape it takes; returns how often it ran and what was wrong."""
    ran, wrong, refused = 0, [], []
    for shape in shapes:
        case = conv_case(shape, kind, dtype)
        results, reason = forced(row, lambda c=case: run_row(row, c, layouts))
        if reason:
            refused.append(f"{shape.name}: {reason}")
            continue
        ran += case.input.numel() > 0  # an empty batch needs no row
        failure = judge(results, case)
        if failure:
            wrong.append(f"{shape.name}: {failure}")
    support.coverage[f"conv2d {row.direction}: row x shape x dtype x layouts, {kind}"] += ran
    return ran, wrong, refused


def run_row(row, case, layouts):
    device = support.row_device(row)
    return run_conv(ff.conv2d, case, *layouts, want=(row.direction,), device=device)[row.direction]


def check(row, kind, dtype, layouts, shapes, judge):
    ran, wrong, refused = sweep(row, kind, dtype, layouts, shapes, judge)
    assert not wrong, f"{row.name}, {len(wrong)} of {ran}:\n" + "\n".join(wrong)
    if dtype not in row.dtypes:
        assert not ran, f"{row.name} does not list {dtype}, yet runs"
    elif must_run(row, dtype):
        assert ran, f"{row.name} refused every shape:\n" + "\n".join(refused)


def exact(row):
    return lambda actual, case: integers_failure(row, actual, case.reference[row.direction])


def within_contract(row):
    d = row.direction
    return lambda actual, case: contract_failure(actual, case.reference[d], case.peer_error[d], row)


@pytest.mark.parametrize("row, dtype, layouts", support.combinations(TABLE, DTYPES, LAYOUT_PAIRS))
def test_integers_are_exact(row, dtype, layouts):
    shapes = support.shapes_for(row, dtype, layouts, CONV_EDGES)
    with support.threads(2 if layouts[0] == layouts[1] else 1):
        check(row, "integers", dtype, layouts, shapes, exact(row))


def random_shapes(row, dtype, layouts):
    """Sums know no layout, which tensor cores copy into NHWC. Interpreted, all but float64 are
    NumPy's float32, and only NHWC meets the window of 961 taps."""
    if interpreted(row):
        shapes = RANDOM_SHAPES[: None if layouts[0] == "NHWC" else -1]
        return shapes if dtype is torch.float32 else FEW
    shapes = support.shapes_for(row, dtype, layouts, RANDOM_SHAPES)
    return FEW if support.is_slow(row) and layouts[0] == "NCHW" else shapes


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "row, dtype, layouts",
    # In mixed layouts the same numbers are added in the same order.
    support.combinations(TABLE, DTYPES, LAYOUT_PAIRS, mixed_slow=False),
)
def test_random_numbers_keep_the_contract(row, dtype, layouts):
    shapes = random_shapes(row, dtype, layouts)
    check(row, "normal", dtype, layouts, shapes, within_contract(row))


# Long reductions: C * R * S in fprop and dgrad, N * P * Q in wgrad and bgrad.
LONG = (
    ConvShape("C = 1024", 1, 1024, 5, 5, 24, 3, 3, (1, 1), (1, 1)),
    ConvShape("K = 1024", 1, 20, 5, 5, 1024, 3, 3, (1, 1), (1, 1)),
    ConvShape("N P Q = 20000", 8, 4, 50, 50, 6, 3, 3, (1, 1), (1, 1)),
)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_long_sums_keep_the_contract(row, dtype, layout):
    shapes = LONG
    if interpreted(row) and dtype is not torch.float32:
        return  # tl.dot is NumPy's matmul there, in float32 for every dtype but float64
    if support.is_slow(row):
        if layout == "NCHW" and not interpreted(row):
            return  # on tensor cores such tensors are copied into the other layout
    if slow(row):
        # The one whose sums are long in this direction.
        which = {"fprop": 0, "dgrad": 1, "wgrad": 2, "bgrad": 2}[row.direction]
        shapes = LONG[which : which + 1]
    # A depthwise row refuses all three.
    _, wrong, _ = sweep(row, "normal", dtype, (layout, layout), shapes, within_contract(row))
    assert not wrong, f"{row.name}:\n" + "\n".join(wrong)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("layout", FORMATS)
def test_the_same_call_gives_the_same_bits(row, layout):
    def judge(first, case):
        return "" if torch.equal(first, run_row(row, case, (layout, layout))) else "other bits"

    # Of an emulated row run_row() has compared several schedules; NumPy's bits are the same.
    shapes = FEW if support.is_slow(row) else RANDOM_SHAPES
    with fastconv.kernel(row.name):  # for judge's own call
        check(row, "normal", torch.float32, (layout, layout), shapes, judge)


def touched(shape, bad_input, bad_grad, direction):
    """Where a product has a factor of bad_input or of bad_grad, and the other inside its tensor."""
    x, w, grad = (torch.ones(s).double() for s in (shape.input, shape.weight, shape.output))
    if direction == "fprop":
        return references.conv2d(bad_input, w, **shape.options) > 0
    which = ("dgrad", "wgrad", "bgrad").index(direction)
    by_grad = references.conv2d_gradients(x, w, bad_grad, **shape.options)[which]
    by_input = references.conv2d_gradients(bad_input, w, grad, **shape.options)[which]
    return (by_grad + by_input if direction == "wgrad" else by_grad) > 0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("layout", FORMATS)
def test_nan_and_infinity_reach_what_they_touch_and_nothing_else(row, layout):
    """Skipping zeros, or reading a neighbour's row, would lose or spread them. Whether an infinite
    gradient meets the zeros of the padding is left open: torch's own kernels differ in that."""
    names = ("3x3", "stride 2", "depthwise", "1x1", "32 groups of 4", "groups, 1x1", "two groups")
    names += ("three channels, stem",)
    ran = 0
    for shape in (s for s in CONV_EDGES if s.name in names):
        case = support.ConvCase(shape, "integers", torch.float32)
        bad = []
        for t in (case.input, case.grad):
            t[0, 0, 0, 0], t[-1, -1, -1, -1] = torch.nan, torch.inf
            bad.append((~t.isfinite()).double())
        got, reason = forced(row, lambda c=case: run_row(row, c, (layout, layout)))
        if reason:
            continue
        got = ~got.cpu().isfinite()
        least = touched(shape, *bad, row.direction)
        most = least | ~case.reference[row.direction].isfinite()
        assert not (least & ~got).any(), f"{shape.name}: lost"
        assert not (got & ~most).any(), f"{shape.name}: spread"
        ran += 1
    assert ran or not must_run(row, torch.float32)


FPROP = [pytest.param(row, id=row.name) for row in support.rows("conv2d", "fprop")]
FUSED = [s for s in CONV_EDGES if s.name in (
    "3x3", "3x3 odd channels", "1x1 odd channels", "stride 2", "three groups, odd", "depthwise",
    "one pixel", "64 to 65 channels, 1x1", "wide rows", "empty batch",
)]  # fmt: skip
ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "relu6": torch.nn.functional.relu6,
    "leaky_relu": torch.nn.functional.leaky_relu,
    "silu": torch.nn.functional.silu,
    "hardswish": torch.nn.functional.hardswish,
    "sigmoid": torch.sigmoid,
}
EXACT_ACTIVATIONS = ("none", "relu", "relu6")


def fused_tensors(case, layouts):
    """Input, weight, bias, mean, var, bn_weight, bn_bias, residual. With eps = 1 the square roots
    are 1, 2 and 4, so that scales are powers of two and integers stay exact."""
    K = case.shape.K
    generator = torch.Generator().manual_seed(7)
    per_channel = [support.integers((K,), generator, dtype=torch.float64) for _ in range(3)]
    var = torch.tensor([0.0, 3.0, 15.0])[torch.arange(K) % 3]
    x = case.input.contiguous(memory_format=FORMATS[layouts[0]])
    w = case.weight.contiguous(memory_format=FORMATS[layouts[1]])
    residual = case.grad.contiguous(memory_format=FORMATS[layouts[0]])
    mean, gamma, beta = (t.to(case.dtype) for t in per_channel)
    return x, w, case.bias, mean, var.to(case.dtype), gamma, beta, residual


def fused_reference(tensors, options, activation, with_residual):
    x, w, b, mean, var, gamma, beta, residual = (t.double() for t in tensors)
    z = references.conv2d(x, w, b, **options)
    z = references.batch_norm(z, gamma, beta, mean, var, eps=1.0)
    return ACTIVATIONS[activation](z + residual if with_residual else z)


@torch.no_grad()
def run_fused(row, shape, tensors, activation, with_residual):
    *args, residual = (t.to(support.row_device(row)) for t in tensors)
    return ff.conv_bn_relu(
        *args,
        residual=residual if with_residual else None,
        eps=1.0,
        activation=activation,
        **shape.options,
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("row", FPROP)
@pytest.mark.parametrize("layouts", [("NCHW", "NCHW"), ("NHWC", "NHWC")], ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue(row, activation, dtype, layouts):
    """scale, shift, residual, activation, one rounding: exact where the activation is."""
    wrong, ran = [], 0
    telling = activation in ("relu", "silu")
    if (
        support.is_slow(row)
        and dtype is not torch.float32
        and (layouts[0] == "NCHW" or not telling)
    ):
        return  # float32's: what another dtype changes is the accumulator and the rounding
    many = telling or interpreted(row) or not support.is_slow(row)
    for shape in FUSED if many else FUSED[2::3]:
        tensors = fused_tensors(conv_case(shape, "integers", dtype), layouts)
        for with_residual in (False, True):
            call = functools.partial(run_fused, row, shape, tensors, activation, with_residual)
            out, reason = forced(row, call)
            if reason:
                continue
            expected = fused_reference(tensors, shape.options, activation, with_residual)
            if activation in EXACT_ACTIVATIONS:
                failure = integers_failure(row, out, expected)
            else:
                # exp and the division round in the accumulator's type, then the store does.
                error = 2 * support.eps(dtype)
                if is_rough(row):  # of what the activation is given
                    z = fused_reference(tensors, shape.options, "none", with_residual)
                    error *= max(1, z.abs().amax().item() if z.numel() else 0)
                failure = contract_failure(out, expected, error, row)
            ran += 1
            if failure:
                wrong.append(f"{shape.name}, residual {with_residual}: {failure}")
    support.coverage["conv2d epilogue: row x shape x dtype x layout x activation"] += ran
    assert not wrong, f"{row.name}, {len(wrong)} of {ran}:\n" + "\n".join(wrong)
    assert ran or not must_run(row, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
def test_every_edge_shape_runs_on_some_row_of_our_own(dtype, layouts):
    """The last row is general: nothing falls to ATen, and the default choice is right too."""
    wrong = []
    with fastconv.allow_fallback(False):
        for shape in CONV_EDGES:
            case = conv_case(shape, "integers", dtype)
            for direction, got in run_conv(ff.conv2d, case, *layouts).items():
                failure = exact_failure(got, case.reference[direction])
                if failure:
                    wrong.append(f"{shape.name} {direction}: {failure}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
def test_output_and_gradient_strides_are_torch(dtype, layouts):
    wrong = []
    for shape in CONV_EDGES:
        case = conv_case(shape, "integers", dtype)
        ours = run_conv(ff.conv2d, case, *layouts)
        theirs = run_conv(torch.nn.functional.conv2d, case, *layouts)
        for direction in ours:
            # A weight's gradient has the weight's layout, where torch's follows the input's: the
            # optimiser then meets no transposition.
            if direction == "wgrad" and layouts[0] != layouts[1]:
                theirs[direction] = torch.empty_like(
                    theirs[direction], memory_format=FORMATS[layouts[1]]
                )
            try:
                support.assert_same_format(ours[direction], theirs[direction])
            except AssertionError as error:
                wrong.append(f"{shape.name} {direction}: {error}")
    assert not wrong, f"{len(wrong)} differ:\n" + "\n".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_every_edge_shape_keeps_the_contract(row, dtype, layouts):
    shapes = support.shapes_for(row, dtype, layouts, CONV_EDGES)
    check(row, "normal", dtype, layouts, shapes, within_contract(row))
