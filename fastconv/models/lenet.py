"""LeNet-5 for 28x28 images, in the original's form and in today's."""

from torch import Tensor, nn

from fastconv.models.registry import check_at_least_one, register
from fastconv.modules import AvgPool2d, Conv2d, MaxPool2d

# form -> (pooling, activation)
_FORMS = {"modern": (MaxPool2d, nn.ReLU), "classic": (AvgPool2d, nn.Sigmoid)}


class LeNet5(nn.Module):
    """Two convolutions, two poolings, three linear layers: 61,706 parameters for ten classes.

    ==============  =====================  ==============
    layer           parameters             output
    ==============  =====================  ==============
    input                                  N, C,  28, 28
    convolution     5x5, padding 2         N, 6,  28, 28
    pooling         2x2, stride 2          N, 6,  14, 14
    convolution     5x5                    N, 16, 10, 10
    pooling         2x2, stride 2          N, 16, 5,  5
    linear          400 -> 120             N, 120
    linear          120 -> 84              N, 84
    linear          84 -> num_classes      N, num_classes
    ==============  =====================  ==============

    Args:
        num_classes: how many scores the network gives an image.
        in_channels: 1 for grey images, 3 for colour.
        form: ``"modern"``: ReLU and max pooling. ``"classic"``: sigmoid and average pooling,
            with Xavier's initialisation scaled for sigmoids.

    Raises:
        ValueError: ``form`` is neither, or a number is below 1.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 1, form: str = "modern"):
        super().__init__()
        if form not in _FORMS:
            raise ValueError(f'form must be "modern" or "classic", but got {form!r}')
        check_at_least_one(num_classes=num_classes, in_channels=in_channels)
        pool, activation = _FORMS[form]
        self.features = nn.Sequential(
            Conv2d(in_channels, 6, kernel_size=5, padding=2),
            activation(),
            pool(kernel_size=2, stride=2),
            Conv2d(6, 16, kernel_size=5),
            activation(),
            pool(kernel_size=2, stride=2),
        )
        self.classifier = nn.Sequential(
            nn.Flatten(),
            nn.Linear(16 * 5 * 5, 120),
            activation(),
            nn.Linear(120, 84),
            activation(),
            nn.Linear(84, num_classes),
        )
        if form == "classic":
            for layer in (*self.features, *self.classifier):
                if isinstance(layer, (nn.Conv2d, nn.Linear)):
                    # A sigmoid's slope is at most 1/4; without the 4 each layer passes on a quarter
                    # of the gradient, and some seeds never leave 10 % accuracy.
                    nn.init.xavier_uniform_(layer.weight, gain=4)
                    nn.init.zeros_(layer.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Images (N, in_channels, 28, 28) to scores (N, num_classes)."""
        return self.classifier(self.features(images))


@register
def lenet5(num_classes: int = 10, in_channels: int = 1, form: str = "modern") -> LeNet5:
    """LeNet-5 (see :class:`LeNet5`)."""
    return LeNet5(num_classes, in_channels, form)
