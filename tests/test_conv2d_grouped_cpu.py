"""The CPU rows for groups of few channels and for large depthwise filters, beyond what
test_conv2d_kernels.py asks of every row: each register tile, each number of taps that one takes at
a time, windows cut into blocks and vectors that channels do not fill."""

import pytest
import torch

import fastconv
import fastconv.functional as ff
import support
from fastconv.benchmarking.shapes import ConvShape
from support import contract_failure, conv_case, exact_failure, forced, name_of, run_conv


def shape(name, N, C, H, W, K, kernel, stride=1, padding=0, dilation=1, groups=None):
    def pair(value):
        return (value, value) if isinstance(value, int) else value

    groups = C if groups is None else groups
    R, S = pair(kernel)
    return ConvShape(name, N, C, H, W, K, R, S, pair(stride), pair(padding), pair(dilation), groups)


GROUPED = (
    shape("groups of 4, rows of 14 + 3", 2, 32, 9, 17, 32, 3, 1, 1, groups=8),
    shape("groups of 8, stride 2", 2, 64, 15, 31, 64, 3, 2, 1, groups=8),
    shape("groups of 16, rows of 2 x 14 + 2", 1, 64, 9, 30, 64, 3, 1, 1, groups=4),
    shape("groups of 64, several sums", 1, 128, 7, 7, 128, 3, 1, 1, groups=2),
    shape("groups of 32 to 64, stride 2", 1, 64, 9, 8, 128, 3, 2, 1, groups=2),
    shape("groups of 12 to 16", 1, 24, 9, 8, 32, 3, 1, 1, groups=2),
    shape("3 + 2 taps, stride 1 by 2", 1, 64, 9, 20, 128, 5, (1, 2), 2, groups=2),
    shape("3 + 3 + 1 taps of groups of 4", 1, 32, 13, 20, 32, (5, 7), 1, (2, 3), groups=8),
    shape("2 taps", 1, 32, 6, 19, 32, (1, 2), 1, 0, groups=4),
    shape("dilation", 1, 64, 13, 20, 64, 3, 1, (2, 3), 2, groups=16),
    shape("1x1", 3, 64, 6, 7, 64, 1, groups=16),
    shape("1x1, stride 2", 2, 64, 7, 6, 64, 1, 2, groups=8),
    shape("stride of the window", 1, 64, 8, 8, 64, 2, 2, groups=4),
    shape("stride 3", 1, 64, 8, 8, 64, 3, 3, groups=4),
    shape("wide rows, blocks of rows", 1, 32, 12, 300, 32, 3, 1, 1, groups=4),
)
WINDOWS = (
    shape("3x3, a part of a vector", 2, 20, 8, 9, 20, 3, 1, 1),
    shape("31x31", 1, 16, 12, 13, 16, 31, 1, 15),
    shape("7x5, two vectors and a part", 3, 33, 17, 15, 33, (7, 5), 1, (3, 2)),
    shape("stride 2 down", 2, 16, 17, 15, 16, 7, (2, 1), 3),
    shape("stride 2", 2, 16, 17, 15, 16, 7, 2, 3),
    shape("dilation 2", 2, 16, 17, 15, 16, 5, 1, 4, 2),
    shape("dilation 2 down, stride 3 down", 2, 16, 17, 15, 16, 5, (3, 1), 4, (2, 1)),
    shape("1x1, stride 2", 2, 16, 9, 9, 16, 1, 2),
    shape("13x13 on long rows", 1, 48, 20, 60, 48, 13, 1, 6),
    shape("padding beyond the window", 1, 8, 3, 3, 8, 5, 1, 6),
    shape("blocks of rows", 1, 8, 120, 90, 8, (9, 3), 1, (4, 1)),
)
ROWS = [
    row
    for row in support.table()
    if row.backend == "cpu" and row.name.startswith(("conv2d_grouped_", "conv2d_depthwise_window_"))
]


def run(row, case, layouts=("NHWC", "NHWC")):
    want = (row.direction,)
    return forced(row, lambda: run_conv(ff.conv2d, case, *layouts, want))


def shapes_of(row):
    return GROUPED if "grouped" in row.name else WINDOWS


def sweep(row, kind, dtype, judge):
    """Every shape in the row's layouts, and in float32 filters of the other one."""
    wrong, ran = [], 0
    for s in shapes_of(row):
        case = conv_case(s, kind, dtype)
        for layouts in support.LAYOUT_PAIRS:
            if layouts[0] not in row.layouts:
                continue
            if layouts[0] != layouts[1] and dtype is not torch.float32:
                continue
            results, reason = run(row, case, layouts)
            if reason:
                continue
            ran += 1
            failure = judge(results[row.direction], case)
            wrong += [f"{s.name} in {'-'.join(layouts)}: {failure}"] if failure else []
    assert not wrong, "\n".join(wrong)
    assert ran >= 8, f"{row.name} refuses most shapes"


@pytest.mark.parametrize("dtype", support.DTYPES, ids=name_of)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_integers_are_exact(row, dtype):
    d = row.direction
    sweep(row, "integers", dtype, lambda got, case: exact_failure(got, case.reference[d]))


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_random_numbers_keep_the_contract(row, dtype):
    d = row.direction

    def judge(got, case):
        return contract_failure(got, case.reference[d], case.peer_error[d])

    sweep(row, "normal", dtype, judge)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_any_number_of_threads_gives_the_same_bits(row):
    for s in shapes_of(row):
        case = conv_case(s, "normal", torch.float32)
        with support.threads(1):
            one, reason = run(row, case)
        if reason:
            continue
        for threads in (2, 3):
            with support.threads(threads):
                more, _ = run(row, case)
            assert support.same_bits(one, more), f"{s.name} with {threads} threads"


AVX512 = pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX512"), reason="no AVX-512"
)


@AVX512
@pytest.mark.parametrize(
    "C, K, groups, why",
    [
        (64, 64, 1, "one group"),
        (64, 128, 16, "16 groups of 4 to 8 channels do not fill vectors of 16"),
        (64, 64, 32, "2 channels a group, not a multiple of 4"),
        (24, 24, 6, "6 groups of 4 to 4 channels do not fill vectors of 16"),
    ],
)
def test_groups_that_fill_no_vector_are_refused_with_their_sizes(C, K, groups, why):
    x = torch.empty(1, C, 4, 4).to(memory_format=torch.channels_last)
    text = fastconv.explain(x, torch.empty(K, C // groups, 3, 3), groups=groups)
    assert f"conv2d_grouped_avx512_fprop: {why}" in text


@AVX512
@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad"])
def test_resnext_and_replknet_run_on_these_rows(direction):
    for C, size in ((128, 56), (256, 28), (512, 14), (1024, 7)):
        x = torch.empty(4, C, size, size).to(memory_format=torch.channels_last)
        w = torch.empty(C, C // 32, 3, 3)
        chosen = fastconv.explain(x, w, padding=1, groups=32, direction=direction).kernel
        assert chosen == f"conv2d_grouped_avx512_{direction}"
    for C, size, R in ((128, 56, 31), (256, 28, 29), (512, 14, 27), (1024, 7, 13)):
        x = torch.empty(4, C, size, size).to(memory_format=torch.channels_last)
        w = torch.empty(C, 1, R, R)
        chosen = fastconv.explain(x, w, padding=R // 2, groups=C, direction=direction).kernel
        assert chosen == f"conv2d_depthwise_window_avx512_{direction}"
