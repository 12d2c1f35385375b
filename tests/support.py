"""What tests share: reading a graph from text, running one pass on it, running what it says."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest

from lwc.analysis.manager import AnalysisManager
from lwc.core.module import Module
from lwc.pipeline.passes import Pass, PassContext, PassResult
from lwc.verify.structure.well_formed import verify_structure

ROOT = Path(__file__).parents[1]


def module_of(text: str, opset: int = 17, ir_version: int = 8) -> Module:
    """Read a graph in onnx's text format, without the header."""
    header = f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\n'
    return Module(ir.from_proto(onnx.parser.parse_model(header + text)))


def ops(module: Module) -> list[str]:
    """Return the operators of a module in order, those of subgraphs and functions too."""
    return [node.op_type for node in module.nodes()]


def run_pass(chosen: Pass, module: Module) -> PassResult:
    """Run a pass; check the structure and that `changed` is true."""
    before = module.fingerprint()
    result = chosen.run(module, PassContext(AnalysisManager(module), source=chosen.name))
    assert result.changed == (module.fingerprint() != before)
    verify_structure(module)
    return result


def run_pass_to_the_end(chosen: Pass, module: Module) -> PassResult:
    """Run a pass as `run_pass` does; check that a second run changes nothing."""
    result = run_pass(chosen, module)
    again = run_pass(chosen, module)
    assert not again.changed, (result.rewrites, again.rewrites)
    return result


def plain_session(model: Module | onnx.ModelProto) -> ort.InferenceSession:
    """Open a session that runs a graph as it is written, on one thread."""
    proto = ir.to_proto(model.model) if isinstance(model, Module) else model
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    return ort.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def run_plain(model: Module | onnx.ModelProto, feed: Mapping[str, Any]) -> list[Any]:
    """Run a graph as it is written and return its outputs."""
    return list(plain_session(model).run(None, dict(feed)))


def once_a_run(name: str, make: Callable[[Path], None], temporary: pytest.TempPathFactory) -> Path:
    """Return a folder that `make` fills for all processes of this run; each only reads it."""
    shared = temporary.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder, draft = shared / name, shared / f"{name}.draft"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            make(draft)
            draft.rename(folder)
    return folder


class Idle(Pass):
    """A pass that does nothing; tests of options derive from it."""

    def run(self, module: Module, ctx: PassContext) -> PassResult:
        """Do nothing."""
        return PassResult(False)


def run_interpreted(program: str, folder: Path) -> str:
    """Return what a program prints that imports the `model.py` of a folder, in the interpreter.

    Triton chooses it when kernels are defined, so the program has a process of its own.
    """
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{folder}:{ROOT}"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout
