"""How each network is trained where nothing else is said: optimizers, schedules, first guesses."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import nn

from fastconv.training.loop import one_cycle

# What remains of the learning rate when this share of all steps is done.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "one-cycle": one_cycle,
}
# The learning rate where neither the user nor the recipe gives one.
OPTIMIZERS = {"sgd": 0.01, "adam": 1e-3, "adamw": 1e-3}
# So much higher may one-cycle's rate be: it is there for a moment.
ONE_CYCLE_PEAK = 4


@dataclass(frozen=True)
class Defaults:
    """What the options of `fastconv train` are where they are not given.

    `statistics` are the mean and deviation that pixels in 0..1 are normalised by, None for the
    data's own; `image_size` None means the data's own; `flip` mirrors images at random.
    """

    optimizer: str = "adam"
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 0.0
    schedule: str = "constant"
    batch_size: int = 64
    epochs: int = 10
    image_size: int | None = None
    statistics: tuple[float, float] | None = None
    flip: bool = False


_LARGE = {"optimizer": "sgd", "epochs": 90, "image_size": 224}

# The first pattern that a network's name matches counts. Learning rates of the large networks are
# their papers', divided as their batches are.
_DEFAULTS = {
    "lenet5": Defaults(image_size=28),
    "simple_cnn": Defaults(image_size=28),
    "mnist_cnn": Defaults("sgd", 1e-3, epochs=5, image_size=28, statistics=(0.5, 0.5)),
    "fashion_cnn": Defaults(batch_size=128, image_size=32, statistics=(0.286, 0.353), flip=True),
    "resnet*": Defaults(lr=0.025, weight_decay=1e-4, **_LARGE),
    "alexnet": Defaults(lr=0.005, weight_decay=5e-4, **_LARGE),
    "vgg*": Defaults(lr=0.0025, weight_decay=5e-4, **_LARGE),
    "googlenet": Defaults(lr=0.0025, weight_decay=2e-4, **_LARGE),
}


def defaults(model: str) -> Defaults:
    """The defaults for a network of this name."""
    found = (value for pattern, value in _DEFAULTS.items() if fnmatchcase(model, pattern))
    return next(found, Defaults())


def make_optimizer(
    model: nn.Module, name: str, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of that name over all parameters that learn."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum=momentum, weight_decay=weight_decay)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name]
    return kind(parameters, lr, weight_decay=weight_decay)
