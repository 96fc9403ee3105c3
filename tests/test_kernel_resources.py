"""benchmarks/kernel_resources.py: what ptxas says about kernels, and when it ends a build."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "kernel_resources.py"
MAX_POOL = "_ZN8fastconv4cuda23max_pool2d_fprop_kernelIfLi4EaEEvNS0_9MaxParamsE"


def words(name, arch, registers, stack=0, stores=0, loads=0, rest=""):
    return f"""\
  ptxas info    : Compiling entry function '{name}' for '{arch}'
  ptxas info    : Function properties for {name}
      {stack} bytes stack frame, {stores} bytes spill stores, {loads} bytes spill loads
  ptxas info    : Used {registers} registers, used 1 barriers{rest}, 432 bytes cmem[0]
"""


def run(tmp_path, log, *options):
    file = tmp_path / "build.log"
    file.write_text(log)
    command = [sys.executable, str(SCRIPT), str(file), "--json", str(tmp_path / "out.json")]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    found = tmp_path / "out.json"
    return done, json.loads(found.read_text()) if found.exists() else []


def test_a_clean_build(tmp_path):
    log = "[1/9] nvcc ...\n" + words(MAX_POOL, "sm_80", 40) + words(MAX_POOL, "sm_90", 128)
    done, kernels = run(tmp_path, log)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [k["arch"] for k in kernels] == ["sm_80", "sm_90"]
    # 256 threads: 8 warps of 40 * 32 = 5 units of 256 registers; 65,536 hold 6 such blocks of 8.
    assert [k["occupancy"] for k in kernels] == [6 * 8 / 64, 2 * 8 / 64]
    assert all(k["threads"] == 256 and k["registers"] for k in kernels)
    assert kernels[0]["name"].startswith("max_pool2d_fprop_kernel<float, 4,")
    assert "max_pool2d_fprop_kernel" in done.stdout and "0 with spills" in done.stdout


@pytest.mark.parametrize(
    "fault",
    [{"stack": 8}, {"stores": 16}, {"loads": 16}, {"rest": ", 24 bytes lmem"}],
    ids=lambda fault: next(iter(fault)),
)
def test_faults_end_the_build(fault, tmp_path):
    log = words(MAX_POOL, "sm_80", 40) + words(MAX_POOL, "sm_90", 40, **fault)
    done, kernels = run(tmp_path, log)
    assert done.returncode == 1
    assert "on sm_90: " in done.stdout and "on sm_80: " not in done.stdout
    assert len(kernels) == 2


@pytest.mark.parametrize(
    "said",
    [
        "(C7508) Potential Performance Loss: 'setmaxnreg' ignored; unable to determine register "
        "count at entry.",
        "(C7511) Potential Performance Loss: wgmma.mma_async instructions are serialized due to "
        "insufficient register resources for the wgmma pipeline in the function '_Z1kPfi'",
    ],
)
def test_what_ptxas_calls_a_loss_ends_the_build_though_it_is_no_warning(said, tmp_path):
    log = f"ptxas info    : {said}\n" * 2 + words(MAX_POOL, "sm_90a", 168)
    done, kernels = run(tmp_path, log)
    assert done.returncode == 1 and len(kernels) == 1
    assert done.stdout.count(said.partition(": ")[2]) == 1 and "1 losses" in done.stdout


def test_shared_memory_is_read(tmp_path):
    _, kernels = run(tmp_path, words("_Z1fv", "sm_90a", 32, rest=", 1024 bytes smem"))
    assert kernels[0]["static_shared"] == 1024 and kernels[0]["threads"] is None


def test_a_log_without_kernels_is_no_success(tmp_path):
    done, _ = run(tmp_path, "nothing was compiled\n")
    assert done.returncode == 2 and "-Xptxas=-v" in done.stdout


def test_each_instantiation_when_asked(tmp_path):
    other = MAX_POOL.replace("IfLi4", "IdLi2")
    log = words(MAX_POOL, "sm_80", 40) + words(other, "sm_80", 48)
    assert "40 to 48" in run(tmp_path, log)[0].stdout
    assert "40 to 48" not in run(tmp_path, log, "--all")[0].stdout
