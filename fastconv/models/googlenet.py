"""GoogLeNet: torchvision's, with BatchNorm, and the paper's, without."""

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastconv.functional import adaptive_avg_pool2d
from fastconv.models import pretrained
from fastconv.models.alexnet import local_response_norm
from fastconv.models.registry import check_at_least_one, register
from fastconv.modules import AdaptiveAvgPool2d, AvgPool2d, BatchNorm2d, Conv2d, MaxPool2d, conv_bn


class GoogLeNetOutputs(NamedTuple):
    """What a GoogLeNet with auxiliary classifiers returns in training; each (N, num_classes)."""

    logits: Tensor
    aux_logits2: Tensor | None
    aux_logits1: Tensor | None


class BasicConv2d(nn.Module):
    """Convolution, BatchNorm and ReLU, as one operation; the paper's has a bias instead of the
    BatchNorm."""

    def __init__(self, in_channels, out_channels, *, paper=False, **options):
        super().__init__()
        self.conv = Conv2d(in_channels, out_channels, bias=paper, **options)
        self.bn = None if paper else BatchNorm2d(out_channels, eps=0.001)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        if self.bn is None:
            return self.relu(self.conv(x))
        return conv_bn(x, self.conv, self.bn, self.relu)


class Inception(nn.Module):
    """Four branches side by side, their channels joined: (N, in_channels, H, W) to
    (N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W).

    The branch called 5x5 is one of 3x3 in torchvision, whose weights are so.
    """

    def __init__(
        self, in_channels, ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj, *, paper=False
    ):
        super().__init__()

        def conv(in_channels, channels, size):
            return BasicConv2d(
                in_channels, channels, kernel_size=size, padding=size // 2, paper=paper
            )

        self.branch1 = conv(in_channels, ch1x1, 1)
        self.branch2 = nn.Sequential(conv(in_channels, ch3x3red, 1), conv(ch3x3red, ch3x3, 3))
        self.branch3 = nn.Sequential(
            conv(in_channels, ch5x5red, 1), conv(ch5x5red, ch5x5, 5 if paper else 3)
        )
        self.branch4 = nn.Sequential(
            MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True),
            conv(in_channels, pool_proj, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(
            [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1
        )


class InceptionAux(nn.Module):
    """An auxiliary classifier: (N, in_channels, H, W) to (N, num_classes)."""

    def __init__(self, in_channels, num_classes, dropout=0.7, *, paper=False):
        super().__init__()
        self.conv = BasicConv2d(in_channels, 128, kernel_size=1, paper=paper)
        self.fc1 = nn.Linear(2048, 1024)
        self.fc2 = nn.Linear(1024, num_classes)
        self.relu = nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(p=dropout)
        self.pool = AvgPool2d(kernel_size=5, stride=3) if paper else None

    def forward(self, x: Tensor) -> Tensor:
        # The paper's windows give the linear layer's 4x4 from 14x14 (images of 224x224) alone.
        if self.pool is not None and x.shape[2:] == (14, 14):
            x = self.pool(x)
        else:
            x = adaptive_avg_pool2d(x, (4, 4))
        x = torch.flatten(self.conv(x), 1)
        return self.fc2(self.dropout(self.relu(self.fc1(x))))


class GoogLeNet(nn.Module):
    """Nine Inception blocks and two auxiliary classifiers.

    Args:
        num_classes: how many scores the network gives an image.
        aux_logits: have the auxiliary classifiers. In training the network then returns
            :class:`GoogLeNetOutputs`.
        transform_input: images come normalised by ImageNet's means and deviations; bring them into
            -1 to 1, which torchvision's weights were trained on. Three channels only.
        init_weights: normal of deviation 0.01, in the paper's form Kaiming's; False leaves torch's.
        dropout, dropout_aux: the part of the features that training leaves out before the last
            layer (None: 0.2, in the paper's form 0.4) and in the auxiliary classifiers.
        in_channels: 3 for colour images.
        paper: the paper's form: 5x5 convolutions, no BatchNorm, local response normalisation.
            6,998,552 parameters, 13,378,280 with the auxiliary classifiers.

    Raises:
        ValueError: a number is below 1, or ``transform_input`` with other than three channels.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        aux_logits: bool = True,
        transform_input: bool = False,
        init_weights: bool = True,
        *,
        dropout: float | None = None,
        dropout_aux: float = 0.7,
        in_channels: int = 3,
        paper: bool = False,
    ):
        super().__init__()
        check_at_least_one(num_classes=num_classes, in_channels=in_channels)
        if transform_input and in_channels != 3:
            raise ValueError(f"transform_input needs in_channels=3, but got {in_channels}")
        if dropout is None:
            dropout = 0.4 if paper else 0.2
        self.aux_logits = aux_logits
        self.transform_input = transform_input

        def pool(size):
            return MaxPool2d(size, stride=2, ceil_mode=True)

        def inception(*channels):
            return Inception(*channels, paper=paper)

        self.conv1 = BasicConv2d(in_channels, 64, kernel_size=7, stride=2, padding=3, paper=paper)
        # No parameters, so the keys stay torchvision's.
        self.maxpool1 = nn.Sequential(pool(3), local_response_norm()) if paper else pool(3)
        self.conv2 = BasicConv2d(64, 64, kernel_size=1, paper=paper)
        self.conv3 = BasicConv2d(64, 192, kernel_size=3, padding=1, paper=paper)
        self.maxpool2 = nn.Sequential(local_response_norm(), pool(3)) if paper else pool(3)
        self.inception3a = inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = pool(3)
        self.inception4a = inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = inception(528, 256, 160, 320, 32, 128, 128)
        self.maxpool4 = pool(3 if paper else 2)
        self.inception5a = inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = inception(832, 384, 192, 384, 48, 128, 128)
        self.aux1 = self.aux2 = None
        if aux_logits:
            self.aux1 = InceptionAux(512, num_classes, dropout_aux, paper=paper)
            self.aux2 = InceptionAux(528, num_classes, dropout_aux, paper=paper)
        self.avgpool = AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout(p=dropout)
        self.fc = nn.Linear(1024, num_classes)
        if init_weights:
            self._initialise(paper)

    def _initialise(self, paper):
        for layer in self.modules():
            if not isinstance(layer, nn.Conv2d | nn.Linear):
                continue
            if not paper:
                nn.init.trunc_normal_(layer.weight, mean=0.0, std=0.01, a=-2, b=2)
                continue
            # Nothing normalises between 21 layers: a deviation of 0.01 would leave no signal.
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)

    def remove_auxiliary_classifiers(self):
        """Leave the network's own classifier alone."""
        self.aux_logits, self.aux1, self.aux2 = False, None, None

    def forward(self, images: Tensor) -> Tensor | GoogLeNetOutputs:
        """Images (N, in_channels, H, W), of at least 15x15, to scores (N, num_classes); in training
        with auxiliary classifiers to :class:`GoogLeNetOutputs`."""
        if self.transform_input:
            images = _from_imagenets_to_half(images)
        x = self.maxpool1(self.conv1(images))
        x = self.maxpool2(self.conv3(self.conv2(x)))
        x = self.maxpool3(self.inception3b(self.inception3a(x)))
        x = self.inception4a(x)
        auxiliary = self.training and self.aux_logits
        aux1 = self.aux1(x) if auxiliary else None
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        aux2 = self.aux2(x) if auxiliary else None
        x = self.maxpool4(self.inception4e(x))
        x = self.avgpool(self.inception5b(self.inception5a(x)))
        x = self.fc(self.dropout(torch.flatten(x, 1)))
        return GoogLeNetOutputs(x, aux2, aux1) if auxiliary else x


def _from_imagenets_to_half(images: Tensor) -> Tensor:
    """Images normalised by ImageNet's numbers, as normalised by a mean and a deviation of 0.5."""
    means, deviations = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return torch.cat(
        [
            images[:, c : c + 1] * (deviation / 0.5) + (mean - 0.5) / 0.5
            for c, (mean, deviation) in enumerate(zip(means, deviations, strict=True))
        ],
        dim=1,
    )


@register
def googlenet(
    weights=None,
    progress: bool = True,
    *,
    paper: bool = False,
    aux_logits: bool | None = None,
    transform_input: bool | None = None,
    **config,
) -> GoogLeNet:
    """GoogLeNet (see :class:`GoogLeNet`), as torchvision's; with ``paper`` as in the paper.

    Args:
        weights, progress: as of :func:`fastconv.models.resnet50`; without ``paper`` only.
        aux_logits: None: without weights True, with weights False, since theirs are not trained.
        transform_input: None: True with weights, which were trained so.
        config: ``num_classes``, ``in_channels`` and whatever else :class:`GoogLeNet` takes.
    """
    if transform_input is not None:
        config["transform_input"] = transform_input
    if paper:
        pretrained.refuse_weights("googlenet(paper=True)", weights, config)
        return GoogLeNet(paper=True, aux_logits=aux_logits is not False, **config)
    weights = pretrained.requested("googlenet", weights, config)
    if weights is None:
        return GoogLeNet(aux_logits=aux_logits is not False, **config)
    # torchvision's state_dict has auxiliary classifiers, which nobody trained.
    model = GoogLeNet(**{"transform_input": True} | config | {"init_weights": False})
    pretrained.load(model, weights, progress)
    if aux_logits:
        warnings.warn("googlenet's auxiliary classifiers are not pretrained", stacklevel=2)
    else:
        model.remove_auxiliary_classifiers()
    return model
