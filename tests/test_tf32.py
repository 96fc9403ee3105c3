"""float32 convolutions that may round their operands to TF32, by every CUDA row that does."""

import functools

import pytest
import torch

import fastconv
import fastconv.functional as ff
import support

DIRECTIONS = ("fprop", "dgrad", "wgrad")
SHAPES = [
    ((2, 24, 9, 10), (40, 24, 3, 3), {"padding": 1}),
    ((2, 32, 9, 9), (64, 32, 3, 3), {"stride": 2, "padding": 1}),
    ((2, 64, 8, 7), (72, 64, 1, 1), {}),
    ((1, 5, 12, 11), (9, 5, 3, 2), {"dilation": 2}),
]


def rounded(t):
    """To TF32's 10 bits after the point, the nearest."""
    return ((t.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


def direction_of(direction, conv2d, x, w, grad, options):
    leaves = [t.detach().requires_grad_() for t in (x, w)]
    out = conv2d(*leaves, **options)
    if direction == "fprop":
        return out.detach()
    return torch.autograd.grad(out, leaves[direction == "wgrad"], grad)[0]


@pytest.fixture
def tf32():
    if fastconv.emulator.available():
        pytest.skip(fastconv.emulator.available())
    fastconv.emulator.allow_tf32(True)
    yield
    fastconv.emulator.allow_tf32(False)


@pytest.mark.parametrize("layout", support.FORMATS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_that_may_round_to_tf32(tf32, direction, layout):
    """Within float32's contract of the convolution of rounded operands, or of those given: a row
    need not make use of what it may."""
    generator = torch.Generator().manual_seed(3)
    ran = 0
    for size, weight, options in SHAPES:
        x, w = (torch.randn(s, generator=generator) for s in (size, weight))
        grad = torch.randn(torch.nn.functional.conv2d(x, w, **options).shape, generator=generator)
        memory_format = support.FORMATS[layout]
        given = [t.contiguous(memory_format=memory_format) for t in (x, w, grad)]
        conv2d = torch.nn.functional.conv2d
        exact, of_rounded = (
            direction_of(direction, conv2d, *(t.double() for t in tensors), options)
            for tensors in (given, map(rounded, given))
        )
        for row in support.rows("conv2d", direction):
            if row.backend != "emulator" or torch.float32 not in row.dtypes:
                continue
            call = functools.partial(direction_of, direction, ff.conv2d, *given, options)
            got, reason = support.forced(row, call)
            if reason:
                continue
            errors = [(got.double() - e).abs().max().item() for e in (of_rounded, exact)]
            # Sums of up to 600 products in float32, whatever their order.
            allowed = 16 * 2**-23 * exact.abs().max().item()
            assert min(errors) <= allowed, f"{row.name} {size} {weight} {options}: {errors}"
            if "igemm" in row.name:
                assert errors[0] <= allowed < errors[1], f"{row.name} makes no use of TF32"
            ran += 1
    assert ran
