"""Networks built from fastconv's layers, with torchvision's names where torchvision has them.

A model file holds one class and its constructors, uses ``fastconv.modules`` where torch.nn has
convolution, pooling or normalisation, and torch.nn for everything else. The same network out of
torch.nn's layers comes from :func:`fastconv.benchmarking.peers.torch_twin`, so a model need not
know that it will be compared.
"""

from fastconv.models.lenet import LeNet5, lenet5

__all__ = ["LeNet5", "lenet5"]
