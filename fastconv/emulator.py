"""Runs fastconv's CUDA kernels on the CPU: for tests, and for learning how a kernel behaves.

``with fastconv.backend("emulator"):`` is all that is needed. On first use the sources in ``csrc``
are compiled, by a C++ compiler and with CUDA's headers, into the user's cache directory (a minute
or two); afterwards they load from there. A CUDA thread becomes a fiber; schedules are random and
depend on :func:`seed` alone, so a failure can be repeated.
"""

import contextlib
import ctypes
import fcntl
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from fastconv import _extension
from fastconv._source_digest import source_digest

_PACKAGE = Path(__file__).resolve().parent
_LIBRARY = "libfastconv_emulator.so"
_SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
# -Wno-psabi: a note on 64-byte aligned arguments.
_FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-DFASTCONV_EMULATOR"]
_FLAGS += ["-Wno-psabi", "-Wno-unknown-pragmas"]
_FLAGS += ["-DFASTCONV_SM90A"]  # csrc/cuda/*sm90*.cu are among what is compiled
# A GPU contracts a * b + c to one rounding; where the CPU has that instruction, so do we.
if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
    _FLAGS += ["-mavx2", "-mfma", "-ffp-contract=fast"]


class Launch(NamedTuple):
    """One kernel launch: ``name`` is the CUDA row's."""

    name: str
    blocks: int
    threads: int
    shared_bytes: int
    cluster: int


def available() -> str:
    """Empty when the emulator can be compiled here, otherwise one sentence that says why not."""
    try:
        _Toolchain()
    except RuntimeError as error:
        return str(error)
    return ""


def load() -> None:
    """Compiles the emulator where no cached one fits, and adds its rows to the kernel table.

    ``FASTCONV_EMULATOR_SANITIZE=1`` in the environment takes the one whose kernels are built with
    AddressSanitizer and UBSan; the process must then have been started with their libraries
    preloaded (``make emulate`` does).

    Raises:
        RuntimeError: without a C++ compiler, CUDA's headers or fastconv's sources; when compiling
            fails.
    """
    global _library
    with _lock:
        if _library is None:
            sanitize = os.environ.get("FASTCONV_EMULATOR_SANITIZE", "0") not in ("", "0")
            if sanitize and "libasan" not in os.environ.get("LD_PRELOAD", ""):
                raise RuntimeError(
                    "FASTCONV_EMULATOR_SANITIZE=1 needs the sanitizers' libraries, libasan first, "
                    "in LD_PRELOAD when Python starts"
                )
            path = build(sanitize=sanitize)
            try:
                _extension.load().load_emulator(str(path))
            except ImportError as error:
                raise RuntimeError(
                    f"the emulator was compiled and does not load: {error}"
                ) from None
            _library = ctypes.CDLL(str(path))


def seed(value: int) -> None:
    """Sets the seed that every later launch draws its schedule from; 0 at first."""
    load()
    _library.fastconv_emulator_set_seed(ctypes.c_uint64(value))


@contextlib.contextmanager
def sms(count: int):
    """``with sms(2):`` emulates a GPU of 2 SMs instead of an H200's 132. A persistent kernel then
    gives a block several tiles of a problem that is small enough to emulate.

    Raises:
        ValueError: `count` is less than 1.
    """
    if count < 1:
        raise ValueError(f"sms: {count} SMs, less than 1")
    load()
    before = _library.fastconv_emulator_sm_count()
    _library.fastconv_emulator_set_sm_count(ctypes.c_int(count))
    try:
        yield
    finally:
        _library.fastconv_emulator_set_sm_count(ctypes.c_int(before))


@contextlib.contextmanager
def launches():
    """``with launches() as log:`` fills the list `log` with a :class:`Launch` a kernel, in order,
    when the block ends."""
    load()
    log: list[Launch] = []
    _library.fastconv_emulator_start_log()
    try:
        yield log
    finally:
        keep = _ROW(lambda name, *numbers: log.append(Launch(name.decode(), *numbers)))
        _library.fastconv_emulator_stop_log(keep)


@contextlib.contextmanager
def truncation():
    """In this block tensor cores round their float32 sums towards zero, as hardware may: a kernel
    that is to be as exact as float32 must not leave long sums to them."""
    load()
    set_truncation = _library.fastconv_emulator_set_truncation
    set_truncation.restype = ctypes.c_bool
    before = set_truncation(ctypes.c_bool(True))
    try:
        yield
    finally:
        set_truncation(ctypes.c_bool(before))


@contextlib.contextmanager
def tf32():
    """In this block float32 convolutions on CPU tensors, emulated or interpreted, may round their
    operands to TF32. On a GPU torch's switches say so (``torch.backends.cudnn.allow_tf32``); they
    do not reach tensors on the CPU."""
    switch = _extension.load().set_tf32_on_cpu
    before = switch(True)
    try:
        yield
    finally:
        switch(before)


_lock = threading.Lock()
_library = None
_ROW = ctypes.CFUNCTYPE(
    None, ctypes.c_char_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64, ctypes.c_int
)

# --- compiling ------------------------------------------------------------------------------------


def build(*, sanitize: bool = False) -> Path:
    """The library with every kernel, compiled if the cache has none of these sources."""
    tools = _Toolchain()
    sources = _emulator_sources(tools.csrc) + sorted((tools.csrc / "cuda").glob("*.cu"))
    sources += [tools.csrc / "cuda" / "table.cpp"]
    sources += [tools.csrc / "emulator" / "entry.cpp"]
    return tools.link(sources, cache() / tools.key(sources, sanitize) / _LIBRARY, sanitize)


def compile_program(sources, output, sanitize: bool = False) -> Path:
    """Compiles a program of its own from .cu or .cpp files and links the emulator to it.

    Args:
        sources: the program's files, one with a ``main``.
        output: path of the executable.
        sanitize: AddressSanitizer and UBSan in the program's own files.
    """
    tools = _Toolchain()
    files = [Path(s).resolve() for s in sources] + _emulator_sources(tools.csrc)
    return tools.link(files, Path(output), sanitize, program=True)


def _emulator_sources(csrc):
    return sorted(f for f in (csrc / "emulator").glob("*.cpp") if f.name != "entry.cpp")


def cache() -> Path:
    """``FASTCONV_CACHE``, or ``fastconv`` in the user's cache directory."""
    named = os.environ.get("FASTCONV_CACHE")
    if named:
        return Path(named) / "emulator"
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fastconv" / "emulator"


def _find_sources() -> Path:
    """csrc, of which at least the core must be what the extension was compiled from: the extension
    and the emulator hand each other its structs."""
    for csrc in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (csrc / "emulator").is_dir():
            break
    else:
        raise RuntimeError(
            f"the emulator is compiled from fastconv's sources, and there are none in {_PACKAGE}"
        )
    built_from = _extension.facts.get("core_digest")
    if built_from and built_from != source_digest(csrc / "core"):
        raise RuntimeError(
            f"{csrc / 'core'} has changed since the extension was compiled: install fastconv again"
        )
    return csrc


def _find_compiler() -> list[str]:
    asked = os.environ.get("CXX")
    names = [asked] if asked else ["c++", "g++", "clang++"]
    for name in names:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    raise RuntimeError(
        f"the emulator is compiled on first use, and no C++ compiler was found ({', '.join(names)})"
    )


def _header_folders() -> list[Path]:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = shutil.which("nvcc")
    homes += [Path(nvcc).resolve().parent.parent] if nvcc else []
    folders = [Path(home) / "include" for home in homes if home]
    # A CUDA build of torch brings headers in wheels of its own; Triton's has all that is needed.
    for pattern in ("nvidia/c*/include", "triton/backends/nvidia/include"):
        for entry in sys.path:
            folders += sorted(Path(entry or ".").glob(pattern))
    return folders


def _version_of(compiler) -> str:
    try:
        done = subprocess.run([*compiler, "--version"], capture_output=True, text=True)
        complaint = f"status {done.returncode}" if done.returncode else ""
    except OSError as error:
        complaint = str(error)
    if complaint:
        raise RuntimeError(f"`{shlex.join(compiler)} --version` fails: {complaint}")
    return done.stdout


def _find_cuda_headers() -> Path:
    folders = _header_folders()
    for folder in folders:
        if all((folder / name).exists() for name in _HEADERS):
            return folder
    looked = ", ".join(dict.fromkeys(str(f) for f in folders))
    raise RuntimeError(
        f"the emulator is compiled on first use, and CUDA's headers ({', '.join(_HEADERS)}) were "
        f"not found in {looked}: install a CUDA toolkit, or name one in CUDA_HOME"
    )


_HEADERS = ("cuda.h", "cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h", "crt/host_defines.h")


class _Toolchain:
    """Sources, compiler and headers, found or refused."""

    def __init__(self):
        self.csrc = _find_sources()
        self.compiler = _find_compiler()
        self.headers = _find_cuda_headers()
        self.identity = [*self.compiler, _version_of(self.compiler), str(self.headers)]
        stub = self.csrc / "emulator" / "include" / "nv" / "target"
        cuda = re.findall(r"#define CUDA_VERSION \d+", (self.headers / "cuda.h").read_text())
        self.identity += [stub.read_text(), *cuda, *_FLAGS, *_SANITIZERS]
        self.includes = {}  # file: those it includes, itself among them

    def sanitizers(self, source: Path, sanitize: bool) -> list[str]:
        # AddressSanitizer watches the kernels. The emulator checks its own accesses, and sanitized
        # fibers would switch four times slower.
        own = source.is_relative_to(self.csrc / "emulator")
        return _SANITIZERS if sanitize and not own else []

    def flags(self) -> list[str]:
        flags = [*_FLAGS, f"-I{self.csrc}", "-isystem", str(self.headers), "-x", "c++"]
        return [*flags, "-idirafter", str(self.csrc / "emulator" / "include")]

    def key(self, sources, sanitize: bool) -> str:
        """A fingerprint of all that decides what comes out."""
        digest = hashlib.sha256()
        for text in self.identity:
            digest.update(text.encode() + b"\0")
        for source in sources:
            sanitized = str(bool(self.sanitizers(source, sanitize)))
            digest.update(f"{source.name} {sanitized}".encode() + b"\0")
        for file in sorted(set().union(*(self.included_by(source) for source in sources))):
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
        return digest.hexdigest()[:32]

    def included_by(self, file: Path) -> set[Path]:
        """`file` and what it includes in quotes, from csrc or from beside it."""
        found, new = set(), {file}
        while new:
            found |= new
            new = set().union(*(self._direct(f) for f in new)) - found
        return found

    def _direct(self, file: Path) -> set[Path]:
        if file not in self.includes:
            names = re.findall(r'^\s*#\s*include "([^"]+)"', file.read_text(), re.MULTILINE)
            places = [folder / name for name in names for folder in (self.csrc, file.parent)]
            self.includes[file] = {place for place in places if place.is_file()}
        return self.includes[file]

    def link(self, sources, output: Path, sanitize: bool, program: bool = False) -> Path:
        if not program and _is_whole(output):
            return output
        objects_folder = cache() / "objects"
        try:
            objects_folder.mkdir(parents=True, exist_ok=True)
            output.parent.mkdir(parents=True, exist_ok=True)
            with (objects_folder / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)  # two processes need not both compile
                if not program and _is_whole(output):
                    return output
                with ThreadPoolExecutor(_jobs()) as pool:
                    compile_one = lambda s: self._object(s, objects_folder, sanitize)  # noqa: E731
                    objects = list(pool.map(compile_one, sources))
                kind = [] if program else ["-shared", "-Wl,-Bsymbolic"]
                # A sanitizer's functions come from the library that is preloaded.
                kind += _SANITIZERS if sanitize else [] if program else ["-Wl,-z,defs"]
                self._run(output, [*kind, *map(str, objects), "-ldl"])
        except OSError as error:
            raise RuntimeError(f"the emulator could not be written to {output}: {error}") from error
        return output

    def _object(self, source: Path, folder: Path, sanitize: bool) -> Path:
        output = folder / f"{source.stem}-{self.key([source], sanitize)}.o"
        if not _is_whole(output):
            own = self.sanitizers(source, sanitize)
            self._run(output, [*self.flags(), *own, "-c", str(source)])
        return output

    def _run(self, output: Path, arguments) -> None:
        """Compiles into a temporary file that takes its place when it is whole."""
        with tempfile.TemporaryDirectory(dir=output.parent) as folder:
            part = Path(folder) / output.name
            command = [*self.compiler, *arguments, "-o", str(part)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode != 0:
                raise RuntimeError(
                    f"compiling the emulator failed: {shlex.join(command)}\n{done.stderr[-4000:]}"
                )
            with part.open("rb") as file:
                os.fsync(file.fileno())  # a crash must not leave a name without its bytes
            os.replace(part, output)


def _is_whole(path: Path) -> bool:
    """Exists and is not truncated, by whatever filled the disk."""
    return path.exists() and not _extension.is_truncated(path)


def _jobs() -> int:
    asked = os.environ.get("MAX_JOBS", "")
    return int(asked) if asked.isdigit() and int(asked) > 0 else os.cpu_count() or 1
