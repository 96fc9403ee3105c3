"""A fused graph in channels_last: one conversion where images enter, one where they leave.

On a CPU the convolutions are fastest where a pixel's channels lie side by side. What enters as NCHW
is converted once, stays so through everything that keeps a memory format, and is converted back
before what may look at strides: a view, a module or function that nobody knows here, the output.
"""

import copy
import operator

import torch
import torch.nn.functional as F
from torch import nn

from fastconv import functional
from fastconv.modules import AdaptiveAvgPool2d, AvgPool2d, BatchNorm2d, Conv2d, MaxPool2d
from fastconv.modules.inference import FusedBatchNorm2d, FusedConv2d
from fastconv.modules.plain import ACTIVATIONS, has_hooks
from fastconv.surgery import patterns

# Convolutions that a conversion must be shared by: about two of NCHW cost as much more.
WORTH = 2

CONVOLUTIONS = (FusedConv2d, Conv2d)
# What keeps channels_last, and computes the same in it, element by element or plane by plane.
MODULES = (
    *CONVOLUTIONS,
    *(FusedBatchNorm2d, BatchNorm2d, MaxPool2d, AvgPool2d, AdaptiveAvgPool2d),
    *ACTIVATIONS,
    *(nn.GELU, nn.ELU, nn.Tanh, nn.Hardsigmoid, nn.Hardtanh, nn.Mish, nn.Softplus),
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.Upsample, nn.ConvTranspose2d),
)
# Those whose first argument alone is an image.
OF_ONE_IMAGE = (
    *(functional.conv2d, functional.batch_norm, functional.max_pool2d, functional.avg_pool2d),
    *(functional.adaptive_avg_pool2d, F.interpolate, F.dropout, F.hardtanh, F.gelu),
    *(F.hardsigmoid, torch.tanh),
)
OF_SEVERAL = (
    *(operator.add, operator.sub, operator.mul, operator.truediv),
    *(operator.iadd, operator.isub, operator.imul, operator.itruediv),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.cat, torch.concat),
    *("add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_"),
)
READERS = ("size", "dim", "numel")  # methods that no memory format matters to
FACTS = ("shape", "ndim", "dtype", "device")  # attributes likewise


def to_nhwc(value):
    """An image in channels_last, always with channels_last's own strides, which a tensor of one
    channel or one pixel need not have to be contiguous in it; anything else as it is."""
    if not isinstance(value, torch.Tensor) or value.dim() != 4:
        return value
    # As torch.vmap takes it, which does not know clone(memory_format=channels_last).
    return _copy(value.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def to_nchw(value):
    """The way back."""
    return _copy(value) if isinstance(value, torch.Tensor) else value


def _copy(value):
    return value.clone(memory_format=torch.contiguous_format)


def strides_of(sizes):
    """Those that tell NCHW from channels_last, of a packed tensor: all but the first."""
    H, W = sizes[2:]
    return (H * W, W, 1)


class AllNCHW:
    """When the graph with conversions stands for the other: all is NCHW, on a CPU.

    Args:
        entries: which of the forward's arguments are converted.
        convs: the convolutions. Where a filter of theirs is channels_last, so are the results, and
            the other graph gives just that.
    """

    def __init__(self, entries, convs):
        self.entries = entries
        self.convs = [(conv, strides_of((0, 0, *conv.kernel_size))) for conv in convs]

    def holds(self, values):
        """Whether it does in a call with these arguments."""
        for index in self.entries:
            value = values[index]
            if (
                type(value) not in (torch.Tensor, nn.Parameter)
                or value.dim() != 4
                or value.device.type != "cpu"
                or not value.is_floating_point()
                or not value.is_contiguous()
                or value.stride()[1:] != strides_of(value.shape)
            ):
                return False
        return all(conv.weight.stride()[1:] == strides for conv, strides in self.convs)


def in_channels_last(graph, modules):
    """(the graph with its conversions, an :class:`AllNCHW`); None where it is not to run so.

    Args:
        graph: a fused one; it is copied.
        modules: the modules that it calls, by name.
    """
    return _Layout(copy.deepcopy(graph), modules).run()


class _Layout:
    def __init__(self, graph, modules):
        self.graph, self.modules = graph, modules
        self.marked = {}  # nodes whose tensors are channels_last, in order
        self.convs = []

    def run(self):
        for node in self.graph.nodes:
            if self._is_conv(node):
                self.convs.append(node)
                self.marked[node] = True
            elif any(image in self.marked for image in self._images(node)):
                self.marked[node] = True
        readers = self._readers_of_twins()
        if not readers or len(self.convs) < WORTH * len(readers):
            return None
        if not self._may_be_copied(readers):
            return None
        inputs = [node for node in self.graph.nodes if node.op == "placeholder"]
        entries = [i for i, node in enumerate(inputs) if node in readers]
        for node, users in readers.items():
            self._convert(node, users, inputs)
        self.graph.lint()
        return self.graph, AllNCHW(entries, self._conv_modules())

    def _is_conv(self, node):
        what = patterns.kind(node, self.modules)
        if node.op == "call_module":
            return what in CONVOLUTIONS and not has_hooks(self.modules[node.target])
        return what is functional.conv2d

    def _conv_modules(self):
        called = [self.modules[node.target] for node in self.convs if node.op == "call_module"]
        return [module.conv if type(module) is FusedConv2d else module for module in called]

    def _images(self, node):
        """The inputs that a node takes in channels_last, to give channels_last; none where it may
        not do so."""
        what = patterns.kind(node, self.modules)
        if "out" in node.kwargs or _gives_indices(node, self.modules):
            return []
        if node.op == "call_module":
            kept = what in MODULES and not has_hooks(self.modules[node.target])
            return node.all_input_nodes if kept else []
        if what in OF_ONE_IMAGE or patterns.activation(node, self.modules):
            return [a for a in node.args[:1] if isinstance(a, torch.fx.Node)]
        return node.all_input_nodes if what in OF_SEVERAL else []

    def _readers_of_twins(self):
        """{node: those who read it in the other memory format}."""
        found = {}
        for node in self.graph.nodes:
            if self._reads_no_elements(node):
                continue
            images = self._images(node) if node in self.marked else ()
            for source in node.all_input_nodes:
                # A parameter is a factor or a summand a channel: nothing to convert.
                if source.op != "get_attr" and (source in images) != (source in self.marked):
                    found.setdefault(source, []).append(node)
        return found

    def _reads_no_elements(self, node):
        if node.op == "call_method":
            return node.target in READERS
        return patterns.kind(node, self.modules) is getattr and node.args[1] in FACTS

    def _may_be_copied(self, readers):
        """Whether nobody sees that there are two tensors in place of one: no change in place of the
        one must reach readers of the other."""
        changed = set()
        for node in self.graph.nodes:
            for target in patterns.changed_by(node, self.modules):
                changed |= patterns.origins(target, self.modules)
        for node, users in readers.items():
            renamed = patterns.is_fresh(node, self.modules) and set(users) == set(node.users)
            if not renamed and changed & patterns.origins(node, self.modules):
                return False
        return True

    def _convert(self, node, users, inputs):
        convert = to_nchw if node in self.marked else to_nhwc
        with self.graph.inserting_after(inputs[-1] if node in inputs else node):
            twin = self.graph.call_function(convert, (node,))
        for user in users:
            user.replace_input_with(node, twin)


def _gives_indices(node, modules):
    """Whether it is a max pooling that returns two tensors."""
    if node.op == "call_module":
        return getattr(modules[node.target], "return_indices", False)
    return node.target is functional.max_pool2d and (
        len(node.args) > 6 or "return_indices" in node.kwargs
    )
