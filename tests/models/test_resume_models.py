"""--resume on fused decoders: killed at random moments, the last run writes the same file."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import families
import numpy as np
import pytest

from lwc.cli.opt import main

pytestmark = pytest.mark.models

FRONT = "canonicalize,fuse-norm,fuse-activation,fuse-rotary,fuse-attention,canonicalize"


@pytest.mark.parametrize(
    ("family", "method", "max_memory"),
    [("llama", "gptq", []), ("qwen3", "awq", ["--max-memory", "10K"]), ("gpt2", "awq", [])],
)
def test_killed_at_random(
    family: str,
    method: str,
    max_memory: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = families.variant_path(families.Variant(family, "sdpa", "dynamo"))
    ids = np.random.default_rng(0).integers(3, families.VOCABULARY, (4, 24))
    data, kept, out = tmp_path / "ids.jsonl", tmp_path / "kept", tmp_path / "out.onnx"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in ids.tolist()))
    passes = f"{FRONT},smooth,quantize-weights{{method={method} block-size=16 bits=4}}"
    line = [str(model), "-p", passes, *max_memory, "--calibrate", str(data), "--threads", "1"]
    assert main([*line, "-o", str(out)]) == 0
    wanted = out.read_bytes()
    line += ["-o", str(out), "--resume", str(kept)]
    child = subprocess.Popen(
        [sys.executable, "-m", "lwc.cli.opt", *line], stderr=subprocess.DEVNULL
    )
    while not any(kept.glob("*.lwc")) and child.poll() is None:
        time.sleep(0.002)
    time.sleep(random.Random(family).uniform(0, 0.4))
    child.kill()
    child.wait()
    out.unlink()
    capsys.readouterr()
    assert main(line) == 0
    assert "statistics resumed" in capsys.readouterr().err
    assert out.read_bytes() == wanted
