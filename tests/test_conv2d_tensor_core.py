"""What the tensor-core convolutions share: copies of activations and filters in the layout that the
kernels read, the store of a tile's results, statistics. The program is
tests/emulator/conv2d_pieces.cu.
"""

import os
import subprocess
from pathlib import Path

import pytest

import fastconv

FOLDER = Path(__file__).resolve().parent / "emulator"
CUDA = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
SEEDS = (0, 1, 2)

missing = fastconv.emulator.available()
needs_emulator = pytest.mark.skipif(bool(missing), reason=missing)


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """Compiles the program once; asked for by whether it is sanitized."""
    folder = tmp_path_factory.mktemp("pieces")
    built = {}

    def program(sanitize):
        if sanitize not in built:
            sources = [FOLDER / "cases.cu", FOLDER / "conv2d_pieces.cu"]
            sources += [CUDA / "conv2d_layout.cu", CUDA / "conv2d_statistics.cu"]
            output = folder / ("sanitized" if sanitize else "plain")
            built[sanitize] = fastconv.emulator.compile_program(sources, output, sanitize=sanitize)
        return folder / ("sanitized" if sanitize else "plain")

    return program


@needs_emulator
@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
def test_pieces(pieces, sanitize):
    for seed in SEEDS[:1] if sanitize else SEEDS:
        environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
        command = [pieces(sanitize), "all", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
