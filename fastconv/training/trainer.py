"""Training that may be stopped anywhere and resumed exactly, in one process or in several."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastconv.training.batches import (
    ImageFiles,
    Preparation,
    TensorImages,
    batches,
    epoch_order,
)
from fastconv.training.checkpoint import (
    CheckpointError,
    fit_weights,
    random_state,
    set_random_state,
)
from fastconv.training.distributed import World
from fastconv.training.interrupts import Interrupts
from fastconv.training.loop import Epoch, Evaluation, score, worth
from fastconv.training.recipes import SCHEDULES, make_optimizer

AUXILIARY_WEIGHT = 0.3  # of the losses of GoogLeNet's auxiliary classifiers
_LOOKS = 32  # on a GPU the loss is read, which waits for the GPU, at every so many steps


@dataclass(frozen=True)
class Plan:
    """The numbers of a training. `batch_size` counts the images of all processes together."""

    epochs: int
    batch_size: int
    lr: float
    optimizer: str
    momentum: float
    weight_decay: float
    schedule: str
    seed: int
    amp: str | None = None
    workers: int = 0


@dataclass
class Position:
    """Where a training is: `epoch` finished ones and `step` steps of the next.

    The sums are those of this process's share of that epoch.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    hits: int = 0
    seconds: float = 0.0


class Trainer:
    """Trains `model` on `train` and judges it on `held_out` after every epoch.

    A training stopped between any two steps and resumed from :meth:`state` computes the bits that
    it would have computed without the stop, on the same machine with as many threads.

    Args:
        model: on `device` already.
        train, held_out: uint8 images and their classes.
        prepare: makes a network's input of them, and augments those to learn from.
        world: the processes that share every batch; gradients are those of the whole batch.
        compile: run the network through torch.compile.
    """

    def __init__(
        self,
        model: nn.Module,
        train: TensorImages | ImageFiles,
        held_out: TensorImages | ImageFiles,
        prepare: Preparation,
        plan: Plan,
        device: torch.device,
        world: World,
        compile: bool = False,
    ):
        least = 2 * world.size  # nobody's share may be a single image
        if world.size > 1 and min(plan.batch_size, len(train)) < least:
            raise ValueError(
                f"{world.size} processes need batches of at least {least} images, but there are "
                f"{min(plan.batch_size, len(train))}"
            )
        if len(held_out) < world.size:
            raise ValueError(f"{world.size} processes have {len(held_out)} images to judge by")
        self.model, self.train, self.held_out, self.prepare = model, train, held_out, prepare
        self.plan, self.device, self.world, self.least = plan, device, world, least
        self.optimizer = make_optimizer(
            model, plan.optimizer, plan.lr, plan.momentum, plan.weight_decay
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=plan.amp == "float16")
        self.judged = torch.compile(model) if compile else model
        self.learner = self.judged
        if world.size > 1:
            ids = [device.index] if device.type == "cuda" else None
            learner = nn.parallel.DistributedDataParallel(model, device_ids=ids)
            self.learner = torch.compile(learner) if compile else learner
        self.steps = len(self._order(0))
        self.position = Position()
        self.history: list[Epoch] = []
        self.best: float | None = None
        self.confusion: Tensor | None = None

    # ---- what is kept ----

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs; every process must ask for it at the same time."""
        own = {"position": asdict(self.position), "random": random_state(self.device)}
        return {
            "model": {name: value.cpu() for name, value in self.model.state_dict().items()},
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "processes": self.world.gather(own),
            "best": self.best,
            "history": [asdict(epoch) for epoch in self.history],
            "confusion": self.confusion,
        }

    def resume(self, state: dict[str, Any], path: str) -> None:
        """Go on from :meth:`state`, read from `path`.

        Raises:
            CheckpointError: it belongs to another network or optimizer.
        """
        fit_weights(self.model, state["model"], path)
        try:
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            own = state["processes"][self.world.rank]
            self.position = Position(**own["position"])
            self.best = state["best"]
            self.confusion = state["confusion"]
            self.history = [
                Epoch(**{**epoch, "held_out": Evaluation(**epoch["held_out"])})
                for epoch in state["history"]
            ]
            set_random_state(own["random"], self.device)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"{path} is damaged: {' '.join(str(error).split())}") from error

    # ---- training ----

    def run(
        self,
        interrupts: Interrupts,
        until: int,
        on_step: Callable[[int, int], None],
        on_epoch: Callable[[Epoch, bool], None],
    ) -> int:
        """Train up to the end of epoch `until`; returns the signal that stopped it, or 0.

        Args:
            on_step: called after every step with the epoch's number and the steps done in it.
            on_epoch: called after every epoch, with whether it is the best so far.

        Raises:
            FloatingPointError: the loss is no longer a number.
        """
        while self.position.epoch < until:
            (stopped,) = self.world.highest(interrupts.received)
            stopped = stopped or self._learn(interrupts, on_step)
            if stopped:
                return stopped
            evaluation = self._judge(interrupts)
            if evaluation is None:
                return interrupts.received
            at, count = self.position, len(self.train)
            sums = torch.tensor([at.loss_sum, at.hits], dtype=torch.float64)
            loss, accuracy = (self.world.sum(sums) / count).tolist()
            epoch = Epoch(at.epoch + 1, loss, accuracy, at.seconds, evaluation)
            self.history.append(epoch)
            improved = self.best is None or evaluation.accuracy > self.best
            self.best = evaluation.accuracy if improved else self.best
            self.position = Position(epoch=at.epoch + 1)
            on_epoch(epoch, improved)
        return 0

    def _order(self, epoch: int) -> list[Tensor]:
        plan = self.plan
        return epoch_order(len(self.train), plan.batch_size, self.least, plan.seed, epoch)

    def _learn(self, interrupts: Interrupts, on_step: Callable[[int, int], None]) -> int:
        """The rest of this epoch's steps; returns the signal that stopped it, or 0."""
        began = time.perf_counter()
        at, start = self.position, self.position.step
        order = self._order(at.epoch)
        own = [batch[self.world.rank :: self.world.size] for batch in order[start:]]
        # Sums stay on the device: reading them every step would make a GPU wait.
        sums = torch.tensor([at.loss_sum, at.hits], device=self.device, dtype=torch.float64)
        self.learner.train()
        stopped = 0
        pin = self.device.type == "cuda"
        for step, (images, labels) in enumerate(
            batches(self.train, own, self.plan.workers, pin), start
        ):
            self._step(step, len(order[step]), images, labels, sums)
            looks = self.device.type == "cpu" or (step + 1) % _LOOKS == 0 or interrupts.received
            lost = int(looks and not math.isfinite(sums[0].item()))
            stopped, lost = self.world.highest(interrupts.received, lost)
            if lost:
                raise self._lost("loss")
            at.step = step + 1
            on_step(at.epoch + 1, at.step)
            if stopped:
                break
        at.loss_sum, at.hits = sums[0].item(), round(sums[1].item())
        if self.world.highest(int(not math.isfinite(at.loss_sum))) != [0]:
            raise self._lost("loss")
        at.seconds += time.perf_counter() - began
        return stopped

    def _step(self, step: int, count: int, images: Tensor, labels: Tensor, sums: Tensor) -> None:
        plan, at, world = self.plan, self.position, self.world
        images = images.to(self.device, non_blocking=True)
        labels = labels.to(self.device, non_blocking=True)
        draw = self.prepare.draw(count, plan.seed, at.epoch, step).share(world.rank, world.size)
        progress = (at.epoch * self.steps + step) / (plan.epochs * self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.lr * SCHEDULES[plan.schedule](progress)
        inputs = self.prepare(images, draw)
        with self._autocast():
            loss, scores = _loss(self.learner(inputs), labels)
        # DistributedDataParallel takes the mean over processes: this makes it the whole batch's.
        mean = loss * (world.size / count)
        self.optimizer.zero_grad()
        self.scaler.scale(mean).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        sums[0] += loss.detach()
        sums[1] += (scores.argmax(1) == labels).sum()

    def _autocast(self):
        if self.plan.amp is None:
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.plan.amp))

    def _judge(self, interrupts: Interrupts) -> Evaluation | None:
        """The worth on the held-out images; None where a signal came first.

        Several processes finish it: they would have to agree, at every batch, on where to stop.
        """
        self.world.share_buffers(self.model)
        alone = self.world.size == 1
        size = max(1, self.plan.batch_size // self.world.size)
        own = torch.arange(self.world.rank, len(self.held_out), self.world.size).split(size)

        def prepared() -> Iterator[tuple[Tensor, Tensor]]:
            for images, labels in batches(self.held_out, own, self.plan.workers):
                if alone and interrupts.received:
                    return
                yield self.prepare(images.to(self.device)), labels.to(self.device)

        with self._autocast():
            confusion, loss = score(self.judged, prepared())
        if alone and interrupts.received:
            return None
        self.confusion = self.world.sum(confusion)
        evaluation = worth(self.confusion, self.world.sum(loss))
        if not math.isfinite(evaluation.loss):
            raise self._lost("held-out loss")
        return evaluation

    def _lost(self, what: str) -> FloatingPointError:
        return FloatingPointError(
            f"the {what} is no longer a finite number in epoch {self.position.epoch + 1} at "
            f"learning rate {self.plan.lr:g}: try a lower --lr; the last checkpoint is kept"
        )


def _loss(output: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over images of the cross-entropy, auxiliary classifiers' included, and the scores."""
    scores, *auxiliaries = output if isinstance(output, tuple) else (output,)
    loss = F.cross_entropy(scores, labels, reduction="sum")
    for auxiliary in auxiliaries:
        if auxiliary is not None:
            loss = loss + AUXILIARY_WEIGHT * F.cross_entropy(auxiliary, labels, reduction="sum")
    return loss, scores.detach()
