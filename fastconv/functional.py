"""torch.nn.functional's convolution, pooling and normalisation, on fastconv's kernels.

Names, arguments, defaults, results, memory formats and exception types are torch's. Shapes are
written in CUTLASS's letters: input (N, C, H, W), weight (K, C / groups, R, S), output (N, K, P, Q).
"""

import functools
import operator

import torch
import torch.nn.functional as F
from torch.nn.functional import interpolate, relu
from torch.overrides import handle_torch_function, has_torch_function_unary
from torch.utils.checkpoint import checkpoint

from fastconv import _extension

__all__ = [
    "adaptive_avg_pool2d",
    "avg_pool2d",
    "batch_norm",
    "conv2d",
    "conv2d_max_pool2d",
    "conv_bn_relu",
    "interpolate",
    "max_pool2d",
    "relu",
]


def _operator(name):
    """torch.ops.fastconv.<name>, or what raises a clear ImportError where nothing is compiled."""
    if _extension.available:
        return getattr(torch.ops.fastconv, name).default

    def missing(*args, **kwargs):
        raise ImportError(_extension.explanation)

    return missing


_conv2d = _operator("conv2d")
_conv_bn_act = _operator("conv_bn_act")
_conv_bn_training = _operator("conv_bn_training")
_conv2d_act_max_pool2d = _operator("conv2d_act_max_pool2d")
_max_pool2d = _operator("max_pool2d")
_max_pool2d_with_indices = _operator("max_pool2d_with_indices")
_avg_pool2d = _operator("avg_pool2d")
_adaptive_avg_pool2d = _operator("adaptive_avg_pool2d")
_batch_norm_training = _operator("batch_norm_training")
_batch_norm_inference = _operator("batch_norm_inference")


def _overridable(function):
    """Lets tensor subclasses and torch.fx's proxies take a call over, as torch's functions do."""

    @functools.wraps(function)
    def call(input, *args, **kwargs):
        if has_torch_function_unary(input):
            return handle_torch_function(call, (input,), input, *args, **kwargs)
        return function(input, *args, **kwargs)

    return call


def _check_tensors(op, required, **optional):
    for name, value in required.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{op}(): {name} must be a Tensor, but got {type(value).__name__}")
    for name, value in optional.items():
        if not isinstance(value, torch.Tensor) and value is not None:
            raise TypeError(
                f"{op}(): {name} must be a Tensor or None, but got {type(value).__name__}"
            )


def _one_int(op, name, value, whole, wanted="an int or a tuple of ints"):
    if isinstance(value, torch.SymInt):
        return value
    try:
        value = operator.index(value)  # numpy's integers and tensors of one integer too
    except TypeError:
        raise TypeError(f"{op}(): argument '{name}' must be {wanted}, but got {whole!r}") from None
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{op}(): argument '{name}' does not fit 64 bits: {whole!r}")
    return value


def _as_int(op, name, value):
    return _one_int(op, name, value, value, "an int")


def as_ints(op, name, value):
    """An int as (int, int); a tuple or list as a tuple. The operators check how many there are.

    Raises:
        TypeError: for anything that is not an integer.
    """
    if type(value) is int and -(2**63) <= value < 2**63:
        return (value, value)
    if isinstance(value, list | tuple):
        return tuple([_one_int(op, name, v, value) for v in value])
    value = _one_int(op, name, value, value)
    return (value, value)


def resolve_padding(input, weight, stride, padding, dilation):
    """'same' and 'valid' as numbers; 'same' may pad the input by one more at the far end."""
    if not isinstance(padding, str):
        return input, as_ints("conv2d", "padding", padding)
    if padding == "valid":
        return input, (0, 0)
    if padding != "same":
        raise RuntimeError(f"padding must be 'same', 'valid' or numbers, but got {padding!r}")
    if weight.dim() != 4 or input.dim() not in (3, 4):
        return input, (0, 0)  # the convolution refuses it
    if any(s != 1 for s in stride):
        raise RuntimeError(
            f"padding='same' is not supported for strided convolutions, but stride is {stride}"
        )
    total = [d * (size - 1) for d, size in zip(dilation, weight.shape[2:], strict=True)]
    left = [t // 2 for t in total]
    if any(t % 2 for t in total) and min(total) >= 0:
        input = F.pad(input, [0, total[1] - 2 * left[1], 0, total[0] - 2 * left[0]])
    return input, left


@_overridable
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
    _check_tensors("conv2d", {"input": input, "weight": weight}, bias=bias)
    stride = as_ints("conv2d", "stride", stride)
    dilation = as_ints("conv2d", "dilation", dilation)
    groups = _as_int("conv2d", "groups", groups)
    input, padding = resolve_padding(input, weight, stride, padding, dilation)
    return _conv2d(input, weight, bias, stride, padding, dilation, groups)


@_overridable
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
    _check_tensors("max_pool2d", {"input": input})
    pool = _max_pool2d_with_indices if return_indices else _max_pool2d
    return pool(
        input,
        as_ints("max_pool2d", "kernel_size", kernel_size),
        () if stride is None else as_ints("max_pool2d", "stride", stride),
        as_ints("max_pool2d", "padding", padding),
        as_ints("max_pool2d", "dilation", dilation),
        ceil_mode,
    )


@_overridable
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
    _check_tensors("avg_pool2d", {"input": input})
    return _avg_pool2d(
        input,
        as_ints("avg_pool2d", "kernel_size", kernel_size),
        () if stride is None else as_ints("avg_pool2d", "stride", stride),
        as_ints("avg_pool2d", "padding", padding),
        ceil_mode,
        count_include_pad,
        None
        if divisor_override is None
        else _as_int("avg_pool2d", "divisor_override", divisor_override),
    )


@_overridable
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
    _check_tensors("adaptive_avg_pool2d", {"input": input})
    return _adaptive_avg_pool2d(input, as_ints("adaptive_avg_pool2d", "output_size", output_size))


def _update_running(running, batch, momentum):
    if running is not None:
        running.mul_(1 - momentum).add_(batch, alpha=momentum)


def _update_statistics(input, running_mean, running_var, mean, var, momentum):
    """Running statistics as torch keeps them: the variance unbiased, n / (n - 1)."""
    if input.numel() == 0 or (running_mean is None and running_var is None):
        return
    count = input.numel() // input.size(1)
    _update_running(running_mean, mean, momentum)
    _update_running(running_var, var * (count / (count - 1)), momentum)


def _check_batch_norm(input, training, eps):
    if training:
        values = input.numel() // max(input.size(1), 1) if input.dim() > 1 else 0
        if values == 1:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got input size "
                f"{input.size()}"
            )
        if eps <= 0.0:
            raise ValueError(f"batch_norm eps must be positive during training, but got {eps}")
    elif eps < 0.0:
        raise ValueError(f"batch_norm eps must be non-negative, but got {eps}")


@_overridable
def batch_norm(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
):
    """Batch normalisation, as :func:`torch.nn.functional.batch_norm`.

    Args:
        input: (N, C) or (N, C, ...).
        running_mean, running_var: (C) or None. Read in evaluation; in training moved towards the
            batch's statistics by ``momentum``, in place.
        weight, bias: (C) or None.

    Raises:
        ValueError: in training, for a single value per channel or eps <= 0.
        RuntimeError: for sizes or dtypes that do not fit.
    """
    _check_tensors(
        "batch_norm",
        {"input": input},
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
    )
    _check_batch_norm(input, training, eps)
    if input.dim() < 2:  # nothing to normalise: torch takes an empty vector, and refuses the rest
        return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        if running_mean is None or running_var is None:
            raise RuntimeError(
                "batch_norm: running_mean and running_var must be given in evaluation mode, but "
                f"got {type(running_mean).__name__} and {type(running_var).__name__}"
            )
        return _batch_norm_inference(input, weight, bias, running_mean, running_var, eps)
    _check_running(input, running_mean, running_var)
    out, mean, var = _batch_norm_training(input, weight, bias, eps)
    _update_statistics(input, running_mean, running_var, mean, var, momentum)
    return out


def _check_running(input, *statistics):
    for running in statistics:
        if running is not None and input.dim() > 1 and running.numel() != input.shape[1]:
            raise RuntimeError(
                f"batch_norm: running statistics should contain {input.shape[1]} elements, but "
                f"have size {tuple(running.shape)}"
            )


_ACTIVATIONS = {
    "none": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "silu": F.silu,
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
}


def activation_name(activation):
    """The name as the kernels know it; None stands for "none".

    Raises:
        ValueError: for an unknown one.
    """
    name = "none" if activation is None else activation
    if name not in _ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(_ACTIVATIONS)} or None, but got {activation!r}"
        )
    return name


@_overridable
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
    _check_tensors(op, {"input": input, "weight": weight}, bias=bias)
    stride = as_ints(op, "stride", stride)
    dilation = as_ints(op, "dilation", dilation)
    groups = _as_int(op, "groups", groups)
    input, padding = resolve_padding(input, weight, stride, padding, dilation)
    return _conv2d_act_max_pool2d(
        input,
        weight,
        bias,
        stride,
        padding,
        dilation,
        groups,
        activation,
        as_ints(op, "pool_kernel_size", pool_kernel_size),
        () if pool_stride is None else as_ints(op, "pool_stride", pool_stride),
        as_ints(op, "pool_padding", pool_padding),
    )


@_overridable
def conv_bn_relu(
    input,
    weight,
    bias,
    running_mean,
    running_var,
    bn_weight,
    bn_bias,
    *,
    residual=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    stride=1,
    padding=0,
    dilation=1,
    groups=1,
    activation="relu",
    recompute=False,
):
    """activation(batch_norm(conv2d(input, weight, bias)) + residual).

    In inference (not training, and no gradient asked for) it is one kernel. Where gradients are
    asked for it runs as its differentiable parts, with the same results.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as of :func:`conv2d`.
        running_mean, running_var, bn_weight, bn_bias, training, momentum, eps: as of
            :func:`batch_norm`, over the K output channels. Without running statistics the batch's
            own are used, in evaluation too.
        residual: (N, K, P, Q), of the input's dtype, or None.
        activation: "relu", "relu6", "leaky_relu" (slope 0.01), "silu", "hardswish", "sigmoid",
            or None.
        recompute: in training, compute the convolution again in backward instead of keeping its
            output.

    Raises:
        ValueError: for an unknown activation, and as :func:`batch_norm`.
        RuntimeError: as :func:`conv2d`, and for a residual of another size.
    """
    activation = activation_name(activation)
    _check_tensors(
        "conv_bn_relu",
        {"input": input, "weight": weight},
        bias=bias,
        running_mean=running_mean,
        running_var=running_var,
        bn_weight=bn_weight,
        bn_bias=bn_bias,
        residual=residual,
    )
    stride = as_ints("conv_bn_relu", "stride", stride)
    dilation = as_ints("conv_bn_relu", "dilation", dilation)
    groups = _as_int("conv_bn_relu", "groups", groups)
    input, padding = resolve_padding(input, weight, stride, padding, dilation)
    if not training and running_mean is not None and running_var is not None:
        _check_batch_norm(input, training, eps)
        return _conv_bn_act(
            input,
            weight,
            bias,
            running_mean,
            running_var,
            bn_weight,
            bn_bias,
            residual,
            eps,
            stride,
            padding,
            dilation,
            groups,
            activation,
        )

    def block(input, weight, bias, bn_weight, bn_bias, residual):
        batch = input.unsqueeze(0) if input.dim() == 3 else input
        normalised, _, mean, var = _conv_bn_training(
            batch, weight, bias, bn_weight, bn_bias, eps, stride, padding, dilation, groups
        )
        _check_batch_norm(normalised, True, eps)
        z = normalised.squeeze(0) if input.dim() == 3 else normalised
        if residual is not None:
            if residual.shape != z.shape:
                raise RuntimeError(
                    f"conv_bn_relu: residual must have the output's size {tuple(z.shape)}, but "
                    f"got {tuple(residual.shape)}"
                )
            z = z + residual
        return _ACTIVATIONS[activation](z), mean, var

    tensors = (input, weight, bias, bn_weight, bn_bias, residual)
    if recompute and torch.is_grad_enabled():
        out, mean, var = checkpoint(block, *tensors, use_reentrant=False)
    else:
        out, mean, var = block(*tensors)
    if training:
        _update_statistics(
            out if out.dim() == 4 else out.unsqueeze(0),
            running_mean,
            running_var,
            mean,
            var,
            momentum,
        )
    return out
