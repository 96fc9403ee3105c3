"""convert and revert: a module changes its class, and nothing else.

fastconv's layers are subclasses of torch.nn's with no state of their own. Changing ``__class__``
keeps parameters, buffers, hooks and their handles, flags, further attributes, names and sharing by
construction; a module made anew would have to be given each of them.
"""

import copy

import torch
from torch import nn
from torch.nn.utils import parametrize

from fastconv.modules import AdaptiveAvgPool2d, AvgPool2d, BatchNorm2d, Conv2d, MaxPool2d
from fastconv.surgery import forward, reporting

OURS = {
    nn.Conv2d: Conv2d,
    nn.MaxPool2d: MaxPool2d,
    nn.AvgPool2d: AvgPool2d,
    nn.AdaptiveAvgPool2d: AdaptiveAvgPool2d,
    nn.BatchNorm2d: BatchNorm2d,
}
TORCHS = {ours: plain for plain, ours in OURS.items()}


def convert(model, *, inplace=False):
    """Makes every torch.nn layer that fastconv has into fastconv's.

    Taken over is each module whose type is exactly ``nn.Conv2d``, ``nn.MaxPool2d``,
    ``nn.AvgPool2d``, ``nn.AdaptiveAvgPool2d`` or ``nn.BatchNorm2d``, ``model`` itself included, and
    such a module under ``torch.nn.utils.parametrizations``. Parameters, keys, buffers, hooks, flags
    and sharing stay. Left alone are subclasses (they may compute something else), TorchScript, and
    modules with a ``qconfig``, which quantisation looks up by their exact type.

    Args:
        model: any ``nn.Module``, wrapped by DistributedDataParallel or torch.compile too.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The copy, or ``model``.

    Raises:
        TypeError: for what is not an ``nn.Module``, or is TorchScript.
        RuntimeError: for a model that cannot be copied.
    """
    model = checked_copy("convert", model, inplace)
    for module in model.modules():
        if not left_by_convert(module):
            _change_class(module, OURS)
    return model


def revert(model, *, inplace=False):
    """Undoes :func:`convert` and :func:`fuse`: fastconv's layers become torch.nn's again.

    Args, Returns, Raises: as of :func:`convert`. Subclasses of fastconv's layers are left alone.
    """
    model = checked_copy("revert", model, inplace)
    forward.remove(model)
    reporting.remove(model)
    for module in model.modules():
        _change_class(module, TORCHS)
    return model


def left_by_convert(module):
    """Why convert() leaves a module of a class it knows; empty where it does not."""
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    if getattr(module, "qconfig", None) is not None:
        return "has a qconfig: quantisation looks for torch.nn's own classes"
    return ""


def _change_class(module, classes):
    cls = type(module)
    if cls in classes:
        module.__class__ = classes[cls]
    elif parametrize.is_parametrized(module) and cls.__bases__[0] in classes:
        # A parametrized module has a class of its own, which copies of it share: make another.
        body = {k: v for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(cls.__name__, (classes[cls.__bases__[0]],), body)


def checked_copy(name, model, inplace):
    """``model`` where inplace, else a copy; refuses what surgery cannot work on."""
    if not isinstance(model, nn.Module):
        kind = model.__name__ if isinstance(model, type) else type(model).__name__
        what = f"the class {kind}" if isinstance(model, type) else f"a {kind}"
        raise TypeError(f"{name}(): model must be a torch.nn.Module, but got {what}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{name}(): {type(model).__name__} is compiled by TorchScript, whose code is fixed: "
            f"{name} the model before it is traced"
        )
    return model if inplace else _copy(name, model)


def _copy(name, model):
    # The old weight_norm and spectral_norm leave a computed weight on the module, which deepcopy
    # refuses. It is computed again at each call.
    computed = [
        value
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    ]
    try:
        return copy.deepcopy(model, {id(t): t.detach().clone() for t in computed})
    except Exception as error:
        raise RuntimeError(
            f"{name}(): {type(model).__name__} cannot be copied ({error}): "
            "pass inplace=True to change the model itself"
        ) from error
