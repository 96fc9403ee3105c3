"""Our networks and torchvision's of the same name: parameters, sizes, weights on no device."""

import torch

from fastconv import models
from zoo import torchvision

# Parameters, as the papers' authors, torchvision or Caffe count them; ours to compute in the last.
PARAMETERS = {
    "alexnet": 61_100_840,
    "googlenet": 13_004_888,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "vgg11": 132_863_336,
    "vgg11_bn": 132_868_840,
    "vgg13": 133_047_848,
    "vgg13_bn": 133_053_736,
    "vgg16": 138_357_544,
    "vgg16_bn": 138_365_992,
    "vgg19": 143_667_240,
    "vgg19_bn": 143_678_248,
}
OTHERS = {
    "vgg11_lrn": 132_863_336,
    "vgg16_c": 133_638_952,
    "lenet5": 61_706,
    "simple_cnn": 10 * 16 * 28 * 28 + 10 + 16 * 9 + 16,
    "mnist_cnn": 320 + 18_496 + 200_768 + 650,
    "fashion_cnn": 160 + 4_640 + 131_136 + 650,
}
SMALL = {"lenet5": 28, "simple_cnn": 28, "mnist_cnn": 28, "fashion_cnn": 32}


def on_meta(name, **config):
    """Neither memory nor time for weights."""
    with torch.device("meta"):
        return models.get_model(name, **config)


def theirs(name, **config):
    if name == "googlenet":
        config.setdefault("init_weights", True)
    return getattr(torchvision.models, name)(**config)


def count(model):
    return sum(p.numel() for p in model.parameters())


def flat(output):
    return torch.cat(list(output)) if isinstance(output, tuple) else output
