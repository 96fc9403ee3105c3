"""torchvision's weights for networks that torchvision has."""

import importlib
import warnings

from torch import nn


def build(name, network, weights, progress, config, *, when_loaded=None) -> nn.Module:
    """network(**config), with torchvision's weights where they are asked for.

    Args:
        name, weights, config: as of :func:`requested`.
        network: what is called to make the network.
        progress: show the download's progress on stderr.
        when_loaded: arguments of `network` where weights are loaded.
    """
    weights = requested(name, weights, config)
    if weights is None:
        return network(**config)
    model = network(**config | (when_loaded or {}))
    load(model, weights, progress)
    return model


def requested(name, weights, config):
    """The member of torchvision's enum that is asked for, or None.

    Args:
        name: the constructor's, as torchvision has it.
        weights: None; a member of torchvision's enum of this network; its name, as "DEFAULT",
            "IMAGENET1K_V1" or "ResNet50_Weights.IMAGENET1K_V2". True, as in the old spelling, is
            "IMAGENET1K_V1", with a warning.
        config: arguments of the network. An old ``pretrained``, which is taken out of them, stands
            for `weights`.

    Raises:
        ImportError: weights are asked for, and torchvision cannot be imported.
        TypeError: `weights` is something else, or belongs to another network.
        ValueError: there are no such weights, or they do not fit ``num_classes`` or
            ``in_channels``.
    """
    weights = _find(name, _modern_spelling(name, weights, config))
    if weights is not None:
        categories = weights.meta["categories"]
        if categories is not None:  # None: weights of the features alone
            _check_fit(weights, config, "num_classes", len(categories))
        _check_fit(weights, config, "in_channels", 3)
    return weights


def load(model, weights, progress):
    """Downloads the weights, unless they are there, and loads them strictly."""
    model.load_state_dict(weights.get_state_dict(progress=progress, check_hash=True))


def refuse_weights(name, weights, config):
    """For a variant that torchvision does not have.

    Raises:
        ValueError: weights are asked for.
    """
    if weights or config.pop("pretrained", False):
        raise ValueError(f"{name} has no pretrained weights: torchvision does not have it")


def _modern_spelling(name, weights, config):
    """What `pretrained`, or a bool as `weights`, would be written as today."""
    old = None
    if "pretrained" in config:
        old, how = config.pop("pretrained"), "pretrained"
        if weights is not None:
            raise TypeError(f"{name}: give weights or pretrained, not both")
    elif isinstance(weights, bool):
        old, how = weights, "a bool for weights"
    if old is None:
        return weights
    new = "IMAGENET1K_V1" if old else None
    warnings.warn(
        f"{name}: {how} is deprecated, as it is in torchvision: write weights={new!r}"
        + (', or weights="DEFAULT" for the best there are' if old else ""),
        stacklevel=5,
    )
    return new


def _find(name, weights):
    if weights is None:
        return None
    members = _torchvision_models(name).get_model_weights(name)
    if isinstance(weights, members):
        return weights
    if not isinstance(weights, str):
        raise TypeError(
            f"{name}: weights must be None, a name, or a member of {members.__name__}, "
            f"but got {weights!r}"
        )
    short = weights.removeprefix(f"{members.__name__}.")
    if short not in members.__members__:
        raise ValueError(
            f"{name} has no weights called {weights!r}: there are {', '.join(members.__members__)}"
        )
    return members[short]


def _torchvision_models(name):
    try:
        return importlib.import_module("torchvision.models")
    except ImportError as error:
        reason = str(error)
    except Exception as error:  # built for another torch, it raises what it likes
        reason = f"{type(error).__name__}: {error}"
    raise ImportError(
        f"the weights of {name} come from torchvision, which cannot be imported "
        f"({' '.join(reason.split())})"
    )


def _check_fit(weights, config, argument, expected):
    given = config.get(argument, expected)
    if given != expected:
        raise ValueError(f"{argument} must be {expected} for {weights!r}, but got {given}")
