"""What fuse() has made of a model, layer by layer."""

from collections import Counter
from dataclasses import dataclass, field

from torch import nn

from fastconv import modules as ours

LAYERS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.BatchNorm2d)
OURS = (ours.Conv2d, ours.MaxPool2d, ours.AvgPool2d, ours.AdaptiveAvgPool2d, ours.BatchNorm2d)
ATTRIBUTE = "fastconv_report"


@dataclass(frozen=True)
class Entry:
    """One layer: where it stands, what it is, what it runs as, why no more was fused."""

    name: str
    layer: str
    became: str
    reason: str = ""

    @property
    def fused(self):
        return "-" in self.became


@dataclass
class Report:
    """What became of each layer that fastconv knows. ``str()`` of it is a table.

    Attributes:
        entries: one :class:`Entry` a layer, in the order of execution; those inside another's
            group are not listed.
        notes: what holds for the whole model.
    """

    entries: list = field(default_factory=list)
    notes: list = field(default_factory=list)

    @property
    def fused(self):
        """Those that are one kernel with what follows them."""
        return [entry for entry in self.entries if entry.fused]

    @property
    def left(self):
        """Those that run alone."""
        return [entry for entry in self.entries if not entry.fused]

    @property
    def counts(self):
        """How many of each kind: a Counter of what layers became."""
        return Counter(entry.became or f"{entry.layer}, not fastconv's" for entry in self.entries)

    def __str__(self):
        head = Entry("layer", "was", "became", "left alone, why")
        rows = [(e.name, e.layer, e.became or "left", e.reason) for e in (head, *self.entries)]
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        lines = [
            "  ".join((*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3]))
            for row in rows
        ]
        counts = ", ".join(f"{n} {what}" for what, n in self.counts.most_common())
        return "\n".join([*(line.rstrip() for line in lines), *self.notes, counts or "no layers"])


def report(model):
    """What :func:`fastconv.fuse` made of a model; of one that is not fused, whose its layers are.

    Returns:
        A :class:`Report`: ``print()`` it.
    """
    made = vars(model).get(ATTRIBUTE)
    if made is not None:
        return made
    entries = [
        Entry(name or "(itself)", type(module).__name__, *whose(module))
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
    ]
    return Report(entries)


def whose(module):
    """What a layer runs as, "" where that is not fastconv's, and why not."""
    ours = next((cls for cls in OURS if isinstance(module, cls)), None)
    if ours is not None:
        return ours.__name__, "" if type(module) is ours else "parametrized, or a subclass"
    if type(module) in LAYERS:
        return "", "not converted"
    base = next((cls for cls in LAYERS if isinstance(module, cls)), None)
    return "", f"a subclass of {base.__name__}, with code of its own" if base else "not torch.nn's"


def attach(model, made):
    # Past nn.Module's own __setattr__: a plain attribute, which travels with copies and pickles.
    vars(model)[ATTRIBUTE] = made


def remove(model):
    for module in model.modules():
        vars(module).pop(ATTRIBUTE, None)
