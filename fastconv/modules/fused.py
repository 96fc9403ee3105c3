"""ConvBNReLU2d: convolution, BatchNorm, an optional residual and an activation as one layer."""

from torch import nn

from fastconv import functional
from fastconv.modules.batchnorm import (
    BatchNorm2d,
    advance,
    running_statistics,
    uses_batch_statistics,
)
from fastconv.modules.conv import Conv2d


class ConvBNReLU2d(nn.Module):
    """activation(bn(conv(input)) + residual): one kernel in inference.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of
            :class:`torch.nn.Conv2d`.
        eps, momentum: as of :class:`torch.nn.BatchNorm2d`.
        activation: "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid" or None.
        recompute: in training, compute the convolution again in backward instead of keeping its
            output.

    Shapes: input (N, in_channels, H, W); residual and output (N, out_channels, P, Q).

    ``conv`` is a :class:`fastconv.Conv2d` and ``bn`` a :class:`fastconv.BatchNorm2d`; the
    state_dict holds theirs in that order. Evaluation is differentiable too.

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
        conv, bn = self.conv, self.bn
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
            activation=self.activation,
            recompute=self.recompute,
        )

    def extra_repr(self):
        return f"activation={self.activation!r}" + (", recompute=True" if self.recompute else "")
