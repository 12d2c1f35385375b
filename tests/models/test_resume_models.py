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

pytestmark = pytest.mark.models

FRONT = "canonicalize,fuse-norm,fuse-activation,fuse-rotary,fuse-attention,canonicalize"


@pytest.mark.parametrize(
    ("family", "method", "max_memory"),
    [("llama", "gptq", []), ("qwen3", "awq", ["--max-memory", "10K"]), ("gpt2", "awq", [])],
)
def test_killed_at_random(family: str, method: str, max_memory: list[str], tmp_path: Path) -> None:
    model = families.variant_path(families.Variant(family, "sdpa", "dynamo"))
    ids = np.random.default_rng(0).integers(3, families.VOCABULARY, (4, 24))
    data, kept = tmp_path / "ids.jsonl", tmp_path / "kept"
    data.write_text("".join(f"{json.dumps(row)}\n" for row in ids.tolist()))
    passes = f"{FRONT},smooth,quantize-weights{{method={method} block-size=16 bits=4}}"
    line = [sys.executable, "-m", "lwc.cli.opt", str(model), "-p", passes, *max_memory]
    line += ["--calibrate", str(data), "--threads", "1"]
    subprocess.run([*line, "-o", str(tmp_path / "wanted.onnx")], check=True, capture_output=True)
    draw = random.Random(f"{family} {max_memory}")
    line += ["-o", str(tmp_path / "out.onnx"), "--resume", str(kept)]
    for _ in range(2):
        had = len(list(kept.glob("*.lwc")))
        child = subprocess.Popen(line, stderr=subprocess.DEVNULL)
        while len(list(kept.glob("*.lwc"))) == had and child.poll() is None:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.3))
        child.kill()
        child.wait()
    (tmp_path / "out.onnx").unlink(missing_ok=True)
    done = subprocess.run(line, check=True, capture_output=True, text=True)
    assert "layers resumed" in done.stderr
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "wanted.onnx").read_bytes()
