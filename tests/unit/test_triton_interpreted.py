"""Triton kernels compute what torch computes, run on the CPU by Triton's interpreter.

The interpreter is chosen when a kernel is defined, so the tests of `tests/interpreted` run in
processes of their own, one for each file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[triton]'")

ROOT = Path(__file__).parents[2]
FILES = [
    pytest.param(path.name, marks=[pytest.mark.models] * ("models" in path.name))
    for path in sorted((ROOT / "tests" / "interpreted").glob("*.py"))
]


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_interpreted(file: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    ended = subprocess.run(
        [*command, f"tests/interpreted/{file}"],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-6000:] + ended.stderr[-2000:]
