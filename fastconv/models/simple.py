"""Small networks that tutorials begin with."""

from torch import Tensor, nn

from fastconv.models.registry import check_at_least_one, register
from fastconv.modules import Conv2d, MaxPool2d


class _Classifier(nn.Module):
    """Convolutions, then linear layers."""

    def __init__(self, features: list[nn.Module], classifier: list[nn.Module]):
        super().__init__()
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Flatten(), *classifier)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, in_channels, H, W) to scores (N, num_classes)."""
        return self.classifier(self.features(images))


class SimpleCNN(_Classifier):
    """One convolution and one linear layer, for 28x28 images.

    Args:
        num_classes: how many scores the network gives an image.
        in_channels: 1 for grey images, 3 for colour.

    Raises:
        ValueError: a number is below 1.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1):
        check_at_least_one(num_classes=num_classes, in_channels=in_channels)
        super().__init__(
            [Conv2d(in_channels, 16, kernel_size=3, padding=1), nn.ReLU()],
            [nn.Linear(16 * 28 * 28, num_classes)],
        )


class MnistCNN(_Classifier):
    """Two convolutions, two poolings, two linear layers, for 28x28 images.

    Arguments as of :class:`SimpleCNN`.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1):
        check_at_least_one(num_classes=num_classes, in_channels=in_channels)
        super().__init__(
            _two_convolutions(in_channels, 32, 64),
            [nn.Linear(64 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, num_classes)],
        )


class FashionCNN(_Classifier):
    """Two convolutions, two poolings, two linear layers with dropout, for 32x32 images.

    Args:
        num_classes, in_channels: as of :class:`SimpleCNN`.
        dropout: the part of the 64 features that training leaves out.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, dropout: float = 0.5):
        check_at_least_one(num_classes=num_classes, in_channels=in_channels)
        super().__init__(
            _two_convolutions(in_channels, 16, 32),
            [
                nn.Linear(32 * 8 * 8, 64),
                nn.ReLU(),
                nn.Dropout(dropout),
                nn.Linear(64, num_classes),
            ],
        )


def _two_convolutions(in_channels, first, second):
    return [
        Conv2d(in_channels, first, kernel_size=3, padding=1),
        nn.ReLU(),
        MaxPool2d(kernel_size=2),
        Conv2d(first, second, kernel_size=3, padding=1),
        nn.ReLU(),
        MaxPool2d(kernel_size=2),
    ]


@register
def simple_cnn(num_classes: int = 10, in_channels: int = 1) -> SimpleCNN:
    """One convolution, one linear layer (see :class:`SimpleCNN`)."""
    return SimpleCNN(num_classes, in_channels)


@register
def mnist_cnn(num_classes: int = 10, in_channels: int = 1) -> MnistCNN:
    """The network of MNIST tutorials (see :class:`MnistCNN`)."""
    return MnistCNN(num_classes, in_channels)


@register
def fashion_cnn(num_classes: int = 10, in_channels: int = 1, dropout: float = 0.5) -> FashionCNN:
    """The network of Fashion-MNIST tutorials (see :class:`FashionCNN`)."""
    return FashionCNN(num_classes, in_channels, dropout)
