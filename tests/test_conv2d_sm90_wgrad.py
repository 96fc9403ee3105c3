"""conv2d_igemm_sm90_wgrad beyond what test_conv2d_kernels.py asks of every row: each tile, what two
blocks share, how sums are cut, merged groups, NaN and infinity, and what it refuses."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest
import torch

import fastconv
import fastconv.functional as ff
import references
import support
from fastconv.benchmarking.shapes import ConvShape
from support import ConvCase, exact_failure, forced, run_conv

ROW = "conv2d_igemm_sm90_wgrad_emulated"
FOLDER = Path(__file__).resolve().parent / "emulator"

missing = fastconv.emulator.available()
pytestmark = pytest.mark.skipif(bool(missing), reason=missing)


@pytest.fixture(scope="module")
def row():
    return next(row for row in support.table() if row.name == ROW)


def run(row, case, layouts=("NHWC", "NHWC")):
    """(gradient, "") or (None, reason)."""
    call = lambda: run_conv(ff.conv2d, case, *layouts, want=("wgrad",))["wgrad"]  # noqa: E731
    return forced(row, call)


def shape(name, N, C, H, W, K, R, S, stride=1, groups=1):
    padding = (R // 2, S // 2)
    return ConvShape(name, N, C, H, W, K, R, S, (stride, stride), padding, groups=groups)


# Blocks of the first launch, and of a cluster, say that the plan is the one named.
PLANS = {
    "64 x 256, parts": (shape("", 24, 136, 7, 20, 8, 3, 3), 126, 1),
    "64 x 256, dy shared": (shape("", 1, 2048, 9, 8, 8, 3, 3, 2), 72, 2),
    "64 x 256, ten steps": (shape("", 24, 8, 48, 24, 8, 3, 3), 132, 1),
    "128 x 64, x shared, two steps": (shape("", 1, 256, 24, 14, 8, 3, 3, 2), 72, 2),
    "128 x 64, dy shared, ten steps": (shape("", 64, 8, 24, 20, 8, 3, 3, 2), 120, 2),
    "128 x 64, x shared, ten steps": (shape("", 16, 256, 7, 20, 8, 3, 3, 2), 72, 2),
    "128 x 128, dy shared": (shape("", 1, 1024, 16, 8, 8, 3, 3, 2), 72, 2),
    "128 x 128, x shared, ten steps": (shape("", 64, 8, 16, 8, 136, 3, 3), 130, 2),
    "128 x 192, dy shared": (shape("", 1, 2048, 7, 10, 72, 3, 3, 2), 96, 2),
    "128 x 192, x shared": (shape("", 1, 72, 7, 7, 2048, 3, 3), 96, 2),
    "128 x 192, x shared, ten steps": (shape("", 24, 8, 24, 24, 136, 3, 3), 132, 2),
    "128 x 256, dy shared": (shape("", 1, 1024, 9, 14, 264, 3, 3, 2), 108, 2),
    "128 x 256, x shared": (shape("", 1, 136, 5, 8, 2048, 3, 3, 2), 112, 2),
    "64 x 256, dy shared, cut anywhere": (shape("", 32, 2048, 9, 7, 8, 2, 3), 130, 2),
}


# float32, of which TF32 has one product of each number and tiles of its own preferences. The one
# named so is shown every schedule: its rings of four and three stages go round.
FLOAT32_PLANS = {
    "128 x 128, float32": (shape("", 1, 72, 14, 16, 1024, 3, 3), 72, 1),
    "64 x 128, parts": (shape("", 2, 512, 9, 8, 4, 1, 1), 20, 1),
    "64 x 128, cut anywhere": (shape("", 32, 72, 9, 5, 136, 3, 3), 122, 1),
    "TF32, 128 x 128, dy shared": (shape("", 1, 256, 10, 16, 512, 3, 3), 72, 2),
    "TF32, 128 x 64, dy shared, parts": (shape("", 1, 4, 4, 12, 4, 1, 1), 4, 2),
    "TF32, 128 x 64, x shared, parts": (shape("", 1, 4, 4, 12, 136, 1, 1), 4, 2),
    "TF32, 128 x 64, x shared": (shape("", 1, 256, 10, 16, 4, 3, 3), 72, 2),
}


@pytest.mark.parametrize("name", PLANS)
def test_every_tile_share_and_cut_is_exact(row, name):
    problem, blocks, cluster = PLANS[name]
    dtype = torch.float16 if "dy" in name else torch.bfloat16
    filter_layout = "NCHW" if "ten" in name else "NHWC"
    check_plan(row, ConvCase(problem, "integers", dtype), filter_layout, blocks, cluster)


@pytest.mark.parametrize("name", FLOAT32_PLANS)
def test_every_tile_share_and_cut_in_32_bits_is_exact(row, name):
    problem, blocks, cluster = FLOAT32_PLANS[name]
    allowed = fastconv.emulator.tf32() if "TF32" in name else contextlib.nullcontext()
    filter_layout = "NCHW" if "dy" in name else "NHWC"
    case = ConvCase(problem, "integers", torch.float32)
    with allowed:
        check_plan(row, case, filter_layout, blocks, cluster)


def check_plan(row, case, filter_layout, blocks, cluster):
    problem = case.shape
    with fastconv.emulator.launches() as log:
        got, reason = run(row, case, ("NHWC", filter_layout))
    assert not reason
    x, w, grad = case.input.float(), case.weight.float(), case.grad.float()
    want = torch.nn.grad.conv2d_weight(x, w.shape, grad, **problem.options)  # small integers
    assert not exact_failure(got, want)
    assert (log[0].blocks, log[0].cluster) == (blocks, cluster)


@pytest.mark.parametrize("layout", support.FORMATS)
@pytest.mark.parametrize(
    "problem",
    [
        shape("32 groups of 4", 1, 128, 5, 5, 128, 3, 3, groups=32),
        shape("two groups of 4 and 6", 2, 8, 7, 7, 12, 3, 3, groups=2),
        shape("six groups of 5 and 7", 2, 30, 7, 7, 42, 3, 3, groups=6),
        shape("32 groups of 8", 1, 256, 7, 7, 256, 3, 3, groups=32),
        shape("six groups of 16 and 32", 2, 96, 9, 7, 192, 3, 1, groups=6),
        shape("two groups of 40", 2, 80, 6, 5, 80, 1, 1, groups=2),
        shape("two groups of 72 and 100", 1, 144, 6, 5, 200, 3, 2, groups=2),
    ],
    ids=lambda problem: problem.name,
)
def test_groups(row, problem, layout):
    case = ConvCase(problem, "integers", torch.bfloat16)
    for filter_layout in support.FORMATS:
        got, reason = run(row, case, (layout, filter_layout))
        assert not reason
        assert not exact_failure(got, case.reference["wgrad"])


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32], ids=support.name_of
)
@pytest.mark.parametrize(
    "problem",
    [
        shape("3x3", 2, 16, 9, 10, 16, 3, 3),
        shape("odd channels, stride 2", 2, 7, 9, 10, 5, 3, 3, 2),
        shape("1x1", 1, 24, 7, 9, 72, 1, 1),
        shape("merged groups", 1, 32, 7, 9, 32, 3, 3, groups=4),
    ],
    ids=lambda problem: problem.name,
)
def test_nan_and_infinity_stay_where_they_belong(row, problem, dtype):
    """Neither the pixels behind the last, nor the channels of padding, nor a neighbour's group."""
    case = ConvCase(problem, "integers", dtype)
    bad = []
    for t in (case.input, case.grad):
        t[0, 0, 0, 0], t[-1, -1, -1, -1] = torch.nan, torch.inf
        bad.append((~t.isfinite()).double())
    got, reason = run(row, case)
    assert not reason
    x, w, grad = (torch.ones(s).double() for s in (problem.input, problem.weight, problem.output))
    touched = [
        references.conv2d_gradients(a, w, b, **problem.options)[1] > 0
        for a, b in ((x, bad[1]), (bad[0], grad))
    ]
    least = touched[0] | touched[1]
    most = least | ~case.reference["wgrad"].isfinite()
    got = ~got.isfinite()
    assert not (least & ~got).any(), "lost"
    assert not (got & ~most).any(), "spread"


REFUSED = {
    "the step of dimension 1 is 9, not in 1 .. 8": dict(stride=9),
    "the filter's reach 256": dict(padding=127, dilation=128),
    "the bounding box's upper corner of dimension 1 is -129": dict(padding=1, dilation=65),
    "channels a group 2": dict(groups=4),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_it_refuses(reason):
    x = torch.ones(1, 8, 140, 140, dtype=torch.bfloat16)
    w = torch.ones(8, 8 // REFUSED[reason].get("groups", 1), 3, 3, dtype=torch.bfloat16)
    x, w = x.contiguous(memory_format=torch.channels_last), w.requires_grad_()
    with fastconv.kernel(ROW), pytest.raises(RuntimeError, match=reason):
        ff.conv2d(x, w, **REFUSED[reason]).sum().backward()


@pytest.mark.parametrize("seed", support.SEEDS)
def test_pieces_have_every_step_once(tmp_path_factory, seed):
    program = tmp_path_factory.getbasetemp() / "sm90_wgrad_work"
    if not program.exists():
        sources = [FOLDER / "cases.cu", FOLDER / "conv2d_sm90_wgrad_work.cu"]
        fastconv.emulator.compile_program(sources, program)
    done = subprocess.run(
        [program, "all", str(seed)], capture_output=True, text=True, timeout=300, env=os.environ
    )
    assert done.returncode == 0, done.stderr
