"""Hopper's implicit GEMM rows under the emulator, beyond what every row is asked: tiles of every
shape, blocks that have several of them, TF32, statistics, and what the rows refuse."""

import re

import pytest
import torch

import fastconv.functional as ff
import references
import support
from fastconv import emulator
from fastconv.benchmarking.shapes import ConvShape
from support import FORMATS, ConvCase, exact_failure, forced, max_error, run_conv

pytestmark = pytest.mark.skipif(
    bool(support.emulator_missing()), reason=support.emulator_missing() or "-"
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def row_named(name):
    return next(row for row in support.table() if row.name == name + "_emulated")


def run_row(name, case, layout="NHWC"):
    row = row_named(name)
    call = lambda: run_conv(ff.conv2d, case, layout, layout, want=(row.direction,))  # noqa: E731
    results, reason = forced(row, call)
    assert not reason, reason
    return results[row.direction]


def shape(name, N, C, H, W, K, R=1, stride=1, pad=0, dil=1, groups=1):
    pairs = ((value, value) for value in (stride, pad, dil))
    return ConvShape(name, N, C, H, W, K, R, R, *pairs, groups)


# Pixel tiles have 128 pixels, filter tiles 64, 128 or 256 filters; a step 64 or 32 channels.
LARGE = (
    shape("3x3", 2, 64, 11, 13, 248, 3, pad=1),
    shape("3x3, narrow", 2, 136, 12, 13, 24, 3, pad=1),
    shape("3x3 stride 2", 2, 40, 29, 30, 136, 3, stride=2, pad=1),
    shape("3x3 dilation 2", 1, 64, 21, 20, 130, 3, pad=2, dil=2),
    shape("1x1", 3, 200, 13, 11, 264),
    shape("two groups", 2, 128, 13, 12, 256, 3, pad=1, groups=2),
)
ROWS = (
    "conv2d_igemm_sm90_fprop", "conv2d_igemm_sm90_dgrad",
    "conv1x1_sm90_fprop", "conv1x1_sm90_dgrad",
)  # fmt: skip


def taken(name):
    return [s for s in LARGE if s.R == 1 or not name.startswith("conv1x1")]


@pytest.mark.parametrize("dtype", DTYPES, ids=support.name_of)
@pytest.mark.parametrize("name", ROWS)
def test_blocks_with_several_tiles(name, dtype):
    """Which block has a tile, and what else it has, is not seen in the result."""
    wrong = []
    every = dtype is torch.bfloat16
    for case in (ConvCase(s, "integers", dtype) for s in taken(name)[:: 1 if every else 4]):
        for sms in (1, 3, 4) if every else (2,):
            with emulator.sms(sms):
                got = run_row(name, case)
            failure = exact_failure(got, case.reference[row_named(name).direction])
            if failure:
                wrong.append(f"{case.shape.name}, {sms} SMs: {failure}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("dtype, tiles", [(torch.bfloat16, 3), (torch.float32, 2)])
def test_every_tile_runs_and_gives_the_same_bits(dtype, tiles):
    """The number of SMs decides the shape of the tiles, but no sum's order."""
    seen = set()
    for case in (ConvCase(s, "normal", dtype) for s in LARGE[0::4][: tiles - 1]):
        results = []
        for sms in (1, 2, 132):
            with emulator.sms(sms), emulator.launches() as log:
                results.append(run_row("conv2d_igemm_sm90_fprop", case))
            seen |= {(entry.cluster, entry.shared_bytes) for entry in log if entry.threads == 384}
        assert all(support.same_bits(results[0], other) for other in results[1:]), case.shape.name
    assert len(seen) == tiles, seen


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=support.name_of)
def test_few_tiles_of_long_sums_are_split(dtype, layout):
    """Over as many blocks as an H200 would have, whatever the GPU; a second kernel adds them up and
    has the epilogue."""
    long = shape("long", 1, 264, 7, 6, 72, 3, pad=1)
    case = ConvCase(long, "integers", dtype)
    for name in ROWS[:2]:
        with emulator.launches() as log:
            got = run_row(name, case, layout)
        assert not exact_failure(got, case.reference[row_named(name).direction]), name
        assert log[-1].threads == 256 and log[-2].threads == 384
    if dtype is torch.float16:
        return
    case = ConvCase(long, "normal", dtype)
    x, w, residual = (
        t.contiguous(memory_format=FORMATS[layout]) for t in (case.input, case.weight, case.grad)
    )
    mean, var = torch.zeros(long.K, dtype=dtype), torch.ones(long.K, dtype=dtype)
    results = []
    for sms in (2, 132):
        with emulator.sms(sms), torch.no_grad():
            out, reason = forced(
                row_named(ROWS[0]),
                lambda: ff.conv_bn_relu(
                    x, w, case.bias, mean, var, None, None, residual=residual, eps=0.0, padding=1
                ),
            )
        assert not reason, reason
        results.append(out)
    assert support.same_bits(*results)
    exact = (case.reference["fprop"] + case.grad.double()).relu()
    failure = support.contract_failure(results[0], exact, case.peer_error["fprop"])
    assert not failure, failure


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", ROWS)
def test_tf32(name, layout):
    """Operands are rounded to TF32, ties away from zero, and products are exact in float32."""
    for s in taken(name)[::2]:
        case = ConvCase(s, "normal", torch.float32)
        exact = ConvCase(s, "normal", torch.float32)
        given = (case.input, case.weight, case.grad)
        exact.input, exact.weight, exact.grad = map(support.to_tf32, given)
        direction = row_named(name).direction
        with emulator.tf32(), emulator.sms(2):
            got = run_row(name, case, layout)
        error = max_error(got, exact.reference[direction])
        assert error <= 2 * exact.peer_error[direction] + 1e-6, f"{s.name}: {error}"
        assert max_error(got, case.reference[direction]) > 10 * error, "not rounded"


def test_strict_float32_is_not_tf32():
    case = ConvCase(LARGE[1], "normal", torch.float32)
    error = max_error(run_row(ROWS[0], case), case.reference["fprop"])
    with emulator.tf32():
        rough = max_error(run_row(ROWS[0], case), case.reference["fprop"])
    assert rough > 50 * error


@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=support.name_of)
@pytest.mark.parametrize("name", ["conv2d_igemm_sm90_statistics", "conv1x1_sm90_statistics"])
def test_statistics(name, dtype, layout):
    """Mean and biased variance of the results as they are stored, large against their spread."""
    for s in (shape("wide", 3, 24, 11, 10, 136), shape("odd", 2, 9, 7, 8, 13)):
        generator = torch.Generator().manual_seed(3)
        x = support.normal(s.input, generator, dtype).contiguous(memory_format=FORMATS[layout])
        w = support.normal(s.weight, generator, dtype).contiguous(memory_format=FORMATS[layout])
        bias = torch.full((s.K,), 50.0).to(dtype)
        with emulator.sms(2):
            (_, y, mean, var), reason = forced(
                row_named(name),
                lambda: statistics(x, w, bias),  # noqa: B023
            )
        assert not reason, reason
        exact = references.conv2d(x.double(), w.double(), bias.double())
        assert max_error(y, exact) <= support.eps(dtype) * exact.abs().max()
        assert max_error(mean, y.double().mean((0, 2, 3))) <= 1e-5
        expected = y.double().var((0, 2, 3), unbiased=False)
        assert max_error(var, expected) <= 1e-4 * expected.max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=support.name_of)
def test_statistics_are_the_same_on_every_gpu(dtype):
    case = ConvCase(LARGE[0], "normal", dtype)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (case.input, case.weight))
    found = []
    for sms in (1, 2, 132):
        with emulator.sms(sms):
            call = lambda: statistics(x, w, torch.zeros(w.shape[0], dtype=dtype))  # noqa: E731
            (_, *results), reason = forced(row_named("conv2d_igemm_sm90_statistics"), call)
        assert not reason, reason
        found.append(results)
    for others in found[1:]:
        assert all(map(support.same_bits, found[0], others))


def statistics(x, w, bias):
    pair = [1, 1]
    return torch.ops.fastconv.conv_bn_training(
        x, w, bias, None, None, None, 1e-5, pair, [0, 0], pair, 1, "none", False
    )


@pytest.mark.parametrize(
    "name, s, reason",
    [
        (ROWS[0], shape("", 1, 8, 400, 400, 8, 3, pad=200), "tensor map: .* -200, not in -128"),
        (ROWS[0], shape("", 1, 8, 30, 30, 8, 3, stride=9), "tensor map: the step .* is 9"),
        (ROWS[0], shape("", 1, 8, 300, 300, 8, 2, dil=256, pad=128), "window of 257 pixels"),
        (ROWS[0], shape("", 1, 96, 5, 5, 96, 3, groups=3), "C / groups 32, no multiple of 64"),
        (ROWS[1], shape("", 1, 96, 5, 5, 96, 3, groups=3), "K / groups 32, no multiple of 64"),
        (ROWS[1], shape("", 1, 8, 9, 9, 8, 3, stride=3), "stride 3 by 3, 9 phases, more than 4"),
        (ROWS[2], shape("", 1, 8, 9, 9, 8, stride=2), "stride 2, not 1"),
        (ROWS[2], shape("", 1, 8, 9, 9, 8, 3), "filter 3x3, not 1x1"),
        (ROWS[3], shape("", 1, 8, 9, 9, 8, pad=1), "padding 1, not 0"),
    ],
)
def test_refusals_name_the_value(name, s, reason):
    row = row_named(name)
    x = torch.zeros(s.input, dtype=torch.bfloat16, requires_grad=True)
    w = torch.zeros(s.weight, dtype=torch.bfloat16)

    def call():
        out = ff.conv2d(x, w, **s.options)
        return out if row.direction == "fprop" else torch.autograd.grad(out.sum(), x)

    result, why = forced(row, call)
    assert result is None and re.search(reason, why), why


def test_the_number_of_sms_comes_back():
    with pytest.raises(ValueError, match="0 SMs"), emulator.sms(0):
        pass
    case = ConvCase(LARGE[0], "integers", torch.bfloat16)
    with emulator.launches() as log:
        with emulator.sms(1):
            run_row(ROWS[0], case)
        run_row(ROWS[0], case)
    blocks = [launch.blocks for launch in log]
    assert blocks[0] <= 2 < blocks[-1]
