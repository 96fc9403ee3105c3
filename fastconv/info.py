"""`fastconv info`: what is installed, what was built, what runs here."""

import platform
from pathlib import Path

import torch

import fastconv
from fastconv import _extension, emulator, triton_kernels
from fastconv.benchmarking.tables import LEFT, print_table
from fastconv.selection import BACKENDS


def print_info() -> None:
    """Print versions, the build, the devices and the kernel table."""
    facts = [*_versions(), *_build(), *_devices()]
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name.ljust(width)}  {value}")
    print()
    if fastconv.available:
        _print_kernels()
    else:
        print(fastconv.explanation)


def _versions() -> list[tuple[str, str]]:
    cuda = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU"
    return [
        ("fastconv", f"{fastconv.__version__}, in {Path(fastconv.__file__).parent}"),
        ("Python", platform.python_version()),
        ("torch", f"{torch.__version__}, {cuda}"),
        ("triton", _triton()),
    ]


def _triton() -> str:
    found = triton_kernels.version()
    why = triton_kernels.available()
    return f"{found}, " + (why or "its kernels run here") if found else why


def _build() -> list[tuple[str, str]]:
    """Whether the extension is loaded, and what the build wrote down about it."""
    state = f"loaded from {_extension.load().__file__}" if fastconv.available else "cannot be used"
    facts = [
        (
            f"  {name.replace('_', ' ')}",
            ", ".join(map(str, value)) if isinstance(value, list) else str(value),
        )
        for name, value in _extension.facts.items()
        if value is not None and not name.endswith("_digest")
    ]
    return [("extension", state), *facts]


def _devices() -> list[tuple[str, str]]:
    # Our own reading of the CPU where the extension is there; else torch's, which may differ.
    isa = (
        _extension.load().cpu_isa()
        if fastconv.available
        else torch.backends.cpu.get_cpu_capability()
    )
    found = [("CPU", f"{platform.machine()}, {isa}, {torch.get_num_threads()} threads")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        found.append(
            (
                f"GPU {index}",
                f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} SMs, "
                f"{gpu.total_memory / 2**30:.0f} GiB",
            )
        )
    if len(found) == 1:
        found.append(("GPU", "none that this torch can use"))
    # ATen is torch itself: there even where nothing of ours was built.
    ours = {row.backend for row in fastconv.kernels()} if fastconv.available else set()
    here = [name for name in BACKENDS if name in ours or name == "aten"]
    absent = [name for name in BACKENDS if name not in here and name != "emulator"]
    found.append(("backends", ", ".join(here) + f" (not in this build: {', '.join(absent)})"))
    missing = emulator.available() if fastconv.available else "needs the compiled extension"
    ready = 'runs the CUDA kernels on the CPU inside `with fastconv.backend("emulator"):`'
    found.append(("emulator", missing or ready))
    return found


def _print_kernels() -> None:
    rows = fastconv.kernels()
    # Operation and direction stand in the name. Short dtypes: a terminal is 80 to 100 wide.
    print_table(
        f"{len(rows)} kernels, in the order in which they are considered",
        [(name, LEFT) for name in ("kernel", "backend", "needs", "dtypes", "layouts")],
        [
            [
                row.name,
                row.backend,
                row.arch,
                " ".join(_short(dtype) for dtype in row.dtypes),
                " ".join(row.layouts),
            ]
            for row in rows
        ],
    )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.").replace("bfloat", "bf").replace("float", "f")
