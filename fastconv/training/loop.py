"""Training and judging a classifier whose data fits in memory."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastconv.training.metrics import confusion_matrix, macro_f1_of


@dataclass(frozen=True)
class Recipe:
    """How to train: the numbers of :func:`fit`.

    The learning rate climbs to `lr` during the first fifth and falls to nought by the end; images
    are moved by up to `shift` pixels, at random, every time they are seen.
    """

    epochs: int = 12
    batch_size: int = 64
    lr: float = 4e-3
    weight_decay: float = 0.1
    shift: int = 1

    def __post_init__(self):
        for name, least in (("epochs", 1), ("batch_size", 1), ("shift", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, but is {getattr(self, name)}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be a positive number, but is {self.lr}")


@dataclass(frozen=True)
class Evaluation:
    """What a model is worth on images it has not seen."""

    loss: float
    accuracy: float
    macro_f1: float


@dataclass(frozen=True)
class Epoch:
    """One pass over the training images: mean loss and accuracy while it learned."""

    number: int
    loss: float
    accuracy: float
    seconds: float
    held_out: Evaluation | None = None


@dataclass
class History:
    """The finished epochs, all steps done, and whether Ctrl-C ended it."""

    epochs: list[Epoch] = field(default_factory=list)
    steps: int = 0
    interrupted: bool = False


def one_cycle(progress: float) -> float:
    """One cycle: linear from 0.04 to 1 over the first fifth, then half a cosine down to 0."""
    if progress < 0.2:
        return 0.04 + 0.96 * progress / 0.2
    return 0.5 * (1 + math.cos(math.pi * (progress - 0.2) / 0.8))


def random_shift(images: Tensor, pixels: int, background: float, rng: torch.Generator) -> Tensor:
    """Move each image by its own -pixels..pixels in both axes; `background` fills the border."""
    return shift(images, random_starts(len(images), pixels, rng), pixels, background)


def random_starts(n: int, pixels: int, rng: torch.Generator) -> Tensor:
    """(2, N, 1): where the windows of :func:`shift` start, drawn on the CPU for every device."""
    return torch.randint(2 * pixels + 1, (2, n, 1), generator=rng)


def shift(images: Tensor, starts: Tensor, pixels: int, background: float) -> Tensor:
    """From each image with a border of `pixels`, the window of its own size at its start."""
    n, _, height, width = images.shape
    padded = F.pad(images, (pixels,) * 4, value=background)
    rows = (starts[0] + torch.arange(height))[:, :, None].to(images.device)
    columns = (starts[1] + torch.arange(width))[:, None, :].to(images.device)
    sample = torch.arange(n, device=images.device)[:, None, None]
    # Indexing around the channel's slice puts the channels last: (N, H, W, C).
    return padded[sample, :, rows, columns].permute(0, 3, 1, 2).contiguous()


def fit(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    recipe: Recipe | None = None,
    *,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
    on_epoch: Callable[[Epoch], None] | None = None,
) -> History:
    """Train `model` in place with AdamW on (N, C, H, W) images and (N,) classes.

    On a CPU the same model, seed and number of threads give the same weights, bit for bit. Ctrl-C
    does not raise: the model keeps what it has learned and the history says where it stopped.

    Args:
        recipe: numbers of the training; the default suits LeNet-5 on digits.
        seed: of the order of the images and of their shifts.
        on_step: called before every step with the epoch's number and the steps done in it.
        on_epoch: called after every epoch.

    Raises:
        FloatingPointError: the loss is no longer a number.
    """
    recipe = recipe or Recipe()
    count = len(images)
    if count == 0 or len(labels) != count:
        raise ValueError(f"got {count} images and {len(labels)} labels")
    rng = torch.Generator().manual_seed(seed)
    all_steps = recipe.epochs * math.ceil(count / recipe.batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), recipe.lr, weight_decay=recipe.weight_decay)
    background = images.min().item()
    history = History()
    model.train()
    try:
        for number in range(1, recipe.epochs + 1):
            began = time.perf_counter()
            # Sums stay on the device: reading them every step would make a GPU wait.
            loss_sum = torch.zeros((), device=images.device, dtype=torch.float64)
            hits = torch.zeros((), device=images.device, dtype=torch.int64)
            order = torch.randperm(count, generator=rng).to(images.device)
            for step, batch in enumerate(order.split(recipe.batch_size)):
                if on_step is not None:
                    on_step(number, step)
                inputs, targets = images[batch], labels[batch]
                if recipe.shift:
                    inputs = random_shift(inputs, recipe.shift, background, rng)
                for group in optimizer.param_groups:
                    group["lr"] = recipe.lr * one_cycle(history.steps / all_steps)
                scores = model(inputs)
                loss = F.cross_entropy(scores, targets)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                history.steps += 1
                loss_sum += loss.detach() * len(batch)
                hits += (scores.detach().argmax(1) == targets).sum()
            epoch = Epoch(
                number,
                loss_sum.item() / count,
                hits.item() / count,
                time.perf_counter() - began,
            )
            if not math.isfinite(epoch.loss):
                raise FloatingPointError(
                    f"the loss became {epoch.loss} in epoch {number} at learning rate {recipe.lr}"
                )
            history.epochs.append(epoch)
            if on_epoch is not None:
                on_epoch(epoch)
    except KeyboardInterrupt:
        history.interrupted = True
    return history


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 500) -> Evaluation:
    """Loss, accuracy and macro F1 of `model` in eval mode; its mode is put back afterwards."""
    batches = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    return worth(*score(model, batches))


@torch.no_grad()
def score(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Confusion matrix and sum of losses over `batches` of images and labels, in eval mode.

    Both are on the CPU, in int64 and float64; those of parts of the data may be added.
    """
    was_training = model.training
    model.eval()
    confusion = torch.zeros((), dtype=torch.int64)
    loss = torch.zeros((), dtype=torch.float64)
    try:
        for images, labels in batches:
            scores = model(images)
            confusion = confusion + confusion_matrix(scores.argmax(1), labels, scores.shape[1])
            loss += F.cross_entropy(scores, labels, reduction="sum").double().cpu()
    finally:
        model.train(was_training)
    return confusion, loss


def worth(confusion: Tensor, loss_sum: Tensor) -> Evaluation:
    """The evaluation that :func:`score`'s sums amount to."""
    count = confusion.sum().item()
    return Evaluation(
        loss_sum.item() / count,
        confusion.diagonal().sum().item() / count,
        macro_f1_of(confusion),
    )
