"""torch.nn's layers on fastconv's kernels: same constructors, same state_dicts, subclasses."""

from fastconv.modules.batchnorm import BatchNorm2d
from fastconv.modules.conv import Conv2d
from fastconv.modules.fused import ConvBNReLU2d, ConvSequential, conv_bn
from fastconv.modules.pooling import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d

__all__ = [
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "Conv2d",
    "ConvBNReLU2d",
    "ConvSequential",
    "MaxPool2d",
    "conv_bn",
]
