"""BatchNorm with a residual and an activation on a GPU's rows, emulated or interpreted: how many
launches, and that backward is at the same side of a kink as forward was. What they compute is in
test_batch_norm.py, with all other rows."""

from collections import Counter

import pytest
import torch

import fastconv
import fastconv.functional as ff
import support
from support import FORMATS, assert_contract, assert_exact, forced, normal

ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid")
FROM_OUTPUT = ("relu", "relu6", "leaky_relu")
BACKENDS = [b for b in support.backends() if b.name in ("emulator", "triton", "cuda")]
EMULATED = pytest.mark.skipif(bool(support.emulator_missing()), reason=support.emulator_missing())


@pytest.fixture(params=BACKENDS, ids=str)
def gpu(request):
    with fastconv.backend(request.param.name):
        yield request.param


def draw(size, layout, device="cpu", dtype=torch.float32, seed=0):
    """input, residual, grad; weight, bias, mean and var."""
    generator = torch.Generator().manual_seed(sum(size) + seed)
    tensors = [normal(size, generator).to(dtype) for _ in range(3)]
    channels = [normal(size[1], generator).float() for _ in range(3)]
    channels.append(normal(size[1], generator).abs().float() + 0.5)
    placed = [t.to(device).contiguous(memory_format=FORMATS[layout]) for t in tensors]
    return placed, [t.to(device) for t in channels]


def forward(x, residual, weight, bias, activation, statistics=None):
    """Output, mean and var."""
    ops = torch.ops.fastconv
    if statistics is None:
        return ops.batch_norm_training(x, weight, bias, residual, 1e-5, activation)
    parameters = (weight, bias, *statistics, residual)
    return ops.batch_norm_inference(x, *parameters, 1e-5, activation), *statistics


def backward(grad, x, parameters, residual, output, activation, training=True, mask=None):
    """Gradients of input, weight, bias and residual."""
    mask = [True, True, True, residual is not None] if mask is None else mask
    tail = (residual, output, training, 1e-5, activation, mask)
    return torch.ops.fastconv.batch_norm_backward(grad, x, *parameters, *tail)


# Launches


def launched(call):
    with fastconv.backend("emulator"), fastconv.emulator.launches() as log:
        result = call()
    return result, Counter(launch.name for launch in log)


@EMULATED
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", FORMATS)
def test_no_launch_more_than_without(layout, activation, with_residual):
    """Training: sums, their joining, elements; inference: elements."""
    (x, residual, grad), (weight, bias, mean, var) = draw((2, 8, 5, 4), layout)
    residual = residual if with_residual else None
    for statistics, count in ((None, 3), ((mean, var), 1)):
        (out, m, v), log = launched(
            lambda s=statistics: forward(x, residual, weight, bias, activation, s)
        )
        assert log == {"batch_norm_sm80_fprop": count}
    # What nobody wants is not launched: the residual's gradient comes with the sums, but where it
    # is the gradient itself.
    both, alone = [True] * 4, [False, True, True, True]
    for mask, count in (
        ([*both[:3], with_residual], 3),
        ([*alone[:3], with_residual], 2 if activation != "none" or not with_residual else 3),
    ):
        for output in (None, out) if activation in FROM_OUTPUT else (None,):
            _, log = launched(
                lambda m_=mask, o=output: backward(
                    grad, x, (weight, bias, m, v), residual, o, activation, mask=m_
                )
            )
            assert log == {"batch_norm_sm80_dgrad": count}, (mask, output is None)


@EMULATED
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=support.name_of)
def test_statistics_of_the_convolution_feed_one_launch(dtype):
    """Forward is the convolution, the merging of its tiles' statistics, and one pass that
    normalises, adds and activates."""
    generator = torch.Generator().manual_seed(0)
    x, w, residual = (
        normal(size, generator).to(dtype).contiguous(memory_format=torch.channels_last)
        for size in ((2, 16, 6, 6), (32, 16, 3, 3), (2, 32, 6, 6))
    )
    weight, bias = normal(32, generator).to(dtype), normal(32, generator).to(dtype)

    def unfused(x, w, residual, weight, bias):
        y = torch.nn.functional.conv2d(x, w, padding=1)
        z = torch.nn.functional.batch_norm(y, None, None, weight, bias, True)
        return torch.nn.functional.silu(z + residual)

    with fastconv.kernel("conv2d_igemm_sm80_statistics_emulated"):
        out, log = launched(
            lambda: ff.conv_bn_relu(
                *(x, w, None, None, None, weight, bias),
                residual=residual,
                training=True,
                padding=1,
                activation="silu",
            )
        )
    assert log == {"conv2d_igemm_sm80_statistics": 2, "batch_norm_sm80_fprop": 1}
    tensors = (x, w, residual, weight, bias)
    assert_contract(out, unfused(*(t.double() for t in tensors)), [unfused(*tensors)])


# What backward computes again


def near_the_kink(layout, device):
    """A channel's mean is one of its elements, but for rounding: z = bias = 0 there."""
    generator = torch.Generator().manual_seed(0)
    others = 1000 + normal((32, 6), generator).float()
    x = torch.cat([others, others.double().mean(1, keepdim=True).float()], 1).reshape(1, 32, 7, 1)
    weight = torch.linspace(0.5, 2, 32)
    return x.to(device).contiguous(memory_format=FORMATS[layout]), weight.to(device)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", FORMATS)
def test_backward_is_at_the_side_of_the_kink_where_forward_was(layout, training, gpu):
    x, weight = near_the_kink(layout, gpu.device)
    bias = torch.zeros_like(weight)
    mean, var = x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=False)
    for residual in (None, torch.zeros_like(x)):
        statistics = None if training else (mean.float(), var.float())
        out, m, v = forward(x, residual, weight, bias, "relu", statistics)
        grad, mask = torch.ones_like(x), [True] * 4
        *_, dz = backward(grad, x, (weight, bias, m, v), residual, None, "relu", training, mask)
        assert torch.equal(dz, (out > 0).to(dz))
    assert 0 < dz.sum() < dz.numel()


@pytest.mark.parametrize("activation", FROM_OUTPUT)
@pytest.mark.parametrize("layout", FORMATS)
def test_the_output_gives_the_bits_that_the_input_gives(layout, activation, gpu):
    for size in ((2, 8, 5, 4), (3, 5, 3, 7)):
        (x, residual, grad), (weight, bias, *_) = draw(size, layout, gpu.device)
        for r in (residual, None):
            out, mean, var = forward(x, r, weight, bias, activation)
            parameters = (weight, bias, mean, var)
            a, b = (backward(grad, x, parameters, r, o, activation) for o in (out, None))
            assert support.same_bits(a, b)


@pytest.mark.parametrize("dtype", support.DTYPES, ids=support.name_of)
@pytest.mark.parametrize("layout", FORMATS)
def test_the_residuals_gradient_is_rounded_once(layout, dtype, gpu):
    (x, residual, grad), channels = draw((2, 8, 5, 4), layout, gpu.device, dtype)
    channels = [t.to(torch.promote_types(dtype, torch.float32)) for t in channels]
    for activation in ("none", "relu"):
        out, mean, var = forward(x, residual, *channels[:2], activation)
        parameters = (*channels[:2], mean, var)
        dx, *_, dz = backward(grad, x, parameters, residual, out, activation)
        kept = grad if activation == "none" else torch.where(out > 0, grad, 0)
        assert_exact(dz, kept.double().cpu())
        alone = [False, True, True, True]
        *_, dz = backward(grad, x, parameters, residual, out, activation, mask=alone)
        assert_exact(dz, kept.double().cpu())
        plain = [True, True, True, False]
        same, *_ = backward(grad, x, parameters, residual, out, activation, mask=plain)
        assert support.same_bits(dx, same)


@pytest.mark.parametrize("activation", ("relu", "relu6", "hardswish"))
def test_an_infinite_gradient_ends_at_a_flat_piece(activation, gpu):
    """As in torch: 0 * inf would be NaN."""
    (x, residual, grad), (weight, bias, mean, var) = draw((1, 8, 4, 4), "NHWC", gpu.device)
    x *= 8
    z = (x - mean[:, None, None]) / (var[:, None, None] + 1e-5).sqrt() * weight[:, None, None]
    z += bias[:, None, None]
    flat = z < -3.1
    assert flat.any()
    grad[flat] = torch.inf
    parameters = (weight, bias, mean, var)
    for output in (None,) if activation == "hardswish" else (None, z.clamp(0, 6)):
        mask = [True] * 4
        answers = backward(grad, x, parameters, None, output, activation, False, mask)
        assert all(t.isfinite().all() for t in answers)
        assert not answers[0][flat].any() and not answers[3][flat].any()


# The same bits, in whatever order the threads run


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("activation", ("relu", "silu"))
def test_same_bits_under_every_schedule_float32(activation, layout, training):
    rows = [r for r in support.table() if r.op == "batch_norm" and r.backend == "emulator"]
    assert len(rows) == 2 or support.emulator_missing()
    for size in ((2, 20, 9, 7), (5, 3, 8, 9)):
        (x, residual, grad), (weight, bias, mean, var) = draw(size, layout)
        statistics = None if training else (mean, var)
        for row in rows:

            def call():
                out, m, v = forward(x, residual, weight, bias, activation, statistics)  # noqa: B023
                parameters = (weight, bias, m, v)  # noqa: B023
                answers = backward(grad, x, parameters, residual, None, activation, training)  # noqa: B023
                return out, m, v, answers

            _, reason = forced(row, call)
            assert not reason
