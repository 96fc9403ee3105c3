"""VGG: the six configurations of the paper, with and without BatchNorm."""

import torch
from torch import Tensor, nn

from fastconv.models.alexnet import local_response_norm
from fastconv.models.pretrained import build, refuse_weights
from fastconv.models.registry import check_at_least_one, register
from fastconv.modules import AdaptiveAvgPool2d, BatchNorm2d, Conv2d, ConvSequential, MaxPool2d

# Output channels of 3x3 convolutions, or (channels, kernel size); "M" is a pooling, "LRN" the
# normalisation that the paper found useless.
CONFIGURATIONS = {
    "A": [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "A-LRN": [64, "LRN", "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "B": [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"],
    "C": [
        *(64, 64, "M", 128, 128, "M", 256, 256, (256, 1), "M"),
        *(512, 512, (512, 1), "M", 512, 512, (512, 1), "M"),
    ],
    "D": [
        *(64, 64, "M", 128, 128, "M", 256, 256, 256, "M"),
        *(512, 512, 512, "M", 512, 512, 512, "M"),
    ],
    "E": [
        *(64, 64, "M", 128, 128, "M", 256, 256, 256, 256, "M"),
        *(512, 512, 512, 512, "M", 512, 512, 512, 512, "M"),
    ],
}


def make_layers(configuration: list, batch_norm: bool = False, in_channels: int = 3):
    """The convolutions and poolings of a configuration, numbered as torchvision numbers them."""
    layers = []
    for entry in configuration:
        if entry == "M":
            layers.append(MaxPool2d(kernel_size=2, stride=2))
        elif entry == "LRN":
            layers.append(local_response_norm())
        else:
            channels, size = entry if isinstance(entry, tuple) else (entry, 3)
            layers.append(Conv2d(in_channels, channels, kernel_size=size, padding=size // 2))
            if batch_norm:
                layers.append(BatchNorm2d(channels))
            layers.append(nn.ReLU(inplace=True))
            in_channels = channels
    return ConvSequential(*layers)


class VGG(nn.Module):
    """Convolutions of 3x3, five poolings, three linear layers, as torchvision has them.

    Args:
        features: the convolutions, (N, C, H, W) to (N, 512, P, Q); see :func:`make_layers`.
        num_classes: how many scores the network gives an image.
        init_weights: Kaiming's initialisation of the convolutions; False leaves torch's.
        dropout: the part of the features that training leaves out, twice.

    Raises:
        ValueError: ``num_classes`` is below 1.
    """

    def __init__(
        self,
        features: nn.Module,
        num_classes: int = 1000,
        init_weights: bool = True,
        dropout: float = 0.5,
    ):
        super().__init__()
        check_at_least_one(num_classes=num_classes)
        self.features = features
        self.avgpool = AdaptiveAvgPool2d((7, 7))
        self.classifier = nn.Sequential(
            nn.Linear(512 * 7 * 7, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(p=dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(p=dropout),
            nn.Linear(4096, num_classes),
        )
        if init_weights:
            self._initialise()

    def _initialise(self):
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, 0, 0.01)
                nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, in_channels, H, W), of at least 32x32, to scores (N, num_classes)."""
        x = self.avgpool(self.features(images))
        return self.classifier(torch.flatten(x, 1))


def _network(configuration, batch_norm, in_channels=3, **config):
    check_at_least_one(in_channels=in_channels)
    features = make_layers(CONFIGURATIONS[configuration], batch_norm, in_channels)
    return VGG(features, **config)


def _vgg(name, configuration, batch_norm, weights, progress, config):
    def network(**config):
        return _network(configuration, batch_norm, **config)

    loaded = {"init_weights": False}
    return build(name, network, weights, progress, config, when_loaded=loaded)


def _original(name, configuration, weights, config):
    refuse_weights(name, weights, config)
    return _network(configuration, False, **config)


@register
def vgg11(weights=None, progress: bool = True, **config) -> VGG:
    """VGG's configuration A. Arguments as of :func:`vgg16`."""
    return _vgg("vgg11", "A", False, weights, progress, config)


@register
def vgg11_bn(weights=None, progress: bool = True, **config) -> VGG:
    """VGG's configuration A with BatchNorm. Arguments as of :func:`vgg16`."""
    return _vgg("vgg11_bn", "A", True, weights, progress, config)


@register
def vgg11_lrn(weights=None, progress: bool = True, **config) -> VGG:
    """VGG's configuration A-LRN. Arguments as of :func:`vgg16`; there are no weights."""
    return _original("vgg11_lrn", "A-LRN", weights, config)


@register
def vgg13(weights=None, progress: bool = True, **config) -> VGG:
    """VGG's configuration B. Arguments as of :func:`vgg16`."""
    return _vgg("vgg13", "B", False, weights, progress, config)


@register
def vgg13_bn(weights=None, progress: bool = True, **config) -> VGG:
    """VGG's configuration B with BatchNorm. Arguments as of :func:`vgg16`."""
    return _vgg("vgg13_bn", "B", True, weights, progress, config)


@register
def vgg16(weights=None, progress: bool = True, **config) -> VGG:
    """VGG's configuration D, sixteen layers with weights: 138,357,544 parameters.

    Args:
        weights, progress: as of :func:`fastconv.models.resnet50`.
        config: ``num_classes``, ``in_channels``, ``dropout``, ``init_weights``; see :class:`VGG`.
    """
    return _vgg("vgg16", "D", False, weights, progress, config)


@register
def vgg16_bn(weights=None, progress: bool = True, **config) -> VGG:
    """VGG's configuration D with BatchNorm. Arguments as of :func:`vgg16`."""
    return _vgg("vgg16_bn", "D", True, weights, progress, config)


@register
def vgg16_c(weights=None, progress: bool = True, **config) -> VGG:
    """VGG's configuration C: sixteen layers, three of them 1x1. Arguments as of :func:`vgg16`;
    there are no weights."""
    return _original("vgg16_c", "C", weights, config)


@register
def vgg19(weights=None, progress: bool = True, **config) -> VGG:
    """VGG's configuration E. Arguments as of :func:`vgg16`."""
    return _vgg("vgg19", "E", False, weights, progress, config)


@register
def vgg19_bn(weights=None, progress: bool = True, **config) -> VGG:
    """VGG's configuration E with BatchNorm. Arguments as of :func:`vgg16`."""
    return _vgg("vgg19_bn", "E", True, weights, progress, config)
