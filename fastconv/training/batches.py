"""From pixels to batches: order, sharing among processes, augmentation, normalisation.

Everything random is drawn from a generator of its own, seeded by what it is for, the seed, the
epoch and the step. So a batch is the same whoever asks for it, and a training that is resumed in
the middle of an epoch needs nothing but its position.
"""

import hashlib
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from fastconv.training.data import DataError
from fastconv.training.folder import ImageFiles
from fastconv.training.loop import random_starts, shift


def generator(*purpose: str | int) -> torch.Generator:
    """Random numbers that depend on every word and number of `purpose` and on nothing else."""
    digest = hashlib.sha256(repr(purpose).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def epoch_order(count: int, batch_size: int, least: int, seed: int, epoch: int) -> list[Tensor]:
    """The images of each step of an epoch, every image once.

    A last batch of fewer than `least` joins the one before it: BatchNorm cannot learn from a
    single image.
    """
    order = torch.randperm(count, generator=generator("order", seed, epoch))
    steps = list(order.split(batch_size))
    if len(steps) > 1 and len(steps[-1]) < least <= batch_size:
        steps[-2:] = [torch.cat(steps[-2:])]
    return steps


@dataclass(frozen=True)
class TensorImages:
    """A data set in memory: uint8 images (N, channels, H, W) and their classes (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


def batches(
    data: TensorImages | ImageFiles, places: Sequence[Tensor], workers: int = 0, pin: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """uint8 images and classes of each element of `places`, on the CPU.

    Args:
        workers: processes that read files ahead.
        pin: into page-locked memory, from which copies to a GPU are asynchronous.

    Raises:
        DataError: a file cannot be read.
    """
    if isinstance(data, TensorImages):
        for batch in places:
            yield data.images[batch], data.labels[batch]
        return
    loader = DataLoader(
        data,
        batch_sampler=[batch.tolist() for batch in places],
        num_workers=workers,
        collate_fn=_collate,
        pin_memory=pin,
        worker_init_fn=_ignore_interrupts,
        # The loader seeds its workers. From torch's own generator that would move the random
        # numbers of the training.
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, DataError):
            raise batch
        yield tuple(batch)


def _collate(samples):
    failed = [sample for sample in samples if isinstance(sample, DataError)]
    return failed[0] if failed else default_collate(samples)


def _ignore_interrupts(worker: int) -> None:
    # Ctrl-C reaches every process of the terminal, and SIGTERM often the whole group: the one that
    # trains decides what they mean.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@dataclass(frozen=True)
class Draw:
    """What chance decides about a batch: windows of the crop (2, N, 1) and who is mirrored (N,)."""

    starts: Tensor | None = None
    mirrored: Tensor | None = None

    def share(self, rank: int, size: int) -> "Draw":
        """That of the images ``rank::size``."""
        return Draw(
            None if self.starts is None else self.starts[:, rank::size],
            None if self.mirrored is None else self.mirrored[rank::size],
        )


@dataclass(frozen=True)
class Preparation:
    """uint8 images (N, C, H, W) to the float32 (N, channels, size, size) that a network takes.

    Images are padded with black by up to an eighth on each side, and resized beyond that. A grey
    image becomes `channels` equal ones. `mean` and `deviation` hold one number, or one a channel.

    Args:
        crop: the most pixels that a random crop moves an image by, in both axes; the border is
            black.
        flip: mirror half of the images, left to right.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    deviation: tuple[float, ...]
    crop: int = 0
    flip: bool = False

    def draw(self, n: int, seed: int, epoch: int, step: int) -> Draw:
        """The augmentation of the `n` images of a step."""
        if not (self.crop or self.flip):
            return Draw()
        rng = generator("augment", seed, epoch, step)
        starts = random_starts(n, self.crop, rng)
        mirrored = torch.rand(n, generator=rng) < 0.5
        return Draw(starts if self.crop else None, mirrored if self.flip else None)

    def __call__(self, images: Tensor, draw: Draw | None = None) -> Tensor:
        images = images.float() / 255
        images = _fit(images, self.size)
        if images.shape[1] == 1:
            images = images.expand(-1, self.channels, -1, -1)
        if draw is not None and draw.starts is not None:
            images = shift(images, draw.starts, self.crop, 0.0)
        if draw is not None and draw.mirrored is not None:
            mirrored = draw.mirrored.to(images.device)[:, None, None, None]
            images = torch.where(mirrored, images.flip(3), images)
        mean, deviation = (
            torch.tensor(values, device=images.device).reshape(1, -1, 1, 1)
            for values in (self.mean, self.deviation)
        )
        return (images - mean) / deviation


def _fit(images: Tensor, size: int) -> Tensor:
    height, width = images.shape[-2:]
    if (height, width) == (size, size):
        return images
    border = size - height
    if height == width and 0 < border <= height // 4:
        return F.pad(images, (border // 2, border - border // 2) * 2)
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)
