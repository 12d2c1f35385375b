"""lwc: a compiler that makes transformer models light.

`lwc.load` and `lwc.trace` read a model, `lwc.optimize` runs passes over it, and the result saves
itself and reports what was done. Attributes load on first use, so that `import lwc` is fast.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lwc.backends.fx.convert import to_fx
    from lwc.backends.triton.convert import to_triton
    from lwc.core.diagnostics import Remark
    from lwc.core.errors import LwcError
    from lwc.core.module import Module
    from lwc.frontend.load import load
    from lwc.frontend.onnx_writer import save
    from lwc.frontend.torch_trace import trace
    from lwc.optimizer import OptimizeResult, optimize
    from lwc.pipeline.function_pass import function_pass
    from lwc.pipeline.passes import (
        Approximate,
        Exact,
        Lossy,
        Pass,
        PassContext,
        PassResult,
    )
    from lwc.pipeline.rule_pass import RulePass
    from lwc.rewrite.editor import Editor
    from lwc.rewrite.patterns import PatternRule
    from lwc.rewrite.rules import EDITED, Miss, Rule, rule

__version__ = "0.1.0"

_HOME = {
    "Approximate": "lwc.pipeline.passes",
    "EDITED": "lwc.rewrite.rules",
    "Editor": "lwc.rewrite.editor",
    "Exact": "lwc.pipeline.passes",
    "Lossy": "lwc.pipeline.passes",
    "LwcError": "lwc.core.errors",
    "Miss": "lwc.rewrite.rules",
    "Module": "lwc.core.module",
    "OptimizeResult": "lwc.optimizer",
    "Pass": "lwc.pipeline.passes",
    "PassContext": "lwc.pipeline.passes",
    "PassResult": "lwc.pipeline.passes",
    "PatternRule": "lwc.rewrite.patterns",
    "Remark": "lwc.core.diagnostics",
    "Rule": "lwc.rewrite.rules",
    "RulePass": "lwc.pipeline.rule_pass",
    "function_pass": "lwc.pipeline.function_pass",
    "load": "lwc.frontend.load",
    "optimize": "lwc.optimizer",
    "rule": "lwc.rewrite.rules",
    "save": "lwc.frontend.onnx_writer",
    "to_fx": "lwc.backends.fx.convert",
    "to_triton": "lwc.backends.triton.convert",
    "trace": "lwc.frontend.torch_trace",
}

__all__ = [
    "EDITED",
    "Approximate",
    "Editor",
    "Exact",
    "Lossy",
    "LwcError",
    "Miss",
    "Module",
    "OptimizeResult",
    "Pass",
    "PassContext",
    "PassResult",
    "PatternRule",
    "Remark",
    "Rule",
    "RulePass",
    "function_pass",
    "load",
    "optimize",
    "rule",
    "save",
    "to_fx",
    "to_triton",
    "trace",
]


def __getattr__(name: str) -> Any:
    if name == "verify":
        return importlib.import_module("lwc.verify")
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'lwc' has no attribute '{name}'")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME, "verify"])
