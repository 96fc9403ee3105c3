"""What a build of fastconv decides, and why: Python, torch, C++ compiler, CUDA, jobs.

Every refusal is one sentence (`Refused`). Nothing here writes anything, and this file parses under
old Pythons too, so that one is refused in words rather than by a SyntaxError.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile

MIN_PYTHON = (3, 11)
MIN_TORCH = (2, 11)
MIN_SETUPTOOLS = (77, 0)  # reads pyproject.toml's `license = "BSD-3-Clause"`
# sm_80 and sm_90 machine code, and compute_90 PTX for every newer card.
DEFAULT_ARCHES = "8.0;9.0+PTX"
# wgmma and setmaxnreg exist in sm_90a alone, whose PTX runs on nothing else: machine code only.
HOPPER_FLAG = "-gencode=arch=compute_90a,code=sm_90a"
# torch takes CUDA's own 16-bit conversions from every .cu file. Ours see no torch, and compile as
# they do by nvcc alone.
PLAIN_CUDA_FLAGS = [
    f"-U__CUDA_NO_{what}__"
    for what in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
]
# One compiler process on torch's headers needs about this much memory.
BYTES_PER_JOB = 2 << 30


class Refused(Exception):
    """The build cannot go on; the message is the one sentence a user reads."""


def refuse_python(version=None):
    version = tuple(version or sys.version_info)[:2]
    if version < MIN_PYTHON:
        raise Refused(
            f"Python 3.11 or newer is needed, and this is Python {version[0]}.{version[1]} "
            f"({sys.executable})."
        )


def release_of(version):
    """'2.13.0+cpu' -> (2, 13)."""
    match = re.match(r"(\d+)\.(\d+)", version)
    if match is None:
        raise Refused(f"{version!r} is no version of torch or setuptools that fastconv can read.")
    return int(match.group(1)), int(match.group(2))


def refuse_setuptools():
    """Only without build isolation can it be missing or old: pyproject.toml asks for a new one."""
    try:
        import setuptools
    except ImportError:
        raise Refused(
            f"setuptools is not installed in {sys.prefix}: run `pip install setuptools ninja`, or "
            "install fastconv without --no-build-isolation."
        ) from None
    if release_of(setuptools.__version__) < MIN_SETUPTOOLS:
        raise Refused(
            f"setuptools 77.0 or newer is needed, and {sys.prefix} holds "
            f"{setuptools.__version__}: run `pip install --upgrade setuptools`, or install "
            "fastconv without --no-build-isolation."
        )


def refuse_torch(version, where):
    if release_of(version) < MIN_TORCH:
        raise Refused(
            f"torch 2.11 or newer is needed, and {where} holds torch {version}: "
            "run `pip install --upgrade torch` first."
        )


def torch_requirement(version):
    """The wheel's requirement: the minor version it was compiled against; None: any it supports."""
    if version is None:
        return f"torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"
    major, minor = release_of(version)
    early = ".0.dev0" if re.search(r"(a|b|rc|dev)\d", version.split("+")[0]) else ""
    return f"torch>={major}.{minor}{early},<{major}.{minor + 1}"


def installed_torch():
    """The version of the torch that sys.path offers, without importing it where possible."""
    from importlib import metadata, util

    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:  # A folder without __init__.py is not torch.
        return None
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:  # On PYTHONPATH, not installed.
        return str(import_torch().__version__)


def import_torch():
    try:
        import torch
    except ImportError as error:
        if error.name == "torch":
            raise Refused(
                f"torch is not installed in {sys.prefix}: run `pip install torch` first, or "
                "install fastconv without --no-build-isolation."
            ) from None
        raise Refused(f"torch in {sys.prefix} fails to import: {error}.") from None
    refuse_torch(torch.__version__, os.path.dirname(os.path.dirname(torch.__file__)))
    return torch


# --- C++ ------------------------------------------------------------------------------------------


def _run(command):
    """(exit status, output and errors together) of a command; a missing program is status 127."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        return 127, str(error)
    return done.returncode, done.stdout


def _compile(compiler, name, text, flags):
    """None if `text` compiles, otherwise the compiler's first complaint."""
    with tempfile.TemporaryDirectory() as folder:
        source = os.path.join(folder, name)
        with open(source, "w") as file:
            file.write(text)
        status, output = _run(compiler + flags + ["-c", source, "-o", source + ".o"])
    if status == 0:
        return None
    complaints = [line for line in output.splitlines() if "error" in line] or output.splitlines()
    return complaints[0].replace(source + ":", "").strip() if complaints else f"status {status}"


def find_compiler(standard="c++17"):
    """(command, description) of a C++ compiler that can build an extension of this Python."""
    asked = os.environ.get("CXX")
    command = shlex.split(asked) if asked else []
    for name in [] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(name):
            command = [name]
            break
    if not command or shutil.which(command[0]) is None:
        raise Refused(
            "No C++ compiler was found "
            f"({f'CXX={asked}' if asked else 'looked for c++, g++ and clang++ on PATH'}): "
            "install one, for example with `apt install g++`, or name it in CXX."
        )
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        raise Refused(
            f"Python.h is missing from {sysconfig.get_path('include')}: install this Python's "
            "development files, for example with `apt install python3-dev`."
        )
    # The probe finds a compiler without a standard library, without OpenMP, or too old for torch.
    probe = "#include <omp.h>\n#include <string>\nint main() { return std::string().size(); }\n"
    complaint = _compile(command, "probe.cpp", probe, ["-std=" + standard, "-fopenmp"])
    if complaint is not None:
        raise Refused(
            f"The C++ compiler {' '.join(command)} does not compile {standard.upper()} with "
            f"OpenMP: {complaint}"
        )
    version = _run(command + ["--version"])[1].strip().splitlines()
    return command, version[0] if version else " ".join(command)


# --- CUDA -----------------------------------------------------------------------------------------


def find_nvcc():
    """(path of nvcc, None) or (None, where it was looked for)."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        home = os.environ.get(variable)
        if home:  # Asked for by name: nothing else will do.
            nvcc = shutil.which("nvcc", path=os.path.join(home, "bin"))
            return (nvcc, None) if nvcc else (None, f"{variable}={home} has no bin/nvcc")
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    return (nvcc, None) if nvcc else (None, "no nvcc in CUDA_HOME, PATH or /usr/local/cuda")


def describe_nvcc(nvcc):
    """(CUDA version, toolkit folder). nvcc on PATH may be a link or a script, so it is asked."""
    match = re.search(r"release (\d+\.\d+)", _run([nvcc, "--version"])[1])
    top = re.search(r"^#\$ TOP=(.+)$", _run([nvcc, "--dryrun", "probe.cu"])[1], re.MULTILINE)
    home = top.group(1) if top else os.path.dirname(os.path.dirname(nvcc))
    return (match.group(1) if match else None), os.path.realpath(home)


class Cuda:
    """Whether the CUDA part is compiled, why, and with what."""

    def __init__(self, build, why, nvcc=None, version=None, home=None):
        self.build, self.why = build, why
        self.nvcc, self.version, self.home = nvcc, version, home


def cuda_mode():
    """FASTCONV_CUDA. What can be refused before there is a torch is refused here."""
    mode = os.environ.get("FASTCONV_CUDA", "auto").strip().lower() or "auto"
    if mode not in ("auto", "0", "1"):
        raise Refused(f"FASTCONV_CUDA={mode} is not one of auto, 0 and 1.")
    missing = find_nvcc()[1]
    if mode == "1" and missing:
        raise Refused(f"FASTCONV_CUDA=1 asks for the CUDA kernels, but {missing}.")
    return mode


def decide_cuda(torch_version, torch_cuda):
    """What `auto` declines, `1` refuses with the same reason."""
    mode = cuda_mode()
    if mode == "0":
        return Cuda(False, "FASTCONV_CUDA=0")
    nvcc, missing = find_nvcc()
    version, home = describe_nvcc(nvcc) if nvcc else (None, None)
    reason = None
    if torch_cuda is None:
        reason = f"torch {torch_version} is a build without CUDA"
    elif nvcc is None:
        reason = missing
    elif version is None:
        reason = f"{nvcc} does not say which CUDA version it is"
    elif version.split(".")[0] != torch_cuda.split(".")[0]:
        reason = (
            f"nvcc is CUDA {version} but torch {torch_version} is built for CUDA {torch_cuda}, "
            "another major version"
        )
    else:
        empty = "#include <cuda_runtime.h>\n__global__ void probe() {}\n"
        complaint = _compile([nvcc], "probe.cu", empty, [])
        if complaint is not None:
            reason = f"nvcc {version} does not compile an empty kernel: {complaint}"
    if reason is None:
        why = "FASTCONV_CUDA=1" if mode == "1" else "nvcc was found and torch is a CUDA build"
        return Cuda(True, why, nvcc, version, home)
    if mode == "1":
        raise Refused(f"FASTCONV_CUDA=1 asks for the CUDA kernels, but {reason}.")
    return Cuda(False, reason, nvcc, version, home)


def decide_arches(torch):
    """TORCH_CUDA_ARCH_LIST; "native" as the versions that it means here."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip() or DEFAULT_ARCHES
    if asked != "native":
        return asked
    cards = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return ";".join("{}.{}".format(*card) for card in sorted(cards)) or DEFAULT_ARCHES


class Hopper:
    """Whether csrc/cuda/*sm90*.cu are compiled, and why."""

    def __init__(self, build, why):
        self.build, self.why = build, why


def decide_hopper(cuda, arches):
    """Yes where the arch list has compute capability 9.0, in whichever spelling torch takes."""
    if not cuda.build:
        return Hopper(False, "no CUDA kernels are built")
    for arch in re.split(r"[;\s]+", arches):
        if re.match(r"(9\.0a?|Hopper)(\+PTX)?$", arch):
            return Hopper(True, f"for sm_90a, since the arch list has {arch}")
    return Hopper(False, "the arch list has no 9.0")


# --- The rest -------------------------------------------------------------------------------------


def decide_jobs():
    """MAX_JOBS (which torch's build reads too), else one a processor while memory lasts."""
    asked = os.environ.get("MAX_JOBS")
    if asked:
        if not asked.isdigit() or int(asked) < 1:
            raise Refused(f"MAX_JOBS={asked} is not a positive whole number.")
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return cores
    return max(1, min(cores, memory // BYTES_PER_JOB))


class Plan:
    """Every decision of one build; `facts` travel in the wheel as fastconv/_build_facts.json."""

    def __init__(self):
        refuse_python()
        torch = import_torch()
        self.torch_version = str(torch.__version__)
        self.torch_cuda = torch.version.cuda
        self.torch_path = os.path.dirname(torch.__file__)
        # torch's headers ask for C++20 from 2.13 on; torch adds the flag, this only tries it.
        standard = "c++20" if release_of(self.torch_version) >= (2, 13) else "c++17"
        self.cxx, self.cxx_version = find_compiler(standard)
        self.cuda = decide_cuda(self.torch_version, self.torch_cuda)
        self.arches = decide_arches(torch)
        self.hopper = decide_hopper(self.cuda, self.arches)
        self.jobs = decide_jobs()
        self.ninja = shutil.which("ninja")
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        self.simd = "AVX-512, AVX2, portable" if x86 else "portable"

    def export(self):
        """Makes torch's extension builder follow: it reads these variables when it is imported."""
        os.environ["CXX"] = " ".join(self.cxx)
        os.environ["MAX_JOBS"] = str(self.jobs)
        if self.cuda.build:
            os.environ["CUDA_HOME"] = self.cuda.home
            os.environ["TORCH_CUDA_ARCH_LIST"] = self.arches

    @property
    def tag(self):
        """A folder name for this build's objects: builds for two torches must not share any."""
        cuda = "cuda" + self.cuda.version if self.cuda.build else "cpu"
        return f"{sys.implementation.cache_tag}-torch{self.torch_version}-{cuda}"

    def facts(self, version, digest, core_digest):
        return {
            "fastconv": version,
            "source_digest": digest,
            "core_digest": core_digest,
            "python": platform.python_version(),
            "abi": sysconfig.get_config_var("EXT_SUFFIX"),
            "torch": self.torch_version,
            "torch_cuda": self.torch_cuda,
            "cuda": self.cuda.version if self.cuda.build else None,
            "cuda_why": self.cuda.why,
            "arch_list": self.arches if self.cuda.build else None,
            "hopper_kernels": self.hopper.build if self.cuda.build else None,
            "compiler": self.cxx_version,
            "simd": self.simd,
            "platform": platform.platform(),
        }

    def table(self, version):
        cuda = self.cuda
        built_for = "built for CUDA " + self.torch_cuda if self.torch_cuda else "CPU build"
        minor = ""
        if cuda.build and cuda.version != self.torch_cuda:
            minor = f" (torch has {self.torch_cuda}: a minor difference is fine)"
        rows = [
            ("fastconv", version),
            ("Python", f"{platform.python_version()}, {sys.executable}"),
            ("torch", f"{self.torch_version}, {built_for}, {self.torch_path}"),
            ("C++ compiler", f"{self.cxx_version} ({' '.join(self.cxx)})"),
            ("CPU kernels", f"yes: {self.simd}, chosen at run time"),
            ("CUDA kernels", f"{'yes' if cuda.build else 'no'}: {cuda.why}"),
            ("nvcc", f"{cuda.version}{minor}, {cuda.nvcc}" if cuda.nvcc else "-"),
            ("CUDA arch list", self.arches if cuda.build else "-"),
            ("Hopper kernels", f"{'yes' if self.hopper.build else 'no'}: {self.hopper.why}"),
            ("ninja", self.ninja or "none: one file after another, every file every time"),
            ("jobs", f"{self.jobs} (MAX_JOBS)"),
        ]
        lines = [f"{name:<15} {value}" for name, value in rows]
        if self.torch_cuda and not cuda.build:
            lines.append("On a GPU the Triton kernels serve.")
        rule = "-" * 72
        return "\n".join([rule] + lines + [rule])
