"""MaxPool2d, AvgPool2d and AdaptiveAvgPool2d."""

from torch import nn

from fastconv import functional


class MaxPool2d(nn.MaxPool2d):
    """:class:`torch.nn.MaxPool2d` on fastconv's kernels.

    Backward keeps one byte an output (the position in its window) where torch keeps eight.
    """

    def forward(self, input):
        return functional.max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            ceil_mode=self.ceil_mode,
            return_indices=self.return_indices,
        )


class AvgPool2d(nn.AvgPool2d):
    """:class:`torch.nn.AvgPool2d` on fastconv's kernels."""

    def forward(self, input):
        return functional.avg_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            self.ceil_mode,
            self.count_include_pad,
            self.divisor_override,
        )


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d):
    """:class:`torch.nn.AdaptiveAvgPool2d` on fastconv's kernels."""

    def forward(self, input):
        return functional.adaptive_avg_pool2d(input, self.output_size)
