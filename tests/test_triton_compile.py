"""Every Triton kernel and configuration, compiled for sm_80 and sm_90 without a GPU: by
benchmarks/triton_resources.py, in a process that does not interpret."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastconv
import support
from fastconv import triton_kernels

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "triton_resources.py"
MISSING = triton_kernels.version() is None

pytestmark = pytest.mark.skipif(MISSING, reason="Triton is not installed")


def environment():
    """Of a process that imports the fastconv that is tested here."""
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {
        "PYTHONPATH": os.pathsep.join(
            [str(Path(fastconv.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        ).rstrip(os.pathsep)
    }


def run(*arguments, code=None):
    command = [sys.executable, *(["-c", code] if code else [str(SCRIPT)]), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=1500, env=environment(), check=False
    )


def test_every_kernel_and_configuration_compiles(tmp_path):
    """No spills, no more shared memory than the card has, tensor cores where tl.dot is."""
    done = run("--json", str(tmp_path / "kernels.json"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    kernels = json.loads((tmp_path / "kernels.json").read_text())["kernels"]
    rows = {row.name for row in fastconv.kernels() if row.backend == "triton"}
    assert {k["row"] for k in kernels} == rows
    for arch in (80, 90):
        named = {name for name in rows if arch == 90 or "sm90" not in name}
        assert {k["row"] for k in kernels if k["arch"] == arch} == named
    products = [k for k in kernels if k["tensor_cores"]]
    assert {k["row"] for k in products} == {r for r in rows if "igemm" in r or "conv1x1" in r}
    for name in {k["row"] for k in products}:  # wgmma has 64 rows: smaller tiles take mma.sync
        wide = [k for k in products if k["row"] == name and k["arch"] == 90]
        assert any("wgmma" in k["tensor_cores"] for k in wide if k["dtype"] == "bfloat16")
    assert any("TMA" in k["accesses"] for k in products)
    support.coverage["Triton kernels compiled for sm_80 and sm_90"] += len(kernels)


FAULTS = """
import sys
sys.path.insert(0, {folder!r})
import triton_resources as checker
from fastconv.triton_kernels import table
from fastconv.triton_kernels.plan import Plan, Row

name = "conv2d_igemm_triton_fprop"
row = table.ROWS[name]
problem, device = checker.BASE, checker.DEVICES[{device}]
task = checker.Task(name, "planted", problem, device, None)

def changed(**fields):
    def plan(problem, device, config=None):
        launch = row.plan(problem, device, config).launches[-1]
        constants = launch.constants | fields.pop("constants", {{}})
        return Plan((launch._replace(constants=constants, **fields),))
    table.ROWS[name] = Row(name, plan, row.configs_for)
    return "; ".join(result.fault for result in checker.guarded(task))

print(changed({change}))
"""


@pytest.mark.parametrize(
    "device, change, said",
    [
        (0, "constants={'ROWS': 128, 'COLUMNS': 256}, num_warps=4", "that spill"),
        (1, "num_stages=12", "of shared memory"),
        (1, "constants={'PRECISION': 'ieee', 'DEPTH': 3}", "does not compile"),
    ],
    ids=["spills", "shared memory", "compile error"],
)
def test_the_checker_finds_planted_faults(device, change, said):
    done = run(code=FAULTS.format(folder=str(SCRIPT.parent), device=device, change=change))
    assert said in done.stdout, done.stdout + done.stderr


def test_the_checker_misses_no_tensor_core():
    """Strict float32 on CUDA cores, which `precision` never asks an NVIDIA card for."""
    change = "constants={'PRECISION': 'ieee'}"
    code = FAULTS.format(folder=str(SCRIPT.parent), device=1, change=change)
    done = run(code=code.replace("checker.BASE", "checker.BASE._replace(dtype='float32')"))
    assert "no tensor-core instruction" in done.stdout, done.stdout + done.stderr
