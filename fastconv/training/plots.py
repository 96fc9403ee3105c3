"""Pictures of a training: loss curve, confusion matrix, feature maps."""

import io
import math
import os
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from fastconv.training.files import check_writable, write_atomically
from fastconv.training.loop import History

_FORMATS = ("png", "svg", "pdf", "jpg")
READABLE_CLASSES = 20  # as many names fit beside a matrix, and as many columns on a terminal
MOST_MAPS = 63  # with the input 8 x 8 pictures


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
    check_matplotlib()
    check_writable(path)


def check_matplotlib() -> None:
    """
    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('a plot needs matplotlib: pip install "fastconv[demo]"') from error


def save_loss_curve(history: History, path: str | os.PathLike) -> None:
    """Draw loss and accuracy over the epochs into `path`: of training, and held out if known.

    The ending chooses the format. Errors are those of :func:`check_plot`.
    """
    figure = _figure(path, (6, 4))
    loss = figure.subplots()
    accuracy = loss.twinx()
    judged = [epoch for epoch in history.epochs if epoch.held_out is not None]
    for epochs, what, line, of in (
        (history.epochs, "training", "-", lambda epoch: epoch),
        (judged, "held-out", "--", lambda epoch: epoch.held_out),
    ):
        if not epochs:
            continue
        numbers = [epoch.number for epoch in epochs]
        losses = [of(epoch).loss for epoch in epochs]
        shares = [100 * of(epoch).accuracy for epoch in epochs]
        loss.plot(numbers, losses, f"o{line}", color="C0", label=f"{what} loss")
        accuracy.plot(numbers, shares, f"s{line}", color="C1", label=f"{what} accuracy")
    loss.set_xlabel("epoch")
    loss.set_ylabel("loss", color="C0")
    loss.xaxis.get_major_locator().set_params(integer=True)
    accuracy.set_ylabel("accuracy, %", color="C1")
    figure.legend(loc="outside upper center", ncols=2)
    _save(figure, path)


def save_confusion_matrix(
    confusion: Tensor, classes: Sequence[str], path: str | os.PathLike
) -> None:
    """Draw a confusion matrix, each true class's row as shares of that class.

    Errors are those of :func:`check_plot`.
    """
    side = min(12.0, 3 + 0.4 * len(classes))
    figure = _figure(path, (side, side))
    axes = figure.subplots()
    rows = confusion.double()
    shares = (rows / rows.sum(1, keepdim=True).clamp(min=1)).tolist()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    if len(classes) <= READABLE_CLASSES:
        axes.set_xticks(range(len(classes)), classes, rotation=90)
        axes.set_yticks(range(len(classes)), classes)
        for y, row in enumerate(confusion.tolist()):
            for x, count in enumerate(row):
                if count:
                    colour = "white" if shares[y][x] > 0.5 else "black"
                    axes.text(x, y, str(count), color=colour, ha="center", va="center", fontsize=7)
    _save(figure, path)


def save_feature_maps(image: Tensor, maps: Tensor, path: str | os.PathLike) -> None:
    """Draw an image (C, H, W) and, beside it, feature maps (K, P, Q) of it, all in grey.

    Errors are those of :func:`check_plot`.
    """
    shown = [image.mean(0), *maps[:MOST_MAPS]]
    columns = math.ceil(math.sqrt(len(shown)))
    rows = math.ceil(len(shown) / columns)
    figure = _figure(path, (1.5 * columns, 1.6 * rows))
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        axes.axis("off")
        if place < len(shown):
            axes.imshow(shown[place].tolist(), cmap="gray")
            axes.set_title(f"map {place}" if place else "input", fontsize=8)
    _save(figure, path)


def _figure(path: str | os.PathLike, size: tuple[float, float]):
    check_plot(path)
    # Figure without pyplot: no window system is looked for and no global state is left behind.
    from matplotlib.figure import Figure

    return Figure(figsize=size, layout="constrained")


def _save(figure, path: str | os.PathLike) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix.lstrip(".").lower(), dpi=150)
    write_atomically(path, buffer.getvalue())
