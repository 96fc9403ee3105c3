"""ResNet, with the stride in the 3x3 convolution of a bottleneck (version 1.5)."""

import functools

import torch
from torch import Tensor, nn

from fastconv.models.pretrained import build
from fastconv.models.registry import check_at_least_one, register
from fastconv.modules import (
    AdaptiveAvgPool2d,
    BatchNorm2d,
    Conv2d,
    ConvSequential,
    MaxPool2d,
    conv_bn,
)


def conv3x3(in_channels, channels, stride=1, groups=1, dilation=1):
    return Conv2d(
        in_channels, channels, 3, stride, dilation, dilation=dilation, groups=groups, bias=False
    )


def conv1x1(in_channels, channels, stride=1):
    return Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: (N, inplanes, H, W) to (N, planes, H / stride, ...).

    Raises:
        ValueError: for groups, another width or a dilation, which only bottlenecks have.
    """

    expansion = 1

    def __init__(
        self,
        inplanes,
        planes,
        stride=1,
        downsample=None,
        groups=1,
        base_width=64,
        dilation=1,
        norm_layer=None,
    ):
        super().__init__()
        if (groups, base_width, dilation) != (1, 64, 1):
            raise ValueError(
                "a BasicBlock has groups=1, base_width=64 and dilation=1, "
                f"but got {groups}, {base_width} and {dilation}"
            )
        norm_layer = norm_layer or BatchNorm2d
        self.conv1 = conv3x3(inplanes, planes, stride)
        self.bn1 = norm_layer(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = norm_layer(planes)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = conv_bn(x, self.conv1, self.bn1, self.relu)
        return conv_bn(out, self.conv2, self.bn2, self.relu, shortcut)


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions and a shortcut: (N, inplanes, H, W) to
    (N, 4 * planes, H / stride, W / stride)."""

    expansion = 4

    def __init__(
        self,
        inplanes,
        planes,
        stride=1,
        downsample=None,
        groups=1,
        base_width=64,
        dilation=1,
        norm_layer=None,
    ):
        super().__init__()
        norm_layer = norm_layer or BatchNorm2d
        width = int(planes * (base_width / 64)) * groups
        self.conv1 = conv1x1(inplanes, width)
        self.bn1 = norm_layer(width)
        self.conv2 = conv3x3(width, width, stride, groups, dilation)
        self.bn2 = norm_layer(width)
        self.conv3 = conv1x1(width, planes * self.expansion)
        self.bn3 = norm_layer(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = conv_bn(x, self.conv1, self.bn1, self.relu)
        out = conv_bn(out, self.conv2, self.bn2, self.relu)
        return conv_bn(out, self.conv3, self.bn3, self.relu, shortcut)


class ResNet(nn.Module):
    """A 7x7 convolution, a pooling, four stages of blocks, a linear layer, as torchvision has them.

    A convolution, its BatchNorm, the shortcut and the ReLU run as one operation; see
    :func:`fastconv.modules.conv_bn`.

    Args:
        block: :class:`BasicBlock` or :class:`Bottleneck`.
        layers: how many blocks each of the four stages has.
        num_classes: how many scores the network gives an image.
        zero_init_residual: start each block as the identity.
        groups, width_per_group: of the bottlenecks' 3x3 convolutions.
        replace_stride_with_dilation: three bools, for the last three stages.
        norm_layer: what makes a normalisation of some channels; None is
            :class:`fastconv.BatchNorm2d`.
        in_channels: 3 for colour images.

    Raises:
        ValueError: a number is below 1, or ``replace_stride_with_dilation`` has not three elements.
    """

    def __init__(
        self,
        block,
        layers,
        num_classes: int = 1000,
        zero_init_residual: bool = False,
        groups: int = 1,
        width_per_group: int = 64,
        replace_stride_with_dilation=None,
        norm_layer=None,
        in_channels: int = 3,
    ):
        super().__init__()
        check_at_least_one(num_classes=num_classes, in_channels=in_channels, groups=groups)
        dilate = replace_stride_with_dilation
        if dilate is None:
            dilate = (False, False, False)
        if len(dilate) != 3:
            raise ValueError(
                "replace_stride_with_dilation must be None or have 3 elements, "
                f"but got {replace_stride_with_dilation!r}"
            )
        norm_layer = norm_layer or BatchNorm2d
        self._norm_layer = norm_layer
        self.inplanes, self.dilation = 64, 1
        self.groups, self.base_width = groups, width_per_group
        self.conv1 = Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = norm_layer(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = MaxPool2d(kernel_size=3, stride=2, padding=1)
        self.layer1 = self._make_layer(block, 64, layers[0])
        self.layer2 = self._make_layer(block, 128, layers[1], stride=2, dilate=dilate[0])
        self.layer3 = self._make_layer(block, 256, layers[2], stride=2, dilate=dilate[1])
        self.layer4 = self._make_layer(block, 512, layers[3], stride=2, dilate=dilate[2])
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(512 * block.expansion, num_classes)
        self._initialise(zero_init_residual)

    def _make_layer(self, block, planes, blocks, stride=1, dilate=False):
        """A stage. Its first block changes the number of channels and the size."""
        first_dilation = self.dilation
        if dilate:
            self.dilation *= stride
            stride = 1
        channels = planes * block.expansion
        make = functools.partial(
            block, groups=self.groups, base_width=self.base_width, norm_layer=self._norm_layer
        )
        downsample = None
        if stride != 1 or self.inplanes != channels:
            downsample = ConvSequential(
                conv1x1(self.inplanes, channels, stride), self._norm_layer(channels)
            )
        first = make(self.inplanes, planes, stride, downsample, dilation=first_dilation)
        self.inplanes = channels
        others = (make(channels, planes, dilation=self.dilation) for _ in range(1, blocks))
        return nn.Sequential(first, *others)

    def _initialise(self, zero_init_residual):
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
        if zero_init_residual:
            for block in self.modules():
                if isinstance(block, BasicBlock | Bottleneck):
                    last = block.bn2 if isinstance(block, BasicBlock) else block.bn3
                    if last.weight is not None:
                        nn.init.zeros_(last.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to scores (N, num_classes)."""
        x = self.maxpool(conv_bn(images, self.conv1, self.bn1, self.relu))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def _resnet(name, block, layers, weights, progress, config):
    return build(name, functools.partial(ResNet, block, layers), weights, progress, config)


@register
def resnet18(weights=None, progress: bool = True, **config) -> ResNet:
    """ResNet-18. Arguments as of :func:`resnet50`."""
    return _resnet("resnet18", BasicBlock, (2, 2, 2, 2), weights, progress, config)


@register
def resnet34(weights=None, progress: bool = True, **config) -> ResNet:
    """ResNet-34. Arguments as of :func:`resnet50`."""
    return _resnet("resnet34", BasicBlock, (3, 4, 6, 3), weights, progress, config)


@register
def resnet50(weights=None, progress: bool = True, **config) -> ResNet:
    """ResNet-50: 25,557,032 parameters.

    Args:
        weights: None; a member of torchvision's ``ResNet50_Weights``; its name: ``"DEFAULT"``,
            ``"IMAGENET1K_V1"``. torchvision downloads them and they are loaded strictly.
        progress: show the download's progress on stderr.
        config: ``num_classes``, ``in_channels`` and whatever else :class:`ResNet` takes;
            ``pretrained=True``, the old spelling of ``weights="IMAGENET1K_V1"``.

    Raises:
        ImportError: weights are asked for, and torchvision cannot be imported.
        TypeError: ``weights`` is something else, or belongs to another network.
        ValueError: there are no such weights, they do not fit ``num_classes`` or ``in_channels``,
            or a number is below 1.
    """
    return _resnet("resnet50", Bottleneck, (3, 4, 6, 3), weights, progress, config)


@register
def resnet101(weights=None, progress: bool = True, **config) -> ResNet:
    """ResNet-101. Arguments as of :func:`resnet50`."""
    return _resnet("resnet101", Bottleneck, (3, 4, 23, 3), weights, progress, config)


@register
def resnet152(weights=None, progress: bool = True, **config) -> ResNet:
    """ResNet-152. Arguments as of :func:`resnet50`."""
    return _resnet("resnet152", Bottleneck, (3, 8, 36, 3), weights, progress, config)
