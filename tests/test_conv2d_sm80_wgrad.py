"""Every tile and mode of conv2d_igemm_sm80_wgrad: small problems, which the tests of all rows run,
would take the smallest tile alone. The program is tests/emulator/wgrad_sm80.cu.
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


@needs_emulator
@pytest.mark.parametrize("sanitize", [False, True], ids=["plain", "sanitized"])
def test_every_tile(sanitize, tmp_path):
    program = fastconv.emulator.compile_program(
        [FOLDER / "cases.cu", FOLDER / "wgrad_sm80.cu", CUDA / "conv2d_layout.cu"],
        tmp_path / "program",
        sanitize=sanitize,
    )
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    for seed in SEEDS[:1] if sanitize else SEEDS:
        command = [program, "all", str(seed)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
        assert done.returncode == 0, done.stderr
