"""The networks by name."""

import difflib

_CONSTRUCTORS = {}


def register(constructor):
    """Decorator: the network is known by the constructor's name."""
    _CONSTRUCTORS[constructor.__name__] = constructor
    return constructor


def list_models() -> list[str]:
    """The names of all networks, sorted."""
    return sorted(_CONSTRUCTORS)


def get_model(name: str, **config):
    """A network by its name.

    Args:
        name: one of :func:`list_models`, in capitals or not.
        config: the constructor's arguments: ``num_classes``, ``in_channels``, ``weights`` ...

    Raises:
        ValueError: no network has that name; the message has the names that are nearest.
        TypeError: the network has no such argument.
    """
    constructor = _CONSTRUCTORS.get(name.lower()) if isinstance(name, str) else None
    if constructor is None:
        names = list_models()
        near = difflib.get_close_matches(str(name).lower(), names, n=3, cutoff=0.5)
        hint = (
            f"did you mean {' or '.join(near)}?"
            if near
            else f"there are {', '.join(list_models())}"
        )
        raise ValueError(f"there is no network called {name!r}: {hint}")
    return constructor(**config)


def check_at_least_one(**values):
    """
    Raises:
        ValueError: a value is below 1; the message has its name.
    """
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, but got {value}")
