"""Every program under tools/bench prints a table and writes its figures as JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "tools" / "bench"

SMALL = {
    "attention_memory": ["--only", "window", "--lengths", "256", "512"],
    "backend_nodes": ["--kinds", "node", "--only", "scan"],
    "cache_policies": ["--layers", "2", "--tokens", "64"],
    "cost_model": ["--only", "flops", "--models", "magika"],
    "decode": [
        "--layers",
        "2",
        "--contenders",
        "pytorch",
        "genai-int4",
        "--lengths",
        "8",
        "--tokens",
        "4",
        "--rounds",
        "1",
    ],
    "fusion": ["--models", "vit", "--exporters", "script", "--implementations", "eager"],
    "fx_gradients": ["--models", "smollm2", "--layers", "2", "--pipelines", "read"],
    "fx_nodes": ["--kinds", "node", "--only", "scan"],
    "fx_round_trip": ["--families", "vit"],
    "greedy": ["--layers", "2", "--prompts", "2", "--tokens", "4"],
    "mutants": ["--only", "branches of a decided if"],
    "pack": ["--threads", "1", "--tokens", "1", "--rounds", "1"],
    "quantize": [
        "--layers",
        "2",
        "--tokens",
        "64",
        "--samples",
        "1",
        "--settings",
        "tables-8bit",
        "lwc/4-g128/rotate+gptq",
        "ort/4-g32/rtn",
    ],
    "quantize_weights": ["--layers", "2", "--variants", "8 bits", "--tokens", "33"],
    "recover": ["--layers", "2", "--steps", "2", "--tokens", "64", "--samples", "2"],
    "scale": [
        "--layers",
        "1",
        "--hidden",
        "64",
        "--ffn",
        "128",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--vocab",
        "512",
    ],
    "simplify": ["--only", "magika", "--repeats", "1"],
    "triton_model": ["--layers", "1", "--tokens", "4", "--settings", "w8a8"],
    "triton_static": ["--only", "rotary"],
    "verification": ["--models", "magika", "--repeats", "1"],
    "window": ["--lengths", "256", "--rounds", "1"],
}


def _programs() -> list[str]:
    return sorted(path.stem for path in BENCH.glob("*.py") if "argparse" in path.read_text())


@pytest.mark.models
@pytest.mark.slow
@pytest.mark.parametrize("name", _programs())
def test_table_and_json(name: str, tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    command = [sys.executable, str(BENCH / f"{name}.py"), *SMALL[name], "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "│" in done.stdout
    figures = json.loads(file.read_text())
    assert set(figures) == {"summary", "rows"}
    assert figures["summary"]
    assert figures["rows"]
    assert all(isinstance(row, dict) for row in figures["rows"])
