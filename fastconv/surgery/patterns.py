"""What the nodes of a traced graph are: activations, additions, BatchNorms, in-place changes."""

import operator

import torch
import torch.nn.functional as F
from torch import fx, nn

from fastconv import functional
from fastconv.modules import AdaptiveAvgPool2d, AvgPool2d, BatchNorm2d, Conv2d, MaxPool2d
from fastconv.modules.inference import FusedBatchNorm2d, FusedConv2d
from fastconv.modules.plain import ACTIVATIONS as MODULES
from fastconv.modules.plain import SLOPE, has_hooks, module_activation
from fastconv.surgery.tracing import BATCH_NORM_ACT, FOREIGN_NORMS, full_name

CONVOLUTIONS = (nn.Conv2d, Conv2d)
NORMS = (nn.BatchNorm2d, BatchNorm2d, nn.SyncBatchNorm)
MAX_POOLS = (nn.MaxPool2d, MaxPool2d)

ACTIVATIONS = {
    **MODULES,
    F.relu: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.silu: "silu",
    F.hardswish: "hardswish",
    torch.relu: "relu",
    torch.relu_: "relu",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    F.leaky_relu_: "leaky_relu",
    "relu": "relu",
    "relu_": "relu",
    "sigmoid": "sigmoid",
    "sigmoid_": "sigmoid",
}

ADDITIONS = (operator.add, torch.add, "add")
ADDITIONS_IN_PLACE = (operator.iadd, "add_", "__iadd__")

DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
STOCHASTIC_DEPTH = "torchvision.ops.stochastic_depth.stochastic_depth"
DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout)

# Calls of torch's functions that have a kernel of fastconv.
FUNCTIONS = {
    F.max_pool2d: functional.max_pool2d,
    torch.max_pool2d: functional.max_pool2d,
    F.avg_pool2d: functional.avg_pool2d,
    F.adaptive_avg_pool2d: functional.adaptive_avg_pool2d,
    F.conv2d: functional.conv2d,
    F.batch_norm: functional.batch_norm,
}

PARTS = (FusedConv2d, FusedBatchNorm2d)
# Modules and functions whose result shares no memory with what they are given.
FRESH_MODULES = (
    *CONVOLUTIONS,
    *NORMS,
    *MAX_POOLS,
    *(nn.AvgPool2d, AvgPool2d, nn.AdaptiveAvgPool2d, AdaptiveAvgPool2d),
    *(nn.Linear, nn.ConvTranspose2d, *PARTS),
)
FRESH_FUNCTIONS = (
    *(operator.add, operator.sub, operator.mul, operator.truediv, torch.add, torch.mul, torch.cat),
    *FUNCTIONS,
    *FUNCTIONS.values(),
)


def kind(node, modules):
    """What is called: a module's class, a function, a method's name; None for the other nodes."""
    if node.op == "call_module":
        return type(modules[node.target])
    return node.target if node.op in ("call_function", "call_method") else None


def label(node, modules):
    """How a report names what is called."""
    what = kind(node, modules)
    return getattr(what, "__name__", None) or str(what or node.op)


def activation(node, modules):
    """The kernels' name of an activation; None where the node is none of theirs."""
    what = kind(node, modules)
    try:
        name = ACTIVATIONS.get(what)
    except TypeError:  # not hashable
        return None
    if name is None or len(node.all_input_nodes) != 1 or "out" in node.kwargs:
        return None
    if node.op == "call_module":
        return module_activation(modules[node.target])
    if name == "leaky_relu":
        slope = node.args[1] if len(node.args) > 1 else node.kwargs.get("negative_slope", SLOPE)
        return name if slope == SLOPE else None
    return name


def is_identity(node, modules):
    """Whether the node hands on what it is given, as dropout does in evaluation."""
    what = kind(node, modules)
    if node.op == "call_module":
        module = modules[node.target]
        return does_nothing(module)
    if node.op != "call_function" or len(node.all_input_nodes) != 1:
        return False
    if what in DROPOUT_FUNCTIONS:
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("training", True)
        return training is False
    if full_name(what) == STOCHASTIC_DEPTH:
        training = node.args[3] if len(node.args) > 3 else node.kwargs.get("training", True)
        return training is False
    return False


def does_nothing(module):
    idle = type(module) is nn.Identity or (type(module) in DROPOUTS and not module.training)
    return idle and not has_hooks(module)


def has_modes(module):
    """Whether a layer that may be fused does something else in training."""
    return is_norm(module) or type(module) in DROPOUTS


def is_norm(module):
    return type(module) in NORMS or full_name(type(module)) in FOREIGN_NORMS


def norm_parts(module):
    """(activation's name or None, reason or "") of a BatchNorm that may hold one."""
    if full_name(type(module)) != BATCH_NORM_ACT:
        return None, ""
    if not does_nothing(module.drop):
        return None, f"drops by {type(module.drop).__name__}"
    if does_nothing(module.act):
        return None, ""
    name = module_activation(module.act)
    return name, "" if name else f"{type(module.act).__name__} is in no kernel"


def why_not_norm(node, module, channels=None):
    """Why a BatchNorm cannot be fused, behind a convolution of so many filters; empty if it can."""
    if len(node.args) != 1 or node.kwargs:
        return "BatchNorm is not called with one positional argument"
    if has_hooks(module):
        return "BatchNorm has hooks"
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
        return "BatchNorm is in training mode"
    if module.running_mean is None or module.running_var is None:
        return "BatchNorm tracks no statistics"
    if type(module).__module__.startswith("torch.nn.utils"):
        return "BatchNorm is parametrized"
    if channels is not None and len(module.running_mean) != channels:
        return f"BatchNorm has {len(module.running_mean)} channels, not {channels}"
    return norm_parts(module)[1]


def addition(node, modules):
    """The two operands of an addition, else None. The first is changed where it is in place."""
    what = kind(node, modules)
    if node.op == "call_module" or what not in (*ADDITIONS, *ADDITIONS_IN_PLACE):
        return None
    if len(node.args) != 2 or node.kwargs or not all(isinstance(a, fx.Node) for a in node.args):
        return None
    return node.args


def is_in_place_addition(node):
    return node.target in ADDITIONS_IN_PLACE


def changed_by(node, modules):
    """The nodes whose tensors this one may change in place."""
    if node.op == "call_module":
        module = modules[node.target]
        # What fuse() has made reads its input alone, whatever it was made of.
        changes = type(module) not in PARTS and any(map(_may_change_input, module.modules()))
        return node.all_input_nodes if changes else []
    if node.op == "call_method":
        in_place = node.target.endswith("_") and not node.target.endswith("__")
        return node.all_input_nodes if in_place or node.target.startswith("__i") else []
    if node.op != "call_function":
        return []
    name = getattr(node.target, "__name__", "_")
    home = getattr(node.target, "__module__", None) or "torch"
    in_place = name.endswith("_") or node.kwargs.get("inplace") or "out" in node.kwargs
    in_place = in_place or (home == "_operator" and _is_assigning(name))
    if home == "torch.nn.functional" and True in node.args[1:]:
        in_place = True  # `inplace` given by position, perhaps
    known = home.startswith(("torch", "_operator", "builtins", "math", "fastconv", "collections"))
    return node.all_input_nodes if in_place or not known else []


def _may_change_input(module):
    known = type(module).__module__.startswith(("torch.nn.", "fastconv."))
    return not known or getattr(module, "inplace", False) or has_hooks(module)


def _is_assigning(name):
    return name == "setitem" or (name.startswith("i") and hasattr(operator, name[1:]))


def origins(node, modules, found=None):
    """The nodes whose memory a node's tensor may share: its own, and what it may be a view of. All
    inputs and attributes of the model count as one memory."""
    found = set() if found is None else found
    if node in found:
        return found
    found.add("outside" if node.op in ("placeholder", "get_attr") else node)
    if not is_fresh(node, modules):
        for source in node.all_input_nodes:
            origins(source, modules, found)
    return found


def is_fresh(node, modules):
    """Whether a node's tensor is surely new memory."""
    what = kind(node, modules)
    if node.op == "call_module":
        if activation(node, modules):
            return not getattr(modules[node.target], "inplace", False)
        return what in FRESH_MODULES
    if node.op == "call_function":
        if activation(node, modules):
            return not changed_by(node, modules)
        return what in FRESH_FUNCTIONS and not changed_by(node, modules)
    return False
