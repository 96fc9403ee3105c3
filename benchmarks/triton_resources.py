"""Compiles the Triton kernels for sm_80 and sm_90 and says what each costs an SM. Needs no GPU.

    python benchmarks/triton_resources.py [--all] [--only TEXT] [--jobs N] [--json FILE]

What is compiled is what the package launches: every row's plan, with every configuration that the
row offers for a problem. By default, of a row's first problem, each configuration in bfloat16 and
each dtype with the configuration that is chosen for it; of the others bfloat16 with the chosen one,
by turns for sm_80 or for sm_90. --all takes every combination. Ends with status 1 when a
kernel spills registers, asks for more shared memory than the card has, or was meant for tensor
cores and does not use them; with 2 when there was nothing to compile.
"""

import argparse
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)  # its kernels cannot be compiled

from fastconv.benchmarking.tables import LEFT, RIGHT, print_table  # noqa: E402
from fastconv.triton_kernels import available  # noqa: E402
from fastconv.triton_kernels.problem import (  # noqa: E402
    BatchNormProblem,
    Conv2dProblem,
    Device,
    Pool2dProblem,
)

DEVICES = (
    Device("cuda", 80, 108, 166912),  # A100: 163 KiB a block
    Device("cuda", 90, 132, 232448),  # H200: 227 KiB
)
DTYPES = ("bfloat16", "float16", "float32", "float64")

BASE = Conv2dProblem(
    32, 128, 28, 28, 256, 3, 3, 1, 1, 1, 1, 1, 1, 1, "bfloat16", "NHWC", "NHWC"
)  # fmt: skip
POINTWISE = BASE._replace(R=1, S=1, pad_h=0, pad_w=0)
DEPTHWISE = BASE._replace(K=128, G=128)
NCHW = {"layout": "NCHW", "filter_layout": "NCHW"}
STEM = {"C": 3, "K": 64, "R": 7, "S": 7, "stride_h": 2, "stride_w": 2, "pad_h": 3, "pad_w": 3}
ALL_EPILOGUES = {"scale": True, "shift": True, "residual": True, "activation": "silu"}
CONVOLUTIONS = {
    "3x3": BASE,
    "3x3 NCHW": BASE._replace(**NCHW),
    "3x3 NHWC, KCRS": BASE._replace(filter_layout="NCHW"),
    "3x3/2": BASE._replace(stride_h=2, stride_w=2),
    "3x3/2 NCHW": BASE._replace(stride_h=2, stride_w=2, **NCHW),
    "stem": BASE._replace(**STEM),
    "stem NCHW": BASE._replace(**STEM, **NCHW),
    "24 channels": BASE._replace(C=24, K=40),
    "odd channels": BASE._replace(C=20, K=33),
    "odd channels NCHW": BASE._replace(C=20, K=33, **NCHW),
    "32 groups": BASE._replace(G=32),
    "few filters": BASE._replace(K=8),
    "dilated, 5x5": BASE._replace(R=5, S=5, dil_h=2, dil_w=2, pad_h=4, pad_w=4),
    "wide": BASE._replace(N=100_000),
    "unaligned": BASE._replace(aligned=False),
}
POINTWISES = {
    "1x1": POINTWISE,
    "1x1 NCHW": POINTWISE._replace(**NCHW),
    "1x1 NCHW 7x7": POINTWISE._replace(H=7, W=7, **NCHW),
    "1x1 24": POINTWISE._replace(C=24, K=40),
    "1x1 odd": POINTWISE._replace(C=20, K=33),
    "1x1 wide": POINTWISE._replace(N=100_000),
}
EPILOGUES = {
    "bias": {"shift": True},
    "scale, shift, residual, silu": ALL_EPILOGUES,
    "leaky relu": {"scale": True, "shift": True, "activation": "leaky_relu"},
}
DEPTHWISES = {
    "depthwise 3x3": DEPTHWISE,
    "depthwise 3x3 NCHW": DEPTHWISE._replace(**NCHW),
    "depthwise 3x3/2": DEPTHWISE._replace(stride_h=2, stride_w=2),
    "depthwise 31x31": DEPTHWISE._replace(R=31, S=31, pad_h=15, pad_w=15),
    "depthwise, multiplier 3": DEPTHWISE._replace(K=384),
    "depthwise 24": DEPTHWISE._replace(C=24, K=24, G=24),
    "depthwise odd": DEPTHWISE._replace(C=21, K=21, G=21),
    "depthwise wide": DEPTHWISE._replace(N=100_000),
}
MAX_POOL = Pool2dProblem("max", 32, 64, 112, 112, 56, 56, 3, 3, 2, 2, 1, 1, dtype="bfloat16")
MAX_POOLS = {
    "max 3x3/2": MAX_POOL,
    "max 3x3/2, uint8": MAX_POOL._replace(index="uint8"),
    "max 2x2/2, int64": MAX_POOL._replace(
        R=2, S=2, pad_h=0, pad_w=0, index="int64"
    ),
    "max 3x3/1, uint8": MAX_POOL._replace(
        C=480, H=14, W=14, P=14, Q=14, stride_h=1, stride_w=1, index="uint8"
    ),
    "max 31x31, int32": MAX_POOL._replace(
        P=41, Q=41, R=31, S=31, pad_h=0, pad_w=0, index="int32"
    ),
    "max odd, uint8": MAX_POOL._replace(C=3, H=7, W=7, P=3, Q=3, pad_h=0, pad_w=0, index="uint8"),
    "max wide, uint8": MAX_POOL._replace(N=4000, index="uint8"),
}  # fmt: skip
AVERAGE = Pool2dProblem("average", 32, 192, 28, 28, 28, 28, 3, 3, 1, 1, 1, 1, dtype="bfloat16")
AVERAGES = {
    "average 3x3/1": AVERAGE,
    "average 3x3/1, inside": AVERAGE._replace(count_include_pad=False),
    "average 2x2/2 by 3": AVERAGE._replace(
        P=14, Q=14, R=2, S=2, stride_h=2, stride_w=2, pad_h=0, pad_w=0, divisor_override=3
    ),
    "average wide": AVERAGE._replace(N=20_000),
}
ADAPTIVES = {
    "global": AVERAGE._replace(kind="adaptive_average", C=2048, H=7, W=7, P=1, Q=1),
    "global, large": AVERAGE._replace(kind="adaptive_average", H=64, W=64, P=1, Q=1),
    "to 6x6": AVERAGE._replace(kind="adaptive_average", C=256, H=13, W=13, P=6, Q=6),
}
NORM = BatchNormProblem(32, 256, 784, 1, dtype="bfloat16")
NORMS = {
    "training": NORM,
    "inference": NORM._replace(training=False),
    "plain": NORM._replace(weight=False, bias=False),
    "49 pixels": NORM._replace(C=2048, H=49),
    "odd channels": NORM._replace(C=33, H=101),
    "wide": NORM._replace(N=20_000),
}
NORM_TAILS = {
    "fprop": {
        "residual, relu": NORM._replace(residual=True, activation="relu"),
        "silu, inference": NORM._replace(training=False, activation="silu"),
    },
    "dgrad": {
        "relu": NORM._replace(activation="relu"),
        "residual, relu": NORM._replace(activation="relu", output=True, grad_residual=True),
        "residual, hardswish": NORM._replace(activation="hardswish", residual=True),
    },
}


def both_layouts(problems: dict) -> dict:
    return {
        f"{name} {layout}": problem._replace(layout=layout)
        for name, problem in problems.items()
        for layout in ("NHWC", "NCHW")
    }


def problems_of(row: str) -> dict:
    """Named problems for a row of the table."""
    if row.startswith("conv1x1_tma"):
        pointwises = {"1x1": POINTWISE, "1x1, few": POINTWISE._replace(C=64, K=64)}
    else:
        pointwises = POINTWISES
    if row.startswith("conv1x1"):
        problems = pointwises
        if row.endswith("fprop"):
            epilogues = {f"1x1 {n}": POINTWISE._replace(**e) for n, e in EPILOGUES.items()}
            problems = problems | epilogues
            if "tma" not in row:
                problems["1x1/2"] = POINTWISE._replace(stride_h=2, stride_w=2)
    elif "depthwise" in row:
        problems = DEPTHWISES
        if row.endswith("fprop"):
            problems = problems | {
                f"depthwise {n}": DEPTHWISE._replace(**e) for n, e in EPILOGUES.items()
            }
    elif "bgrad" in row:
        bgrads = {"bgrad": POINTWISE, "bgrad odd": POINTWISE._replace(K=33, H=7, W=7)}
        problems = both_layouts(bgrads)
    elif row.startswith("conv2d"):
        problems = CONVOLUTIONS
        if row.endswith("fprop"):
            problems = problems | {f"3x3 {n}": BASE._replace(**e) for n, e in EPILOGUES.items()}
            problems["3x3 NCHW residual"] = BASE._replace(**ALL_EPILOGUES, **NCHW)
        if row.endswith("wgrad"):
            problems = problems | POINTWISES
    elif row.startswith("max"):
        problems = both_layouts(MAX_POOLS)
    elif row.startswith("avg"):
        problems = both_layouts(AVERAGES)
    elif row.startswith("adaptive"):
        problems = both_layouts(ADAPTIVES)
    else:
        problems = both_layouts(NORMS | NORM_TAILS[row.rsplit("_", 1)[1]])
        if row.endswith("dgrad"):
            problems["no input gradient"] = NORM._replace(out=False)
    if row.endswith("statistics"):
        problems = {
            name: problem._replace(statistics=True, shift=True)
            for name, problem in problems.items()
        }
    if row.endswith("max_pool2d_triton_dgrad"):
        problems = {n: p for n, p in problems.items() if p.index != "none"}
    return problems


def in_dtype(problem, dtype: str) -> Iterator:
    """The problem in that dtype; float32 convolutions are strict and TF32."""
    yield problem._replace(dtype=dtype)
    if dtype == "float32" and isinstance(problem, Conv2dProblem):
        yield problem._replace(dtype=dtype, tf32=True)


@dataclass(frozen=True)
class Task:
    """One plan to compile."""

    row: str
    name: str
    problem: tuple
    device: Device
    config: int | None  # its number in configs_for; None: what is chosen


def tasks(rows: dict, everything: bool) -> Iterator[Task]:
    for row in rows.values():
        takes_all_dtypes = "tma" not in row.name  # TMA moves no float64
        devices = DEVICES[-1:] if "sm90" in row.name else DEVICES
        for place, device in enumerate(devices):
            for number, (name, problem) in enumerate(problems_of(row.name).items()):
                # The first on every device, the others in turn; neighbours differ in the layout.
                turn = (number + number // 2) % len(devices)
                if number and place != turn and not everything:
                    continue
                for dtype in DTYPES if takes_all_dtypes else DTYPES[:3]:
                    for typed in in_dtype(problem, dtype):
                        configs = range(len(row.configs_for(typed, device)))
                        if everything or (number == 0 and dtype == "bfloat16"):
                            yield from (Task(row.name, name, typed, device, i) for i in configs)
                        if number == 0 or dtype == "bfloat16":
                            yield Task(row.name, name, typed, device, None)


@dataclass
class Compiled:
    """One kernel in one of the forms that a plan launches."""

    row: str
    problem: str
    dtype: str
    arch: int
    config: str
    kernel: str
    registers: int
    spills: int  # instructions that store a register in memory, or load it back
    shared: int
    tensor_cores: str  # the instruction, where there is one
    accesses: str  # of global memory, by width
    seconds: float
    fault: str


ACCESSES = {
    "TMA": r"cp\.async\.bulk\.tensor",
    "async 16": r"cp\.async\.cg\.shared",
    "async 4": r"cp\.async\.ca\.shared",
    "load 16": r"ld\.global[\w.:]*\.(?:v4\.b32|v2\.b64|b128)",
    "load 8": r"ld\.global[\w.:]*\.(?:v2\.b32|b64)",
    "load 4": r"ld\.global[\w.:]*\.b32 [^{]",
    "load 2": r"ld\.global[\w.:]*\.b16",
    "store 16": r"st\.global[\w.:]*\.(?:v4\.b32|v2\.b64|b128)",
    "store 2": r"st\.global[\w.:]*\.b16",
}
DOT = r"((?:wgmma\.mma_async|mma)\.sync\.aligned\.[\w.]+)"


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a kernel, and the instructions that spill some, by cuobjdump, which comes with
    Triton. A stack frame alone is no fault: ptxas leaves some of 8 bytes that nothing uses."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def ask(what: str) -> str:
            command = [tool, what, file.name]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", ask("-res-usage"))
        registers, *memory = map(int, usage.groups())
        spills = len(re.findall(r"\b(?:STL|LDL)\b", ask("-sass"))) if any(memory) else 0
    return registers, spills


def compile_task(task: Task) -> list[Compiled]:
    from fastconv.triton_kernels import runtime
    from fastconv.triton_kernels.table import ROWS

    row = ROWS[task.row]
    config = (
        None if task.config is None else row.configs_for(task.problem, task.device)[task.config]
    )
    results = []
    for launch in row.plan(task.problem, task.device, config).launches:
        began = time.perf_counter()
        kernel = runtime.compile_for(launch, task.device, task.problem.aligned)
        seconds = time.perf_counter() - began
        registers, spills = resource_usage(kernel.asm["cubin"])
        ptx = kernel.asm["ptx"]
        dots = sorted(set(re.findall(DOT, ptx)))
        counts = {name: len(re.findall(pattern, ptx)) for name, pattern in ACCESSES.items()}
        faults = []
        if spills:
            faults.append(f"{spills} instructions that spill")
        if kernel.metadata.shared > task.device.shared_memory:
            faults.append(f"{kernel.metadata.shared} bytes of shared memory")
        # "tl.dot" in the source, and float32 that is not asked to be exact on CUDA cores
        if "tl.dot" in launch.kernel.src or "dot(" in launch.kernel.src:
            if not dots:
                faults.append("no tensor-core instruction")
        results.append(
            Compiled(
                task.row,
                task.name,
                task.problem.dtype + (" tf32" if getattr(task.problem, "tf32", False) else ""),
                task.device.arch,
                "chosen" if config is None else " ".join(map(str, config[:2])),
                launch.kernel.__name__.removesuffix("_kernel"),
                registers,
                spills,
                kernel.metadata.shared,
                ", ".join(dots),
                ", ".join(f"{count} x {name}" for name, count in counts.items() if count),
                round(seconds, 2),
                "; ".join(faults),
            )
        )
    return results


def guarded(task: Task) -> list[Compiled]:
    try:
        return compile_task(task)
    except Exception as error:  # the next one may well compile
        said = f"does not compile: {type(error).__name__}: {error}"
        dtype, arch = task.problem.dtype, task.device.arch
        config = str(task.config)
        return [Compiled(task.row, task.name, dtype, arch, config, "?", 0, 0, 0, "", "", 0.0, said)]


def report(results: list[Compiled], title: str) -> None:
    columns = [("row", LEFT), ("problem", LEFT), ("dtype", LEFT), ("sm", RIGHT), ("config", LEFT)]
    columns += [("kernel", LEFT), ("registers", RIGHT), ("shared", RIGHT), ("dot", LEFT)]
    columns += [("global memory", LEFT), ("fault", LEFT)]
    rows = [
        (
            *(r.row, r.problem, r.dtype, str(r.arch), r.config, r.kernel),
            *(str(r.registers), str(r.shared)),
            *(r.tensor_cores.replace(".sync.aligned", ""), r.accesses, r.fault),
        )
        for r in results
    ]
    print_table(title, columns, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--all", action="store_true", help="every configuration of every problem")
    parser.add_argument("--only", default="", help="rows whose name holds this text")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if why := available():
        # Without a GPU there is no one to run them, but ptxas comes with Triton.
        if "no GPU" not in why:
            print(why, file=sys.stderr)
            return 2
    import triton

    from fastconv.triton_kernels.table import ROWS

    rows = {name: row for name, row in ROWS.items() if arguments.only in name}
    todo = list(dict.fromkeys(tasks(rows, arguments.all)))
    began = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(arguments.jobs) as pool:
        results = [r for some in pool.imap(guarded, todo, chunksize=4) for r in some]
    faulty = [r for r in results if r.fault]
    report(faulty or results if arguments.only else faulty, f"Triton {triton.__version__}")
    seconds = time.monotonic() - began
    print(
        f"Triton {triton.__version__}: {len(rows)} rows, {len(results)} kernels compiled for sm_80 "
        f"and sm_90 in {seconds:.0f} s, {len(faulty)} faulty"
    )
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        kept = {"triton": triton.__version__, "kernels": [asdict(r) for r in results]}
        arguments.json.write_text(json.dumps(kept, indent=1) + "\n")
    return 1 if faulty else 0 if results else 2


if __name__ == "__main__":
    sys.exit(main())
