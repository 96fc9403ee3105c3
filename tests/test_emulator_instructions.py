"""The emulated PTX instructions: against plain loops, on small kernels of the kinds fastconv has,
and on planted faults, each of which must be found under every seed while its right twin passes.

The programs are tests/emulator/*.cu. nvcc builds the same files for a GPU; where it is found, it
must accept every instruction for sm_90a.
"""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import fastconv

FOLDER = Path(__file__).resolve().parent / "emulator"
CSRC = Path(__file__).resolve().parent.parent / "csrc"
SEEDS = (0, 1, 2)

INSTRUCTIONS = ["cases", "instructions_warp", "instructions_block", "instructions_tma"]
INSTRUCTIONS += ["instructions_wgmma", "gemm_sm80", "gemm_sm90", "conv_sm90"]
FAULTS = ["cases", "faults_simt", "faults_async"]

# A planted fault, and what its report says; "" where a wrong result may be all there is.
REPORTS = {
    "missing_first_syncthreads": "",
    "missing_second_syncthreads": "",
    "divergent_syncthreads": " end",  # "the thread ends while", or "after 3 threads have ended"
    "syncthreads_after_exit": "__syncthreads",
    "cp_async_out_of_block": "run out of an array or of the",
    "wrong_cp_async_wait_count": "",
    "early_read_of_cp_async": "",
    "cp_async_read_by_others_without_syncthreads": "",
    "named_barrier_arrival_too_early": "",
    "named_barrier_wrong_count": "bar.sync 1, 96",
    "missing_first_cluster_barrier": "it may not have started",
    "missing_cluster_barrier": "",
    "missing_last_cluster_barrier": "the shared memory of a block that has ended",
    "missing_full_wait": "",
    "released_before_wgmma_wait": "changed while the product was under way",
    "missing_last_wgmma_wait": "wgmma.mma_async",
    "wrong_consumer_parity": "",
    "wrong_producer_parity": "deadlock",
    "deadlock": "parity 0: its phase 0 lacks 1 of 129 arrivals and 0 bytes",
    "arrival_too_many": "",
    "expect_tx_too_many_bytes": "parity 0: its phase 0 lacks 0 of 1 arrivals and 16 bytes",
    "expect_tx_too_few_bytes": "deadlock",
    "missing_fence_mbarrier_init": "was not made visible to copies by fence_mbarrier_init()",
    "missing_mbarrier_init": "has not been initialised",
    "missing_wgmma_fence": "no wgmma_fence() came after",
    "missing_wgmma_commit": "",
    "overwritten_mbarrier": "has been overwritten",
    "accumulators_used_under_way": "D's registers were written while under way",
    "wgmma_out_of_bounds": "wgmma.mma_async",
    "tma_destination_misaligned": "is not aligned to 1024 bytes",
    "wgmma_descriptors_differ": "the threads of a warpgroup differ in",
    "missing_fence_proxy_async_before_store": "",
    "missing_fence_proxy_async_before_wgmma": "",
    "missing_syncthreads_before_store": "changed before the store had read it",
    "missing_store_wait": "",
    "ends_before_store_has_read": "a group of TMA stores",
    "setmaxnreg_beyond_the_block": "setmaxnreg.inc 232: the block has 7168 registers to give",
}
# What only AddressSanitizer sees, and its words or the emulator's own.
SANITIZER_REPORTS = {
    "shared_out_of_bounds": "use-after-poison",
    "global_out_of_bounds": "heap-buffer-overflow",
    "cp_async_out_of_array": "run out of an array",
}

missing = fastconv.emulator.available()
needs_emulator = pytest.mark.skipif(bool(missing), reason=missing)


def run(program, case, seed):
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [program, case, str(seed)], capture_output=True, text=True, timeout=300, env=environment
    )


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Compiles a program once; asked for by name and whether it is sanitized."""
    folder = tmp_path_factory.mktemp("programs")
    built = {}

    def program(name, sanitize=False):
        if (name, sanitize) not in built:
            stems = INSTRUCTIONS if name == "instructions" else FAULTS
            output = folder / (name + ("_sanitized" if sanitize else ""))
            fastconv.emulator.compile_program(
                [FOLDER / f"{stem}.cu" for stem in stems], output, sanitize=sanitize
            )
            built[name, sanitize] = output
        return built[name, sanitize]

    return program


@needs_emulator
@pytest.mark.parametrize("seed", SEEDS)
def test_instructions_and_kernels(programs, seed):
    done = run(programs("instructions"), "all", seed)
    assert done.returncode == 0, done.stderr


@needs_emulator
def test_instructions_and_kernels_sanitized(programs):
    done = run(programs("instructions", sanitize=True), "all", SEEDS[0])
    assert done.returncode == 0, done.stderr


@needs_emulator
def test_every_planted_fault_is_listed_here(programs):
    cases = subprocess.run([programs("faults")], capture_output=True, text=True, check=True)
    names = set(cases.stdout.split())
    planted = {name for name in names if not name.endswith(".right")}
    assert planted == {*REPORTS, *SANITIZER_REPORTS}
    assert {name + ".right" for name in planted} == names - planted


@needs_emulator
@pytest.mark.parametrize("name", REPORTS)
def test_planted_fault_is_found(programs, name):
    for seed in SEEDS:
        done = run(programs("faults"), name, seed)
        assert done.returncode == 1, f"seed {seed}: not found"
        assert REPORTS[name] in done.stderr


@needs_emulator
@pytest.mark.parametrize("name", SANITIZER_REPORTS)
def test_planted_fault_is_found_by_the_sanitizer(programs, name):
    for seed in SEEDS:
        done = run(programs("faults", sanitize=True), name, seed)
        assert done.returncode != 0, f"seed {seed}: not found"
        assert SANITIZER_REPORTS[name] in done.stderr


@needs_emulator
@pytest.mark.parametrize("name", [*REPORTS, *SANITIZER_REPORTS])
def test_right_twin_passes(programs, name):
    for seed in SEEDS:
        done = run(programs("faults"), name + ".right", seed)
        assert done.returncode == 0, done.stderr
    done = run(programs("faults", sanitize=True), name + ".right", SEEDS[0])
    assert done.returncode == 0, done.stderr


# --- nvcc -----------------------------------------------------------------------------------------


def nvcc():
    found = shutil.which("nvcc")
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin" / "nvcc"
    return found or (str(home) if home.exists() else None)


def compile_for(arches, source, output):
    """What nvcc and ptxas say when they compile `source`."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in arches]
    command = [nvcc(), "-std=c++17", "-O3", f"-I{CSRC}", *targets, "-Xptxas=-warn-spills", "-c"]
    command += [str(source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def complaints(said):
    """ptxas's and nvcc's warnings, and its notes (C75..) that wgmma or setmaxnreg will not run as
    written; but for C7519, an added warpgroup.arrive, and its advice against the instructions of
    sm_90a elsewhere."""
    lines = said.splitlines()
    noted = [line for line in lines if "warning" in line.lower() or "(C75" in line]
    return [line for line in noted if "(C7519)" not in line]


KERNELS = ("gemm_sm80", "gemm_sm90", "conv_sm90")


@pytest.mark.skipif(nvcc() is None, reason="nvcc was not found")
@pytest.mark.parametrize(
    "stems",
    [
        pytest.param(("every_instruction", *KERNELS), id="kernels"),
        pytest.param(tuple(INSTRUCTIONS[:5]), id="programs", marks=pytest.mark.slow),
    ],
)
def test_ptxas_accepts_every_instruction(stems, tmp_path):
    """Every form of every instruction, and the programs above, for sm_90a; the headers alone also
    where the instructions do not exist."""
    jobs = [(("90a",), stem) for stem in stems]
    jobs += [(("80", "90"), "every_instruction")] if "every_instruction" in stems else []

    def compile_one(job):
        arches, stem = job
        return compile_for(arches, FOLDER / f"{stem}.cu", tmp_path / f"{stem}{arches[0]}.o")

    with ThreadPoolExecutor(2) as pool:
        for job, said in zip(jobs, pool.map(compile_one, jobs), strict=True):
            assert complaints(said) == [], job
