"""Conv2d."""

import functools

import torch
import torch.nn.functional as F
from torch import nn

from fastconv import functional


class Conv2d(nn.Conv2d):
    """:class:`torch.nn.Conv2d` on fastconv's kernels: same arguments, parameters and state_dict.

    Shapes: input (N, in_channels, H, W) or (in_channels, H, W); output (N, out_channels, P, Q) or
    (out_channels, P, Q). A channels_last input or weight gives a channels_last output.
    """

    @functools.wraps(nn.Conv2d.__init__)
    def __init__(self, *args, **kwargs):
        try:
            super().__init__(*args, **kwargs)
        except ValueError as error:
            given = [*map(repr, args), *(f"{name}={value!r}" for name, value in kwargs.items())]
            raise ValueError(f"{error}, but got Conv2d({', '.join(given)})") from None

    def _conv_forward(self, input, weight, bias):
        input, padding = padded(self, input)
        return functional.conv2d(
            input, weight, bias, self.stride, padding, self.dilation, self.groups
        )


def padded(conv, input):
    """The input, and the padding that is left to the kernel: only zeros are."""
    if conv.padding_mode == "zeros":
        return input, conv.padding
    return F.pad(input, conv._reversed_padding_repeated_twice, mode=conv.padding_mode), (0, 0)


def output_dtype(input):
    """Of a convolution of `input`, which autocast may run in another type."""
    device = input.device.type
    if input.dtype is torch.float64 or not torch.amp.is_autocast_available(device):  # as on meta
        return input.dtype
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else input.dtype
