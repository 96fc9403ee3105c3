"""What the commands that train share: console, progress bar, and the device they run on."""

import platform

import torch

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


def choose_device(name: str) -> torch.device:
    """The GPU if `name` is "auto" and torch can use one; else what `name` says, or the CPU.

    Raises:
        ValueError: "cuda" was asked for and torch has none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device cuda: torch {torch.__version__} finds no GPU it can use")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def machine_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's kind, instruction set and the threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    return f"{platform.machine()} CPU ({capability}), {threads} thread{'s' * (threads > 1)}"


def rich_console(who: str, quiet: bool = False):
    """A console that neither wraps nor colours numbers; `quiet` prints nothing.

    Raises:
        ImportError: rich is missing.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise ImportError(f'{who} needs rich: pip install "fastconv[demo]"') from error
    return Console(highlight=False, soft_wrap=True, quiet=quiet)


def progress_bar(console):
    """A bar with steps and the time that remains, shown on a terminal alone."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=console.quiet or not console.is_terminal,
    )
