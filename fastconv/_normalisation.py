"""BatchNorm, alone and with what stands around it: a convolution, a residual, an activation."""

import torch.nn.functional as F

from fastconv._arguments import (
    activation_name,
    as_int,
    as_ints,
    check_tensors,
    operator_named,
    overridable,
    resolve_padding,
)

_batch_norm_training = operator_named("batch_norm_training")
_batch_norm_inference = operator_named("batch_norm_inference")
_conv_bn_act = operator_named("conv_bn_act")
_conv_bn_training = operator_named("conv_bn_training")
_max_pool2d = operator_named("max_pool2d")


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


def _check_running(input, *statistics):
    for running in statistics:
        if running is not None and input.dim() > 1 and running.numel() != input.shape[1]:
            raise RuntimeError(
                f"batch_norm: running statistics should contain {input.shape[1]} elements, but "
                f"have size {tuple(running.shape)}"
            )


def _batch_norm(
    input,
    running_mean,
    running_var,
    weight,
    bias,
    residual,
    training,
    momentum,
    eps,
    activation,
):
    if not training:
        if running_mean is None or running_var is None:
            raise RuntimeError(
                "batch_norm: running_mean and running_var must be given in evaluation mode, but "
                f"got {type(running_mean).__name__} and {type(running_var).__name__}"
            )
        return _batch_norm_inference(
            input, weight, bias, running_mean, running_var, residual, eps, activation
        )
    _check_running(input, running_mean, running_var)
    out, mean, var = _batch_norm_training(input, weight, bias, residual, eps, activation)
    _update_statistics(input, running_mean, running_var, mean, var, momentum)
    return out


@overridable
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
    check_tensors(
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
    return _batch_norm(
        input, running_mean, running_var, weight, bias, None, training, momentum, eps, "none"
    )


@overridable
def batch_norm_relu(
    input,
    running_mean,
    running_var,
    weight=None,
    bias=None,
    *,
    residual=None,
    training=False,
    momentum=0.1,
    eps=1e-5,
    activation="relu",
):
    """activation(batch_norm(input) + residual) as one pass, differentiable, rounded once.

    Args:
        input, running_mean, running_var, weight, bias, training, momentum, eps: as of
            :func:`batch_norm`.
        residual: of the input's size and dtype, or None.
        activation: as of :func:`conv_bn_relu`.

    Returns:
        A tensor of the input's size, dtype and memory format.

    Raises:
        ValueError: for an unknown activation, and as :func:`batch_norm`.
        RuntimeError: as :func:`batch_norm`, and for a residual of another size.
    """
    activation = activation_name(activation)
    check_tensors(
        "batch_norm_relu",
        {"input": input},
        running_mean=running_mean,
        running_var=running_var,
        weight=weight,
        bias=bias,
        residual=residual,
    )
    _check_batch_norm(input, training, eps)
    return _batch_norm(
        input,
        running_mean,
        running_var,
        weight,
        bias,
        residual,
        training,
        momentum,
        eps,
        activation,
    )


def conv_bn_act(
    input,
    weight,
    bias,
    statistics,
    residual,
    eps,
    stride,
    padding,
    dilation,
    groups,
    activation,
    pool=(),
    keep_filter=False,
):
    """Evaluation's one operator, for arguments that have been brought into its form.

    Args:
        statistics: (running_mean, running_var, bn_weight, bn_bias), or () where nothing is
            normalised.
        pool: max pooling's (kernel_size, stride, padding), or ().
        keep_filter: on a CPU, keep the filter as the kernel packs it, until it changes.
        The others: as of :func:`conv_bn_relu`; stride, padding and dilation are pairs.
    """
    _check_batch_norm(input, False, eps)
    return _conv_bn_act(
        input,
        weight,
        bias,
        *(statistics or (None, None, None, None)),
        residual,
        eps,
        stride,
        padding,
        dilation,
        groups,
        activation,
        *pool,
        keep_filter=keep_filter,
    )


def pool_arguments(op, kernel_size, stride, padding):
    """Max pooling's arguments as the operators take them."""
    return (
        as_ints(op, "pool_kernel_size", kernel_size),
        () if stride is None else as_ints(op, "pool_stride", stride),
        as_ints(op, "pool_padding", padding),
    )


@overridable
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
    pool_kernel_size=None,
    pool_stride=None,
    pool_padding=0,
):
    """activation(batch_norm(conv2d(input, weight, bias)) + residual), with max pooling behind it
    where that is asked for.

    In inference (not training, and no gradient asked for) it is one kernel. In training the
    statistics come with the convolution where a kernel has them, and normalisation, residual and
    activation are one pass over its result; backward needs the input and that result alone (and
    with a residual, the output or the residual). Each step rounds once.

    Args:
        input, weight, bias, stride, padding, dilation, groups: as of :func:`conv2d`.
        running_mean, running_var, bn_weight, bn_bias, training, momentum, eps: as of
            :func:`batch_norm`, over the K output channels. Without running statistics the batch's
            own are used, in evaluation too.
        residual: (N, K, P, Q), of the input's dtype, or None.
        activation: "relu", "relu6", "leaky_relu" (slope 0.01), "silu", "hardswish", "sigmoid",
            or None.
        recompute: in training, compute the convolution again in backward instead of keeping its
            output: half of the memory for the time of one convolution.
        pool_kernel_size, pool_stride, pool_padding: as of :func:`max_pool2d`; None: no pooling. In
            inference it is part of the one kernel where one is there for it: see
            :func:`conv2d_max_pool2d`.

    Raises:
        ValueError: for an unknown activation, and as :func:`batch_norm`.
        RuntimeError: as :func:`conv2d`, and for a residual of another size.
    """
    activation = activation_name(activation)
    check_tensors(
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
    groups = as_int("conv_bn_relu", "groups", groups)
    input, padding = resolve_padding(input, weight, stride, padding, dilation)
    pool = ()
    if pool_kernel_size is not None:
        pool = pool_arguments("conv_bn_relu", pool_kernel_size, pool_stride, pool_padding)
    if not training and running_mean is not None and running_var is not None:
        statistics = running_mean, running_var, bn_weight, bn_bias
        geometry = stride, padding, dilation, groups
        return conv_bn_act(
            input, weight, bias, statistics, residual, eps, *geometry, activation, pool
        )

    unbatched = input.dim() == 3
    if unbatched:
        input = input.unsqueeze(0)
        residual = None if residual is None else residual.unsqueeze(0)
    out, _, mean, var = _conv_bn_training(
        input,
        weight,
        bias,
        bn_weight,
        bn_bias,
        residual,
        eps,
        stride,
        padding,
        dilation,
        groups,
        activation,
        recompute,
    )
    _check_batch_norm(out, True, eps)
    if training:
        _check_running(out, running_mean, running_var)
        _update_statistics(out, running_mean, running_var, mean, var, momentum)
    if pool:
        out = _max_pool2d(out, *pool, (1, 1), False)
    return out.squeeze(0) if unbatched else out
