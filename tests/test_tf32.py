"""Float32 on tensor cores: TF32 where torch's switches allow it, three products otherwise.

A TF32 row is compared with the float64 result of its rounded operands; a strict one keeps float32's
contract even where tensor cores round their sums towards zero.
"""

import contextlib

import pytest
import torch

import fastconv
import fastconv.functional as ff
import references
import support
from fastconv.benchmarking.shapes import CONV_EDGES, ConvShape

DIRECTIONS = ("fprop", "dgrad", "wgrad")
TENSOR_CORES = [
    row
    for direction in DIRECTIONS
    for row in support.rows("conv2d", direction)
    if row.backend in ("emulator", "cuda") and ("igemm" in row.name or "conv1x1_sm90" in row.name)
    if torch.float32 in row.dtypes
]
ROWS = [pytest.param(row, id=row.name) for row in TENSOR_CORES]
SHAPES = [s for s in CONV_EDGES if s.name in (
    "3x3", "three channels, stem", "64 to 64 channels, 3x3", "64 to 65 channels, 1x1", "stride 2",
)]  # fmt: skip
SQUARE = ConvShape("3x3, long", 1, 128, 50, 50, 32, 3, 3, (1, 1), (1, 1))
DEEP = ConvShape("1x1, long", 1, 1024, 8, 8, 64, 1, 1)
WIDE = ConvShape("1x1, wide", 1, 64, 50, 50, 1024, 1, 1)
# Sums of 1,152 and 1,024; of 288 and 1,024; of 2,500.
LONG = {"fprop": (SQUARE, DEEP), "dgrad": (SQUARE, WIDE), "wgrad": (SQUARE,)}

pytestmark = pytest.mark.skipif(not TENSOR_CORES, reason="neither a GPU nor the emulator runs here")


@pytest.fixture
def allowed():
    """On a GPU by torch's switch, on CPU tensors by our own."""
    switches = torch.backends.cudnn  # frozen outside `flags` once torch's test suite is imported
    with switches.flags(enabled=switches.enabled, allow_tf32=True), fastconv.emulator.tf32():
        yield


def truncation(row):
    """A GPU does as it does."""
    return fastconv.emulator.truncation() if row.backend == "emulator" else contextlib.nullcontext()


def run(row, case, layout="NHWC"):
    how = {"want": (row.direction,), "device": support.row_device(row)}
    call = lambda: support.run_conv(ff.conv2d, case, layout, layout, **how)  # noqa: E731
    results, reason = support.forced(row, call)
    return (None, reason) if reason else (results[row.direction], "")


def rounded_reference(case, direction):
    x, w, grad = (support.to_tf32(t.float()).double() for t in (case.input, case.weight, case.grad))
    if direction == "fprop":
        return references.conv2d(x, w, case.bias.double(), **case.shape.options)
    which = ("dgrad", "wgrad").index(direction)
    return references.conv2d_gradients(x, w, grad, **case.shape.options)[which]


@pytest.mark.parametrize("layout", support.FORMATS)
@pytest.mark.parametrize("row", ROWS)
def test_allowed_the_operands_are_rounded_and_nothing_else(row, layout, allowed):
    ran, far = 0, 0
    for shape in SHAPES:
        case = support.conv_case(shape, "normal", torch.float32)
        actual, reason = run(row, case, layout)
        if reason:
            continue
        ran += 1
        exact, rounded = case.reference[row.direction], rounded_reference(case, row.direction)
        largest = rounded.abs().max().item()
        assert support.max_error(actual, rounded) <= 1e-5 * largest, shape.name
        far += support.max_error(actual, exact) > 1e-5 * largest
    assert ran
    assert far, "nothing was rounded: this was not TF32"


@pytest.mark.parametrize("row", ROWS)
def test_strict_sums_do_not_trust_the_tensor_cores(row):
    ran = 0
    with truncation(row):
        for shape in LONG[row.direction]:
            case = support.conv_case(shape, "normal", torch.float32)
            actual, reason = run(row, case)
            if reason:
                continue
            ran += 1
            d = row.direction
            failure = support.contract_failure(actual, case.reference[d], case.peer_error[d])
            assert not failure, f"{shape.name}: {failure}"
    assert ran


def test_truncation_is_what_it_says(allowed):
    """Nothing promotes TF32's sums: those of positive numbers come out too small, where they are
    not cut into parts so short that the last rounding hides it."""
    row = next((r for r in TENSOR_CORES if r.name == "conv2d_igemm_sm90_fprop_emulated"), None)
    if row is None:
        pytest.skip("a GPU's tensor cores do as they do")
    x, w = torch.rand(1, 32, 6, 6), torch.rand(8, 32, 3, 3)
    with fastconv.kernel(row.name):
        plain = ff.conv2d(x, w)
        with fastconv.emulator.truncation():
            truncated = ff.conv2d(x, w)
    assert (truncated <= plain).all() and (truncated < plain).sum() > plain.numel() / 2
