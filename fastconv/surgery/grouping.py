"""Finding, in a traced graph, a convolution or BatchNorm with what follows it, and making it one
node."""

from dataclasses import dataclass, field

from torch import fx

from fastconv.modules.inference import FusedBatchNorm2d, FusedConv2d
from fastconv.modules.plain import has_hooks
from fastconv.surgery import patterns
from fastconv.surgery.reporting import LAYERS, Entry, whose

NAMES = {
    "relu": "ReLU",
    "relu6": "ReLU6",
    "leaky_relu": "LeakyReLU",
    "silu": "SiLU",
    "hardswish": "Hardswish",
    "sigmoid": "Sigmoid",
}


@dataclass
class Group:
    """A chain of nodes that one kernel computes: each is read by the next alone.

    Attributes:
        nodes: the convolution or BatchNorm and what follows it, in order.
        conv: the convolution; None where a BatchNorm stands first.
        anchor: the one in whose place the kernel runs.
        residual: the node that is added, or None.
        words: what the kernel does, as "Conv", "BN", "ReLU".
        stop: why it ends here.
    """

    nodes: list
    anchor: fx.Node
    conv: object = None
    bn: object = None
    residual: fx.Node = None
    activation: str = None
    pool: object = None
    words: list = field(default_factory=list)
    stop: str = ""

    @property
    def tail(self):
        return self.nodes[-1]


class Grouping:
    """The groups of one graph.

    Args:
        graph: the graph, which is rewritten.
        modules: the traced module's submodules by name; fused ones are added.
        parts: receives the fused modules by name.
        fixed: receives the modules whose evaluation mode is taken for granted.
    """

    def __init__(self, graph, modules, parts, fixed):
        self.graph, self.modules, self.parts, self.fixed = graph, modules, parts, fixed
        self.entries = {}  # by node, in the order of execution

    def run(self):
        """The entries of a report, in the order of execution."""
        for node in list(self.graph.nodes):
            if patterns.kind(node, self.modules) in patterns.CONVOLUTIONS:
                self._fuse(node, self._conv, why_not_conv(node, self.modules[node.target]))
        for node in list(self.graph.nodes):  # those that no convolution has taken
            if node.op == "call_module" and patterns.is_norm(self.modules[node.target]):
                reason = patterns.why_not_norm(node, self.modules[node.target])
                self._fuse(node, self._norm, reason)
        for node in self.graph.nodes:
            if node not in self.entries:
                self._enter_single(node)
        return [self.entries[node] for node in self.graph.nodes if node in self.entries]

    def _fuse(self, node, first, reason):
        group = Group([node], node)
        if not reason:
            reason = first(group, node) or self._grow(group)
        if len(group.words) > 1:
            self._replace(group)
        else:
            became, other = whose(self.modules[node.target])
            self._enter(node, node, became, reason or other)

    def _enter(self, place, node, became, reason):
        layer = type(self.modules[node.target]).__name__
        self.entries[place] = Entry(node.target, layer, became, reason)

    def _enter_single(self, node):
        """A layer that is in no group; a function that fastconv has is called in torch's place."""
        what = patterns.kind(node, self.modules)
        if node.op == "call_function" and what in patterns.FUNCTIONS:
            node.target = patterns.FUNCTIONS[what]
            name = node.target.__name__
            reason = "" if "pool" in name else "a function: only layers are fused"
            self.entries[node] = Entry(node.name, f"F.{name}", f"functional.{name}", reason)
        elif node.op == "call_module":
            module = self.modules[node.target]
            if isinstance(module, LAYERS):
                self._enter(node, node, *whose(module))

    def _next(self, group):
        """The node that alone reads the group's result, past those that hand it on; None, with the
        reason in ``group.stop``, where there is none."""
        while True:
            users = list(group.tail.users)
            if len(users) != 1:
                group.stop = f"its output is read {len(users)} times"
                return None
            user = users[0]
            if user.op == "output":
                group.stop = "its output is the model's"
                return None
            if user.all_input_nodes == [group.tail] and patterns.is_identity(user, self.modules):
                group.nodes.append(user)
                continue
            group.stop = self._followed_by(group, user)
            return user

    def _followed_by(self, group, user):
        if isinstance(self.modules.get(user.target), (FusedConv2d, FusedBatchNorm2d)):
            host = self.entries[user].name
            added = user.args[0] is not group.tail
            return f"added in the kernel of {host}" if added else f"followed by {host}"
        return f"followed by {patterns.label(user, self.modules)}"

    def _grow(self, group):
        """Takes in what follows; returns why it ends where it does, as ``group.stop``."""
        for step in (self._norm, self._addition, self._activation, self._pool):
            user = self._next(group)
            reason = step(group, user) if user is not None else ""
            if reason:
                group.stop = reason
            elif group.activation is not None:
                group.stop = ""  # no kernel does more
            if reason or user is None:
                break
        return group.stop

    # Each step takes the next node into the group if it is of its kind. What it returns is why the
    # group must end before it; empty where a later step may still take the node.

    def _conv(self, group, node):
        group.conv = self.modules[node.target]
        group.words.append("Conv")
        return ""

    def _norm(self, group, user):
        is_norm = user.op == "call_module" and patterns.is_norm(self.modules[user.target])
        if not is_norm or group.bn is not None:
            return ""
        bn = self.modules[user.target]
        channels = None if group.conv is None else group.conv.out_channels
        reason = patterns.why_not_norm(user, bn, channels)
        if reason:
            return reason
        if user is not group.tail:
            group.nodes.append(user)
        group.bn = bn
        group.words.append("BN")
        self._activate(group, patterns.norm_parts(bn)[0])
        return ""

    def _addition(self, group, user):
        operands = patterns.addition(user, self.modules)
        if operands is None or group.activation is not None:
            return ""
        first, second = operands
        if first is second:
            return "it is added to itself"
        residual = second if first is group.tail else first
        alone = list(residual.users) == [user] and patterns.is_fresh(residual, self.modules)
        if first is residual and patterns.is_in_place_addition(user) and not alone:
            return "it is added in place to a tensor that may be read elsewhere"
        changed = self._changed_between(group, user)
        if changed is not None:
            label = patterns.label(changed, self.modules)
            return f"{label} changes its input in place before the addition"
        group.residual, group.anchor = residual, user
        group.nodes.append(user)
        group.words.append("add")
        return ""

    def _changed_between(self, group, user):
        """The node that changes the group's input before the addition, where the kernel would run,
        or None."""
        memory = patterns.origins(group.nodes[0].args[0], self.modules)
        node = group.nodes[0].next
        while node is not user:
            if node not in group.nodes:
                for target in patterns.changed_by(node, self.modules):
                    if memory & patterns.origins(target, self.modules):
                        return node
            node = node.next
        return None

    def _activation(self, group, user):
        name = patterns.activation(user, self.modules)
        if name is None or group.activation is not None:
            return ""
        group.nodes.append(user)
        self._activate(group, name)
        return ""

    def _activate(self, group, name):
        if name is not None:
            group.activation = name
            group.words.append(NAMES[name])

    def _pool(self, group, user):
        if patterns.kind(user, self.modules) not in patterns.MAX_POOLS:
            return ""
        pool = self.modules[user.target]
        if group.conv is None or group.residual is not None:
            return "max pooling has a launch of its own behind BatchNorm alone or an addition"
        if pool.ceil_mode or pool.return_indices or pool.dilation not in (1, (1, 1), [1, 1]):
            return "the max pooling behind it has ceil_mode, indices or dilation"
        if has_hooks(pool):
            return "the max pooling behind it has hooks"
        group.pool = pool
        group.nodes.append(user)
        group.words.append("MaxPool")
        return ""

    def _replace(self, group):
        """One node in place of the group's."""
        first = group.nodes[0]
        name = "fused_" + first.target.replace(".", "_")
        while f"parts.{name}" in self.modules:  # a layer that is called twice
            name += "_"
        if group.conv is None:
            part = FusedBatchNorm2d(group.bn, group.activation)
        else:
            part = FusedConv2d(group.conv, group.bn, group.activation, group.pool)
        self.parts[name] = part
        target = f"parts.{name}"
        self.modules[target] = part
        inputs = (first.args[0],) if group.residual is None else (first.args[0], group.residual)
        with self.graph.inserting_before(group.anchor):
            fused = self.graph.call_module(target, inputs)
        self._enter(fused, first, "-".join(group.words), group.stop)
        group.tail.replace_all_uses_with(fused)
        for node in reversed(group.nodes):
            if node.op == "call_module" and patterns.has_modes(self.modules[node.target]):
                self.fixed.append(self.modules[node.target])
            self.graph.erase_node(node)


def why_not_conv(node, conv):
    """Why a convolution runs as the layer it is; empty where it may be fused."""
    if len(node.args) != 1 or node.kwargs:
        return "is not called with one positional argument"
    if "forward" in vars(conv):
        return "its forward has been replaced"
    if has_hooks(conv):
        return "has hooks"
    return ""
