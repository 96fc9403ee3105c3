"""What an import says of a missing, broken or foreign extension, and where it looks for one.

Broken extensions are made from copies of the package that is under test; each is imported by a
process of its own.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastconv
from fastconv import _extension

ROOT = Path(__file__).parent.parent


@pytest.fixture
def copy(tmp_path):
    """A copy of the package under test with its extension: (package folder, extension, facts)."""
    _extension.load()
    extension = Path(_extension.load().__file__)
    package = tmp_path / "installed" / "fastconv"
    left_out = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(Path(fastconv.__file__).parent, package, ignore=left_out)
    shutil.copy(extension, package)
    shutil.copy(extension.with_name("_build_facts.json"), package)
    return package, package / extension.name, package / "_build_facts.json"


IMPORT = """
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import fastconv
    import fastconv
import torch
print("FROM", fastconv.__file__)
print("AVAILABLE", fastconv.available)
ours = [str(w.message) for w in caught if issubclass(w.category, fastconv.ExtensionWarning)]
print("WARNINGS", len(ours))
print(*ours)
layer = fastconv.Conv2d(1, 2, 3)
layer.load_state_dict(torch.nn.Conv2d(1, 2, 3).state_dict())
for use in (lambda: layer(torch.zeros(1, 1, 5, 5)), fastconv.kernels):
    try:
        use()
    except ImportError as error:
        print("RAISED", str(error) == fastconv.explanation)
"""


def import_from(folder, cwd, path=()):
    path = os.pathsep.join(map(str, [folder, *path]))
    result = subprocess.run(
        [sys.executable, "-c", IMPORT],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def assert_explained(output, *fragments):
    assert "AVAILABLE False" in output
    assert "WARNINGS 1" in output
    assert output.count("RAISED True") == 2
    for fragment in [*fragments, "found here:", f"torch {torch.__version__}", "pip install"]:
        assert fragment in output


def test_intact_copy(copy, tmp_path):
    output = import_from(copy[0].parent, tmp_path)
    assert f"FROM {copy[0]}" in output
    assert "AVAILABLE True" in output and "WARNINGS 0" in output and "RAISED" not in output


def test_missing_extension(copy, tmp_path):
    copy[1].unlink()
    output = import_from(copy[0].parent, tmp_path)
    assert_explained(output, f"there is no compiled extension in {copy[0]}")


@pytest.mark.parametrize("keep", [0, 64, 0.5, 0.99])
def test_truncated_extension(copy, tmp_path, keep):
    content = copy[1].read_bytes()
    copy[1].write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    output = import_from(copy[0].parent, tmp_path)
    assert_explained(output, f"{copy[1]} is truncated", "built for:")


def test_overwritten_extension(copy, tmp_path):
    copy[1].write_bytes(b"\0" * 4096)
    assert_explained(import_from(copy[0].parent, tmp_path), f"{copy[1]} does not load")


def test_extension_of_another_torch(copy, tmp_path):
    facts = json.loads(copy[2].read_text())
    copy[2].write_text(json.dumps(facts | {"torch": "2.10.3+cu128", "cuda": "12.8"}))
    output = import_from(copy[0].parent, tmp_path)
    assert_explained(output, "compiled against another torch", "torch 2.10.3+cu128, CUDA 12.8")


def test_extension_of_another_python(copy, tmp_path):
    copy[1].rename(copy[1].with_name("_C.cpython-39-x86_64-linux-gnu.so"))
    facts = json.loads(copy[2].read_text())
    copy[2].write_text(json.dumps(facts | {"python": "3.9.18"}))
    output = import_from(copy[0].parent, tmp_path)
    assert_explained(output, "was built for another Python", "Python 3.9.18")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "is damaged"),
        ("[]", "is damaged"),
        ("{}", "it lacks fastconv, python, torch"),
        (None, "is missing"),
    ],
)
def test_damaged_facts(copy, tmp_path, text, reason):
    copy[2].unlink() if text is None else copy[2].write_text(text)
    assert_explained(import_from(copy[0].parent, tmp_path), str(copy[2]), reason)


# --- A clone beside an installation ---------------------------------------------------------------


in_source_tree = pytest.mark.skipif(
    not (ROOT / "csrc").is_dir(), reason="the tests were taken out of their source tree"
)


@pytest.fixture
def clone(copy, tmp_path):
    """A source tree without an extension, of the state that `copy` was compiled from."""
    root = tmp_path / "clone"
    shutil.copytree(ROOT / "csrc", root / "csrc")
    shutil.copytree(copy[0], root / "fastconv", ignore=shutil.ignore_patterns("_C*", "_build*"))
    shutil.copy(ROOT / "setup.py", root)
    from fastconv._source_digest import source_digest

    facts = json.loads(copy[2].read_text())
    copy[2].write_text(json.dumps(facts | {"source_digest": source_digest(root / "csrc")}))
    return root


@in_source_tree
def test_clone_uses_the_installed_extension(clone, copy):
    output = import_from(clone, clone, [copy[0].parent])
    assert f"FROM {clone}" in output
    assert "AVAILABLE True" in output and "WARNINGS 0" in output


@in_source_tree
def test_clone_with_other_sources_warns(clone, copy):
    with (clone / "csrc" / "core" / "choose.cpp").open("a") as file:
        file.write("// changed\n")
    output = import_from(clone, clone, [copy[0].parent])
    assert "AVAILABLE True" in output and "WARNINGS 1" in output
    assert "compiled from other sources" in output and "pip install ." in output


@in_source_tree
def test_clone_of_another_version_refuses(clone, copy):
    (clone / "fastconv" / "_version.py").write_text('__version__ = "9.9.9"\n')
    assert_explained(import_from(clone, clone, [copy[0].parent]), "belongs to fastconv")


@in_source_tree
def test_other_folders_are_searched_only_from_a_clone(clone, copy):
    (clone / "setup.py").unlink()
    assert_explained(import_from(clone, clone, [copy[0].parent]), "no compiled extension")


@in_source_tree
def test_tests_run_against_the_installed_package():
    """Where fastconv is installed and `pytest` was called, the root must not be on sys.path."""
    wheel_made = "site-packages" in str(_extension.load().__file__)
    if wheel_made and os.path.basename(sys.argv[0]).startswith("pytest"):
        assert not Path(fastconv.__file__).is_relative_to(ROOT)


def test_facts_describe_this_build():
    assert _extension.facts["fastconv"] == fastconv.__version__
    assert _extension.facts["torch"].split(".")[:2] == torch.__version__.split(".")[:2]
    assert len(_extension.facts["source_digest"]) == 64
