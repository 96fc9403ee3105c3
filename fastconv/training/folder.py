"""Images in folders, one folder a class, as for torchvision's ImageFolder; read with Pillow."""

import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastconv.training.data import DataError

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
HELD_OUT_SHARE = 0.2
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels -> Pillow's name of such an image


@dataclass(frozen=True)
class ImageFiles:
    """A data set: image i is read from its file when it is asked for.

    ``self[i]`` is (uint8 image (channels, size, size), class); the image's middle square is
    resized. A file that cannot be read is returned as the DataError that says so: raised in
    another process, it would reach the user as a page of text.
    """

    paths: tuple[str, ...]
    labels: tuple[int, ...]
    size: int
    channels: int

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, place: int) -> tuple[Tensor, int] | DataError:
        import numpy
        from PIL import Image, ImageOps

        path = self.paths[place]
        try:
            with Image.open(path) as file:
                if file.mode.startswith("I;16"):  # convert() would cut 16 bits off at 255
                    file = Image.fromarray((numpy.asarray(file) >> 8).astype(numpy.uint8))
                image = file.convert(_MODES[self.channels])
                image = ImageOps.fit(image, (self.size, self.size), Image.Resampling.BILINEAR)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return DataError(f"cannot read the image {path}: {' '.join(str(error).split())}")
        pixels = torch.from_numpy(numpy.array(image))
        return pixels.reshape(self.size, self.size, self.channels).movedim(2, 0), self.labels[place]


def load_folder(
    root: str | os.PathLike, size: int, channels: int, seed: int
) -> tuple[ImageFiles, ImageFiles, tuple[str, ...]]:
    """Find the images below `root`: to learn from, held out, and the classes' names.

    ``root/train/CLASS/*`` and ``root/val/CLASS/*``, or ``root/CLASS/*``, of which every fifth image
    of a class is held out, drawn by `seed`.

    Raises:
        ImportError: Pillow is missing.
        DataError: there is no such folder, or a class has no image.
        ValueError: images do not have so many channels.
    """
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError("a folder of images needs Pillow: pip install pillow") from error
    if channels not in _MODES:
        raise ValueError(f"images have 1, 3 or 4 channels, not {channels}")
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"there is no folder {root}")
    split = [root / "train", root / "val"]
    here = [part.is_dir() for part in split]
    if here[0] and not here[1]:  # "train" is hardly a class
        raise DataError(f"{split[0]} is there and {split[1]} is not: held-out images belong there")
    if all(here):
        classes = _classes(split[0])
        strangers = sorted(set(_classes(split[1])) - set(classes))
        if strangers:
            raise DataError(f"{split[1]} has a class {strangers[0]!r} that {split[0]} has not")
        halves = [
            {name: _images(part / name) for name in classes if (part / name).is_dir()}
            for part in split
        ]
    else:
        classes = _classes(root)
        halves = [{}, {}]
        rng = torch.Generator().manual_seed(seed)
        for name in classes:
            paths = _images(root / name)
            if len(paths) < 2:
                raise DataError(f"{root / name} has one image, of which none can be held out")
            order = torch.randperm(len(paths), generator=rng).tolist()
            held_out = set(order[: max(1, int(HELD_OUT_SHARE * len(paths)))])
            halves[0][name] = [p for i, p in enumerate(paths) if i not in held_out]
            halves[1][name] = [p for i, p in enumerate(paths) if i in held_out]
    if len(classes) < 2:
        raise DataError(f"{root} has one class, {classes[0]!r}, and nothing to tell apart")
    numbers = {name: number for number, name in enumerate(classes)}
    files = []
    for half in halves:
        pairs = [(path, numbers[name]) for name, paths in half.items() for path in paths]
        paths, labels = zip(*pairs, strict=True)
        files.append(ImageFiles(paths, labels, size, channels))
    return *files, tuple(classes)


def _classes(folder: Path) -> list[str]:
    entries = [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]
    names = sorted(entry.name for entry in entries if entry.is_dir())
    if not names:
        raise DataError(f"{folder} has no folders, one for each class of images")
    return names


def _images(folder: Path) -> list[str]:
    """Every image at any depth, hidden ones apart, in the same order on every machine."""
    found = []
    for where, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = [n for n in names if n.lower().endswith(ENDINGS) and not n.startswith(".")]
        found += [os.path.join(where, name) for name in sorted(images)]
    if not found:
        raise DataError(f"{folder} has no image: no name there ends in {', '.join(ENDINGS)}")
    return found
