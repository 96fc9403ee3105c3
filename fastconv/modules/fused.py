"""ConvBNReLU2d: convolution, BatchNorm, an optional residual and an activation as one layer."""

import torch
from torch import nn
from torch.nn.modules import module as torch_module

from fastconv import functional
from fastconv.modules.batchnorm import (
    BatchNorm2d,
    advance,
    running_statistics,
    uses_batch_statistics,
)
from fastconv.modules.conv import Conv2d, output_dtype
from fastconv.modules.plain import ACTIVATIONS, activate, has_hooks, module_activation


def _is_plain(module, cls):
    """Whether calling `module` does what `cls` does, and nobody looks on. A subclass, such as a
    parametrization makes, may do anything."""
    return type(module) is cls and not has_hooks(module)


def _fused_activation(activation):
    """(whether conv_bn_relu can do it, its name there)."""
    if not isinstance(activation, nn.Module):
        return True, activation
    name = module_activation(activation)
    return name is not None, name


def _activate(z, activation):
    if isinstance(activation, nn.Module):
        return activation(z)
    return activate(z, functional.activation_name(activation))


def _can_be_fused(input, conv, bn):
    # torch.fx's proxies are no tensors, even where they say so: a tracer is shown the modules.
    # BatchNorm2d refuses what is not (N, C, H, W), in torch's words.
    return (
        issubclass(type(input), torch.Tensor)
        and input.dim() == 4
        and _is_plain(conv, Conv2d)
        and conv.padding_mode == "zeros"
        and _is_plain(bn, BatchNorm2d)
        and not torch_module._has_any_global_hook()
    )


def conv_bn(input, conv, bn, activation=None, residual=None, *, recompute=False):
    """activation(bn(conv(input)) + residual), as one operation where nobody can see a difference.

    For networks whose convolution and normalisation are modules of their own, with the state_dict
    that they have always had. Where either has hooks or is not exactly fastconv's class (a
    SyncBatchNorm, a parametrized convolution), the modules are called one by one.

    Args:
        input: (N, C, H, W).
        conv, bn: the modules.
        activation: a name as of :func:`fastconv.functional.conv_bn_relu`, None, or a module.
        residual: (N, K, P, Q) or None.
        recompute: as of :func:`fastconv.functional.conv_bn_relu`; one by one it does nothing.

    Returns:
        (N, K, P, Q).
    """
    fusible, name = _fused_activation(activation)
    fusible = fusible and _can_be_fused(input, conv, bn)
    if fusible and residual is not None:
        fusible = residual.dtype == output_dtype(input)  # an addition of two types promotes
    if not fusible:
        z = bn(conv(input))
        if residual is not None:
            z = z + residual
        return _activate(z, activation)
    momentum = advance(bn)
    return functional.conv_bn_relu(
        input,
        conv.weight,
        conv.bias,
        *running_statistics(bn),
        bn.weight,
        bn.bias,
        residual=residual,
        training=uses_batch_statistics(bn),
        momentum=momentum,
        eps=bn.eps,
        stride=conv.stride,
        padding=conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        activation=name,
        recompute=recompute,
    )


class ConvSequential(nn.Sequential):
    """:class:`torch.nn.Sequential`, but a convolution followed by a BatchNorm (and an activation)
    runs with them as one operation; see :func:`conv_bn`."""

    def forward(self, input):
        layers = [*self]
        while layers:
            layer = layers.pop(0)
            if not (isinstance(layer, Conv2d) and layers and isinstance(layers[0], BatchNorm2d)):
                input = layer(input)
                continue
            bn = layers.pop(0)
            follows = bool(layers) and type(layers[0]) in ACTIVATIONS
            input = conv_bn(input, layer, bn, layers.pop(0) if follows else None)
        return input


class ConvBNReLU2d(nn.Module):
    """activation(bn(conv(input)) + residual): one kernel in inference.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of
            :class:`torch.nn.Conv2d`.
        eps, momentum: as of :class:`torch.nn.BatchNorm2d`.
        activation: "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid" or None.
        recompute: in training, compute the convolution again in backward instead of keeping its
            output.

    Shapes: input (N, in_channels, H, W); residual and output (N, out_channels, P, Q); all of them
    without N, too.

    ``conv`` is a :class:`fastconv.Conv2d` and ``bn`` a :class:`fastconv.BatchNorm2d`; the
    state_dict holds theirs in that order. Evaluation is differentiable too. Where either has hooks
    or has been replaced, the two are called one by one; see :func:`conv_bn`.

    Raises:
        ValueError: for an unknown activation, and as torch.nn's constructors do.
    """

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        *,
        bias=False,
        eps=1e-5,
        momentum=0.1,
        activation="relu",
        recompute=False,
        device=None,
        dtype=None,
    ):
        super().__init__()
        functional.activation_name(activation)
        self.conv = Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=bias,
            device=device,
            dtype=dtype,
        )
        self.bn = BatchNorm2d(out_channels, eps, momentum, device=device, dtype=dtype)
        self.activation = activation
        self.recompute = recompute

    def forward(self, input, residual=None):
        if issubclass(type(input), torch.Tensor) and input.dim() == 3:  # as a convolution takes it
            residual = None if residual is None else residual.unsqueeze(0)
            return self.forward(input.unsqueeze(0), residual).squeeze(0)
        return conv_bn(
            input, self.conv, self.bn, self.activation, residual, recompute=self.recompute
        )

    def extra_repr(self):
        return f"activation={self.activation!r}" + (", recompute=True" if self.recompute else "")
