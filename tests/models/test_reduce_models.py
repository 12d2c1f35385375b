"""`--reduce` on a real model with a pass that miscompiles one of its layers."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import faulty_passes
import pytest
from support import ops

from lwc.frontend.load import load


@pytest.mark.models
@pytest.mark.slow
def test_a_wrong_axis_in_one_layer_is_found(
    model_file: Callable[[str], Path], tmp_path: Path
) -> None:
    small = tmp_path / "small.onnxtxt"
    words = [
        str(model_file("paraphrase-MiniLM-L3-v2")),
        "--pass-pipeline=canonicalize,faulty-spell-softmax{at=layer.1/}",
        f"--load-pass-plugin={faulty_passes.__file__}",
        f"--reduce={small}",
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lwc.cli.opt", *words], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("numeric: ")
    assert "354 nodes reduced to 1, 2 passes to 1" in done.stdout
    assert ops(load(small)) == ["Softmax"]
