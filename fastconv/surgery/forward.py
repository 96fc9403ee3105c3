"""The fused forward of a module: code written by torch.fx, kept beside the module's own.

It is set on the instance, so that the module keeps its class, its tree, its state_dict keys, its
other methods and its hooks. The code reaches every layer and tensor through the module at each
call: what ``.to()``, ``load_state_dict`` or an assignment changes, it sees.
"""

import contextlib
import importlib
import inspect
import types
from dataclasses import dataclass, field

import torch
from torch import nn


@dataclass
class Arguments:
    """The arguments of a forward.

    Attributes:
        positional: the names of those that may be given by position.
        required: the names of those that must be given: the graph takes them.
        defaults: the others, and the values that the graph was traced with.
    """

    positional: list = field(default_factory=list)
    required: list = field(default_factory=list)
    defaults: dict = field(default_factory=dict)

    def bind(self, args, kwargs):
        """The arguments of a call by name; None where it is not the call that was traced."""
        given = dict(zip(self.positional, args, strict=False))
        if len(args) > len(self.positional) or given.keys() & kwargs.keys():
            return None  # the owner's forward says what is wrong
        given.update(kwargs)
        for name, value in given.items():
            if name not in self.required and value is not self.defaults.get(name, self):
                return None
        return given if all(name in given for name in self.required) else None


class Code:
    """A graph as torch.fx writes it down: a function of the fused forward and the arguments."""

    def __init__(self, graph, name):
        code = graph.python_code("self")
        self.name, self.source = name, code.src
        self.names = dict(code.globals)
        self._compile()

    def _compile(self):
        namespace = dict(self.names)
        exec(compile(self.source, f"<fused {self.name}>", "exec"), namespace)
        self.function = namespace["forward"]

    def __getstate__(self):
        # A function made by exec cannot be pickled, nor can a module of Python.
        state = {k: v for k, v in vars(self).items() if k != "function"}
        state["names"] = {
            name: _Import(value.__name__) if isinstance(value, types.ModuleType) else value
            for name, value in self.names.items()
        }
        return state

    def __setstate__(self, state):
        vars(self).update(state)
        self.names = {
            name: value.load() if isinstance(value, _Import) else value
            for name, value in self.names.items()
        }
        self._compile()


class FusedForward:
    """Calls the fused code where it stands for the module's own, else the module's own.

    Args:
        owner: the module whose forward this is.
        graph: what to compute. Targets begin with "owner." or "parts.".
        parts: the fused layers by name.
        fixed: modules whose evaluation mode the graph takes for granted.
        arguments: those of the owner's forward, as the tracer found them.
        channels_last: (another graph, an object whose ``holds(values)`` says for which calls), or
            None.
    """

    def __init__(self, owner, graph, parts, fixed, arguments, channels_last=None):
        self.owner = owner
        self.parts = nn.ModuleDict(parts)
        self.fixed = list(dict.fromkeys(fixed))
        self.arguments = arguments
        self.code = Code(graph, type(owner).__name__)
        self.condition = None
        if channels_last is not None:
            graph, self.condition = channels_last
            self.channels_last = Code(graph, f"{type(owner).__name__} in channels_last")
        self._sign()

    def _sign(self):
        # A function of its own, since torch.export asks it for the names of the arguments.
        plain = FusedForward.forward
        call = types.FunctionType(plain.__code__, plain.__globals__, "forward")
        call.__signature__ = inspect.signature(type(self.owner).forward)
        self.forward = types.MethodType(call, self)

    def __getstate__(self):
        return {k: v for k, v in vars(self).items() if k != "forward"}

    def __setstate__(self, state):
        vars(self).update(state)
        self._sign()

    def forward(self, *args, **kwargs):
        values = self._values(args, kwargs)
        if values is None:
            return type(self.owner).forward(self.owner, *args, **kwargs)
        other = self.condition is not None and self.condition.holds(values)
        return (self.channels_last if other else self.code).function(self, *values)

    def _values(self, args, kwargs):
        """The graph's arguments; None where the call is not the one that was traced."""
        for module in self.fixed:
            if module.training:
                return None
        required = self.arguments.required
        if kwargs or len(args) != len(required):
            given = self.arguments.bind(args, kwargs)
            if given is None:
                return None
            args = [given[name] for name in required]
        # Traced as tensors. Somebody else's proxies, even those that say that they are tensors, are
        # shown the owner's code.
        if not all(issubclass(type(value), torch.Tensor) for value in args):
            return None
        return args


class _Import:
    """A module of Python, by name."""

    def __init__(self, name):
        self.name = name

    def load(self):
        return importlib.import_module(self.name)


def install(module, made):
    # On the instance, where calls look before the class. A method, as torch.export expects.
    vars(module)["forward"] = made.forward


def remove(model):
    """Takes every fused forward off again; returns (module, its fused forward) of each."""
    found = []
    for module in model.modules():
        set_here = vars(module).get("forward")
        if isinstance(getattr(set_here, "__self__", None), FusedForward):
            del module.forward
            found.append((module, set_here.__self__))
    return found


@contextlib.contextmanager
def removed(model):
    """For a while the layers are called one by one, and hooks on them see it."""
    found = remove(model)
    try:
        yield
    finally:
        for module, made in found:
            install(module, made)
