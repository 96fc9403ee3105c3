"""What is known of somebody's modules: whether a call is their class's forward and no more, and
which activation they are."""

import torch.nn.functional as F
from torch import nn

# What conv_bn_relu's activations are as modules.
ACTIVATIONS = {
    nn.ReLU: "relu",
    nn.ReLU6: "relu6",
    nn.LeakyReLU: "leaky_relu",
    nn.SiLU: "silu",
    nn.Hardswish: "hardswish",
    nn.Sigmoid: "sigmoid",
}
SLOPE = 0.01  # of leaky ReLU, in the kernels


def has_hooks(module):
    """Whether a call of the module does anything else than its class's forward. Weight norm and
    pruning are hooks; a forward of the instance's own may do anything."""
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def module_activation(module):
    """The kernels' name of an activation module; None where it is none of theirs."""
    name = ACTIVATIONS.get(type(module))
    if name is None or has_hooks(module):
        return None
    return None if name == "leaky_relu" and module.negative_slope != SLOPE else name


def activate(z, name):
    """The activation that the kernels call so, of a tensor by itself."""
    return z if name == "none" else getattr(F, name)(z)
