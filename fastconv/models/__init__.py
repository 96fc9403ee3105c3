"""Networks built from fastconv's layers, with torchvision's names where torchvision has them.

A model file holds one class and its constructors, uses ``fastconv.modules`` where torch.nn has
convolution, pooling or normalisation, and torch.nn for everything else. A network that torchvision
has too takes its state_dict and its ``weights=``. The same network out of torch.nn's layers comes
from :func:`fastconv.benchmarking.peers.torch_twin`, so a model need not know that it will be
compared.
"""

from fastconv.models.alexnet import AlexNet, alexnet
from fastconv.models.googlenet import GoogLeNet, GoogLeNetOutputs, googlenet
from fastconv.models.lenet import LeNet5, lenet5
from fastconv.models.registry import get_model, list_models
from fastconv.models.resnet import (
    ResNet,
    resnet18,
    resnet34,
    resnet50,
    resnet101,
    resnet152,
)
from fastconv.models.simple import (
    FashionCNN,
    MnistCNN,
    SimpleCNN,
    fashion_cnn,
    mnist_cnn,
    simple_cnn,
)
from fastconv.models.summary import summary
from fastconv.models.vgg import (
    VGG,
    vgg11,
    vgg11_bn,
    vgg11_lrn,
    vgg13,
    vgg13_bn,
    vgg16,
    vgg16_bn,
    vgg16_c,
    vgg19,
    vgg19_bn,
)

__all__ = [
    "AlexNet",
    "FashionCNN",
    "GoogLeNet",
    "GoogLeNetOutputs",
    "LeNet5",
    "MnistCNN",
    "ResNet",
    "SimpleCNN",
    "VGG",
    "alexnet",
    "fashion_cnn",
    "get_model",
    "googlenet",
    "lenet5",
    "list_models",
    "mnist_cnn",
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "simple_cnn",
    "summary",
    "vgg11",
    "vgg11_bn",
    "vgg11_lrn",
    "vgg13",
    "vgg13_bn",
    "vgg16",
    "vgg16_bn",
    "vgg16_c",
    "vgg19",
    "vgg19_bn",
]
