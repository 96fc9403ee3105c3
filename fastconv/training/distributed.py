"""The processes that train together: torchrun's, or this one alone."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """Which of how many processes this is. With one, every method is the identity.

    Facts about the training travel over gloo between CPUs, whatever carries the gradients, so that
    asking for one never waits for a GPU.
    """

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of all processes' tensors, which are on the CPU."""
        if self.size > 1:
            dist.all_reduce(numbers, group=self.control)
        return numbers

    def highest(self, *numbers: int) -> list[int]:
        """The highest that any process has, for each number."""
        if self.size == 1:
            return list(numbers)
        highest = torch.tensor(numbers)
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=self.control)
        return highest.tolist()

    def gather(self, value: Any) -> list[Any]:
        """Every process's value."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def wait(self) -> None:
        """Until all processes are here."""
        self.highest(0)

    def share_buffers(self, model: nn.Module) -> None:
        """The leader's buffers for everyone: each has seen running statistics of its own."""
        if self.size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)


@contextmanager
def join(device: torch.device) -> Iterator[tuple[World, torch.device]]:
    """Join the processes that torchrun started, if it did.

    Yields:
        The world, and this process's device: each GPU serves one process.

    Raises:
        ValueError: there are more processes than GPUs.
    """
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1:
        yield World(), device
        return
    if device.type == "cuda":
        local = int(os.environ.get("LOCAL_RANK", 0))
        if local >= torch.cuda.device_count():
            raise ValueError(
                f"process {local} of this machine needs a GPU of its own, but there are "
                f"{torch.cuda.device_count()}"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size, dist.new_group(backend="gloo")), device
    finally:
        dist.destroy_process_group()
