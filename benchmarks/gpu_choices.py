"""Which kernel a GPU would run, and how long it is expected to take, without that GPU.

    python benchmarks/gpu_choices.py [NETWORK...] [--gpu H200] [--dtype bfloat16] [--layout NHWC]
                                     [--batch 64] [--every] [--json FILE]

The choice is a pure function of the problem and the device's properties: a program made of the
kernel table's own C++ (tests/emulator/choices.cpp) is compiled and asked. Prints, for each layer
and direction, the row that is picked, the microseconds that its cost function expects and what
speed that would be: predictions that order rows, and no measurements. --every lists each row that
could run, too.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from fastconv import emulator
from fastconv.benchmarking.layers import DIRECTIONS, layers_of
from fastconv.benchmarking.shapes import ConvShape
from fastconv.benchmarking.tables import LEFT, RIGHT, print_table
from fastconv.selection import Candidate

ROOT = Path(__file__).resolve().parent.parent


class Gpu(NamedTuple):
    sm_arch: int
    sm_count: int
    shared_memory_per_block: int


GPUS = {
    "A100": Gpu(80, 108, 163 << 10),
    "RTX 4090": Gpu(89, 128, 99 << 10),
    "H200": Gpu(90, 132, 227 << 10),
    "B200": Gpu(100, 148, 227 << 10),
}


class Choice(NamedTuple):
    kernel: str  # "" where no row can run it
    candidates: tuple[Candidate, ...]

    @property
    def cost_us(self) -> float:
        return next(c.cost_us for c in self.candidates if c.name == self.kernel)


def query(
    layer: ConvShape,
    direction: str = "fprop",
    *,
    gpu: str = "H200",
    dtype: str = "bfloat16",
    layout: str = "NHWC",
    tf32: bool = False,
    fused: bool = False,
    triton: bool = True,
    op: str = "conv2d",
) -> str:
    """A line for the program. `fused`: with scale, shift and ReLU."""
    sizes = (layer.N, layer.C, layer.H, layer.W, layer.K, layer.R, layer.S)
    place = (*layer.stride, *layer.padding, *layer.dilation, layer.groups)
    modes = (int(triton), dtype, layout, int(tf32), int(fused))
    return " ".join(map(str, (op, direction, *GPUS[gpu], *modes, *sizes, *place)))


def program() -> Path:
    """Compiled where these sources have changed since."""
    csrc = ROOT / "csrc"
    cuda = sorted((csrc / "cuda").glob("*.cu"))
    sources = [ROOT / "tests" / "emulator" / "choices.cpp", *cuda, csrc / "cuda" / "table.cpp"]
    sources += [csrc / "core" / "choose.cpp", csrc / "triton" / "table.cpp"]
    digest = hashlib.sha256()
    for file in sorted({*sources, *csrc.rglob("*.h")}):
        digest.update(file.read_bytes() + b"\0")
    path = emulator.cache() / "programs" / f"choices-{digest.hexdigest()[:16]}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        emulator.compile_program(sources, path)
    return path


def choices(queries) -> list[Choice]:
    done = subprocess.run(
        [str(program())], input="\n".join(queries), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"tests/emulator/choices.cpp: {done.stderr.strip()}")
    found = []
    for answer in done.stdout.split("\n\n")[:-1]:
        first, *rest = answer.strip("\n").split("\n")
        rows = [line.split("\t") for line in rest]
        candidates = [Candidate(n, why or None, None if why else float(c)) for n, c, why in rows]
        found.append(Choice(first.partition("\t")[2], tuple(candidates)))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("networks", nargs="*", default=["resnet50"])
    parser.add_argument("--gpu", default="H200", choices=tuple(GPUS))
    modes = ("bfloat16", "float16", "float32", "tf32", "float64")
    parser.add_argument("--dtype", default="bfloat16", choices=modes)
    parser.add_argument("--layout", default="NHWC", choices=("NHWC", "NCHW"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--every", action="store_true", help="list every row that could run")
    parser.add_argument("--no-triton", action="store_true", help="the CUDA rows alone")
    parser.add_argument("--json", type=Path, help="write every choice here")
    arguments = parser.parse_args()
    how = {"dtype": "float32", "tf32": True} if arguments.dtype == "tf32" else {}
    how = {"dtype": arguments.dtype} | how
    how |= {"gpu": arguments.gpu, "layout": arguments.layout, "triton": not arguments.no_triton}
    asked = [
        (name, layer, direction)
        for name, layer in layers_of(arguments.networks, arguments.batch).items()
        for direction in DIRECTIONS
    ]
    answers = choices(query(layer, direction, **how) for _, layer, direction in asked)
    rows, total_us, total_flops = [], 0.0, 0.0
    for (name, layer, direction), choice in zip(asked, answers, strict=True):
        total_us += layer.count * choice.cost_us
        total_flops += layer.count * layer.flops
        for candidate in choice.candidates:
            picked = candidate.name == choice.kernel
            if picked or (arguments.every and candidate.reason is None):
                us = candidate.cost_us
                first = (name, direction, str(layer.count)) if picked else ("", "", "")
                speed = f"{layer.flops / us / 1e6:.0f}"
                rows.append([*first, candidate.name, f"{us:.1f}", speed])
    headings = [("layer", LEFT), ("direction", LEFT), ("times", RIGHT), ("row", LEFT)]
    headings += [("expected us", RIGHT), ("TFLOP/s", RIGHT)]
    what = f"{arguments.dtype} {arguments.layout}, batch {arguments.batch}"
    print_table(f"{arguments.gpu}, {what}: expected, not measured", headings, rows)
    print(
        f"together {total_us / 1e3:.2f} ms, {total_flops / max(total_us, 1e-9) / 1e6:.0f} TFLOP/s"
    )
    if arguments.json:
        kept = [
            {
                "layer": name,
                "direction": direction,
                "row": choice.kernel,
                "expected_us": choice.cost_us,
                "candidates": {c.name: c.cost_us or c.reason for c in choice.candidates},
            }
            for (name, _, direction), choice in zip(asked, answers, strict=True)
        ]
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 0 if math.isfinite(total_us) else 1


if __name__ == "__main__":
    sys.exit(main())
