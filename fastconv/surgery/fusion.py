"""fuse: chains of layers become single kernels, for inference."""

from dataclasses import replace

from torch import nn

from fastconv.surgery import forward, layout, reporting, tracing
from fastconv.surgery.conversion import checked_copy, convert
from fastconv.surgery.grouping import Grouping
from fastconv.surgery.reporting import Entry, Report


def fuse(model, *, inplace=False):
    """Makes convolutions and what follows them one kernel each, for inference.

    Fused are Conv-BN, Conv-BN-activation, Conv-activation, Conv(-BN)-add(-activation) and
    Conv(-activation)-MaxPool, with ReLU, ReLU6, LeakyReLU of slope 0.01, SiLU, Hardswish and
    Sigmoid as modules, functions or methods. All else that fastconv has is converted, as by
    :func:`convert`.

    The model is put into evaluation mode. It keeps its class, its tree and its state_dict; weights
    are not changed, and BatchNorm's are read at each call. What is new is its ``forward``, written
    by torch.fx, or, where torch.fx cannot trace the model, that of those modules inside which it
    can. In training mode (of the model, or of a layer that matters) the original forward runs.
    Layers must not be exchanged, nor hooks set inside, afterwards: fuse last.

    On a CPU, images in NCHW are converted to channels_last where they enter and back where they
    leave, if there are convolutions enough between. Weights keep their memory format.

    Args:
        model: any ``nn.Module``.
        inplace: change ``model`` itself instead of a copy.

    Returns:
        The copy, or ``model``. ``print(fastconv.surgery.report(it))`` tells what became of each
        layer and what was left alone, why.

    Raises:
        TypeError, RuntimeError: as :func:`convert`.
    """
    model = checked_copy("fuse", model, inplace)
    forward.remove(model)
    reporting.remove(model)
    convert(model, inplace=True)
    report = Report()
    if model.training:
        report.notes.append("The model was in training mode; fused, it is in evaluation mode.")
        model.eval()
    _Fuser(model, report).run()
    reporting.attach(model, report)
    return model


class _Fuser:
    """Fuses a model, and inside it whatever torch.fx does not look into."""

    def __init__(self, model, report):
        self.model, self.report = model, report
        self.names = {module: name for name, module in model.named_modules()}
        self.reached = set()  # layers that have an entry, or are part of another's
        self.reasons = {}  # why a module was not looked into
        self.seen = set()

    def run(self):
        self._fuse(self.model)
        for module, name in self.names.items():
            if isinstance(module, reporting.LAYERS) and module not in self.reached:
                became, reason = reporting.whose(module)
                reason = reason or self._why_unreached(name)
                entry = Entry(name or "(itself)", type(module).__name__, became, reason)
                self.report.entries.append(entry)

    def _fuse(self, module):
        if module in self.seen or isinstance(module, tracing.LAYERS):
            return
        self.seen.add(module)
        tracer = tracing.Tracer()
        reason = tracing.why_not_to_trace(module)
        if not reason:
            try:
                graph = tracer.trace(module)
            except Exception as error:  # whatever a forward raises when it meets a proxy
                reason = tracing.one_line(error)
            else:
                self._fuse_traced(module, tracer, graph)
                return
        if type(module) not in (nn.ModuleList, nn.ModuleDict):  # they have no forward
            self.reasons[module] = reason
        for child in module.children():
            self._fuse(child)

    def _fuse_traced(self, module, tracer, graph):
        modules = dict(module.named_modules())
        self.reasons.update(tracer.opaque)
        called = [modules[node.target] for node in graph.nodes if node.op == "call_module"]
        parts, fixed = {}, list(tracer.through)
        self._enter(module, Grouping(graph, modules, parts, fixed).run(), called)
        if parts:
            channels_last = layout.in_channels_last(graph, modules)
            _retarget(graph, parts)
            if channels_last is not None:
                _retarget(channels_last[0], parts)
            made = forward.FusedForward(
                module, graph, parts, fixed, tracer.arguments, channels_last
            )
            forward.install(module, made)
            self._note(module, tracer.arguments.defaults)
        for leaf in called:
            self._fuse(leaf)

    def _note(self, module, defaults):
        if defaults:
            taken = ", ".join(f"{name}={value!r}" for name, value in defaults.items())
            who = self.names[module] or "The model"
            self.report.notes.append(f"{who} runs fused where it is called with {taken}.")

    def _enter(self, module, entries, called):
        prefix = self.names[module] + "." if self.names[module] else ""
        self.report.entries += [replace(e, name=prefix + e.name) for e in entries]
        self.reached.update(called)

    def _why_unreached(self, name):
        """The reason of the innermost module that holds the layer and was not looked into."""
        holders = {self.names[module]: reason for module, reason in self.reasons.items()}
        while name:
            name = name.rpartition(".")[0]
            if name in holders:
                kind = type(self.model.get_submodule(name)).__name__
                return f"in {name or 'the model'}, a {kind} that is not traced: {holders[name]}"
        return "not called by the traced forward"


def _retarget(graph, parts):
    """Names as the fused forward's code reaches them: through the module itself."""
    ours = {f"parts.{name}" for name in parts}  # the module may have a child called parts
    for node in graph.nodes:
        if node.op == "get_attr" or (node.op == "call_module" and node.target not in ours):
            node.target = f"owner.{node.target}"
