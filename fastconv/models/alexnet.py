"""AlexNet."""

import torch
from torch import Tensor, nn

from fastconv.models.pretrained import build, refuse_weights
from fastconv.models.registry import check_at_least_one, register
from fastconv.modules import AdaptiveAvgPool2d, Conv2d, MaxPool2d


def local_response_norm() -> nn.LocalResponseNorm:
    """The normalisation of AlexNet, VGG A-LRN and GoogLeNet.

    The paper's formula does not divide alpha by the five channels; its program did, and so do torch
    and Caffe.
    """
    return nn.LocalResponseNorm(size=5, alpha=1e-4, beta=0.75, k=2.0)


class AlexNet(nn.Module):
    """Five convolutions, three linear layers, as torchvision has them: 61,100,840 parameters.

    Args:
        num_classes: how many scores the network gives an image.
        dropout: the part of the features that training leaves out, twice.
        lrn: local response normalisation before the first two poolings, as in the original. It
            shifts the numbers in the state_dict's keys.
        in_channels: 3 for colour images.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        dropout: float = 0.5,
        lrn: bool = False,
        in_channels: int = 3,
    ):
        super().__init__()
        check_at_least_one(num_classes=num_classes, in_channels=in_channels)

        def norm():
            return [local_response_norm()] if lrn else []

        self.features = nn.Sequential(
            Conv2d(in_channels, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(inplace=True),
            *norm(),
            MaxPool2d(kernel_size=3, stride=2),
            Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(inplace=True),
            *norm(),
            MaxPool2d(kernel_size=3, stride=2),
            Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            MaxPool2d(kernel_size=3, stride=2),
        )
        self.avgpool = AdaptiveAvgPool2d((6, 6))
        self.classifier = nn.Sequential(
            nn.Dropout(p=dropout),
            nn.Linear(256 * 6 * 6, 4096),
            nn.ReLU(inplace=True),
            nn.Dropout(p=dropout),
            nn.Linear(4096, 4096),
            nn.ReLU(inplace=True),
            nn.Linear(4096, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, in_channels, H, W), of at least 63x63, to scores (N, num_classes)."""
        x = self.avgpool(self.features(images))
        return self.classifier(torch.flatten(x, 1))


@register
def alexnet(weights=None, progress: bool = True, *, lrn: bool = False, **config) -> AlexNet:
    """AlexNet (see :class:`AlexNet`), as torchvision's; with ``lrn`` the original's variant.

    Args:
        weights, progress: as of :func:`fastconv.models.resnet50`; without ``lrn`` only.
        config: ``num_classes``, ``in_channels``, ``dropout``.
    """
    if lrn:
        refuse_weights("alexnet(lrn=True)", weights, config)
        return AlexNet(lrn=True, **config)
    return build("alexnet", AlexNet, weights, progress, config)
