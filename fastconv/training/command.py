"""`fastconv train`: a network learns from a set of images."""

import argparse
import contextlib
import fcntl
import json
import os
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastconv
from fastconv.benchmarking.tables import LEFT, RIGHT, print_table
from fastconv.models import get_model
from fastconv.training.batches import ImageFiles, Preparation, TensorImages, batches
from fastconv.training.checkpoint import load_training, load_weights, save_training
from fastconv.training.data import load_pixels
from fastconv.training.distributed import World, join
from fastconv.training.files import save_checkpoint, write_atomically
from fastconv.training.folder import load_folder
from fastconv.training.interrupts import Interrupts
from fastconv.training.loop import Epoch, History
from fastconv.training.plots import (
    READABLE_CLASSES,
    check_matplotlib,
    save_confusion_matrix,
    save_feature_maps,
    save_loss_curve,
)
from fastconv.training.recipes import defaults
from fastconv.training.settings import DATA, FOLDER, KEPT, MODEL, SOURCES, settle
from fastconv.training.terminal import choose_device, machine_name, progress_bar, rich_console
from fastconv.training.trainer import Plan, Trainer

RESULTS = (
    *("last.pt", "best.pt", "metrics.json"),
    *("loss_curve.png", "confusion_matrix.png", "feature_maps.png"),
)
# A network for photographs gets 28x28 pixels enlarged to no more than this, unless it is asked to.
_ENLARGED = 64
# Mean and deviation of ImageNet's red, green and blue: what networks for photographs are used to.
_PHOTOGRAPHS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Images:
    """A data set as it is trained on: pixels, what prepares them, and the classes' names."""

    name: str
    train: TensorImages | ImageFiles
    held_out: TensorImages | ImageFiles
    classes: tuple[str, ...]
    prepare: Preparation


def run(options: argparse.Namespace) -> int:
    """Train as the options of :func:`fastconv.training.settings.add_arguments` say.

    Returns:
        The exit status: 0, 130 after Ctrl-C, 143 after SIGTERM.

    Raises:
        ImportError: a package is missing.
        OSError: a file cannot be written; older files are as they were.
        RuntimeError, ValueError: data, checkpoint or options are wrong, in one sentence.
        FloatingPointError: the loss is no longer a number.
    """
    check_matplotlib()
    with join(choose_device(options.device)) as (world, device):
        return _run(options, world, device)


def _run(options: argparse.Namespace, world: World, device: torch.device) -> int:
    console = rich_console("training", quiet=not world.leads)
    if options.resume is not None and options.weights is not None:
        raise ValueError("--resume and --weights exclude each other")
    out, path = _places(options)
    state = None if path is None else load_training(path)
    settings = settle(options, device, state and state["arguments"], str(path))
    if path is None or path.resolve() != (out / "last.pt").resolve():
        _check_free(out, world)

    torch.manual_seed(settings["seed"])
    # Names are checked before the data is read; the network proper follows when it is known.
    get_model(settings["model"])
    images = _load(settings, options.data_root, world)
    settings |= {"in_channels": images.prepare.channels, "image_size": images.prepare.size}
    settings["num_classes"] = settings["num_classes"] or len(images.classes)
    if settings["num_classes"] < len(images.classes):
        raise ValueError(
            f"--num-classes {settings['num_classes']}, but {images.name} has {len(images.classes)}"
        )
    if state is not None:
        _check_same(state, images, world, path)

    torch.manual_seed(settings["seed"])
    model = get_model(
        settings["model"],
        num_classes=settings["num_classes"],
        in_channels=settings["in_channels"],
    )
    if options.weights is not None:
        load_weights(model, options.weights)
    if settings["sync_bn"]:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device)
    _check_fits(model, settings, device)
    # From here on each process draws numbers of its own, for dropout.
    torch.manual_seed(settings["seed"] + world.rank)
    plan = Plan(
        workers=options.workers,
        **{name: settings[name] for name in Plan.__dataclass_fields__ if name in settings},
    )
    trainer = Trainer(
        model,
        images.train,
        images.held_out,
        images.prepare,
        plan,
        device,
        world,
        compile=settings["compile"],
    )
    if state is not None:
        trainer.resume(state, str(path))
    facts = {
        "arguments": {name: settings[name] for name in KEPT},
        "images": [len(images.train), len(images.held_out)],
        "classes": list(images.classes),
    }
    _print_start(console, settings, images, model, device, world)
    return _train(console, trainer, facts, out, options.stop_after)


# ---- before ----


def _places(options: argparse.Namespace) -> tuple[Path, Path | None]:
    """The folder for results, and the checkpoint to go on from."""
    if options.resume:
        path = Path(options.resume)
        return Path(options.out) if options.out else path.parent, path
    data = options.data or DATA
    data = f"folder-{Path(data).name}" if data.startswith(FOLDER) else data
    usual = Path("runs") / f"{options.model or MODEL}-{data}"
    if options.out is not None:
        out = Path(options.out)
    else:
        runs = (usual if n == 1 else usual.with_name(f"{usual.name}-{n}") for n in count(1))
        out = next(runs)
        for following in runs:
            # A new run takes the first free name, a resumed one is the last that has a checkpoint.
            there = out if options.resume is None else following
            if not (there / "last.pt").exists():
                break
            out = following
    return out, None if options.resume is None else out / "last.pt"


def _check_free(out: Path, world: World) -> None:
    """Find out before the training that results cannot go to `out`."""
    if world.leads and (out / "last.pt").exists():
        raise FileExistsError(
            f"{out / 'last.pt'} is there already: --resume goes on from it, another --out keeps it"
        )
    there = next(part for part in (out, *out.absolute().parents) if part.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"cannot write to --out {out}: {there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write to --out {out}: no permission in {there}")


def _load(settings: dict[str, Any], root: str, world: World) -> Images:
    # A download is one process's work, and the others find the files.
    if not world.leads:
        world.wait()
    usual = defaults(settings["model"])
    channels, size = settings["in_channels"], settings["image_size"] or usual.image_size
    if settings["data"].startswith(FOLDER):
        name, mirrors = settings["data"][len(FOLDER) :], True
        channels, size = channels or 3, size or 224
        train, held_out, classes = load_folder(name, size, channels, settings["seed"])
        statistics = _PHOTOGRAPHS if channels == 3 else ((0.5,), (0.5,))
    else:
        source, mirrors = SOURCES[settings["data"]]
        data = load_pixels(source, root)
        name, channels = data.name, channels or 1
        usual_size = min(usual.image_size or data.train_images.shape[-1], _ENLARGED)
        size = settings["image_size"] or usual_size
        train = TensorImages(data.train_images, data.train_labels)
        held_out = TensorImages(data.test_images, data.test_labels)
        classes = tuple(map(str, range(data.classes)))
        statistics = tuple((number,) for number in data.statistics)
    if usual.statistics is not None:
        statistics = tuple((number,) for number in usual.statistics)
    if world.leads:
        world.wait()
    augment = settings["augment"]
    prepare = Preparation(
        size,
        channels,
        *statistics,
        crop=max(1, size // 8) if augment else 0,
        flip=mirrors and (usual.flip if augment is None else augment),
    )
    return Images(name, train, held_out, classes, prepare)


def _check_same(state: dict[str, Any], images: Images, world: World, path: Path) -> None:
    """
    Raises:
        ValueError: a checkpoint is of other data, or of another number of processes.
    """
    counts = [len(images.train), len(images.held_out)]
    for what, then, now in (
        ("images to learn from and to judge by", state["images"], counts),
        ("the classes", state["classes"], list(images.classes)),
        ("processes", len(state["processes"]), world.size),
    ):
        if then != now:
            raise ValueError(f"{path} was trained with {what}: {then}, but now it is {now}")


@torch.no_grad()
def _check_fits(model: nn.Module, settings: dict[str, Any], device: torch.device) -> None:
    """
    Raises:
        ValueError: the network cannot take images of this size.
    """
    channels, size = settings["in_channels"], settings["image_size"]
    model.eval()
    try:
        model(torch.zeros(2, channels, size, size, device=device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            f"{settings['model']} does not take images of {channels}x{size}x{size} "
            f"(--image-size and --in-channels change that): {error}"
        ) from error


def _print_start(console, settings, images: Images, model, device, world: World) -> None:
    together = f", {world.size} processes" if world.size > 1 else ""
    console.print(
        f"fastconv {fastconv.__version__}, torch {torch.__version__}, "
        f"{machine_name(device)}{together}"
    )
    console.print(
        f"{images.name}: {len(images.train):,} to learn from, {len(images.held_out):,} held out, "
        f"{len(images.classes)} classes",
        markup=False,
    )
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"{settings['model']}, {parameters:,} parameters, {settings['in_channels']}x"
        f"{settings['image_size']}x{settings['image_size']} images, seed {settings['seed']}"
    )
    console.print(
        f"{settings['optimizer']}, learning rate {settings['lr']:g}, {settings['schedule']}, "
        f"batches of {settings['batch_size']}, {settings['epochs']} "
        f"epoch{'s' * (settings['epochs'] > 1)}\n"
    )


# ---- during ----


def _train(console, trainer: Trainer, facts: dict, out: Path, stop_after: int | None) -> int:
    plan, leads = trainer.plan, trainer.world.leads
    if trainer.position.epoch >= plan.epochs:
        console.print(f"all {plan.epochs} epochs are done; nothing is changed")
        return 0
    with _alone(out) if leads else contextlib.nullcontext():
        return _run_epochs(console, trainer, facts, out, stop_after)


def _run_epochs(console, trainer, facts, out, stop_after) -> int:
    plan, leads = trainer.plan, trainer.world.leads
    until = min(plan.epochs, trainer.position.epoch + (stop_after or plan.epochs))
    with (
        Interrupts(patient=trainer.world.size > 1) as interrupts,
        progress_bar(console) as progress,
    ):
        done = trainer.position.epoch * trainer.steps + trainer.position.step
        task = progress.add_task("learning", total=until * trainer.steps, completed=done)

        def on_step(number: int, step: int) -> None:
            progress.update(
                task,
                completed=(number - 1) * trainer.steps + step,
                description=f"epoch {number}/{plan.epochs}",
            )

        def on_epoch(epoch: Epoch, improved: bool) -> None:
            _keep(trainer, facts, out, improved)
            console.print(_line(epoch))

        stopped = trainer.run(interrupts, until, on_step, on_epoch)
        if stopped:
            _keep(trainer, facts, out, improved=False)
    if stopped:
        at = trainer.position
        how = "Ctrl-C" if stopped == signal.SIGINT else "SIGTERM"
        console.print(
            f"stopped by {how} in epoch {at.epoch + 1} after {at.step} of {trainer.steps} steps"
        )
    elif leads:
        _print_worth(console, trainer, facts["classes"])
        _draw(trainer, facts["classes"], out)
        written = ", ".join(name for name in RESULTS if (out / name).exists())
        console.print(f"{out} has {written}", markup=False)
    if trainer.position.epoch < plan.epochs:
        path = shlex.quote(str(out / "last.pt"))
        console.print(f"fastconv train --resume {path} goes on from here", markup=False)
    return 128 + stopped if stopped else 0


@contextlib.contextmanager
def _alone(out: Path):
    """The folder, made, and nobody else's while it is written to: two runs that are started
    together would choose the same name. The lock goes with the process."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        folder = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise OSError(error.errno, f"cannot write to --out {out}: {error.strerror}") from error
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileExistsError(
                f"another training writes to {out}: give this one another --out"
            ) from error
        yield
    finally:
        os.close(folder)


def _keep(trainer: Trainer, facts: dict, out: Path, improved: bool) -> None:
    state = trainer.state()
    if not trainer.world.leads:
        return
    if improved:
        save_checkpoint(trainer.model, out / "best.pt")
    save_training({**facts, **state}, out / "last.pt")
    metrics = {
        "arguments": facts["arguments"],
        "classes": facts["classes"],
        "epochs": state["history"],
        "best_accuracy": trainer.best,
        "confusion_matrix": None if trainer.confusion is None else trainer.confusion.tolist(),
    }
    write_atomically(out / "metrics.json", json.dumps(metrics, indent=1).encode())


def _line(epoch: Epoch) -> str:
    seen, judged = epoch, epoch.held_out
    return (
        f"epoch {seen.number:3d}   loss {seen.loss:6.4f}   accuracy {100 * seen.accuracy:5.2f} %   "
        f"held out: loss {judged.loss:6.4f}   accuracy {100 * judged.accuracy:5.2f} %   "
        f"macro F1 {judged.macro_f1:.4f}   {seen.seconds:5.2f} s"
    )


# ---- after ----


def _print_worth(console, trainer: Trainer, classes: Sequence[str]) -> None:
    confusion, worth = trainer.confusion, trainer.history[-1].held_out
    if len(classes) <= READABLE_CLASSES:
        console.print()
        print_table(
            "held out: row true, column predicted",
            [("", LEFT), *((name, RIGHT) for name in classes)],
            [
                [name, *map(str, row[: len(classes)])]
                for name, row in zip(classes, confusion.tolist(), strict=False)
            ],
            file=console.file,
        )
    console.print(
        f"[bold]held out: accuracy {100 * worth.accuracy:.2f} %, macro F1 {worth.macro_f1:.4f}"
        f"[/bold], loss {worth.loss:.4f}; the best epoch's accuracy {100 * trainer.best:.2f} %"
    )


def _draw(trainer: Trainer, classes: Sequence[str], out: Path) -> None:
    confusion = trainer.confusion
    names = [*classes, *map(str, range(len(classes), len(confusion)))]
    save_confusion_matrix(confusion, names, out / "confusion_matrix.png")
    save_loss_curve(History(trainer.history), out / "loss_curve.png")
    pixels, _ = next(batches(trainer.held_out, [torch.tensor([0])]))
    image = trainer.prepare(pixels.to(trainer.device))
    save_feature_maps(image[0], first_feature_maps(trainer.model, image), out / "feature_maps.png")


@torch.no_grad()
def first_feature_maps(model: nn.Module, image: Tensor) -> Tensor:
    """(K, P, Q): what the first convolution that runs makes of the image (1, C, H, W).

    Raises:
        ValueError: the network has no convolution.
    """
    found = []
    handles = [
        layer.register_forward_hook(lambda layer, given, maps: found.append(maps))
        for layer in model.modules()
        if isinstance(layer, nn.Conv2d)
    ]
    was_training = model.training
    model.eval()
    try:
        model(image)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError(f"{type(model).__name__} has no convolution")
    return found[0][0].float().cpu()
