"""`lwc.optimize`: any model in, passes over it, a result that saves and reports itself."""

from __future__ import annotations

import functools
import operator
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lwc.analysis.manager import AnalysisManager
from lwc.core.diagnostics import Remark
from lwc.core.errors import RequirementError, UsageError
from lwc.core.paths import is_folder_target
from lwc.frontend.load import as_module
from lwc.pipeline.instruments import History
from lwc.pipeline.manager import PassManager
from lwc.pipeline.options import did_you_mean
from lwc.pipeline.passes import Pass, PassContext, Progress, Verify, check_settings
from lwc.pipeline.record import PipelineRecord
from lwc.pipeline.registry import default_registry
from lwc.pipeline.spec import resolve
from lwc.wiring import (
    checkpoint,
    find_backend,
    make_gradient_runners,
    make_runners,
    numeric_check,
    target_finder,
)

if TYPE_CHECKING:
    from pathlib import Path

    from lwc.backends.base import Backend
    from lwc.calibration.data import Calibration
    from lwc.core.module import Module
    from lwc.frontend.onnx_writer import SaveResult
    from lwc.pipeline.instruments import Instrument
    from lwc.pipeline.passes import Feed
    from lwc.report.data import Report

__all__ = [
    "OptimizeResult",
    "RunSettings",
    "bind_pass",
    "check_required",
    "make_context",
    "optimize",
    "required_rewrites",
    "run_passes",
    "save_module",
]


@dataclass(frozen=True)
class OptimizeResult:
    """What `optimize` returns.

    Attributes:
        module: The optimised module.
        record: What each pass did.
        bindings: The numbers given to symbolic dimensions.
        history: The module at every point of the run; it shares the weights.
    """

    module: Module
    record: PipelineRecord
    bindings: Mapping[str, int] = field(default_factory=dict)
    history: History = field(default_factory=History)

    @functools.cached_property
    def report(self) -> Report:
        """The report: what each pass did, with the cost model's figures before and after."""
        from lwc.report import build_report, model_entry

        modules = self.history.modules
        return build_report(
            self.record,
            modules,
            model_entry(modules[0], modules[0].source.path),
            model_entry(self.module, None),
            bindings=self.bindings,
        )

    def save(self, path: str | os.PathLike[str]) -> SaveResult:
        """Write the module; see `save_module`."""
        return save_module(self.module, path)


@dataclass(frozen=True)
class RunSettings:
    """How to run a pipeline.

    Attributes:
        verify: See `lwc.pipeline.manager.PassManager`.
        backend: What runs the model for passes that need activations: `onnxruntime`, `fx`,
            `triton`, a `Backend`, or None.
        threads: Threads of the backend; its choice by default.
        seed: Seed of everything random.
        max_memory: Bound in bytes on what one step of a pass may hold.
        grant: Assumptions the user vouches for, by their first words, or `all`.
        instruments: What watches the run.
        progress: Display for long loops.
        explain: See `lwc.pipeline.passes.PassContext`.
        calibration: Calibration data, for passes that must see activations.
        resume: A folder that keeps what calibrated passes compute, and gives a run that follows
            a killed one what it holds. The result is the same to the last bit.
        needs_calibration: Whether it is worth a warning where no pass uses the data.

    Raises:
        UsageError: A setting has a value that it cannot have.
    """

    verify: Verify = "structural"
    backend: str | Backend | None = "onnxruntime"
    threads: int | None = None
    seed: int = 0
    max_memory: int | None = None
    grant: frozenset[str] = frozenset()
    instruments: Sequence[Instrument] = ()
    progress: Progress | None = None
    explain: str | None = None
    calibration: Calibration | None = None
    resume: str | os.PathLike[str] | None = None
    needs_calibration: bool = True

    def __post_init__(self) -> None:
        check_settings(self.verify, self.seed, self.threads, self.max_memory)
        if self.resume is not None and self.calibration is None:
            raise UsageError(
                "resume keeps what is computed on calibration data, and there is none",
                remedy="give calibration=",
            )


def optimize(
    graph: Any,
    passes: str | Pass | Iterable[str | Pass] = (),
    *,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    bind: Mapping[str, int] | None = None,
    verify: Verify = "structural",
    backend: str | Backend | None = "onnxruntime",
    threads: int | None = None,
    seed: int = 0,
    instruments: Sequence[Instrument] = (),
    max_memory: int | None = None,
    grant: str | Iterable[str] = (),
    require_match: int | Mapping[str, int] | None = None,
    calibration: str | Path | Calibration | Iterable[Feed] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> OptimizeResult:
    """Run passes over a model.

    Args:
        graph: A path (`.onnx`, `.onnxtxt`, `.gguf`, Hugging Face folder), a `Module`, an
            `OptimizeResult`, an `onnx_ir.Model`, an `onnx.ModelProto`, a `torch.nn.Module` or
            `GraphModule` with `args`, or a `torch.export.ExportedProgram`. It is not changed.
        passes: A pipeline text, a `Pass`, or a sequence of both.
        args: Example inputs of a torch module.
        kwargs: Example keyword inputs of a torch module.
        dynamic_shapes: As `torch.export.export` takes it.
        bind: Numbers for symbolic dimensions; done by `bind-dims` before the first pass.
        verify: How each pass is checked; see `lwc.pipeline.manager.PassManager`.
        backend: See `RunSettings`.
        threads: See `RunSettings`.
        seed: See `RunSettings`.
        instruments: See `RunSettings`.
        max_memory: See `RunSettings`.
        grant: See `RunSettings`.
        require_match: The least number of rewrites of every pass, or by pass name.
        calibration: Data for passes that must see activations: a file (see
            `lwc.calibration.data.CalibrationFile`), feeds, or what gives feeds.
        resume: See `RunSettings`.

    Raises:
        UsageError: A pass or an option is unknown, or a pass lacks calibration data.
        InputError: The model cannot be read.
        PassError: A pass failed.
        VerificationError: A pass broke what it promises.
        RequirementError: A pass did fewer rewrites than required.
    """
    resolved = resolve(passes)
    required = required_rewrites(require_match, resolved)
    module = as_module(graph, args, kwargs, dynamic_shapes=dynamic_shapes, copy=True)
    settings = RunSettings(
        verify=verify,
        backend=backend,
        threads=threads,
        seed=seed,
        max_memory=max_memory,
        grant=frozenset([grant] if isinstance(grant, str) else grant),
        instruments=instruments,
        calibration=_calibration(calibration),
        resume=resume,
    )
    result = run_passes(module, [*bind_pass(bind or {}), *resolved], settings, bind or {})
    check_required(result.record, required)
    return result


def run_passes(
    module: Module,
    passes: Sequence[Pass],
    settings: RunSettings,
    bindings: Mapping[str, int] | None = None,
) -> OptimizeResult:
    """Run passes over `module` in place; where one fails, the module is lost.

    Raises:
        LwcError: See `optimize`.
    """
    history = History()
    manager = PassManager(
        passes,
        verify=settings.verify,
        numeric=numeric_check(seed=settings.seed, threads=settings.threads),
        instruments=(*settings.instruments, history),
        rollback=False,
    )
    ctx = make_context(module, settings)
    ctx.find_original = lambda: history.modules[0]
    asked = _watch_calibration(ctx)
    record = manager.run(module, ctx)
    if settings.calibration is not None and settings.needs_calibration and not asked:
        kept = (
            ""
            if settings.resume is None
            else f"; nothing is kept in '{os.fspath(settings.resume)}'"
        )
        module.remarks.emit(
            Remark("warning", "calibration", f"no pass of the pipeline used the data{kept}")
        )
    return OptimizeResult(module, record, dict(bindings or {}), history)


def make_context(module: Module, settings: RunSettings) -> PassContext:
    """Return what passes may use besides `module`."""
    backend = find_backend(settings.backend)
    ctx = PassContext(
        AnalysisManager(module),
        make_runner=make_runners(backend, settings.threads),
        make_gradient_runner=None if backend is None else make_gradient_runners(settings.threads),
        max_memory=settings.max_memory,
        seed=settings.seed,
        granted=settings.grant,
        explain=settings.explain,
        find_target=target_finder(settings.backend, settings.threads),
        calibration=None if settings.calibration is None else settings.calibration.feeds,
        checkpoint=checkpoint(settings.resume, settings.backend, settings.threads),
    )
    if settings.progress is not None:
        ctx.progress = settings.progress
    return ctx


def _watch_calibration(ctx: PassContext) -> list[Module]:
    """Return a list that gets every module for which calibration data is asked."""
    asked: list[Module] = []
    feeds = ctx.calibration
    if feeds is not None:

        def watched(module: Module) -> Iterable[Feed]:
            asked.append(module)
            return feeds(module)

        ctx.calibration = watched
    return asked


def _calibration(
    given: str | Path | Calibration | Iterable[Feed] | None,
) -> Calibration | None:
    if given is None:
        return None
    from lwc.calibration.data import as_calibration

    return as_calibration(given)


def required_rewrites(
    require: int | Mapping[str, int] | None, passes: Sequence[Pass]
) -> dict[str, int]:
    """Return the least number of rewrites by pass name.

    Args:
        require: The number for each of `passes`, or numbers by name.
        passes: The pipeline, without what is bound before it.

    Raises:
        UsageError: A name is not in the pipeline.
    """
    names = [pass_.name for pass_ in passes]
    if isinstance(require, int):
        return dict.fromkeys(names, require)
    if not isinstance(require, Mapping | None):
        raise UsageError(f"a number of rewrites is required, or one by pass, not {require!r}")
    for name in require or ():
        if name not in names:
            raise UsageError(
                f"rewrites of pass '{name}' are required, but it is not in the pipeline",
                remedy=did_you_mean(name, names),
            )
    return dict(require or {})


def check_required(record: PipelineRecord, required: Mapping[str, int]) -> None:
    """Check that passes found what the user required.

    Args:
        record: What the passes did.
        required: The least number of rewrites by pass name; see `required_rewrites`.

    Raises:
        RequirementError: A pass did fewer.
    """
    applied: Counter[str] = Counter()
    for each in record.passes:
        applied[each.name] += each.applied
    for name, count in required.items():
        if applied[name] < count:
            raise RequirementError(
                f"pass '{name}' applied {applied[name]} rewrites, but {count} are required",
                remedy=f"--explain={name} tells why others did not apply",
            )


def bind_pass(bindings: Mapping[str, int]) -> tuple[Pass, ...]:
    """Return the `bind-dims` pass for `bindings`, or nothing when there are none.

    Raises:
        UsageError: They are no mapping of names to integers.
    """
    if not bindings:
        return ()
    cls = default_registry().load("bind-dims")
    assert cls.free_options is not None
    try:
        pairs = tuple((name, operator.index(extent)) for name, extent in bindings.items())
    except (AttributeError, TypeError) as error:
        raise UsageError(f"bind maps names to integers: {error}") from error
    return (cls(**{cls.free_options: pairs}),)


def save_module(module: Module, path: str | os.PathLike[str]) -> SaveResult:
    """Write a module as one file, or as a folder when `path` ends in a slash or is a folder.

    Raises:
        OSError: The disk is full or the path cannot be written.
    """
    from lwc.frontend.onnx_writer import save, save_folder

    text = os.fspath(path)
    if is_folder_target(text):
        return save_folder(module, text)
    return save(module, text)
