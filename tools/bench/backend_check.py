"""Run a model before and after passes in ONNX Runtime, and say what differs."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from bench.backend_cases import Case, Variant
from onnx import helper, numpy_helper

from lwc.core.errors import InputError
from lwc.frontend.load import load
from lwc.frontend.onnx_writer import save
from lwc.pipeline.manager import PassManager
from lwc.pipeline.passes import Pass

__all__ = ["Close", "Outcome", "check", "difference", "run"]

Before: TypeAlias = Literal["correct", "other result", "cannot run"]
Status: TypeAlias = Literal["held", "refused", "failed"]
Array: TypeAlias = np.ndarray[Any, Any]

ODD_TYPES = ("bfloat16", "float8", "float4", "int4", "int2")
"""Parts of the names of types that numpy lacks."""

AS_WRITTEN = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
OPTIMIZED = ort.GraphOptimizationLevel.ORT_ENABLE_ALL


@dataclass(frozen=True)
class Outcome:
    """What became of one variant of one case.

    Attributes:
        kind: Kind of the case.
        case: Its name.
        variant: Which variant.
        before: What ONNX Runtime makes of the model before the passes: what ONNX expects,
            something else, or nothing.
        status: `held`: the model after the passes gives the same. `refused`: lwc's reader does
            not take the model. `failed`: all else.
        changed: Whether a pass changed the model.
        reason: Why ONNX Runtime is not correct, why it was refused, or how it failed.
    """

    kind: str
    case: str
    variant: str
    before: Before
    status: Status
    changed: bool = False
    reason: str = ""


@dataclass(frozen=True)
class Close:
    """Tolerances of a comparison.

    Attributes:
        rtol: Relative tolerance.
        atol: Absolute tolerance.
        least: Least relative tolerance of some types.
    """

    rtol: float
    atol: float
    least: Mapping[str, float] = field(default_factory=dict)


ROUNDINGS = {"float16": 2**-9, "bfloat16": 2**-6}
"""Two units in the last place of the 16-bit types, relative."""

SAME = Close(1e-5, 1e-6, ROUNDINGS)
"""Between before and after: a constant may be rounded otherwise than ONNX Runtime's kernels do."""


def stated(case: Case) -> Close:
    """Return the tolerance of a test, but at least two roundings of 16-bit types.

    ONNX's own runner does so for bfloat16. For float16 the tests state one rounding; ONNX Runtime
    stays within it where it computes several nodes in float32 without rounding in between.
    """
    return Close(case.rtol, case.atol, ROUNDINGS)


def check(kind: str, case: Case, variant: Variant, passes: tuple[Pass, ...], at: Path) -> Outcome:
    """Run one variant before and after passes.

    The model goes the way of a user's: a file that is read, rewritten under structural
    verification, saved and read again.

    Args:
        kind: Kind of the case.
        case: The case, for the outputs ONNX expects.
        variant: The model to run.
        passes: The passes.
        at: Folder for the files.
    """
    source, target = at / "before.onnx", at / "after.onnx"
    source.write_bytes(variant.model.SerializeToString())
    results: list[Any] | None = None
    before: Before
    why = ""
    try:
        results = run(source, variant.feed)
    except Exception as error:  # ONNX Runtime's errors have no common base.
        before, why = "cannot run", one_line(error)
    else:
        why = difference(results, case.expected, stated(case)) or ""
        before = "other result" if why else "correct"

    def outcome(status: Status, changed: bool = False, reason: str = "") -> Outcome:
        return Outcome(kind, case.name, variant.name, before, status, changed, reason or why)

    try:
        module = load(source)
    except InputError as error:
        return outcome("refused", reason=error.message)
    except Exception as error:
        return outcome("failed", reason=f"reader: {named(error)}")
    changed = False
    try:
        record = PassManager(passes, verify="structural", rollback=False).run(module)
        changed = any(each.changed for each in record.passes)
        save(module, target)
        load(target)
    except Exception as error:
        return outcome("failed", changed, named(error))
    if results is None:
        problem = _runs_wrong(case, variant.feed, target)
        return outcome("failed" if problem else "held", changed, problem or "")
    problem = broken(case, variant.feed, source, target, results, correct=before == "correct")
    return outcome("failed" if problem else "held", changed, problem or "")


def broken(
    case: Case,
    feed: Mapping[str, Any],
    source: Path,
    target: Path,
    results: list[Any],
    *,
    correct: bool,
) -> str | None:
    """Say what the file `target` does otherwise than `source`, which gave `results`.

    It is run as written and optimized. Where `results` are not what ONNX expects, either will do;
    where they change from run to run, types and shapes must stay.
    """
    repeats = correct or not difference(run(source, feed), results, Close(0, 0))

    def problem(level: Any) -> str | None:
        try:
            found = run(target, feed, level)
        except Exception as error:
            return f"does not run: {one_line(error)}"
        if not repeats:
            return difference(found, results, None)
        changed = difference(found, results, SAME)
        wrong = difference(found, case.expected, stated(case))
        return changed or wrong if correct else changed and wrong and changed

    if as_written := problem(AS_WRITTEN):
        return as_written
    optimized = problem(OPTIMIZED)
    if optimized and not _optimizer_breaks(source, feed, results):
        return f"optimized by ONNX Runtime: {optimized}"
    return None


def _runs_wrong(case: Case, feed: Mapping[str, Any], target: Path) -> str | None:
    """Say what is wrong with the results of a model that ran only after the passes, if it did.

    Folding may replace an operator that ONNX Runtime lacks, and reading raises old opsets.
    """
    try:
        found = run(target, feed)
    except Exception:
        return None
    wrong = difference(found, case.expected, stated(case))
    return wrong and f"runs only after the passes, with another result: {wrong}"


def _optimizer_breaks(source: Path, feed: Mapping[str, Any], results: list[Any]) -> bool:
    """Return whether ONNX Runtime's own optimizations break the file before already."""
    try:
        return difference(run(source, feed, OPTIMIZED), results, SAME) is not None
    except Exception:
        return True


def run(path: Path, feed: Mapping[str, Any], level: Any = AS_WRITTEN) -> list[Any]:
    """Run a model file on one thread and return its outputs.

    Tensors of types that numpy lacks go in and out as plain memory, since ONNX Runtime's Python
    interface takes no others.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = level
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    kinds = {value.type for value in (*session.get_inputs(), *session.get_outputs())}
    if not any(odd in kind for kind in kinds for odd in ODD_TYPES):
        return list(session.run(None, dict(feed)))
    given = {name: _to_memory(array) for name, array in feed.items()}
    return [_from_memory(value) for value in session.run_with_ort_values(None, given)]


def _to_memory(array: Array) -> Any:
    tensor = ir.tensor(array)
    value = ort.OrtValue.ortvalue_from_shape_and_type(list(array.shape), int(tensor.dtype))
    content = tensor.tobytes()
    ctypes.memmove(value.data_ptr(), content, len(content))
    return value


def _from_memory(value: Any) -> Array:
    content = ctypes.string_at(value.data_ptr(), value.tensor_size_in_bytes())
    tensor = helper.make_tensor("", value.element_type(), value.shape(), content, raw=True)
    return numpy_helper.to_array(tensor)


def difference(found: Any, wanted: Any, close: Close | None) -> str | None:
    """Say how outputs differ in type, shape or value, or return None.

    Args:
        found: An array, a list of outputs or elements, or None for an absent optional.
        wanted: The same.
        close: How close floats must be; without it values are not compared.
    """
    if isinstance(wanted, list | tuple):
        if not isinstance(found, list | tuple) or len(found) != len(wanted):
            return "another number of outputs or elements"
        pairs = zip(found, wanted, strict=True)
        return next(filter(None, (difference(a, b, close) for a, b in pairs)), None)
    if found is None or wanted is None:
        return None if found is wanted else "an optional is absent on one side only"
    found, wanted = np.asarray(found), np.asarray(wanted)
    if found.shape != wanted.shape:
        return f"shape {list(found.shape)} instead of {list(wanted.shape)}"
    if found.dtype.kind in "OUS" and wanted.dtype.kind in "OUS":
        return None if found.astype(str).tolist() == wanted.astype(str).tolist() else "strings"
    if found.dtype != wanted.dtype:
        return f"type {found.dtype} instead of {wanted.dtype}"
    return None if close is None else _values(found, wanted, close)


def _values(found: Array, wanted: Array, close: Close) -> str | None:
    name = wanted.dtype.name
    if "float" in name and wanted.dtype.kind != "f":
        found, wanted = found.astype(np.float32), wanted.astype(np.float32)
    if wanted.dtype.kind not in "fc":
        return None if np.array_equal(found, wanted) else "other values"
    rtol = max(close.rtol, close.least.get(name, 0.0))
    with np.errstate(all="ignore"):
        same = np.isclose(found, wanted, rtol, close.atol, equal_nan=True)
        off = np.abs(found - wanted)[~same]
    return None if same.all() else f"values differ by up to {np.max(off):.3g}"


def named(error: BaseException) -> str:
    """Return an error's class and message on one line."""
    return f"{type(error).__name__}: {one_line(error)}"


def one_line(error: BaseException) -> str:
    """Return an error's message on one line, shortened."""
    return " ".join(str(error).split())[:300] or type(error).__name__
