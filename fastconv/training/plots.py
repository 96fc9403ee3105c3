"""The loss curve as a picture."""

import io
import os
from pathlib import Path

from fastconv.training.files import check_writable, write_atomically
from fastconv.training.loop import History

_FORMATS = ("png", "svg", "pdf", "jpg")


def check_plot(path: str | os.PathLike) -> None:
    """Raise now what :func:`save_loss_curve` would raise after the training.

    Raises:
        ValueError: the ending names no picture format we write.
        ImportError: matplotlib is missing.
        OSError: the path cannot be written.
    """
    ending = Path(path).suffix.lstrip(".").lower()
    if ending not in _FORMATS:
        raise ValueError(f"cannot plot to {path}: the name must end in .{', .'.join(_FORMATS)}")
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('a plot needs matplotlib: pip install "fastconv[demo]"') from error
    check_writable(path)


def save_loss_curve(history: History, path: str | os.PathLike) -> None:
    """Draw training loss and training accuracy over the epochs into `path`.

    The ending chooses the format. Errors are those of :func:`check_plot`.
    """
    check_plot(path)
    # Figure without pyplot: no window system is looked for and no global state is left behind.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    loss = figure.subplots()
    numbers = [epoch.number for epoch in history.epochs]
    loss.plot(numbers, [epoch.loss for epoch in history.epochs], "o-", color="C0")
    loss.set_xlabel("epoch")
    loss.set_ylabel("training loss", color="C0")
    loss.xaxis.get_major_locator().set_params(integer=True)
    accuracy = loss.twinx()
    accuracy.plot(numbers, [100 * epoch.accuracy for epoch in history.epochs], "s--", color="C1")
    accuracy.set_ylabel("training accuracy, %", color="C1")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".").lower(), dpi=150)
    write_atomically(path, buffer.getvalue())
