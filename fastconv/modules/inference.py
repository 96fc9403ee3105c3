"""The layers that fuse() makes: a convolution or BatchNorm and what follows it, of modules that
exist."""

from torch import Tensor, nn

from fastconv import functional
from fastconv._normalisation import conv_bn_act, pool_arguments
from fastconv.modules.conv import output_dtype, padded
from fastconv.modules.plain import activate

STATISTICS = ("running_mean", "running_var", "weight", "bias")


class FusedConv2d(nn.Module):
    """pool(activation(bn(conv(input)) + residual)) in evaluation, of a model's own modules.

    ``conv`` and ``bn`` are the model's, not copies: their parameters are read at each call, and
    BatchNorm's scale and shift are computed from them. As in ``functional.conv_bn_relu`` it is one
    kernel where no gradient is asked for, else its differentiable parts.

    Args:
        conv: a Conv2d.
        bn: what holds running_mean, running_var, weight, bias and eps, or None.
        activation: a name as of :class:`fastconv.ConvBNReLU2d`, or None.
        pool: a MaxPool2d without ceil_mode, indices and dilation, or None.
    """

    def __init__(self, conv, bn=None, activation=None, pool=None):
        super().__init__()
        self.conv, self.bn, self.pool = conv, bn, pool
        self.activation = functional.activation_name(activation)

    def forward(self, input, residual=None):
        conv = self.conv
        weight, stride, dilation = _tensor(conv, "weight"), conv.stride, conv.dilation
        input, padding = padded(conv, input)
        input, padding = functional.resolve_padding(input, weight, stride, padding, dilation)
        geometry = stride, padding, dilation
        if residual is None or _fits(residual, input, weight, *geometry):
            return self._folded(input, geometry, residual, self.activation, self._pool())
        z = self._folded(input, geometry, None, "none", ())
        z = _add_apart(z, residual, self.activation)
        return z if self.pool is None else self.pool(z)

    def _folded(self, input, geometry, residual, activation, pool):
        conv, bn = self.conv, self.bn
        statistics, eps = (), 0.0
        if bn is not None:
            statistics, eps = tuple([_tensor(bn, name) for name in STATISTICS]), bn.eps
        return conv_bn_act(
            *(input, _tensor(conv, "weight"), _tensor(conv, "bias"), statistics, residual, eps),
            *(*geometry, conv.groups, activation, pool),
            keep_filter=True,
        )

    def _pool(self):
        if self.pool is None:
            return ()
        pool = self.pool
        return pool_arguments("max_pool2d", pool.kernel_size, pool.stride, pool.padding)

    def extra_repr(self):
        return f"activation={self.activation!r}"


class FusedBatchNorm2d(nn.Module):
    """activation(bn(input) + residual) in evaluation, of a model's own BatchNorm, as one kernel.

    Args:
        bn: what holds running_mean, running_var, weight, bias and eps.
        activation: as of :class:`FusedConv2d`.
    """

    def __init__(self, bn, activation=None):
        super().__init__()
        self.bn = bn
        self.activation = functional.activation_name(activation)

    def forward(self, input, residual=None):
        if residual is None or _matches(residual, input, input.shape, input.dtype):
            return self._normalised(input, residual, self.activation)
        return _add_apart(self._normalised(input, None, None), residual, self.activation)

    def _normalised(self, input, residual, activation):
        bn = self.bn
        return functional.batch_norm_relu(
            input,
            bn.running_mean,
            bn.running_var,
            bn.weight,
            bn.bias,
            residual=residual,
            eps=bn.eps,
            activation=activation,
        )

    def extra_repr(self):
        return f"activation={self.activation!r}"


def _tensor(module, name):
    """``module.name`` of a parameter or buffer, which Python looks for in vain, and makes an
    AttributeError of, before nn.Module is asked: 0.6 us, ten times a layer."""
    for kept in (module._parameters, module._buffers):
        if name in kept:
            return kept[name]
    return getattr(module, name)


def _add_apart(z, residual, activation):
    """For residuals that are broadcast, of another dtype, or numbers: the kernels add element to
    element only."""
    return activate(z + residual, activation)


def _matches(residual, input, shape, dtype):
    return (
        isinstance(residual, Tensor)
        and residual.device == input.device
        and residual.shape == shape
        and residual.dtype == dtype
    )


def _fits(residual, input, weight, stride, padding, dilation):
    """Whether a residual is of the convolution's output's size, dtype and device."""
    output = [
        (size + 2 * p - d * (window - 1) - 1) // s + 1
        for size, window, s, p, d in zip(
            input.shape[-2:], weight.shape[-2:], stride, padding, dilation, strict=True
        )
    ]
    shape = (*input.shape[:-3], weight.shape[0], *output)
    return _matches(residual, input, shape, output_dtype(input))
