"""Runs every command and snippet of docs/getting_started.md, in order; pip installs nothing."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "getting_started.md"

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.models
@pytest.mark.slow
def test_every_command_and_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = BLOCK.findall(PAGE.read_text())
    assert {language for language, _ in blocks} == {"sh", "python"}
    shell = "\n".join(code for language, code in blocks if language == "sh")
    assert shell.count("pip install ") == 2
    shell = shell.replace("pip install ", "pip install --dry-run ")  # other tests are running
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f'{shell}\nprintf "\\n%s\\n%s\\n" "$MODEL" "$WORK"'],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    model, work = done.stdout.strip().splitlines()[-2:]
    produced = {path.name for path in Path(work).iterdir()}
    assert {"small.onnx", "clean.onnx", "report.html", "report.md"} <= produced
    assert "again.onnx" not in produced

    page = types.ModuleType("getting_started")
    monkeypatch.setitem(sys.modules, page.__name__, page)  # dataclasses look their module up
    names: dict[str, Any] = vars(page)
    names.update(MODEL=model, WORK=work)
    for language, code in blocks:
        if language == "python":
            exec(compile(code, str(PAGE), "exec"), names)
    assert names["entry"].rewrites == {"multiply-by-itself": 1}
    assert len(names["entry"].missed) == 1
    assert Path(work, "from_python.onnx").exists()
