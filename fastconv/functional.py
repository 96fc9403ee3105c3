"""torch.nn.functional's convolution, pooling and normalisation, on fastconv's kernels.

Names, arguments, defaults, results, memory formats and exception types are torch's. Shapes are
written in CUTLASS's letters: input (N, C, H, W), weight (K, C / groups, R, S), output (N, K, P, Q).
"""

import torch
from torch.nn.functional import interpolate, relu

from fastconv._arguments import (
    activation_name,
    as_int,
    as_ints,
    check_tensors,
    operator_named,
    overridable,
    resolve_padding,
)
from fastconv._normalisation import (
    batch_norm,
    batch_norm_relu,
    conv_bn_act,
    conv_bn_relu,
    pool_arguments,
)

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "batch_norm_relu",
    "conv2d",
    "conv2d_max_pool2d",
    "conv_bn_relu",
    "interpolate",
    "max_pool2d",
    "relu",
]

_conv2d = operator_named("conv2d")
_max_pool2d = operator_named("max_pool2d")
_max_pool2d_with_indices = operator_named("max_pool2d_with_indices")
_avg_pool2d = operator_named("avg_pool2d")
_adaptive_avg_pool2d = operator_named("adaptive_avg_pool2d")


@overridable
def conv2d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    """2-D convolution (cross-correlation), as :func:`torch.nn.functional.conv2d`.

    Args:
        input: (N, C, H, W) or (C, H, W).
        weight: (K, C / groups, R, S).
        bias: (K) or None.
        stride, padding, dilation: one int, or (height, width), in elements. padding may be "same"
            (stride 1 only) or "valid".
        groups: divides C and K.

    Returns:
        (N, K, P, Q), with P = floor((H + 2 * padding - dilation * (R - 1) - 1) / stride) + 1 and Q
        alike. It is channels_last when the input or the weight is.

    Raises:
        RuntimeError: for sizes, dtypes or devices that do not fit; the message names the value.
    """
    check_tensors("conv2d", {"input": input, "weight": weight}, bias=bias)
    stride = as_ints("conv2d", "stride", stride)
    dilation = as_ints("conv2d", "dilation", dilation)
    groups = as_int("conv2d", "groups", groups)
    input, padding = resolve_padding(input, weight, stride, padding, dilation)
    return _conv2d(input, weight, bias, stride, padding, dilation, groups)


@overridable
def max_pool2d(
    input,
    kernel_size,
    stride=None,
    padding=0,
    dilation=1,
    ceil_mode=False,
    return_indices=False,
):
    """2-D max pooling, as :func:`torch.nn.functional.max_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W).
        kernel_size, stride, padding, dilation: one int, or (height, width). stride None means
            kernel_size; padding is at most half of the dilated kernel.
        ceil_mode: let the last window hang over the edge.
        return_indices: also return where each maximum stood, int64, as h * W + w.

    NaN wins, and of equal maxima the first.
    """
    check_tensors("max_pool2d", {"input": input})
    pool = _max_pool2d_with_indices if return_indices else _max_pool2d
    return pool(
        input,
        as_ints("max_pool2d", "kernel_size", kernel_size),
        () if stride is None else as_ints("max_pool2d", "stride", stride),
        as_ints("max_pool2d", "padding", padding),
        as_ints("max_pool2d", "dilation", dilation),
        ceil_mode,
    )


@overridable
def avg_pool2d(
    input,
    kernel_size,
    stride=None,
    padding=0,
    ceil_mode=False,
    count_include_pad=True,
    divisor_override=None,
):
    """2-D average pooling, as :func:`torch.nn.functional.avg_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W).
        kernel_size, stride, padding: one int, or (height, width). stride None means kernel_size.
        ceil_mode: let the last window hang over the edge.
        count_include_pad: whether padding counts among the elements that a sum is divided by.
        divisor_override: what to divide by instead.
    """
    check_tensors("avg_pool2d", {"input": input})
    return _avg_pool2d(
        input,
        as_ints("avg_pool2d", "kernel_size", kernel_size),
        () if stride is None else as_ints("avg_pool2d", "stride", stride),
        as_ints("avg_pool2d", "padding", padding),
        ceil_mode,
        count_include_pad,
        None
        if divisor_override is None
        else as_int("avg_pool2d", "divisor_override", divisor_override),
    )


@overridable
def adaptive_avg_pool2d(input, output_size):
    """2-D adaptive average pooling, as :func:`torch.nn.functional.adaptive_avg_pool2d`.

    Args:
        input: (N, C, H, W) or (C, H, W).
        output_size: one int, or (P, Q), where None keeps the input's size. Window p spans rows
            floor(p * H / P) to ceil((p + 1) * H / P).

    Raises:
        ValueError: for an input of fewer than three dimensions.
    """
    if not isinstance(output_size, int | torch.SymInt):
        if input.dim() <= len(output_size):
            raise ValueError(
                f"Input dimension should be at least {len(output_size) + 1}, "
                f"but the input has size {tuple(input.shape)}"
            )
        kept = input.shape[input.dim() - len(output_size) :]
        output_size = [
            old if new is None else new for new, old in zip(output_size, kept, strict=True)
        ]
    check_tensors("adaptive_avg_pool2d", {"input": input})
    return _adaptive_avg_pool2d(input, as_ints("adaptive_avg_pool2d", "output_size", output_size))


@overridable
def conv2d_max_pool2d(
    input,
    weight,
    bias=None,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    *,
    activation="relu",
    pool_kernel_size=2,
    pool_stride=None,
    pool_padding=0,
):
    """max_pool2d(activation(conv2d(input, weight, bias))), for inference of small networks.

    Where launches cost more than arithmetic (LeNet, batches of one) a CUDA kernel does all three;
    elsewhere it is a convolution with the activation in its epilogue, then a pooling. Where
    gradients are asked for it runs as its differentiable parts. float16 and bfloat16 are rounded
    after the activation, while the parts round before it too: with "relu", "relu6" and None that
    makes no difference.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as of :func:`conv2d`.
        activation: as of :func:`conv_bn_relu`.
        pool_kernel_size, pool_stride, pool_padding: as of :func:`max_pool2d`.

    Returns:
        (N, K, P, Q) of the pooling, channels_last when the input or the weight is.

    Raises:
        ValueError: for an unknown activation.
        RuntimeError: as :func:`conv2d` and :func:`max_pool2d`.
    """
    activation = activation_name(activation)
    op = "conv2d_max_pool2d"
    check_tensors(op, {"input": input, "weight": weight}, bias=bias)
    stride = as_ints(op, "stride", stride)
    dilation = as_ints(op, "dilation", dilation)
    groups = as_int(op, "groups", groups)
    input, padding = resolve_padding(input, weight, stride, padding, dilation)
    pool = pool_arguments(op, pool_kernel_size, pool_stride, pool_padding)
    geometry = stride, padding, dilation, groups
    return conv_bn_act(input, weight, bias, (), None, 0.0, *geometry, activation, pool)
