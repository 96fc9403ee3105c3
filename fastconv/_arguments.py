"""What the public functions share: their operators, and arguments as the operators take them."""

import functools
import operator

import torch
import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function_unary

from fastconv import _extension

ACTIVATIONS = ("none", "relu", "relu6", "leaky_relu", "silu", "hardswish", "sigmoid")


def operator_named(name):
    """torch.ops.fastconv.<name>, or what raises a clear ImportError where nothing is compiled."""
    if _extension.available:
        return getattr(torch.ops.fastconv, name).default

    def missing(*args, **kwargs):
        raise ImportError(_extension.explanation)

    return missing


def overridable(function):
    """Lets tensor subclasses and torch.fx's proxies take a call over, as torch's functions do."""

    @functools.wraps(function)
    def call(input, *args, **kwargs):
        if has_torch_function_unary(input):
            return handle_torch_function(call, (input,), input, *args, **kwargs)
        return function(input, *args, **kwargs)

    return call


def check_tensors(op, required, **optional):
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


def as_int(op, name, value):
    return _one_int(op, name, value, value, "an int")


def as_ints(op, name, value):
    """An int as (int, int); a tuple or list as a tuple. The operators check how many there are.

    Raises:
        TypeError: for anything that is not an integer.
    """
    if type(value) is int and -(2**63) <= value < 2**63:
        return (value, value)
    if type(value) is tuple and len(value) == 2:  # a layer's: nothing to convert, nearly always
        first, second = value
        if type(first) is int and type(second) is int:
            if -(2**63) <= first < 2**63 and -(2**63) <= second < 2**63:
                return value
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


def activation_name(activation):
    """The name as the kernels know it; None stands for "none".

    Raises:
        ValueError: for an unknown one.
    """
    name = "none" if activation is None else activation
    if name not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATIONS)} or None, but got {activation!r}"
        )
    return name
