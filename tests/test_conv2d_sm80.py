"""The sm_80 tensor-core rows where the edge shapes of test_conv2d_kernels.py are too small to show
what they do: many tiles, splits of the reduction, what is copied; and the rows of statistics."""

import functools

import pytest
import torch

import fastconv
import fastconv.functional as ff
import support
from fastconv.benchmarking.shapes import ConvShape
from support import FORMATS, conv_case, exact_failure, forced, name_of, run_conv
from turns import in_turn

SIZES = ("", "_tall", "_small")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
IGEMM = [
    row
    for direction in ("fprop", "dgrad")
    for row in support.rows("conv2d", direction)
    if "igemm_sm80" in row.name
]
pytestmark = [
    pytest.mark.skipif(not IGEMM, reason="the emulator does not run here"),
    pytest.mark.usefixtures("one_thread"),
]

# Several tiles along pixels and along filters, the last ones cut off.
TILES = (
    ConvShape("tiles", 2, 16, 15, 14, 200, 3, 3, (1, 1), (1, 1)),
    ConvShape("tiles, stride 2, groups", 2, 80, 21, 23, 144, 3, 2, (2, 3), (1, 0), groups=2),
    ConvShape("split", 1, 192, 4, 4, 72, 3, 3, (1, 1), (1, 1)),
    ConvShape("split, dilation 2, stride 2", 1, 64, 9, 9, 128, 3, 3, (2, 2), (2, 2), (2, 2)),
    ConvShape("patches", 2, 3, 17, 19, 70, 7, 7, (2, 2), (3, 3)),
    ConvShape("patches, split", 1, 1, 21, 21, 6, 31, 31, (1, 1), (15, 15)),
)  # fmt: skip


@pytest.mark.parametrize("row", IGEMM, ids=lambda row: row.name)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_many_tiles_and_splits_are_exact(row, layout, dtype):
    """float16 takes bfloat16's way, NCHW is copied into the other layout: two shapes of each."""
    fewer = dtype is torch.float16 or layout == "NCHW"
    shapes = in_turn(TILES, fewer, DTYPES.index(dtype), layout == "NCHW", every=3)
    ran = 0
    for shape in shapes:
        case = conv_case(shape, "integers", dtype)
        fastconv.emulator.seed(TILES.index(shape))
        call = lambda c=case: run_conv(ff.conv2d, c, layout, layout, want=(row.direction,))  # noqa: E731
        results, reason = forced(row, call)
        if reason:
            continue
        ran += 1
        failure = exact_failure(results[row.direction], case.reference[row.direction])
        assert not failure, f"{shape.name}: {failure}"
    fastconv.emulator.seed(0)
    assert ran >= len(shapes) // 2


@pytest.mark.parametrize(
    "C, layout, launches",
    [(64, "NHWC", 1), (64, "NCHW", 3), (20, "NHWC", 3)],
    ids=["in place", "NCHW copied", "channels padded"],
)
def test_what_is_copied(C, layout, launches):
    x, w = torch.randn(1, C, 12, 12).bfloat16(), torch.randn(8, C, 1, 3).bfloat16()
    x, w = (t.contiguous(memory_format=FORMATS[layout]) for t in (x, w))
    with fastconv.kernel("conv2d_igemm_sm80_fprop_emulated"):
        with fastconv.emulator.launches() as log:
            ff.conv2d(x, w)
    assert len(log) == launches, log


STATISTICS = (
    ConvShape("3x3", 3, 16, 13, 12, 24, 3, 3, (1, 1), (1, 1)),
    ConvShape("odd", 2, 5, 11, 9, 7, 3, 3, (2, 1), (1, 1)),
    ConvShape("groups", 2, 32, 8, 9, 40, 1, 1, groups=4),
    ConvShape("split", 2, 256, 5, 5, 136, 3, 3, (1, 1), (1, 1)),
    ConvShape("one tile", 1, 8, 3, 3, 8, 1, 1),
)


@pytest.mark.parametrize("size", SIZES, ids=["large", "tall", "small"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_statistics(size, layout, dtype):
    ran = 0
    name = f"conv2d_igemm_sm80{size}_statistics_emulated"
    row = next(row for row in support.table() if row.name == name)
    for shape in STATISTICS:
        case = conv_case(shape, "normal", dtype)
        x, w = (t.contiguous(memory_format=FORMATS[layout]) for t in (case.input, case.weight))
        bias = case.bias + 100  # sums of squares would cancel
        options = [list(v) for v in (shape.stride, shape.padding, shape.dilation)]
        call = functools.partial(
            torch.ops.fastconv.conv_bn_training,
            *(x, w, bias, None, None, None, 1e-5),
            *(*options, shape.groups, "none", False),
        )
        results, reason = forced(row, call)
        if reason:
            assert "smaller tile" in reason
            continue
        _, y, mean, var = results
        ran += 1
        expected = torch.nn.functional.conv2d(
            x.double(), w.double(), bias.double(), **shape.options
        )
        torch.testing.assert_close(y.double(), expected, rtol=2 * support.eps(dtype), atol=1e-3)
        stored = y.double()
        torch.testing.assert_close(mean.double(), stored.mean((0, 2, 3)), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            var.double(), stored.var((0, 2, 3), unbiased=False), rtol=1e-5, atol=1e-6
        )
    assert ran >= 4
