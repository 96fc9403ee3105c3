"""Tables on a terminal: rich's where rich is installed, plain columns where it is not."""

import sys
from collections.abc import Sequence
from typing import TextIO

LEFT, RIGHT = "left", "right"


def print_table(
    title: str,
    columns: Sequence[tuple[str, str]],
    rows: Sequence[Sequence[str]],
    file: TextIO | None = None,
) -> None:
    """Print `rows` under `columns`, which are (heading, LEFT or RIGHT)."""
    file = file or sys.stdout
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(plain_table(title, columns, rows), file=file)
        return
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for heading, side in columns:
        table.add_column(Text(heading), justify=side, overflow="fold")
    for row in rows:
        # Text: a cell such as "[1, 2]" is no markup.
        table.add_row(*(Text(cell) for cell in row))
    # A pipe or a file has no width of its own: nothing is wrapped there.
    Console(file=file, highlight=False, width=None if file.isatty() else 1000).print(table)


def plain_table(
    title: str, columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]
) -> str:
    """The table as text: columns padded to their widest cell, two spaces between."""
    lines = [[heading for heading, _ in columns], *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]

    def line_of(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if side == RIGHT else cell.ljust(width)
            for cell, width, (_, side) in zip(cells, widths, columns, strict=True)
        )
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([title, line_of(lines[0]), rule, *map(line_of, lines[1:])])


def microseconds(seconds: float) -> str:
    """A time a reader can compare: three figures, in us or ms."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.3g} us" if seconds < 1e-4 else f"{seconds * 1e6:.0f} us"
    return f"{seconds * 1e3:.3g} ms" if seconds < 0.1 else f"{seconds * 1e3:.0f} ms"
