"""The emulator as users meet it: compiled on first use, cached, refused in words, forced, logged.

What its instructions mean and which faults it finds: test_emulator_instructions.py. Each kernel
under it: the tests that loop over the kernel table.
"""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import fastconv
import fastconv.functional as ff
import support
from fastconv import emulator

pytestmark = pytest.mark.skipif(
    bool(support.emulator_missing()), reason=support.emulator_missing() or "-"
)


def emulated_rows():
    return [row for row in fastconv.kernels() if row.backend == "emulator"]


def test_every_cuda_row_has_its_twin():
    names = [row.name for row in emulated_rows()]
    assert names and all(name.endswith("_emulated") for name in names)
    assert all(row.arch.startswith("sm_") for row in emulated_rows())
    compiled = [row.name + "_emulated" for row in fastconv.kernels() if row.backend == "cuda"]
    assert not compiled or compiled == names
    covered = {(row.op, row.direction) for row in emulated_rows()}
    own = {(row.op, row.direction) for row in fastconv.kernels() if row.backend == "cpu"}
    assert own <= covered, f"without a CUDA kernel: {sorted(own - covered)}"


def test_rows_stand_in_the_table_from_the_first_use_on():
    done = support.run_python(
        """
        import fastconv
        rows = lambda: sum(row.backend == "emulator" for row in fastconv.kernels())
        before = rows()
        with fastconv.backend("emulator"):
            first = rows()
        with fastconv.backend("emulator"):
            pass
        print(before, first > 0, rows() == first)
        """
    )
    assert done.stdout.split() == ["0", "True", "True"], done.stderr


def test_it_never_runs_unasked():
    x, w = torch.randn(1, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with emulator.launches() as log:
        ff.max_pool2d(ff.conv2d(x, w), 2)
    assert log == []
    reasons = {c.name: c.reason for c in fastconv.explain(x, w).candidates}
    assert reasons["conv2d_direct_sm80_fprop_emulated"] == "runs only when asked for"


def test_a_forced_row_runs_and_is_logged():
    x, w = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    with emulator.launches() as log, fastconv.kernel("conv2d_direct_sm80_fprop_emulated"):
        out = ff.conv2d(x, w)
    assert [launch.name for launch in log] == ["conv2d_direct_sm80_fprop"]
    assert log[0].blocks >= 1 and log[0].threads >= 32
    assert torch.allclose(out, F.conv2d(x, w), atol=1e-5)


def launch_names(call):
    with emulator.launches() as log, fastconv.backend("emulator"), torch.no_grad():
        call()
    return [launch.name for launch in log]


@pytest.mark.parametrize("layout", support.FORMATS)
def test_fused_calls_are_one_launch(layout):
    x, w, b = torch.randn(2, 8, 9, 9), torch.randn(16, 8, 3, 3), torch.randn(16)
    x = x.contiguous(memory_format=support.FORMATS[layout])
    w = w.contiguous(memory_format=support.FORMATS[layout])
    mean, var, residual = torch.randn(16), torch.rand(16) + 0.5, torch.randn(2, 16, 9, 9)
    lenet = torch.randn(4, 1, 28, 28), torch.randn(6, 1, 5, 5), torch.randn(6)
    calls = {
        "bias": lambda: ff.conv2d(x, w, b, padding=1),
        "BatchNorm, ReLU": lambda: ff.conv_bn_relu(x, w, b, mean, var, b, b, padding=1),
        "residual": lambda: ff.conv_bn_relu(
            x, w, None, mean, var, b, b, residual=residual, padding=1, activation="silu"
        ),
        "pooling": lambda: ff.conv2d_max_pool2d(*lenet, padding=2),
        "max pooling with positions": lambda: ff.max_pool2d(x, 2, return_indices=True),
        "global average": lambda: ff.adaptive_avg_pool2d(x, 1),
        "BatchNorm of fixed statistics": lambda: ff.batch_norm(x, mean[:8], var[:8]),
    }
    counts = {name: launch_names(call) for name, call in calls.items()}
    assert {name for name, launches in counts.items() if len(launches) != 1} == set(), counts


def test_forward_and_backward_stay_on_it():
    """The choice made in forward holds in backward, after the block has ended."""
    x = torch.randn(2, 4, 8, 8, requires_grad=True)
    conv, pool = fastconv.Conv2d(4, 6, 3, padding=1), fastconv.MaxPool2d(2)
    norm = fastconv.BatchNorm2d(6)
    with fastconv.backend("emulator"), emulator.launches() as forward:
        out = pool(torch.relu(norm(conv(x))))
    with emulator.launches() as backward:
        out.square().sum().backward()
    text = " ".join(launch.name for launch in forward + backward)
    for part in ("fprop", "dgrad", "wgrad", "bgrad", "max_pool2d", "batch_norm"):
        assert part in text, text


def test_threads_at_once():
    """Each thread's launches are its own; nothing is shared but the log and the seed."""
    x, w = torch.randn(4, 8, 12, 12), torch.randn(8, 8, 3, 3)
    expected = F.conv2d(x, w)
    results, errors = [None] * 4, []

    def work(i):
        try:
            with fastconv.backend("emulator"):
                for _ in range(5):
                    results[i] = ff.conv2d(x, w)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(torch.allclose(result, expected, atol=1e-4) for result in results)


# --- what keeps the sources runnable here ---------------------------------------------------------

CUDA_SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"


def sources_with(pattern, *allowed):
    """Files of csrc/cuda that match, comments left out, apart from those allowed."""
    found = []
    for path in sorted(CUDA_SOURCES.rglob("*")):
        name = path.relative_to(CUDA_SOURCES).as_posix()
        if path.is_dir() or name.startswith(allowed):
            continue
        code = re.sub(r"//[^\n]*", "", path.read_text())
        found += [name] if re.search(pattern, code) else []
    return found


@pytest.mark.parametrize(
    "pattern, allowed",
    [
        (r"FASTCONV_EMULATOR", ("ptx/", "launch.h")),
        (r"\basm\b", ("ptx/",)),
        (r"<<<|cudaLaunchKernel", ("launch.h",)),
        (r"__shared__", ("launch.h",)),
        (r"\batomic\w*\(", ("none",)),  # integers would do no harm, and none are needed
        (r"cudaMalloc|cudaFree|cudaStreamSynchronize|cudaDeviceSynchronize", ("none",)),
        (r"#include\s*<(torch|ATen|c10)/", ("none",)),
    ],
)
def test_kernels_keep_the_rules(pattern, allowed):
    assert CUDA_SOURCES.is_dir()
    assert sources_with(pattern, *allowed) == []


def types_defined(text):
    """Qualified names of the types that a file defines outside any anonymous namespace."""
    code = re.sub(
        r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\])\'', "", text, flags=re.S
    )
    scopes: list[str | None] = []  # a namespace's name, "" where it has none; None: other braces
    found = []
    for brace in re.finditer(r"([^;{}]*)([;{}])", code):
        before, what = brace.groups()
        head = before.replace("enum class", "enum")
        if what == "}":
            scopes[-1:] = []
        elif what == "{":
            inside = re.search(r"\bnamespace(?:\s+([\w:]+))?\s*$", before)
            named = re.search(
                r"\b(?:struct|class|union|enum)\s+(\w+)(?:\s+final)?(?:\s*:[^:].*)?\s*$", head, re.S
            )
            if named and not {None, ""} & set(scopes):
                found.append("::".join([*scopes, named[1]]))
            scopes.append((inside[1] or "") if inside else None)
    return found


def test_no_two_files_define_types_of_one_name():
    """The linker takes launch_kernel<IgemmParams> of whichever file comes first, for both."""
    where = {}
    for path in sorted(CUDA_SOURCES.rglob("*.*")):
        for name in types_defined(path.read_text()):
            where.setdefault(name, set()).add(path.relative_to(CUDA_SOURCES).as_posix())
    assert len(where) > 20
    assert {name: files for name, files in where.items() if len(files) > 1} == {}
    planted = (
        "namespace a { struct S { int i; }; namespace { class T {}; } } enum class U : int {};"
    )
    assert types_defined(planted) == ["a::S", "U"]


# --- beyond 2^31 elements -------------------------------------------------------------------------

FAR = (65537, 32769)  # 2,147,581,953 elements: the last lies 98,304 beyond 2^31
FAR_STEP = (65536, 32768)


@pytest.fixture(scope="module")
def far():
    """One image of one channel; only its corners are ever touched: a few pages of memory."""
    x = torch.empty(1, 1, *FAR, dtype=torch.bfloat16)
    x[0, 0, 0, 0], x[0, 0, 0, -1], x[0, 0, -1, 0], x[0, 0, -1, -1] = 1, 2, 3, 4
    return x


@pytest.mark.parametrize("layout", support.FORMATS)
@pytest.mark.parametrize("direction", ["fprop", "wgrad"])
def test_convolution_reads_beyond_2_31_elements(far, direction, layout):
    corners = torch.tensor([[[[1.0, 2], [3, 4]]]])
    x = far.as_strided(far.shape, far.stride())
    if layout == "NHWC":  # with one channel both layouts are the same bytes
        x = far.as_strided(far.shape, (far.numel(), 1, FAR[1], 1))
    w = torch.full((3, 1, 1, 1), 2.0, dtype=torch.bfloat16, requires_grad=direction == "wgrad")
    ran = 0
    for row in support.rows("conv2d", direction):
        if row.backend != "emulator":
            continue

        def call():
            out = ff.conv2d(x, w, stride=FAR_STEP)
            if direction == "fprop":
                return out
            return torch.autograd.grad(out, w, torch.ones_like(out))[0]

        result, reason = support.forced(row, call)
        if reason:
            continue
        ran += 1
        expected = 2 * corners.expand(1, 3, 2, 2) if direction == "fprop" else corners.sum()
        assert (result.float() == expected).all(), f"{row.name}: {result}"
    assert ran


@pytest.mark.parametrize("name", ["max_pool2d", "avg_pool2d"])
def test_pooling_reads_beyond_2_31_elements(far, name):
    with fastconv.backend("emulator"):
        out = getattr(ff, name)(far, 1, FAR_STEP)
    assert out.flatten().tolist() == [1, 2, 3, 4]


# --- refusals -------------------------------------------------------------------------------------


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler was found (no-such-compiler)" in emulator.available()


def test_no_cuda_headers(monkeypatch, tmp_path):
    monkeypatch.setattr(emulator, "_header_folders", lambda: [tmp_path])
    message = emulator.available()
    assert "CUDA's headers" in message and str(tmp_path) in message and "CUDA_HOME" in message
    with pytest.raises(RuntimeError, match="CUDA's headers"):
        emulator.build()


def test_sources_of_another_build(monkeypatch):
    monkeypatch.setitem(emulator._extension.facts, "core_digest", "0" * 64)
    assert "has changed since the extension was compiled" in emulator.available()


def test_no_sources(monkeypatch, tmp_path):
    monkeypatch.setattr(emulator, "_PACKAGE", tmp_path / "fastconv")
    assert "there are none in" in emulator.available()


def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "file"))
    with pytest.raises(RuntimeError, match="could not be written"):
        emulator.build()


def test_a_compiler_that_fails(monkeypatch, tmp_path):
    compiler = tmp_path / "cxx"
    fails = "#!/bin/sh\n[ \"$1\" = --version ] && exit 0\necho 'out of ideas' >&2\nexit 1\n"
    compiler.write_text(fails)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("FASTCONV_CACHE", str(tmp_path / "cache"))
    with pytest.raises(RuntimeError, match="(?s)compiling the emulator failed.*out of ideas"):
        emulator.build()
    assert not list((tmp_path / "cache").rglob("*.so"))


def test_the_cache_is_used(monkeypatch):
    path = emulator.build()
    monkeypatch.setattr(emulator._Toolchain, "_run", None)  # compiling would raise
    assert emulator.build() == path and path.stat().st_size > 100_000


@pytest.mark.parametrize("variable", ["FASTCONV_CACHE", "XDG_CACHE_HOME"])
def test_where_the_cache_is(monkeypatch, tmp_path, variable):
    monkeypatch.delenv("FASTCONV_CACHE", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    assert emulator.cache().is_relative_to(tmp_path)


PROGRAM = """
#include <cstdio>
#include "cuda/launch.h"
#include "cuda/ptx/ldmatrix.h"
using namespace fastconv;
__global__ void kernel() { %s }
int main() {
  try {
    cuda::Launch launch{"planted", 1, %d};
    launch.shared_bytes = %d;
    cuda::launch_kernel(launch, &kernel);
    std::puts("fine");
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}
"""
LDMATRIX = "uint32_t r[1]; ptx::ldmatrix<1>(r, ptx::shared_address(cuda::shared_memory()));"
CARVE = "cuda::SharedCarver carve(cuda::shared_memory()); carve.take<float>(%d);"
VOTE = 'if (!__all_sync(0xffffffffu, 1)) throw std::runtime_error("not all");'


@pytest.mark.parametrize(
    "body, threads, shared_bytes, said",
    [
        ("", 64, 300000, "300000"),  # more than any GPU has: refused by the launch, as by CUDA
        ("", 2048, 0, "2048"),
        (LDMATRIX, 32, 1024, "fine"),
        (LDMATRIX, 48, 1024, "ldmatrix in a warp of fewer than 32 threads"),
        (CARVE % 64, 32, 320, "fine"),
        (CARVE % 65, 32, 320, "than the launch asked for, 320"),
        (VOTE, 48, 0, "fine"),  # votes of lanes that do not exist do not count
    ],
)
def test_what_a_launch_reports(tmp_path, body, threads, shared_bytes, said):
    source = tmp_path / "program.cu"
    source.write_text(PROGRAM % (body, threads, shared_bytes))
    program = emulator.compile_program([source], tmp_path / "program")
    done = subprocess.run([program], capture_output=True, text=True, timeout=60)
    assert said in done.stdout, done.stdout + done.stderr


def test_a_truncated_library_counts_as_none(tmp_path):
    whole = emulator.build()
    cut = tmp_path / whole.name
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 8])
    assert emulator._is_whole(whole)
    assert not emulator._is_whole(cut) and not emulator._is_whole(tmp_path / "missing")


@pytest.mark.parametrize("text", ["#!/bin/sh\nexit 3\n", "no program"])
def test_a_compiler_that_is_none(monkeypatch, tmp_path, text):
    (tmp_path / "cxx").write_text(text)
    (tmp_path / "cxx").chmod(0o755)
    monkeypatch.setenv("CXX", str(tmp_path / "cxx"))
    assert "--version` fails" in emulator.available()


def test_sanitized_without_the_libraries():
    code = "import fastconv; fastconv.emulator.load()"
    done = support.run_python(code, FASTCONV_EMULATOR_SANITIZE="1", LD_PRELOAD="")
    assert "in LD_PRELOAD when Python starts" in done.stderr.splitlines()[-1]


# --- AddressSanitizer -----------------------------------------------------------------------------


def sanitizer_libraries():
    """Their paths, for LD_PRELOAD: Python itself is not built with them."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so.6")
    compiler = emulator._find_compiler()
    found = [
        subprocess.run([*compiler, f"-print-file-name={n}"], capture_output=True, text=True)
        for n in names
    ]
    paths = [done.stdout.strip() for done in found]
    return paths if all(os.path.isabs(path) for path in paths) else []


def run_sanitized(*arguments, timeout):
    preload = sanitizer_libraries()
    if not preload:
        assert not os.environ.get("FASTCONV_REQUIRE_EMULATOR"), "no AddressSanitizer"
        pytest.skip("the compiler has no AddressSanitizer")
    environment = {
        "LD_PRELOAD": " ".join(preload),
        "ASAN_OPTIONS": "detect_leaks=0",  # CPython frees little when it ends
        "FASTCONV_EMULATOR_SANITIZE": "1",
        # What Triton's interpreter does is not watched.
        "TRITON_INTERPRET": "0",
        "FASTCONV_REQUIRE_TRITON": "",
        "PYTHONPATH": str(Path(fastconv.__file__).parents[1]),
    }
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# Tests that force rows: by their ids where they have one a row, else by their names.
KERNEL_TESTS = (
    "test_conv2d_kernels.py",
    "test_pooling.py",
    "test_batch_norm.py",
    "test_fused_pool.py",
    "test_conv2d_sm80.py",
    "test_conv2d_sm90.py",
)
LOOPING = "average_keeps_the_contract or test_contract"


def sanitized_pytest(selection, timeout, *more):
    here = os.path.dirname(__file__)
    files = [os.path.join(here, name) for name in KERNEL_TESTS]
    options = ["-q", "-p", "no:cacheprovider", "-k", selection, *more]
    done = run_sanitized("-P", "-m", "pytest", *options, *files, timeout=timeout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    ran = re.search(r"emulated rows that ran: (.*)", done.stdout)
    assert ran is not None, done.stdout[-2000:]
    left_out = {row.name for row in emulated_rows()} - set(ran[1].split())
    assert not left_out, f"never ran under AddressSanitizer: {sorted(left_out)}"


def test_kernels_under_address_sanitizer():
    """Every row, every edge shape, small integers, equal layouts; on tensor cores every fifth shape
    in NHWC. float16 has bfloat16's addresses, and ties those of NaN."""
    cores = "(igemm_sm or conv1x1_sm90)"
    layouts = f"((NHWC-NHWC and {cores}) or ((NHWC-NHWC or NCHW-NCHW) and not {cores}))"
    same = f"integers_are_exact and emulated and {layouts}"
    statistics = "test_statistics and NHWC and (bfloat16 or float32)"
    others = (
        f"(pooling or batch_norm or fused_pool) and (emulated or {LOOPING}) and not emulated-ties"
    )
    dtypes = "(bfloat16 or float32 or float64)"
    sanitized_pytest(f"(({same}) or ({statistics}) or ({others})) and {dtypes}", timeout=2400)


@pytest.mark.slow
def test_kernels_under_address_sanitizer_in_full():
    sanitized_pytest(f"emulated or {LOOPING}", 7200, "-m", "")
