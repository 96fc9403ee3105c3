"""The table of layers that torchinfo prints, for where it is not installed."""

import math
from collections.abc import Mapping

from torch import Tensor, nn

COLUMN, NAME = 25, 40  # widths; a long name widens the second


def _parameters(module, trainable=False):
    found = module.parameters()
    return sum(p.numel() for p in found if p.requires_grad or not trainable)


class Row:
    """One call of the last module of `path`, or, never called, a ModuleList and its like."""

    def __init__(self, path: tuple[nn.Module, ...], seen: set):
        self.path, self.module, self.depth = path, path[-1], len(path) - 1
        self.repeated = self.module in seen
        seen.add(self.module)
        self.leaf = not list(self.module.children())
        self.size, self.output_bytes = [], 0
        self.number = 0  # among the rows of its depth
        self.children = []

    def own_parameters(self, trainable=False) -> int:
        """How many numbers the module's parameters hold, but for those that a row below holds."""
        below = sum(_parameters(r.module, trainable) for r in self.children if not r.repeated)
        return _parameters(self.module, trainable) - below

    def mult_adds(self) -> int:
        """A convolution's parameter works at each place of the output, another once an image."""
        is_convolution = "Conv" in type(self.module).__name__
        uses = math.prod(self.size[:1] + self.size[2:] if is_convolution else self.size[:1])
        named = self.module.named_parameters()
        return uses * sum(p.numel() for name, p in named if name in ("weight", "bias"))

    def title(self) -> str:
        name = type(self.module).__name__
        return f"{name}: {self.depth}-{self.number}" if self.depth else name

    def count(self, deepest: int) -> str:
        if not _parameters(self.module):
            return "--"
        if self.repeated:
            return "(recursive)"
        if self.leaf or self.depth == deepest:
            text = f"{_parameters(self.module):,}"
            return text if _parameters(self.module, trainable=True) else f"({text})"
        return f"{self.own_parameters():,}" if self.own_parameters() > 0 else "--"


class LayerTable:
    """The rows of a network and what they add up to, with torchinfo's names for the sums."""

    def __init__(self, rows: list[Row], input_bytes: int, deepest: int):
        self.rows, self.deepest, self.total_input = rows, deepest, input_bytes
        once = [row for row in rows if not row.repeated]
        leaves = [row for row in rows if row.leaf]
        held = [p for row in once if row.leaf for p in row.module.parameters()]
        self.total_params = sum(max(row.own_parameters(), 0) for row in once)
        self.trainable_params = sum(max(row.own_parameters(trainable=True), 0) for row in once)
        self.total_mult_adds = sum(row.mult_adds() for row in leaves)
        self.total_param_bytes = sum(p.numel() * p.element_size() for p in held)
        # Twice: what forward keeps, and its gradient.
        self.total_output_bytes = 2 * sum(
            row.output_bytes for row in leaves if _parameters(row.module)
        )

    def __str__(self) -> str:
        longest = max(len(row.title()) + 5 * row.depth + 1 for row in self.rows)
        name = math.ceil(longest / 5) * 5 if longest >= NAME else NAME
        divider = "=" * (name + 2 * COLUMN)
        lines = [divider, ("Layer (type:depth-idx)", "Output Shape", "Param #"), divider]
        for row in self.rows:
            if row.depth <= self.deepest:
                branch = {0: "", 1: "├─"}.get(row.depth, "│    " * (row.depth - 1) + "└─")
                size = str(row.size or "--")
                lines.append((branch + row.title(), size, row.count(self.deepest)))
        frozen = self.total_params - self.trainable_params
        lines += [divider, f"Total params: {self.total_params:,}"]
        lines += [
            f"Trainable params: {self.trainable_params:,}",
            f"Non-trainable params: {frozen:,}",
        ]
        lines += [f"Total mult-adds {_readable(self.total_mult_adds)}", divider]
        bytes_of = {
            "Input size": self.total_input,
            "Forward/backward pass size": self.total_output_bytes,
            "Params size": self.total_param_bytes,
        }
        bytes_of["Estimated Total Size"] = sum(bytes_of.values())
        lines += [f"{what} (MB): {size / 1e6:0.2f}" for what, size in bytes_of.items()] + [divider]
        return "\n".join(
            line if isinstance(line, str)
            else f"{line[0]:<{name}} {line[1]:<{COLUMN}} {line[2]}"
            for line in lines
        )  # fmt: skip

    __repr__ = __str__


def layer_table(model: nn.Module, images: Tensor, deepest: int) -> LayerTable:
    """Runs the network on `images`, in its mode, and lists the calls of its modules."""
    rows, running, path, seen, handles = [], [], [], set(), []
    places = _places(model)

    def append(row):
        rows.append(row)
        path[row.depth :] = [row]
        if row.depth:
            path[row.depth - 1].children.append(row)
        row.number = sum(other.depth == row.depth for other in rows)

    def enter(module, inputs):
        place = places[module]
        for depth in range(1, len(place) - 1):  # what stands around it and was not called
            if depth >= len(path) or path[depth].module is not place[depth]:
                append(Row(place[: depth + 1], seen))
        append(Row(place, seen))
        running.append(rows[-1])

    def leave(module, inputs, output):
        row, tensor = running.pop(), _first_tensor(output)
        if tensor is not None:
            row.size, row.output_bytes = list(tensor.shape), tensor.numel() * tensor.element_size()

    try:
        for module in places:
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave))
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return LayerTable(rows, images.numel() * images.element_size(), deepest)


def _places(model):
    """Of each module the path from the root, where it stands last."""
    places = {}

    def visit(path):
        places[path[-1]] = path
        for child in path[-1].children():
            visit((*path, child))

    visit((model,))
    return places


def _first_tensor(output):
    """What stands for an output: of several tensors the first, of a mapping the last."""
    while isinstance(output, list | tuple | Mapping) and len(output):
        output = list(output.values())[-1] if isinstance(output, Mapping) else output[0]
    return output if isinstance(output, Tensor) else None


def _readable(number):
    sizes = {"T": 1e12, "G": 1e9, "M": 1e6}
    unit = next((u for u, size in sizes.items() if number >= size), "M")
    value = number / sizes[unit]
    return f"({unit}): {value:,.0f}" if value.is_integer() else f"({unit}): {value:,.2f}"
