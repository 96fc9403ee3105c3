"""PEP 517 backend: setuptools', compiled against the torch that the user already has.

pip builds in an isolated environment that hides the caller's packages. Left alone it would fetch
the newest torch, compile against that, and leave an extension that the installed torch cannot load.
So: if the environment that pip was called in has torch, ask for none and put that environment's
site-packages at the end of sys.path while building; if it has none, ask for torch, and the wheel
requires the minor version that came (pip then installs the same one).
"""

import importlib
import os
import site
import sys
import sysconfig

import fastconv_decisions as decisions

try:
    from setuptools import build_meta
except ImportError:  # refused in words by every hook
    build_meta = None


def _calling_environments():
    """Candidates, likeliest first, each a list of site-packages folders.

    pip runs this hook with the caller's interpreter and takes the site-packages off sys.path, so
    what `site` names and sys.path lacks is the caller's. uv runs it in a virtual environment of its
    own instead; the caller's is then one on PATH (activated), or `.venv` here.
    """
    hidden = [folder for folder in site.getsitepackages() if folder not in sys.path]
    if hidden:
        # A virtual environment sees the user's folder only if it sees the system's.
        if sys.prefix == sys.base_prefix or sys.base_prefix in site.PREFIXES:
            hidden.append(site.getusersitepackages())
        return [hidden]
    if "UV" not in os.environ:
        return []
    prefixes = [os.path.dirname(p) for p in os.environ.get("PATH", "").split(os.pathsep)]
    prefixes = [os.environ.get("CONDA_PREFIX", "")] + prefixes + [os.path.abspath(".venv")]
    own = os.path.realpath(sys.prefix)
    return [
        [sysconfig.get_path("purelib", "venv", vars={"base": prefix, "platbase": prefix})]
        for prefix in prefixes
        if os.path.realpath(prefix) != own
        and any(os.path.exists(os.path.join(prefix, m)) for m in ("pyvenv.cfg", "conda-meta"))
    ]


def _open_calling_environment():
    """Makes the caller's torch, and what torch itself needs, importable. Returns its version."""
    version = decisions.installed_torch()
    for folders in [] if version else _calling_environments():
        before = sys.path[:]
        for folder in folders:
            site.addsitedir(folder)  # Appended: this build's own requirements stay first.
        importlib.invalidate_caches()
        version = decisions.installed_torch()
        if version is not None:
            break
        sys.path[:] = before
    return version


def _build_requirements():
    # What would fail later fails here, before gigabytes are downloaded.
    version = _open_calling_environment()
    if version is not None:
        decisions.refuse_torch(version, sys.prefix)
    decisions.find_compiler()
    decisions.cuda_mode()
    decisions.decide_jobs()
    return [] if version is not None else [decisions.torch_requirement(None)]


def _plainly(function):
    """Runs a hook; a refusal ends the process with its sentence alone, without a traceback."""

    def hook(*args, **kwargs):
        try:
            decisions.refuse_python()
            decisions.refuse_setuptools()
            return function(*args, **kwargs)
        except decisions.Refused as refused:
            sys.exit("fastconv: " + str(refused))

    return hook


@_plainly
def get_requires_for_build_wheel(config_settings=None):
    return _build_requirements()


@_plainly
def get_requires_for_build_editable(config_settings=None):
    return _build_requirements()


@_plainly
def get_requires_for_build_sdist(config_settings=None):
    return []


@_plainly
def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    _open_calling_environment()
    return build_meta.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


@_plainly
def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    _open_calling_environment()
    return build_meta.prepare_metadata_for_build_editable(metadata_directory, config_settings)


@_plainly
def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    _open_calling_environment()
    return build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)


@_plainly
def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    _open_calling_environment()
    return build_meta.build_editable(wheel_directory, config_settings, metadata_directory)


@_plainly
def build_sdist(sdist_directory, config_settings=None):
    return build_meta.build_sdist(sdist_directory, config_settings)
