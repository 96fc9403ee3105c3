"""A table of a network's layers, by torchinfo where it is installed."""

import contextlib
import sys

import torch
from torch import nn

from fastconv.models.layer_table import layer_table
from fastconv.surgery.forward import removed

DEPTH = 3  # rows deeper than that are added up, as torchinfo does


def summary(model: nn.Module, input_size, *, verbose: int | None = None):
    """What each layer of a network returns and how many parameters it has.

    The network runs once, in evaluation, on zeros. Its mode, its device, its statistics and the
    state of the random number generators stay as they are.

    Args:
        model: any network whose forward takes one tensor.
        input_size: the input's sizes, the batch's among them: (1, 3, 224, 224).
        verbose: 1 prints the table, 0 does not. None: as torchinfo, 0 in an interactive session and
            else 1.

    Returns:
        An object whose ``str`` is the table: torchinfo's, or what prints the same. It has
        ``total_params``, ``trainable_params`` and ``total_mult_adds`` too.

    Raises:
        TypeError: ``input_size`` is not a sequence of integers.
        ValueError: a size is below 1, or the network does not take such an input.
    """
    sizes = _check_sizes(input_size)
    tensors = [*model.parameters(), *model.buffers()]
    floating = [t for t in tensors if t.is_floating_point()]
    like = floating[0] if floating else torch.empty(0)
    images = torch.zeros(sizes, dtype=like.dtype, device=like.device)
    with _left_as_it_was(model, images.device), torch.no_grad():
        try:
            table = _table(model.eval(), images)
        except Exception as error:
            cause = error.__cause__ or error
            reason = " ".join(str(cause).split()) or type(cause).__name__
            raise ValueError(
                f"{type(model).__name__} does not take an input of size {sizes}: {reason}"
            ) from error
    if verbose is None:
        verbose = 0 if getattr(sys, "ps1", None) else 1
    if verbose:
        print(table)
    return table


def _table(model, images):
    try:
        import torchinfo
    except ImportError:
        return layer_table(model, images, DEPTH)
    return torchinfo.summary(model, input_data=images, depth=DEPTH, verbose=0)


def _check_sizes(input_size):
    is_sequence = isinstance(input_size, list | tuple)
    if not is_sequence or not all(type(size) is int for size in input_size):
        raise TypeError(
            f"input_size must be a tuple of integers, as (1, 3, 224, 224), but got {input_size!r}"
        )
    if not input_size or min(input_size) < 1:
        raise ValueError(f"sizes in input_size must be at least 1, but got {tuple(input_size)}")
    return tuple(input_size)


@contextlib.contextmanager
def _left_as_it_was(model, device):
    modes = [(module, module.training) for module in model.modules()]
    cards = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(cards), removed(model):
            yield
    finally:
        for module, training in modes:
            module.training = training
