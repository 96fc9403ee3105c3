"""Winograd's convolution: the switch, tiles at every border, threads, what is not finite, errors.

That each row keeps its contract on the common edge shapes, test_conv2d_kernels.py shows.
"""

import threading

import pytest
import torch

import fastconv
import fastconv.functional as ff
import references
import support
from fastconv.benchmarking.shapes import ConvShape
from support import ConvCase, contract_failure, forced, integers_failure, same_bits

TABLE = [row for row in support.rows("conv2d", "fprop") if "winograd" in row.name]
ROWS = [pytest.param(row, id=row.name) for row in TABLE]
BIG = ConvShape("512 channels", 8, 512, 14, 14, 512, 3, 3, (1, 1), (1, 1))
MODES = ("fast", "accurate", "off")


def explained(shape=BIG):
    x = torch.empty(1, 1, 1, 1).expand(shape.input).to("meta")
    x = x.contiguous(memory_format=torch.channels_last)
    w = torch.empty(shape.weight, device="meta")
    return fastconv.explain(x, w, **shape.options)


def reason(tile):
    name = f"conv2d_winograd{tile}_portable_fprop"
    return next(c.reason for c in explained().candidates if c.name == name)


# The switch


def test_what_each_mode_allows_a_single_convolution():
    wanted = {"fast": ("2 by 2", None), "accurate": ("2 by 2", None), "off": ("0 by 0", "0 by 0")}
    for mode in MODES:
        with fastconv.winograd(mode):
            for tile, most in zip((4, 2), wanted[mode], strict=True):
                said = reason(tile)
                assert (said is None) == (most is None)
                assert said is None or ("winograd" in said and most in said)
            assert "winograd4" not in explained().kernel
            assert mode != "off" or "winograd" not in explained().kernel


def test_a_winograd_row_that_is_forced_runs_in_every_mode():
    for mode in MODES:
        for row in TABLE:
            with fastconv.winograd(mode), fastconv.kernel(row.name):
                assert explained().kernel == row.name


def fused(tensors, shape):
    x, w = tensors
    ones, zeros = torch.ones(shape.K), torch.zeros(shape.K)
    return ff.conv_bn_relu(x, w, None, zeros, ones, ones, zeros, **shape.options)


def test_large_tiles_run_in_fused_inference_alone():
    shape = ConvShape("wide", 4, 256, 28, 28, 256, 3, 3, (1, 1), (1, 1))
    generator = torch.Generator().manual_seed(0)
    x, w = (support.normal(s, generator, torch.float32) for s in (shape.input, shape.weight))
    x = x.contiguous(memory_format=torch.channels_last)
    arch = next(r.arch for r in TABLE)  # the best this machine has comes first
    with fastconv.kernel(f"conv2d_winograd4_{arch}_fprop"):
        large = fused((x, w), shape)
    with torch.no_grad():
        assert same_bits(fused((x, w), shape), large)
        assert not same_bits(ff.conv2d(x, w, **shape.options).relu(), large)
        for mode in ("accurate", "off"):
            with fastconv.winograd(mode):
                assert not same_bits(fused((x, w), shape), large)
    kept = fused((x, w.requires_grad_()), shape)
    assert kept.requires_grad and not same_bits(kept, large)


def test_the_mode_holds_from_now_on_or_until_the_block_ends():
    def work():
        fastconv.winograd("off")
        seen.append(reason(2))
        with fastconv.winograd("accurate"):
            seen.append(reason(2))
            with fastconv.kernel("conv2d_reference_fprop"), fastconv.winograd("off"):
                pass
        seen.append(reason(2))

    seen = []
    thread = threading.Thread(target=work)  # what is set dies with it
    thread.start()
    thread.join()
    assert "0 by 0" in seen[0] and seen[1] is None and "0 by 0" in seen[2]
    assert reason(2) is None

    @fastconv.winograd("off")
    def decorated():
        return reason(2)

    fastconv.winograd("fast")
    assert "0 by 0" in decorated()
    assert reason(2) is None


def test_unknown_modes_are_named_with_what_is_close():
    with pytest.raises(ValueError, match="'fats'.*did you mean fast"):
        fastconv.winograd("fats")
    for bad in (None, True, "", "FAST"):
        with pytest.raises(ValueError, match="fast, accurate, off"):
            fastconv.winograd(bad)
    assert reason(2) is None


# Results


def run(row, case, filter_layout="NHWC"):
    def call():
        return support.run_conv(ff.conv2d, case, "NHWC", filter_layout, ("fprop",))["fprop"]

    result, why = forced(row, call)
    assert not why, why
    return result


BORDERS = [
    ConvShape(f"{H}x{W} padding {ph} {pw}", N, C, H, W, K, 3, 3, (1, 1), (ph, pw))
    for N, C, H, W, K, ph, pw in (
        (1, 2, 1, 2, 1, 1, 1), (1, 3, 3, 3, 2, 0, 0), (2, 15, 4, 5, 17, 1, 0),
        (1, 16, 5, 6, 31, 0, 1), (1, 17, 6, 7, 33, 1, 1), (2, 33, 7, 8, 5, 2, 2),
        (1, 4, 8, 9, 70, 3, 5), (3, 31, 9, 3, 15, 1, 1), (1, 2, 2, 13, 66, 1, 2),
        (5, 40, 14, 14, 96, 1, 1), (1, 300, 5, 5, 40, 1, 1),
    )
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("filter_layout", support.FORMATS)
def test_tiles_at_every_border(row, filter_layout):
    for shape in BORDERS:
        case = support.conv_case(shape, "integers", torch.float32)
        failure = integers_failure(row, run(row, case, filter_layout), case.reference["fprop"])
        assert not failure, f"{shape.name}: {failure}"


@pytest.mark.parametrize("row", ROWS)
def test_any_number_of_threads_gives_the_same_bits(row):
    for shape in (
        ConvShape("few tiles", 1, 96, 7, 7, 160, 3, 3, (1, 1), (1, 1)),
        ConvShape("many tiles", 3, 40, 30, 30, 48, 3, 3, (1, 1), (1, 1)),
    ):
        case = support.conv_case(shape, "normal", torch.float32)
        results = []
        for threads in (1, 2, 3, 7):
            with support.threads(threads):
                results.append(run(row, case))
        assert all(same_bits(r, results[0]) for r in results), shape.name


@pytest.mark.parametrize("row", ROWS)
def test_one_bad_number_reaches_its_windows_alone(row):
    """Also where a large number overflows on the way and its results are finite."""
    shape = ConvShape("one tile and a half", 1, 20, 7, 6, 18, 3, 3, (1, 1), (1, 1))
    for bad in (torch.nan, torch.inf, -torch.inf, 3e38):
        case = ConvCase(shape, "integers", torch.float32)
        case.weight.clamp_(-1, 1)
        case.input[0, 3, 2, 2] = bad
        out = run(row, case).double()
        right = (
            references.conv2d(
                case.input.double(), case.weight.double(), case.bias.double(), **shape.options
            )
            .float()
            .double()
        )
        assert torch.equal(out.isfinite(), right.isfinite()), bad
        assert torch.equal(out.isnan(), right.isnan()), bad
        far = torch.ones_like(out, dtype=torch.bool)
        far[:, :, :4, :4] = False  # its tile, and those that share a window with it
        far &= right.isfinite()
        assert far.any()
        failure = integers_failure(row, out[far].float(), right[far])
        assert not failure, f"{bad}: {failure}"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("C", [8, 64, 512])
def test_errors_of_the_documentation(row, C):
    """fastconv.winograd's docstring tells them."""
    shape = ConvShape(f"C = {C}", 1, C, 14, 14, 32, 3, 3, (1, 1), (1, 1))
    case = support.conv_case(shape, "normal", torch.float32)
    right, peer = case.reference["fprop"], case.peer_error["fprop"]
    failure = contract_failure(run(row, case), right, peer, row)
    assert not failure, failure
