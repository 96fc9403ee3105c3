"""The blocks, threads and shared memory that each CUDA row launches with, from the emulator's log.

    python benchmarks/kernel_launches.py [--json FILE]

All shared memory of fastconv's kernels is dynamic, so ptxas (kernel_resources.py) does not know it.
Each row runs the problems of gpu_rows.py in float32 and float64; the largest launch counts. Bytes
are an upper bound: the emulator leaves a gap of 64 bytes behind each array. Ends with status 1 when
a row launched nothing, or a block asks for more than an SM of sm_80 gives it.
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

# Of an SM: warps and blocks; bytes of shared memory of sm_80, of which each block's runtime takes
# 1 KiB; the most that one block may ask for there.
WARPS, BLOCKS, BYTES, RESERVED, MOST = 64, 32, 164 << 10, 1 << 10, 163 << 10


def launches_of(row) -> list[fastconv.emulator.Launch]:
    found = []
    for dtype in (torch.float32, torch.float64):
        for _, call, leaves, arguments in gpu_rows.problems(row, small=False):
            leaves = [t.to(dtype) for t in leaves]
            try:
                with fastconv.kernel(row.name), fastconv.emulator.launches() as log:
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
    blocks = min(WARPS // warps, BLOCKS, BYTES // (shared + RESERVED))
    return {
        "row": row.name.removesuffix("_emulated"),
        "launches": len(launches),
        "most_blocks": max(launch.blocks for launch in launches),
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
    titles = [("row", LEFT), ("threads", RIGHT), ("shared memory", RIGHT), ("occupancy", RIGHT)]
    print_table(
        "launches: shared memory of a block, and the share of sm_80's warps that it allows",
        titles,
        [
            [r["row"], str(r["threads"]), f"{r['shared_bytes']:,} B", f"{r['occupancy']:.0%}"]
            for r in rows
            if r["launches"]
        ],
    )
    wrong = [r["row"] for r in rows if not r["launches"] or r["shared_bytes"] > MOST]
    print(f"{len(rows)} rows" + (f", wrong: {', '.join(wrong)}" if wrong else ", all launched"))
    return 1 if wrong or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
