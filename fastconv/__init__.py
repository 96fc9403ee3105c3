"""fastconv: convolution, pooling and fused Conv-BN-ReLU kernels for PyTorch.

Use ``fastconv.Conv2d`` in place of ``torch.nn.Conv2d`` (and ``MaxPool2d``, ``AvgPool2d``,
``AdaptiveAvgPool2d``, ``BatchNorm2d`` alike), ``fastconv.functional`` in place of
``torch.nn.functional``, or take a whole network from ``fastconv.models``.
"""

import warnings

from fastconv import autotuning, emulator, functional, models, surgery
from fastconv._extension import ExtensionWarning, available, explanation
from fastconv._version import __version__
from fastconv.autotuning import autotune
from fastconv.modules import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    BatchNorm2d,
    Conv2d,
    ConvBNReLU2d,
    MaxPool2d,
)
from fastconv.selection import allow_fallback, backend, explain, kernel, kernels, winograd
from fastconv.surgery import convert, fuse, revert

__all__ = [
    "AdaptiveAvgPool2d",
    "AvgPool2d",
    "BatchNorm2d",
    "Conv2d",
    "ConvBNReLU2d",
    "MaxPool2d",
    "__version__",
    "allow_fallback",
    "autotune",
    "backend",
    "convert",
    "emulator",
    "explain",
    "functional",
    "fuse",
    "kernel",
    "kernels",
    "models",
    "revert",
    "surgery",
    "winograd",
]

if available:
    autotuning.register()
else:
    warnings.warn(explanation, ExtensionWarning, stacklevel=2)
