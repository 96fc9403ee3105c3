"""Loads the compiled extension, or says why it cannot, what would mend it and what still works.

`pip install .` puts the compiled `fastconv._C` into site-packages and leaves none in a clone. Code
that runs in the clone's root (`python -m fastconv`, `python -m pytest`) imports this package from
the clone all the same, because Python puts the working directory first. So where this file lies in
a clone and no extension lies beside it, the installed one is loaded: the Python code is then the
clone's, as in any project, and the kernels are those that were compiled last. Another version is
refused; other sources than the clone's csrc are warned about.
"""

import importlib.machinery
import importlib.util
import json
import platform
import struct
import sys
import warnings
from pathlib import Path

import torch

from fastconv import triton_kernels
from fastconv._source_digest import source_digest
from fastconv._version import __version__

_PACKAGE = Path(__file__).resolve().parent
_FACTS = "_build_facts.json"


class ExtensionWarning(RuntimeWarning):
    """The compiled extension is missing, broken or out of date."""


class _Unusable(Exception):
    """The one clause that says why; `facts` is what the build wrote down, where that is known."""

    def __init__(self, why, facts=None):
        super().__init__(why)
        self.facts = facts


def _is_clone():
    return (_PACKAGE.parent / "setup.py").exists() and (_PACKAGE.parent / "csrc").is_dir()


def _folders():
    """Where an extension may lie: beside this file and, for a clone, where pip installs."""
    yield _PACKAGE
    for entry in sys.path if _is_clone() else []:
        folder = Path(entry).resolve() / "fastconv"
        if folder != _PACKAGE and folder.is_dir():
            yield folder


def _find():
    """The extension file and its facts."""
    foreign = None
    for folder in _folders():
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            if (folder / f"_C{suffix}").exists():
                return folder / f"_C{suffix}", _read_facts(folder / _FACTS)
        foreign = foreign or next(folder.glob("_C.*"), None)
    if foreign is not None:
        raise _Unusable(
            f"{foreign} was built for another Python", _read_facts(foreign.with_name(_FACTS))
        )
    raise _Unusable(f"there is no compiled extension in {_PACKAGE}")


def _read_facts(path):
    try:
        facts = json.loads(path.read_text())
        missing = [key for key in ("fastconv", "python", "torch") if not facts.get(key)]
    except FileNotFoundError:
        raise _Unusable(
            f"{path}, which says what the extension was built for, is missing"
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise _Unusable(f"{path} is damaged ({error})") from None
    if missing:
        raise _Unusable(f"{path} is damaged (it lacks {', '.join(missing)})")
    return facts


def _minor(version):
    return str(version).split(".")[:2]


def is_truncated(path):
    """Whether an ELF file ends before its section headers, which come last.

    The dynamic loader would map such a file and the process would die of SIGBUS.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if header[:4] != b"\x7fELF":
        return len(header) < 64
    if len(header) < 64 or header[4] != 2:  # not 64-bit: the loader itself refuses it
        return len(header) < 64
    (offset,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return path.stat().st_size < offset + size * count


def _load():
    """The extension module, its facts, and a warning or None."""
    path, facts = _find()
    if facts["fastconv"] != __version__:
        raise _Unusable(f"{path} belongs to fastconv {facts['fastconv']}", facts)
    # Loaded all the same, it might end the process: C++ has no stable interface between minors.
    if _minor(facts["torch"]) != _minor(torch.__version__):
        raise _Unusable(f"{path} was compiled against another torch", facts)
    if is_truncated(path):
        raise _Unusable(f"{path} is truncated", facts)
    spec = importlib.util.spec_from_file_location("fastconv._C", path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise _Unusable(f"{path} does not load: {error}", facts) from None
    sys.modules["fastconv._C"] = module
    triton_kernels.register(module)
    stale = None
    digest = facts.get("source_digest")
    if path.parent != _PACKAGE and digest and digest != source_digest(_PACKAGE.parent / "csrc"):
        stale = (
            f"fastconv is imported from {_PACKAGE.parent}, and the installed extension ({path}) "
            "was compiled from other sources than its csrc: run `pip install .` there again."
        )
    return module, facts, stale


def _describe(python, torch_version, cuda, version):
    return f"fastconv {version}, Python {python}, torch {torch_version}, CUDA {cuda or 'none'}"


def _explain(unusable):
    facts = unusable.facts
    lines = [f"fastconv's compiled kernels cannot be used: {unusable}."]
    if facts:
        built = _describe(facts["python"], facts["torch"], facts.get("cuda"), facts["fastconv"])
        lines.append(f"  built for:  {built}")
    found = _describe(platform.python_version(), torch.__version__, torch.version.cuda, __version__)
    lines += [
        f"  found here: {found}",
        "To mend it, run `pip install --force-reinstall --no-deps .` in a clone of fastconv: it "
        "compiles for this Python and this torch and downloads neither.",
        "Until then layers and models can be built, converted, saved and loaded, and "
        "`python -m fastconv info` works; calling a layer or a function of fastconv raises this "
        "text as an ImportError.",
    ]
    return "\n".join(lines)


_module = None
facts = {}  # what the build wrote down, where that is known
explanation = ""  # why the extension cannot be used; empty: it can
try:
    _module, facts, _stale = _load()
    if _stale:
        warnings.warn(_stale, ExtensionWarning, stacklevel=2)
except _Unusable as unusable:
    explanation = _explain(unusable)
    facts = unusable.facts or {}
available = _module is not None


def load():
    """The compiled extension, fastconv._C; raises ImportError with the explanation."""
    if _module is None:
        raise ImportError(explanation)
    return _module
