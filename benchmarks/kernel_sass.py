"""What the machine code of each CUDA kernel is made of: tensor cores, copies, widths of accesses.

    python benchmarks/kernel_sass.py EXTENSION_OR_CUBIN... [--json FILE] [--all]
    python benchmarks/kernel_sass.py --compile [NAME...] [--json FILE] [--all]

Reads what cuobjdump says of a built extension (fastconv/_C*.so), or compiles csrc/cuda itself: the
files that hold one of NAME, otherwise all of them, *sm90* for sm_90a and the others for sm_80 and
sm_90. cuobjdump and nvdisasm are looked for in CUDA_HOME, on PATH and in the Triton wheel.

A kernel named *igemm_sm90* must be compiled for sm_90a, multiply by wgmma (HGMMA), copy by TMA
(UTMALDG) and move registers between warps (USETMAXREG); one named *igemm_sm80* must multiply by
mma.sync (HMMA) and copy 16 bytes at a time (LDGSTS.128), unless it gathers patches. Both must store
16 bytes at a time or by TMA; those named *reduce* or *join*, which add up partial sums, are left
out. No kernel may use local memory (LDL, STL). Ends with status 1 when one does otherwise, and with
2 when no kernel is found at all.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import util
from pathlib import Path

from kernel_resources import CSRC, arches_of, compile_one, demangle

from fastconv.benchmarking.tables import LEFT, RIGHT, print_table

FUNCTION = re.compile(r"\bFunction : (\S+)")
TARGET = re.compile(r"\bcode for (sm_\w+)|^arch = (sm_\w+)")
# "        /*0770*/              @!P3 LDGSTS.E.BYPASS.128 [R17], [R14.64], P0 ;   /* 0x... */"
INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)((?:\.\w+)*)")

# Its last argument says that few channels are gathered one by one, not copied (kPatches).
PATCHES = re.compile(r"conv2d_igemm_sm80_kernel<.*, true>$")

GLOBAL = {"LDG": "loads", "LDGSTS": "copies", "STG": "stores"}
MATRIX = ("HGMMA", "HMMA", "IMMA", "DMMA")


@dataclass
class Kernel:
    name: str  # with its template arguments
    arch: str
    instructions: int = 0
    opcodes: dict[str, int] = field(default_factory=dict)  # those that this page speaks of
    shapes: dict[str, int] = field(default_factory=dict)  # "HGMMA.64x256x16.F32.BF16"
    wide: dict[str, int] = field(default_factory=dict)  # 16-byte accesses: loads, copies, stores
    narrow: dict[str, int] = field(default_factory=dict)  # the others
    faults: list[str] = field(default_factory=list)

    @property
    def template(self) -> str:
        return self.name.split("<")[0]

    def has(self, opcode: str) -> int:
        return self.opcodes.get(opcode, 0)


COUNTED = (*MATRIX, "UTMALDG", "UTMASTG", "USETMAXREG", "LDSM", "STSM", "FFMA", "LDL", "STL")


def parse(lines: Iterable[str]) -> list[Kernel]:
    """The kernels of cuobjdump's words, in their order."""
    found: list[Kernel] = []
    kernel, arch = None, ""
    for line in lines:
        if kernel is not None and (said := INSTRUCTION.match(line)):
            count(kernel, said[1], said[2].split(".")[1:])
        elif said := FUNCTION.search(line):
            kernel = Kernel(said[1], arch)
            found.append(kernel)
        elif said := TARGET.search(line):
            kernel, arch = None, said[1] or said[2]
    for kernel, name in zip(found, demangle([k.name for k in found]), strict=True):
        kernel.name = name
        kernel.faults = faults_of(kernel)
    return found


def count(kernel: Kernel, opcode: str, suffixes: list[str]) -> None:
    def one_more(of: dict[str, int], key: str) -> None:
        of[key] = of.get(key, 0) + 1

    kernel.instructions += 1
    if opcode in COUNTED:
        one_more(kernel.opcodes, opcode)
    if opcode in MATRIX:
        one_more(kernel.shapes, ".".join([opcode, *suffixes]))
    if opcode in GLOBAL:
        # "128" alone is the width; "LTC128B" is a hint to the cache.
        one_more(kernel.wide if "128" in suffixes else kernel.narrow, GLOBAL[opcode])


def faults_of(kernel: Kernel) -> list[str]:
    found = []

    def needs(there: int, what: str) -> None:
        if not there:
            found.append(f"no {what}")

    if kernel.has("LDL") or kernel.has("STL"):
        found.append(f"{kernel.has('LDL')} LDL and {kernel.has('STL')} STL: local memory")
    multiplies = re.search(r"igemm_sm(80|90)(?!.*(reduce|join))", kernel.template)
    if multiplies is None:
        return found
    if multiplies[1] == "90":
        if kernel.arch != "sm_90a":
            found.append(f"compiled for {kernel.arch}")
        for opcode in ("HGMMA", "UTMALDG", "USETMAXREG"):
            needs(kernel.has(opcode), opcode)
    else:
        needs(kernel.has("HMMA"), "HMMA")
        if not PATCHES.match(kernel.name):
            needs(kernel.wide.get("copies", 0), "LDGSTS.128")
        if kernel.has("HGMMA"):
            found.append(f"{kernel.has('HGMMA')} HGMMA, which sm_80 has not")
    needs(kernel.wide.get("stores", 0) + kernel.has("UTMASTG"), "STG.128 or UTMASTG")
    return found


def tools() -> Path:
    """The folder that has cuobjdump and the nvdisasm which it calls."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / "bin" for home in homes if home]
    if on_path := shutil.which("cuobjdump"):
        folders.append(Path(on_path).resolve().parent)
    triton = util.find_spec("triton")
    for place in (triton.submodule_search_locations or []) if triton else []:
        folders.append(Path(place) / "backends" / "nvidia" / "bin")
    for folder in folders:
        if all(os.access(folder / name, os.X_OK) for name in ("cuobjdump", "nvdisasm")):
            return folder
    looked = ", ".join(map(str, dict.fromkeys(folders)))
    sys.exit(f"kernel_sass: no cuobjdump with an nvdisasm beside it in {looked}")


def disassemble(file: Path) -> list[Kernel]:
    folder = tools()
    path = f"{folder}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [str(folder / "cuobjdump"), "-sass", str(file)]
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            env=os.environ | {"PATH": path},
        )
        kernels = parse(process.stdout)
        if process.wait() != 0 and file.suffix != ".so":  # an extension may hold no kernel
            complaints.seek(0)
            sys.exit(f"kernel_sass: {' '.join(command)}: {complaints.read().strip()}")
    return kernels


def compile_and_disassemble(names: list[str]) -> list[Kernel]:
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((CSRC / "cuda").glob("*.cu")):
            if names and not any(name in source.name for name in names):
                continue
            for arch in arches_of(source):
                cubin = Path(folder) / f"{source.stem}.{arch}.cubin"
                compile_one(source, arch, cubin)
                kernels += disassemble(cubin)
    return kernels


HEADINGS = [
    *(("kernel", LEFT), ("arch", LEFT), ("of it", RIGHT), ("instructions", RIGHT)),
    *(("products", RIGHT), ("TMA in", RIGHT), ("TMA out", RIGHT), ("ldmatrix", RIGHT)),
    *(("loads", RIGHT), ("copies", RIGHT), ("stores", RIGHT), ("faults", RIGHT)),
]


def table(kernels: list[Kernel], every: bool) -> list[list[str]]:
    """A line for each kernel and architecture; the instantiations of a template share one unless
    `every` is asked for. Accesses: 16 bytes wide + narrower."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        key = (kernel.name if every else kernel.template, kernel.arch)
        groups.setdefault(key, []).append(kernel)

    def span(values: Iterable[int]) -> str:
        values = list(values)
        low, high = min(values), max(values)
        return (str(low) if low == high else f"{low} to {high}") if high else "-"

    def accesses(group: list[Kernel], kind: str) -> str:
        wide, narrow = (span(getattr(k, w).get(kind, 0) for k in group) for w in ("wide", "narrow"))
        return "-" if (wide, narrow) == ("-", "-") else f"{wide} + {narrow}".replace("-", "0")

    def products(group: list[Kernel]) -> str:
        used = [o for o in MATRIX if any(k.has(o) for k in group)]
        return ", ".join(f"{span(k.has(o) for k in group)} {o}" for o in used) or "-"

    return [
        [
            *(name, arch, str(len(group)), span(k.instructions for k in group), products(group)),
            *(span(k.has(o) for k in group) for o in ("UTMALDG", "UTMASTG", "LDSM")),
            *(accesses(group, kind) for kind in GLOBAL.values()),
            str(sum(bool(k.faults) for k in group) or "-"),
        ]
        for (name, arch), group in sorted(groups.items())
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("files", nargs="*", help="extensions or cubins; with --compile, names")
    parser.add_argument("--compile", action="store_true", help="run nvcc on csrc/cuda instead")
    parser.add_argument("--json", type=Path, help="write every instantiation here")
    parser.add_argument("--all", action="store_true", help="a line for each instantiation")
    arguments = parser.parse_args()
    if not arguments.files and not arguments.compile:
        parser.error("give an extension, or --compile")
    if arguments.compile:
        kernels = compile_and_disassemble(arguments.files)
    else:
        kernels = [k for file in arguments.files for k in disassemble(Path(file))]
    if not kernels:
        print("kernel_sass: no kernel found; was it built with CUDA?")
        return 2
    print_table(
        "CUDA kernels, as machine code (accesses to global memory: of 16 bytes + narrower ones)",
        HEADINGS,
        table(kernels, arguments.all),
    )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(kernel) for kernel in kernels]
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    faulty = [kernel for kernel in kernels if kernel.faults]
    for kernel in faulty:
        print(f"{kernel.name} on {kernel.arch}: {', '.join(kernel.faults)}")
    products = Counter(o for k in kernels for o in MATRIX if k.has(o))
    said = ", ".join(f"{n} with {o}" for o, n in products.items()) or "none on tensor cores"
    print(f"{len(kernels)} kernels, {said}, {len(faulty)} with faults")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
