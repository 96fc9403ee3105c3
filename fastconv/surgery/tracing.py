"""Tracing a module into a graph by torch.fx, or finding out why that would not be the same.

torch.fx runs a forward once, with proxies, and writes down what they meet. Whatever else the
forward does happens at that one time and is lost. Here such a forward is noticed: the innermost
module that has it becomes a single node of the graph, with the reason, and is called as it is.
"""

import collections
import copy
import inspect
import operator
import sys
from collections import OrderedDict

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastconv.modules.plain import has_hooks
from fastconv.surgery.forward import Arguments

# Their subclasses are called, not looked into: they stand for one operation.
LAYERS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, _BatchNorm)
# Classes of other libraries that are a BatchNorm of fixed statistics, by name: nobody else has to
# install them. timm's holds a dropout and an activation that come after.
BATCH_NORM_ACT = "timm.layers.norm_act.BatchNormAct2d"
FOREIGN_NORMS = ("torchvision.ops.misc.FrozenBatchNorm2d", BATCH_NORM_ACT)
# torch.fx's names of what is no tensor.
SIZES = ("size", "dim", "numel", "stride", "item", "tolist", "get_device", "element_size")


class Untraceable(Exception):
    """A forward that torch.fx would misread; the message says why."""


class TensorProxy(fx.Proxy):
    """A proxy that ``isinstance(x, torch.Tensor)`` takes for the tensor that it stands for."""

    _is_param = _is_buffer = False  # isinstance(x, nn.Parameter), nn.Buffer ask

    @property
    def __class__(self):
        asking = sys._getframe(1).f_globals.get("__name__", "")
        if self.node.meta.get("unknown") and not asking.startswith(("torch.fx", __name__)):
            raise Untraceable(f"its forward asks for the type of what {self.node} returns")
        return torch.Tensor

    def __setitem__(self, index, value):
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _in_place(function):
    # torch.fx would write x += y down as x = x + y, which other names of the tensor do not see.
    def assign(self, other):
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return assign


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"):
    setattr(TensorProxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


class Tracer(fx.Tracer):
    """fx.Tracer with fastconv's and torch.nn's layers, and whatever it cannot trace, as leaves.

    After :meth:`trace`, ``opaque`` maps each module that was not looked into, though it is not a
    plain layer, to the reason, and ``through`` lists those that were.
    """

    proxy_buffer_attributes = True  # a buffer's value is not the code's: it may change

    def __init__(self):
        super().__init__()
        self.opaque = {}
        self.through = []

    def trace(self, root, concrete_args=None):
        self.mode = _mode()
        self.known = {id(t) for m in root.modules() for t in _tensors(m)}
        before = {m: _attributes(m) for m in root.modules()}
        try:
            graph = super().trace(root, concrete_args)
        finally:
            changed = ", ".join(filter(None, [_restore(m, b) for m, b in before.items()]))
        if changed:
            raise Untraceable(f"its forward changes its own {changed}")
        graph.lint()  # a forward that was given up may have left its values in somebody's list
        self.through.append(root)
        return graph

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        # No cache: the node that it remembers may have been erased with a forward given up.
        return super().getattr(attr, attr_val, {})

    def create_args_for_root(self, root_fn, is_module, concrete_args=None):
        """Proxies for the arguments that must be given; the others have the values they default to,
        on which forwards branch."""
        self.arguments = Arguments()
        for p in list(inspect.signature(root_fn).parameters.values())[1:]:
            if p.kind is not p.KEYWORD_ONLY:
                self.arguments.positional.append(p.name)
            if p.default is not p.empty:
                self.arguments.defaults[p.name] = p.default
            elif p.kind is p.POSITIONAL_OR_KEYWORD:
                self.arguments.required.append(p.name)
            else:
                raise Untraceable(f"its forward takes {p}")
        names = self.arguments.required
        return root_fn, [self.root, *(self.create_proxy("placeholder", n, (), {}) for n in names)]

    def is_leaf_module(self, m, module_qualified_name):
        return _is_layer(m)

    def call_module(self, m, forward, args, kwargs):
        path = self.path_of_module(m)
        reason = self.opaque.get(m) or why_not_to_look_into(m, self.root)
        if not reason and self.is_leaf_module(m, path):
            return self.create_proxy("call_module", path, args, kwargs)
        if not reason:
            last, before, through = self._last(), _attributes(m), len(self.through)
            try:
                result = forward(*args, **kwargs)
                changed = _restore(m, before)
                if not changed:
                    self.through.append(m)
                    return result
                reason = f"its forward changes its own {changed}"
            except Exception as error:  # whatever a forward raises when it meets a proxy
                _restore(m, before)
                reason = one_line(error)
            self._erase_after(last)
            del self.through[through:]
        self.opaque[m] = reason
        result = self.create_proxy("call_module", path, args, kwargs)
        result.node.meta["unknown"] = not _is_layer(m)
        return result

    def _last(self):
        return next(iter(reversed(self.graph.nodes)), None)

    def _erase_after(self, last):
        for node in reversed(list(self.graph.nodes)):
            if node is last:
                break
            self.graph.erase_node(node)

    def proxy(self, node):
        node.meta["tensor"] = _is_tensor(node)
        return TensorProxy(node, self) if node.meta["tensor"] else fx.Proxy(node, self)

    def create_node(self, kind, target, args, kwargs, name=None, type_expr=None):
        if _mode() != self.mode:
            raise Untraceable("its forward switches gradients or autocast")
        return super().create_node(kind, target, args, kwargs, name, type_expr)

    def create_arg(self, a):
        if isinstance(a, fx.Proxy):
            return a.node
        if type(a) is OrderedDict:  # torch.fx would make a dict of it
            items = [(key, self.create_arg(value)) for key, value in a.items()]
            return self.create_node("call_function", OrderedDict, (items,), {})
        if isinstance(a, dict) and type(a) is not dict:
            raise Untraceable(f"its forward makes a {type(a).__name__}")
        if isinstance(a, torch.Tensor) and id(a) not in self.known:
            raise Untraceable("its forward makes a tensor that depends on none of its inputs")
        return super().create_arg(a)


def why_not_to_look_into(module, root=None):
    """What forbids to replace a call of a module by what its forward does; empty where nothing."""
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    if "forward" in vars(module):
        return "its forward has been replaced"
    if _is_layer(module):
        return ""  # a leaf in any case
    if has_hooks(module):
        return "has hooks"
    if root is not None and module.training != root.training:
        return "in training mode"
    return ""


def why_not_to_trace(module):
    """What forbids to give a module a forward made of its graph; empty where nothing."""
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    if "forward" in vars(module):
        return "its forward has been replaced"
    if type(module).__module__.startswith("torch.") and not isinstance(module, nn.Sequential):
        return "torch's own"
    if module.training:
        return "in training mode"
    return ""


def one_line(error):
    """An error as a reason: its first sentence, or its type."""
    text = str(error).strip().split("\n")[0].split(". ")[0][:120]
    return f"torch.fx: {text}" if not isinstance(error, Untraceable) else text


def full_name(what):
    """Of a class or function; of anything else, nothing that one could have."""
    return f"{getattr(what, '__module__', '')}.{getattr(what, '__name__', '')}"


def _is_layer(module):
    if isinstance(module, LAYERS) or full_name(type(module)) in FOREIGN_NORMS:
        return True
    home = ("torch.nn.", "torch.ao.", "fastconv.modules.")  # parametrize's classes are torch.nn's
    return type(module).__module__.startswith(home) and not isinstance(module, nn.Sequential)


def _is_tensor(node):
    """Whether a node's value is a tensor, as far as code asks; sizes and what is computed of them
    are not."""
    if node.op == "call_method":
        return node.target not in SIZES
    if node.op == "call_function" and node.target.__module__ in ("_operator", "math", "builtins"):
        return node.target is not getattr and any(
            a.meta.get("tensor") for a in node.all_input_nodes
        )
    return True


def _mode():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
    )


def _tensors(module):
    yield from module._parameters.values()
    yield from module._buffers.values()
    yield from (value for value in vars(module).values() if isinstance(value, torch.Tensor))


CONTAINERS = (list, dict, set, collections.deque)


def _attributes(module):
    return {
        **vars(module),
        "_buffers": dict(module._buffers),
        "": {k: (v, copy.copy(v)) for k, v in vars(module).items() if isinstance(v, CONTAINERS)},
    }


def _restore(module, before):
    """Undoes what a forward has assigned; returns the names."""
    after = _attributes(module)
    buffers = {k for k, v in after["_buffers"].items() if before["_buffers"].get(k) is not v}
    names = {
        k for k, v in after.items() if k not in ("", "_buffers") and before.get(k, vars) is not v
    }
    filled = {k for k, kept in before[""].items() if k != "_buffers" and not _same(*kept)}
    for name in filled:
        now, then = before[""][name]
        now.clear()
        (now.update if isinstance(now, dict | set) else now.extend)(then)
    for name in names:
        if name in before:
            vars(module)[name] = before[name]
        else:
            del vars(module)[name]
    for name in buffers:
        module._buffers[name] = before["_buffers"].get(name)
    return ", ".join(sorted(names | buffers | filled))


def _same(now, then):
    def items(c):
        return [id(i) for pair in c.items() for i in pair] if isinstance(c, dict) else [*map(id, c)]

    return items(now) == items(then)
