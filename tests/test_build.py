"""The build's decisions and refusals.

Nothing here compiles fastconv or needs a network: refusals come before the compiler, and decisions
are plain functions. test_extension.py has what an import says of a broken extension.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
BACKEND = ROOT / "build_backend"
pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists(), reason="the tests were taken out of their source tree"
)


@pytest.fixture
def decisions(monkeypatch):
    monkeypatch.syspath_prepend(str(BACKEND))
    import fastconv_decisions

    return fastconv_decisions


def run(arguments, path=None, cwd=ROOT, **environment):
    """A Python process; `path` replaces PATH, an environment value of None removes it."""
    keep = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "CUDA_PATH")}
    keep |= {"PYTHONDONTWRITEBYTECODE": "1"} | ({"PATH": str(path)} if path else {}) | environment
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={k: str(v) for k, v in keep.items() if v is not None},
        capture_output=True,
        text=True,
        timeout=300,
    )


def build(tmp_path, **kwargs):
    return run(
        ["setup.py", "build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path], **kwargs
    )


def hook(name, **kwargs):
    """One PEP 517 hook, called as pip calls it."""
    code = f"import fastconv_backend as b; print('REQUIRES', b.{name}())"
    return run(["-c", code], PYTHONPATH=BACKEND, **kwargs)


def assert_refused(result, *fragments):
    """One sentence on stderr, nothing compiled, a failing status, no traceback."""
    assert result.returncode == 1, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    (line,) = [text for text in result.stderr.splitlines() if text.startswith("fastconv: ")]
    for fragment in fragments:
        assert fragment in line
    assert "building 'fastconv._C'" not in result.stdout


def fake_torch(folder, version, cuda=None):
    """A package that answers what the build asks torch before it compiles anything."""
    package = folder / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        f"__version__ = {version!r}\nclass version:\n    cuda = {cuda!r}\n"
    )
    info = folder / f"torch-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
    return folder


def fake_program(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + script)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake_nvcc(home, release, works=True):
    return fake_program(
        home / "bin" / "nvcc",
        f'case "$*" in *--version*) echo "Cuda tools, release {release}, V{release}.1";;\n'
        f'*--dryrun*) echo "#$ TOP={home}";;\n'
        + ("*) exit 0;;" if works else '*) echo "error: unsupported GNU version"; exit 1;;')
        + "\nesac\n",
    )


# --- Refusals -------------------------------------------------------------------------------------


def test_no_compiler(tmp_path):
    torch_path = fake_torch(tmp_path / "site", "2.13.0")
    result = build(tmp_path, path=tmp_path, PYTHONPATH=torch_path)
    assert_refused(result, "No C++ compiler was found", "apt install g++")
    assert_refused(hook("get_requires_for_build_wheel", path=tmp_path), "No C++ compiler")


def test_compiler_named_in_cxx_is_missing(tmp_path):
    torch_path = fake_torch(tmp_path / "site", "2.13.0")
    assert_refused(build(tmp_path, CXX="no-such-c++", PYTHONPATH=torch_path), "CXX=no-such-c++")


def test_compiler_that_does_not_compile(tmp_path):
    broken = fake_program(tmp_path / "broken++", "echo 'fatal error: omp.h: none'; exit 1\n")
    torch_path = fake_torch(tmp_path / "site", "2.13.0")
    result = build(tmp_path, CXX=broken, PYTHONPATH=torch_path)
    assert_refused(result, "with OpenMP", "fatal error: omp.h: none")


@pytest.mark.parametrize("version", [(3, 9, 18), (3, 10, 13)])
def test_old_python(tmp_path, version):
    code = (
        f"import runpy, sys; sys.version_info = {(*version, 'final', 0)!r}; "
        "sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py', run_name='__main__')"
    )
    expected = f"Python 3.11 or newer is needed, and this is Python 3.{version[1]}"
    assert_refused(run(["-c", code]), expected)


def test_build_files_parse_under_old_python():
    import ast

    for file in [ROOT / "setup.py", *BACKEND.glob("*.py")]:
        ast.parse(file.read_text(), feature_version=(3, 7))


def test_old_torch(tmp_path):
    path = fake_torch(tmp_path / "site", "2.9.1")
    assert_refused(build(tmp_path, PYTHONPATH=path), "torch 2.11 or newer", "torch 2.9.1")


def test_torch_that_fails_to_import(tmp_path):
    path = fake_torch(tmp_path / "site", "2.13.0")
    (path / "torch" / "__init__.py").write_text("raise ImportError('libc10.so is gone')\n")
    assert_refused(build(tmp_path, PYTHONPATH=path), "fails to import: libc10.so is gone")


def test_no_torch(tmp_path):
    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        "sys.argv = ['setup.py', 'build_ext']; runpy.run_path('setup.py', run_name='__main__')"
    )
    result = run(["-c", code])
    assert_refused(result, "torch")


@pytest.mark.parametrize("value", ["yes", "2", "on"])
def test_bad_fastconv_cuda(tmp_path, value):
    torch_path = fake_torch(tmp_path / "site", "2.13.0")
    result = build(tmp_path, FASTCONV_CUDA=value, PYTHONPATH=torch_path)
    assert_refused(result, f"FASTCONV_CUDA={value}", "auto, 0 and 1")
    # Before anything is downloaded, too.
    assert_refused(hook("get_requires_for_build_wheel", FASTCONV_CUDA=value), "auto, 0 and 1")


def test_bad_max_jobs(tmp_path):
    torch_path = fake_torch(tmp_path / "site", "2.13.0")
    result = build(tmp_path, MAX_JOBS="many", FASTCONV_CUDA="0", PYTHONPATH=torch_path)
    assert_refused(result, "MAX_JOBS=many")


def test_cuda_asked_for_without_nvcc(tmp_path):
    torch_path = fake_torch(tmp_path / "site", "2.14.1+cu130", "13.0")
    result = build(tmp_path, FASTCONV_CUDA="1", CUDA_HOME=tmp_path, PYTHONPATH=torch_path)
    assert_refused(result, "FASTCONV_CUDA=1", f"CUDA_HOME={tmp_path} has no bin/nvcc")


def test_cuda_asked_for_with_a_cpu_torch(tmp_path):
    torch_path = fake_torch(tmp_path / "site", "2.13.0+cpu")
    result = build(tmp_path, FASTCONV_CUDA="1", PYTHONPATH=torch_path)
    assert_refused(result, "torch 2.13.0+cpu is a build without CUDA")


def test_cuda_asked_for_with_another_major_version(tmp_path):
    torch_path = fake_torch(tmp_path / "site", "2.14.1+cu130", "13.0")
    fake_nvcc(tmp_path / "cuda", "12.8")
    home = tmp_path / "cuda"
    result = build(tmp_path, FASTCONV_CUDA="1", CUDA_HOME=home, PYTHONPATH=torch_path)
    assert_refused(result, "nvcc is CUDA 12.8", "built for CUDA 13.0, another major version")


def test_old_or_missing_setuptools(tmp_path):
    (tmp_path / "setuptools").mkdir()
    (tmp_path / "setuptools" / "__init__.py").write_text("__version__ = '65.5.0'\n")
    result = build(tmp_path, PYTHONPATH=tmp_path)
    assert_refused(result, "setuptools 77.0 or newer", "65.5.0")
    code = "import sys; sys.modules['setuptools'] = None; import fastconv_backend as b; "
    result = run(["-c", code + "b.build_wheel('.')"], PYTHONPATH=BACKEND)
    assert_refused(result, "setuptools is not installed", "pip install setuptools ninja")


# --- Decisions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("release", "torch_cuda", "works", "built", "why"),
    [
        ("13.0", "13.0", True, True, "nvcc was found"),
        ("13.0", "13.2", True, True, "nvcc was found"),
        ("12.8", "13.0", True, False, "another major version"),
        ("13.0", None, True, False, "build without CUDA"),
        ("13.0", "13.0", False, False, "unsupported GNU version"),
        (None, "13.0", True, False, "has no bin/nvcc"),
    ],
)
def test_auto_cuda(decisions, monkeypatch, tmp_path, release, torch_cuda, works, built, why):
    monkeypatch.delenv("FASTCONV_CUDA", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    if release is not None:
        fake_nvcc(tmp_path, release, works)
    cuda = decisions.decide_cuda("2.14.1", torch_cuda)
    assert cuda.build is built
    assert why in cuda.why
    if built:
        assert (cuda.version, cuda.home) == (release, str(tmp_path))


def test_cuda_switched_off(decisions, monkeypatch, tmp_path):
    monkeypatch.setenv("FASTCONV_CUDA", "0")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    fake_nvcc(tmp_path, "13.0")
    assert decisions.decide_cuda("2.14.1", "13.0").build is False


@pytest.mark.parametrize(
    ("version", "requirement"),
    [
        ("2.13.0+cpu", "torch>=2.13,<2.14"),
        ("2.11.0", "torch>=2.11,<2.12"),
        ("2.16.0.dev20260901+cu132", "torch>=2.16.0.dev0,<2.17"),
        (None, "torch>=2.11"),
    ],
)
def test_wheel_requires_the_minor_it_was_compiled_against(decisions, version, requirement):
    from packaging.requirements import Requirement

    assert decisions.torch_requirement(version) == requirement
    if version is not None:
        assert Requirement(requirement).specifier.contains(version, prereleases=True)


# --- Which files are compiled for what ------------------------------------------------------------

# What setup.py asks of torch's extension builder, printed instead of compiled.
RECORDING_BUILDER = """
import json, os
from setuptools import Extension
from setuptools.command.build_ext import build_ext


def CUDAExtension(name, sources, **kwargs):
    return Extension(name, sources, include_dirs=["/research/torch/include"], **kwargs)


CppExtension = CUDAExtension


class Compiler:
    def compile(self, sources, output_dir, macros, include_dirs, debug, extra_postargs):
        called = [sources, os.path.basename(output_dir), macros, extra_postargs["nvcc"]]
        print("COMPILE", json.dumps(called))
        return ["hopper.o"]


class BuildExtension(build_ext):
    def build_extensions(self):
        self.compiler = Compiler()
        os.makedirs(os.path.join(self.build_lib, "fastconv"), exist_ok=True)
        self.build_extension(*self.extensions)

    def build_extension(self, ext):
        flags = ext.extra_compile_args
        told = [ext.sources, ext.extra_objects, ext.define_macros, flags["nvcc"], flags["cxx"]]
        print("BUILD", json.dumps(told))
"""


def recorded_build(tmp_path, arches):
    """(decision table, the call for sm_90a or None, the extension, the facts)."""
    path = fake_torch(tmp_path / "site", "2.14.1+cu130", "13.0")
    (path / "torch" / "utils").mkdir()
    (path / "torch" / "utils" / "__init__.py").write_text("")
    (path / "torch" / "utils" / "cpp_extension.py").write_text(RECORDING_BUILDER)
    fake_nvcc(tmp_path / "cuda", "13.0")
    result = build(
        tmp_path,
        PYTHONPATH=path,
        FASTCONV_CUDA="1",
        CUDA_HOME=tmp_path / "cuda",
        TORCH_CUDA_ARCH_LIST=arches,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    said = {"COMPILE": "null"}
    for line in result.stdout.splitlines():
        word, _, rest = line.partition(" ")
        said[word] = rest.strip()
    facts = json.loads((tmp_path / "fastconv" / "_build_facts.json").read_text())
    return said["Hopper"], json.loads(said["COMPILE"]), json.loads(said["BUILD"]), facts


@pytest.mark.parametrize(
    ("arches", "compiled"),
    [
        (None, True),  # the default list
        ("9.0", True),
        ("9.0a", True),
        ("8.0 9.0+PTX", True),
        ("Hopper", True),
        ("8.0", False),
        ("8.6+PTX", False),
        ("8.0;9.0f;10.0", False),
    ],
)
def test_sm90_files_are_compiled_for_sm_90a_alone(tmp_path, arches, compiled):
    table, call, (sources, objects, macros, nvcc, cxx), facts = recorded_build(tmp_path, arches)
    hopper = {f"csrc/cuda/{file.name}" for file in (ROOT / "csrc" / "cuda").glob("*sm90*.cu")}
    assert not hopper.intersection(sources) and "csrc/cuda/conv2d_tiled.cu" in sources
    assert table.startswith("kernels  " + ("yes: for sm_90a" if compiled else "no: the arch list"))
    assert facts["hopper_kernels"] is compiled
    assert (["FASTCONV_SM90A", None] in macros) is compiled
    assert "-U__CUDA_NO_BFLOAT16_CONVERSIONS__" in nvcc  # which torch's own flags define
    # torch adds TORCH_CUDA_ARCH_LIST's flags only where no flag has these letters in it.
    assert not [flag for flag in nvcc if "arch" in flag]
    assert f'-DFASTCONV_CUDA_ARCHES="{arches or "8.0;9.0+PTX"}"' in cxx
    if not compiled:
        assert call is None and objects == []
        return
    assert set(call[0]) == hopper and call[1] == "sm_90a" and call[2] == macros
    assert [f for f in call[3] if "arch" in f] == ["-gencode=arch=compute_90a,code=sm_90a"]
    assert objects == ["hopper.o"]


def test_native_is_what_the_cards_are(decisions, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "native")
    for cards, arches in [([(9, 0), (8, 0), (9, 0)], "8.0;9.0"), ([], "8.0;9.0+PTX")]:
        monkeypatch.setattr(torch.cuda, "device_count", lambda cards=cards: len(cards))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i, cards=cards: cards[i])
        assert decisions.decide_arches(torch) == arches


def test_a_build_without_cuda_has_no_hopper_kernels(decisions, monkeypatch):
    monkeypatch.setenv("FASTCONV_CUDA", "0")
    plan = decisions.Plan()
    assert not plan.hopper.build
    assert "Hopper kernels  no: no CUDA kernels are built" in plan.table("1.2.3")
    assert plan.facts("1.2.3", "abc", "def")["hopper_kernels"] is None


def test_one_file_decides_which_rows_a_build_has():
    """csrc/cuda/table.cpp, by a macro that the emulator defines as a build for Hopper does."""
    cuda = ROOT / "csrc" / "cuda"
    having = [f.name for f in cuda.rglob("*.*") if "FASTCONV_SM90A" in f.read_text()]
    assert having == ["table.cpp"]
    assert "-DFASTCONV_SM90A" in (ROOT / "fastconv" / "emulator.py").read_text()


def test_plan_and_table(decisions, monkeypatch):
    monkeypatch.setenv("FASTCONV_CUDA", "0")
    monkeypatch.setenv("MAX_JOBS", "3")
    plan = decisions.Plan()
    table = plan.table("1.2.3")
    for text in ["1.2.3", torch.__version__, sys.executable, plan.cxx_version, "3 (MAX_JOBS)"]:
        assert text in table
    assert "CUDA kernels    no: FASTCONV_CUDA=0" in table
    assert json.loads(json.dumps(plan.facts("1.2.3", "abc", "def")))["torch"] == str(
        torch.__version__
    )


# --- The backend ----------------------------------------------------------------------------------


def test_no_torch_is_asked_for_where_torch_is(tmp_path):
    for name in ["get_requires_for_build_wheel", "get_requires_for_build_editable"]:
        assert "REQUIRES []" in hook(name).stdout
    assert "REQUIRES []" in hook("get_requires_for_build_sdist", path=tmp_path).stdout


# pip hides the caller's packages from the build: it takes their folders off sys.path. uv builds in
# a virtual environment of its own, whose (empty) folders are on sys.path.
ISOLATED = """
import site, sys
site.getsitepackages = lambda: {hidden!r}
sys.path = [p for p in sys.path if "site-packages" not in p] + [{tools!r}]
import fastconv_backend as b
print("REQUIRES", b.get_requires_for_build_wheel())
print("FOUND", {caller!r} in sys.path)
"""


def build_isolated(tmp_path, caller, hidden, **environment):
    tools = tmp_path / "tools"  # of the build's own environment only setuptools is needed
    (tools / "setuptools").mkdir(parents=True)
    (tools / "setuptools" / "__init__.py").write_text("__version__ = '80.0'\n")
    (tools / "setuptools" / "build_meta.py").write_text("")
    code = ISOLATED.format(caller=str(caller), hidden=hidden, tools=str(tools))
    return run(["-c", code], PYTHONPATH=BACKEND, **environment)


@pytest.mark.parametrize("version", [None, "2.13.0", "2.9.0"])
def test_the_callers_torch_is_found_through_pips_isolation(tmp_path, version):
    caller = tmp_path / "site-packages"
    caller.mkdir()
    if version:
        fake_torch(caller, version)
    result = build_isolated(tmp_path, caller, [str(caller)], UV=None)
    if version == "2.9.0":
        assert_refused(result, "holds torch 2.9.0")
    elif version:
        assert result.stdout.splitlines() == ["REQUIRES []", "FOUND True"], result.stderr
    else:
        assert result.stdout.splitlines() == ["REQUIRES ['torch>=2.11']", "FOUND False"]


@pytest.mark.parametrize("builder", ["uv", None])
def test_the_activated_environments_torch_is_found_for_uv_alone(tmp_path, builder):
    active = tmp_path / "active"
    places = {"base": str(active), "platbase": str(active)}
    caller = Path(sysconfig.get_path("purelib", "venv", vars=places))
    fake_torch(caller, "2.13.0")
    (active / "pyvenv.cfg").write_text("")
    path = os.pathsep.join([str(active / "bin"), os.environ["PATH"]])
    result = build_isolated(tmp_path, caller, [], path=path, UV=builder)
    found = ["REQUIRES []", "FOUND True"]
    assert result.stdout.splitlines() == (
        found if builder else ["REQUIRES ['torch>=2.11']", "FOUND False"]
    )


def test_sdist_holds_what_a_build_needs(tmp_path):
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    left_out = shutil.ignore_patterns("build", "dist", ".*", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=left_out)
    code = "import fastconv_backend as b; print(b.build_sdist(r'" + str(tmp_path) + "'))"
    result = run(["-c", code], cwd=source, PYTHONPATH=source / "build_backend")
    assert result.returncode == 0, result.stderr
    import tarfile

    with tarfile.open(tmp_path / result.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = ["setup.py", "pyproject.toml", "LICENSE", "csrc/core/choose.cpp", "csrc/cuda/launch.h"]
    needed += ["build_backend/fastconv_backend.py", "fastconv/_version.py", "tests/conftest.py"]
    assert set(needed) <= names
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build_facts.json"))]
