"""What starting lwc costs, in imports and in CPU time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import onnx
import onnx.parser
import pytest

HEAVY = {
    "hypothesis",
    "numpy",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "rich",
    "sympy",
    "torch",
    "transformers",
}

MODEL = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[n, 2] x) => (float[n, 2] y)
<float[2, 2] w = {1, 0, 0, 1}>
{
  a = Identity(x)
  y = MatMul(a, w)
}
"""


def loaded(code: str) -> set[str]:
    """Run code in a fresh interpreter and return the top-level modules it has loaded."""
    script = f"{code}\nimport json, sys\nprint('@' + json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    names = json.loads(done.stdout.rpartition("@")[2])
    return {name.partition(".")[0] for name in names}


def test_the_heavy_modules_are_seen_when_they_are_there() -> None:
    assert {"numpy", "onnx_ir"} <= loaded("import lwc; lwc.Module")


@pytest.mark.parametrize(
    "code",
    [
        "import lwc",
        "import lwc.cli.opt",
        "import lwc; dir(lwc); lwc.Exact, lwc.Pass, lwc.LwcError",
        "import lwc.pipeline.spec, lwc.pipeline.registry, lwc.pipeline.config",
        "from lwc.cli.opt import main; main(['--list-passes'])",
        "from lwc.cli.opt import main; main(['--list-passes=json'])",
        "from lwc.cli.opt import main; main(['--no-such-option'])",
    ],
)
def test_nothing_heavy_is_imported(code: str) -> None:
    assert loaded(code).isdisjoint(HEAVY)


def test_help_imports_nothing_heavy() -> None:
    code = "from lwc.cli.opt import main\ntry:\n    main(['--help'])\nexcept SystemExit:\n    pass"
    assert loaded(code).isdisjoint(HEAVY)


@pytest.mark.parametrize("option", ["--help", "--list-passes"])
def test_it_starts_in_less_than_0_4_seconds_of_cpu_time(option: str) -> None:
    code = (
        "import resource, subprocess, sys\n"
        f"subprocess.run([sys.executable, '-m', 'lwc.cli.opt', '{option}'], check=True, "
        "stdout=subprocess.DEVNULL)\n"
        "used = resource.getrusage(resource.RUSAGE_CHILDREN)\n"
        "print(used.ru_utime + used.ru_stime)"
    )
    runs = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(runs) < 0.4


def test_a_graph_pipeline_imports_no_machine_learning_framework(tmp_path: Path) -> None:
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    onnx.save(onnx.parser.parse_model(MODEL), source)
    arguments = [str(source), "-o", str(target), "-p", "canonicalize,infer-shapes,fold-linear"]
    modules = loaded(f"from lwc.cli.opt import main\nassert main({arguments!r}) == 0")
    assert modules.isdisjoint({"torch", "transformers", "hypothesis", "onnxruntime"})
    assert [node.op_type for node in onnx.load(target).graph.node] == ["MatMul"]
