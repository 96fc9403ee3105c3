"""The blocks, threads and shared memory that each CUDA row launches with, from the emulator's log.

    python benchmarks/kernel_launches.py [--json FILE]

All shared memory of fastconv's kernels is dynamic, so ptxas (kernel_resources.py) does not know it.
Each row runs the problems of gpu_rows.py in the types it takes; the largest launch counts. Bytes
are an upper bound: the emulator leaves a gap of 64 bytes behind each array. Ends with status 1 when
a row launched nothing, or a block asks for more than an SM gives it: one of sm_80, or of sm_90 for
the rows that run there alone.
"""

import argparse
import json
import sys
from pathlib import Path

import gpu_rows
import torch

import fastconv
import fastconv.functional as ff
from fastconv.benchmarking.tables import LEFT, RIGHT, print_table

# Of an SM: warps and blocks; bytes of shared memory, of which each block's runtime takes 1 KiB.
WARPS, BLOCKS, RESERVED = 64, 32, 1 << 10


def shared_memory(row) -> int:
    """Of an SM of the least architecture that runs the row; a block may have all but 1 KiB."""
    return (228 if row.arch == "sm_90a" else 164) << 10


def launches_of(row) -> list[fastconv.emulator.Launch]:
    found = []
    for dtype, precision, _ in gpu_rows.MODES:
        # float16's launches are bfloat16's, TF32's are at most strict float32's.
        if dtype not in row.dtypes or dtype == torch.float16 or precision == "tf32":
            continue
        for _, call, leaves, arguments in gpu_rows.problems(row, gpu_rows.CONVOLUTIONS):
            leaves = [t.to(dtype) for t in leaves]
            try:
                with (
                    fastconv.kernel(row.name),
                    gpu_rows.emulated_precision(precision),
                    fastconv.emulator.launches() as log,
                ):
                    gpu_rows.results(row, call, ff, leaves, arguments)
            except RuntimeError as error:
                if f"kernel {row.name} is forced and cannot run" not in str(error):
                    raise
                continue
            found += [launch for launch in log if launch.name + "_emulated" == row.name]
    return found


def figures(row) -> dict:
    launches = launches_of(row)
    if not launches:
        return {"row": row.name.removesuffix("_emulated"), "launches": 0}
    shared = max(launch.shared_bytes for launch in launches)
    threads = max(launch.threads for launch in launches)
    warps = -(-threads // 32)
    blocks = min(WARPS // warps, BLOCKS, shared_memory(row) // (shared + RESERVED))
    return {
        "row": row.name.removesuffix("_emulated"),
        "arch": row.arch,
        "launches": len(launches),
        "most_blocks": max(launch.blocks for launch in launches),
        "blocks": blocks,  # on an SM at once, as far as shared memory goes
        "threads": threads,
        "shared_bytes": shared,
        "occupancy": blocks * warps / WARPS,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--json", type=Path, help="where the figures go")
    path = parser.parse_args().json
    fastconv.emulator.load()
    torch.manual_seed(0)
    rows = [figures(row) for row in fastconv.kernels() if row.backend == "emulator"]
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n")
    headings = [("row", LEFT), ("arch", LEFT)]
    headings += [(name, RIGHT) for name in ("threads", "shared bytes", "occupancy")]
    launched = [r for r in rows if r["launches"]]
    lines = [
        (r["row"], r["arch"], str(r["threads"]), f"{r['shared_bytes']:,}", f"{r['occupancy']:.0%}")
        for r in launched
    ]
    print_table(
        "launches: shared memory of a block, and the share of an SM's warps that it allows",
        headings,
        lines,
    )
    wrong = [r["row"] for r in rows if not r["launches"] or not r["blocks"]]
    print(f"{len(rows)} rows" + (f", wrong: {', '.join(wrong)}" if wrong else ", all launched"))
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
