"""What each CUDA kernel costs an SM, from ptxas's own words: registers, shared memory, occupancy.

    python benchmarks/kernel_resources.py BUILD_LOG [--json FILE] [--all]
    python benchmarks/kernel_resources.py --compile [--json FILE] [--all]

BUILD_LOG is the output of a build made with NVCC_APPEND_FLAGS="-Xptxas=-v"; --compile runs nvcc on
csrc/cuda itself, for sm_80 and sm_90 (files named *sm90*: sm_90a). Ends with status 1 when a kernel
spills or has a stack frame or local memory, or ptxas gave up wgmma's or setmaxnreg's gain (which it
calls no warning), and with 2 when no kernel is found at all.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent / "csrc"

# Of sm_80 and sm_90 alike: 64 warps, 32 blocks and 65,536 registers an SM, which a warp takes in
# units of 256.
WARPS, BLOCKS, REGISTERS, UNIT = 64, 32, 65536, 256


@dataclass
class Kernel:
    name: str  # with its template arguments
    arch: str
    registers: int = 0
    static_shared: int = 0  # bytes; dynamic shared memory is a launch's own
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    local: int = 0
    threads: int | None = None  # a block's, from __launch_bounds__, where that is a number
    occupancy: float = 0.0  # share of an SM's warps that the registers allow

    @property
    def template(self) -> str:
        return self.name.split("<")[0]

    @property
    def fault(self) -> str:
        found = [
            f"{value} bytes {what}"
            for what, value in (
                ("stack frame", self.stack),
                ("spill stores", self.spill_stores),
                ("spill loads", self.spill_loads),
                ("local memory", self.local),
            )
            if value
        ]
        return ", ".join(found)


def occupancy(registers: int, threads: int | None) -> float:
    """A block of unknown size counts as one warp."""
    warps = -(-(threads or 32) // 32)
    allocated = -(-max(registers, 1) * 32 // UNIT) * UNIT
    blocks = min(REGISTERS // allocated // warps, WARPS // warps, BLOCKS if threads else WARPS)
    return blocks * warps / WARPS


def parse(log: str) -> list[Kernel]:
    """The kernels of a log, in its order. Device functions that were not inlined count as kernels
    only where they have something to answer for."""
    kernels: dict[tuple[str, str], Kernel] = {}
    entry, arch, described = "", "", ""
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line):
            entry, arch = found.groups()
            described = entry
            kernels[entry, arch] = Kernel(entry, arch)
        elif found := re.search(r"Function properties for (\w+)", line):
            described = found[1]
        elif found := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            numbers = [int(n) for n in found.groups()]
            if described != entry and not any(numbers):
                continue
            k = kernels.setdefault((described, arch), Kernel(described, arch))
            k.stack, k.spill_stores, k.spill_loads = numbers
        elif (found := re.search(r"Used (\d+) registers", line)) and entry:
            k = kernels[entry, arch]
            k.registers = int(found[1])
            for field, unit in (("static_shared", "smem"), ("local", "lmem")):
                if size := re.search(rf"(\d+) bytes {unit}", line):
                    setattr(k, field, int(size[1]))
    found = list(kernels.values())
    for kernel, name in zip(found, demangle([k.name for k in found]), strict=True):
        kernel.name = name
    bounds = launch_bounds()
    for kernel in found:
        kernel.threads = bounds.get(kernel.template)
        kernel.occupancy = occupancy(kernel.registers, kernel.threads)
    return found


def losses(log: str) -> list[str]:
    """ "setmaxnreg ignored", "wgmma instructions are serialized", each once."""
    found = re.findall(r"Potential Performance Loss: ([^\n]+)", log)
    return list(dict.fromkeys(line.strip() for line in found))


def demangle(names: list[str]) -> list[str]:
    """Without namespaces and parameters: "max_pool2d_fprop_kernel<float, 4, long>"."""
    tool = shutil.which("c++filt") or shutil.which("cu++filt")
    if tool is None or not names:
        return names
    done = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True)
    return [short(line) for line in done.stdout.splitlines()]


def short(name: str) -> str:
    depth, end = 0, len(name)
    for i, character in enumerate(name):
        if character == "(" and depth == 0 and not name.startswith("(anonymous", i):
            end = i
            break
        depth += (character == "<") - (character == ">")
    name = re.sub(r"(?:\w+|\(anonymous namespace\))::", "", name[:end])
    name = re.sub(r"\(\w+\)(?=\d|true|false)", "", name)  # (int)4 -> 4
    return name.removeprefix("void ")


def constants(text: str) -> dict[str, str]:
    """name -> expression of the `constexpr int` definitions of a file."""
    found = {}
    for definition in re.findall(r"constexpr int (k\w+ = [^;]+);", text):
        found |= re.findall(r"(k\w+) = ((?:[^,()]|\([^()]*\))+)", definition)
    return found


def value_of(expression: str, values: dict[str, str]) -> int | None:
    """Of sums and products of numbers and constants; None where it has anything else in it."""
    for _ in range(5):  # constants of constants
        expression = re.sub(r"\bk\w+", lambda m: f"({values.get(m[0], m[0])})", expression)
    if not re.fullmatch(r"[\d\s()*+-]+", expression):
        return None
    try:
        return int(eval(expression, {"__builtins__": {}}))
    except SyntaxError:
        return None


def launch_bounds() -> dict[str, int]:
    """Threads of a block by kernel, for bounds that are made of numbers and csrc/cuda's constants.
    Of constants with one name, the header's counts whose name is most like the kernel's file's."""
    files = [f for kind in ("*.h", "*.cu") for f in sorted((CSRC / "cuda").rglob(kind))]
    texts = {file: file.read_text() for file in files}
    headers = {file: constants(text) for file, text in texts.items() if file.suffix == ".h"}
    bounds = {}
    for file, text in texts.items():
        values = {}
        for header in sorted(headers, key=lambda h: len(os.path.commonprefix([h.stem, file.stem]))):
            values |= headers[header]
        values |= constants(text)
        for bound, name in re.findall(r"__launch_bounds__\((\w+)[^)]*\)\s+(\w+)\s*\(", text):
            threads = value_of(bound, values)
            if threads is not None:
                bounds[name] = threads
    return bounds


def nvcc() -> str:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    places = [shutil.which("nvcc"), *(os.path.join(home, "bin", "nvcc") for home in homes if home)]
    found = next((place for place in places if place and os.path.exists(place)), None)
    if found is None:
        sys.exit("kernel_resources: no nvcc on PATH, in CUDA_HOME or in /usr/local/cuda")
    return found


def arches_of(source: Path) -> tuple[str, ...]:
    """What the build compiles a file for by default, its PTX left out."""
    return ("90a",) if "sm90" in source.name else ("80", "90")


def compile_one(source: Path, arch: str, cubin: Path) -> str:
    """ptxas's words."""
    flags = ["-std=c++17", "-O3", f"-I{CSRC}", "-Xptxas=-v", f"-arch=sm_{arch}", "-cubin"]
    command = [nvcc(), *flags, str(source), "-o", str(cubin)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{source.name} for sm_{arch} does not compile:\n{done.stderr}")
    return done.stderr + done.stdout


def compile_all() -> str:
    """On every file of csrc/cuda, one after the other."""
    logs = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            for arch in arches_of(source):
                logs.append(compile_one(source, arch, Path(folder) / f"{source.stem}.{arch}.cubin"))
    return "\n".join(logs)


HEADINGS = ("kernel", "arch", "of it", "registers", "static B", "threads", "occupancy", "faults")


def table(kernels: list[Kernel], every: bool) -> list[tuple[str, ...]]:
    """A line for each kernel and architecture; the instantiations of a template share one unless
    `every` is asked for."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        groups.setdefault((kernel.name if every else kernel.template, kernel.arch), []).append(
            kernel
        )

    def span(values):
        low, high = min(values), max(values)
        return str(low) if low == high else f"{low} to {high}"

    return [
        (
            name,
            arch,
            str(len(group)),
            span([k.registers for k in group]),
            span([k.static_shared for k in group]),
            str(group[0].threads or "-"),
            span([round(100 * k.occupancy) for k in group]) + " %",
            str(sum(bool(k.fault) for k in group) or "-"),
        )
        for (name, arch), group in sorted(groups.items())
    ]


def show(rows) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
        for row in (HEADINGS, *rows):
            print("  ".join(map(str.ljust, row, widths)).rstrip())
        return
    printed = Table(title="CUDA kernels, as ptxas compiled them")
    for i, heading in enumerate(HEADINGS):
        printed.add_column(heading, justify="left" if i < 2 else "right", no_wrap=True)
    for row in rows:
        printed.add_row(*row)
    width = sum(max(map(len, column)) + 3 for column in zip(HEADINGS, *rows, strict=True)) + 1
    Console(width=width).print(printed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("log", nargs="?", type=Path, help="output of a build with -Xptxas=-v")
    parser.add_argument("--compile", action="store_true", help="run nvcc on csrc/cuda instead")
    parser.add_argument("--json", type=Path, help="write every instantiation here")
    parser.add_argument("--all", action="store_true", help="a line for each instantiation")
    arguments = parser.parse_args()
    if bool(arguments.log) == arguments.compile:
        parser.error("give a build's log, or --compile")
    text = compile_all() if arguments.compile else arguments.log.read_text(errors="replace")
    kernels = parse(text)
    if not kernels:
        print("kernel_resources: no kernel found; was it built with -Xptxas=-v?")
        return 2
    show(table(kernels, arguments.all))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(kernel) for kernel in kernels]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    faulty = [kernel for kernel in kernels if kernel.fault]
    for kernel in faulty:
        print(f"{kernel.name} on {kernel.arch}: {kernel.fault}")
    lost = losses(text)
    for line in lost:
        print(f"ptxas: {line}")
    print(
        f"{len(kernels)} kernels, {len(faulty)} with spills, stack frames or local memory"
        + (f"; {len(lost)} losses that ptxas names" if lost else "")
    )
    return 1 if faulty or lost else 0


if __name__ == "__main__":
    sys.exit(main())
