"""One run of lwc-opt after its arguments are read: load, run passes, write."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lwc.cli.arguments import (
    parse_counts,
    parse_matches,
    parse_shapes,
    parse_size,
    split_words,
)
from lwc.cli.option_checks import check_options
from lwc.cli.progress import ProgressDisplay
from lwc.cli.summary import remark_lines, summary_lines, written_line
from lwc.core.errors import PassError, RequirementError, UsageError, VerificationError
from lwc.core.text import printable
from lwc.pipeline.config import PipelineConfig, read_config
from lwc.pipeline.instruments import Instrument, IrPrinter, StatisticsPrinter, TimingPrinter
from lwc.pipeline.options import did_you_mean
from lwc.pipeline.spec import resolve

if TYPE_CHECKING:
    from lwc.calibration.data import CalibrationFile
    from lwc.core.module import Module
    from lwc.optimizer import OptimizeResult, RunSettings
    from lwc.report.data import LayerSensitivity, ModelEntry

__all__ = ["Session", "settings_of"]


class Session:
    """Carries out one action of the command line.

    Args:
        options: What `parse_arguments` read.

    Raises:
        UsageError: Options contradict each other, or a pass in the pipeline is unknown.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.config = settings_of(options)
        if options.input is None:
            raise UsageError("no input is given", remedy="lwc-opt model.onnx -o smaller.onnx -p …")
        check_options(options)
        asked = parse_matches(options.require_match)
        self.require = self.config.require_match if asked is None else asked
        self.shapes = [{**self.config.bind, **each} for each in parse_shapes(options.measure)]
        shown = not options.quiet and sys.stderr.isatty()
        self.progress = ProgressDisplay(enabled=shown)

    def plan(self) -> int:
        """Print what the input costs."""
        from lwc.backends.onnxruntime.measure import load_target
        from lwc.cli.plan import print_plan

        module = self._load()
        target = load_target(self.config.threads or 1)
        print_plan(module, self.config.bind, target, self.options.color)
        return 0

    def explain(self) -> int:
        """Run up to one pass and print its remarks."""
        from lwc.cli.explain import explain, find_nodes, passes_until

        name, _, node = self.options.explain.partition("@")
        config = self.config
        if not config.passes:
            config = replace(config, passes=resolve(name))
        config = replace(config, passes=tuple(passes_until(name, config.passes)))
        result = self._run_passes(config, [], explain=node)
        nodes = find_nodes(node, result.history) if node else None
        print(printable(explain(result.record.passes[-1], nodes)))
        return 0

    def bisect(self) -> int:
        """Find the first pass and rewrite that change the outputs; 1 if there is one."""
        from lwc.cli.bisect import OutputCheck
        from lwc.cli.explain import describe_culprit
        from lwc.optimizer import make_context
        from lwc.pipeline.bisect import bisect
        from lwc.pipeline.instruments import History

        config = self.config
        if not config.passes and not config.bind:
            raise UsageError("--bisect needs passes to look at", remedy="add -p PIPELINE")
        if config.verify == "numeric":
            config = replace(config, verify="structural")
        history, failure = History(), None
        try:
            self._run_passes(config, [history])
        except (PassError, VerificationError) as error:
            if history.failure is None:
                raise
            failure = error
        with self.progress.phase("running passes again and comparing outputs"):
            check = OutputCheck(seed=config.seed, threads=config.threads)
            settings = self._run_settings(config, [])
            culprit = bisect(history, check, lambda module: make_context(module, settings))
        if culprit is None:
            if failure is not None:
                raise failure
            print(printable(check.agreement()))
            return 0
        print(printable(describe_culprit(culprit)))
        return 1

    def reduce(self) -> int:
        """Write the smallest model that makes the pipeline fail; 1 if there is one."""
        from lwc.cli.reduce import find_reproducer, found_lines, nothing_line

        options, path = self.options, self.options.reduce
        config = replace(self.config, verify=options.verify or "numeric")
        module = self._load()
        with self.progress.phase("running the passes") as rename:
            found = find_reproducer(module, config, lambda text: rename(f"reducing: {text}"))
            failure = None if found is None else found.write(path)
        if found is None or failure is None:
            print(printable(nothing_line(module, config)))
            return 0
        print(printable(found_lines(found, failure, path, options.load_pass_plugin)))
        return 1

    def check_contract(self) -> int:
        """Hold each pass to its whole contract; 1 if one breaks it."""
        from lwc.calibration.feed_file import read_feed_spec
        from lwc.calibration.feeds import FeedSpec
        from lwc.cli.check import check_lines

        feeds = read_feed_spec(self.options.feeds) if self.options.feeds else FeedSpec()
        module = self._load()
        held = True
        for line, kept in check_lines(module, self.config, feeds):
            print(printable(line))
            held = held and kept
        return 0 if held else 1

    def optimize(self) -> int:
        """Run the pipeline and write what was asked for."""
        from lwc.optimizer import check_required, required_rewrites, save_module

        options = self.options
        required = required_rewrites(self.require, self.config.passes)
        instruments = self._instruments()
        ranked = None
        if options.sensitivity is not None:
            from lwc.cli.sensitivity import settings_for

            ranked = settings_for(options.sensitivity, self.config.passes)
        result = self._run_passes(self.config, instruments)
        self._say(summary_lines(options.input, result.record))
        try:
            check_required(result.record, required)
        except RequirementError:
            if options.remarks == "none":
                self._say(remark_lines(result.module.remarks, "missed"))
            raise
        before = result.history.modules[0]
        shapes = self._settled_shapes(before, result.module)
        # The output may be written onto the input.
        source = self._model_entry(before, before.source.path) if options.report else None
        entries: list[LayerSensitivity] = []
        unknown: list[str] = []
        if ranked is not None:
            from lwc.cli.sensitivity import rank

            with self.progress.phase("measuring the sensitivity of layers"):
                settings = self._run_settings(self.config, [])
                entries, unknown = rank(result.history.modules, ranked, settings)
        # What is likeliest to fail comes first, so that it leaves nothing written.
        if options.emit:
            self._emit(result.module)
        output = options.output
        if output not in (None, "-"):
            with self.progress.phase(f"writing {output}"):
                saved = save_module(result.module, output)
            self._say([written_line(saved, result.record.output)])
        if ranked is not None:
            from lwc.cli.sensitivity import print_ranking

            print_ranking(entries, unknown, options.color)
        if source is not None:
            self._report(result, source, None if output == "-" else output, shapes, entries)
        printed = ranked is not None or any(isinstance(each, IrPrinter) for each in instruments)
        written = options.report or options.emit or printed
        if output == "-" or (output is None and not written):
            sys.stdout.write(f"{str(result.module).rstrip()}\n")
        return 0

    def _emit(self, module: Module) -> None:
        """Write code, and print what became of each node."""
        from lwc.cli.emit import emit_code

        options, before = self.options, len(module.remarks)
        targets = split_words(options.arch, "--arch")
        shapes = parse_shapes(options.shapes, "--shapes")
        with self.progress.phase(f"writing {options.emit}") as rename:
            lines = emit_code(module, options.emit, targets, shapes, rename)
        self._say(lines)
        self._say(remark_lines(module.remarks.since(before), options.remarks))

    def _settled_shapes(self, before: Module, after: Module) -> list[dict[str, int]]:
        """Return the numbers to measure at, for every free dimension of `before`."""
        if not self.shapes:
            return []
        from lwc.report.measure import settle_shape

        return [settle_shape(before, after, shape) for shape in self.shapes]

    def _model_entry(self, module: Module, path: str | None) -> ModelEntry:
        from lwc.report import model_entry

        return model_entry(module, path)

    def _report(
        self,
        result: OptimizeResult,
        source: ModelEntry,
        output: str | None,
        shapes: list[dict[str, int]],
        sensitivity: list[LayerSensitivity],
    ) -> None:
        """Build the report, measure what was asked for, and write it in every format."""
        from lwc.report import build_report, write_report

        options, config = self.options, self.config
        before, threads = result.history.modules[0], config.threads or 1
        predict = None
        if shapes:
            from lwc.report.measure import predictor

            with self.progress.phase("measuring this machine, once"):
                predict = predictor(threads)
        with self.progress.phase("building the report"):
            report = build_report(
                result.record,
                result.history.modules,
                source,
                self._model_entry(result.module, output),
                bindings=shapes[0] if shapes else config.bind,
                predict=predict,
            )
        if shapes or options.text:
            from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
            from lwc.report.measure import MeasureSettings, measure

            settings = MeasureSettings(
                shapes=shapes,
                threads=threads,
                text=Path(options.text) if options.text else None,
                tokenizer=Path(options.tokenizer) if options.tokenizer else None,
            )
            with self.progress.phase("measuring both models"):
                report = measure(
                    report,
                    before,
                    result.module,
                    settings,
                    backend=OnnxRuntimeBackend(),
                    predict=predict,
                )
        report = replace(report, sensitivity=sensitivity)
        for path in options.report:
            write_report(report, path)

    def _load(self) -> Module:
        from lwc.frontend.load import load

        options = self.options
        with self.progress.phase(f"reading {options.input}"):
            module = load(
                options.input,
                follow_symlinks=options.follow_symlinks,
                keep_gguf_blocks=options.keep_gguf_blocks,
            )
        self._settled_shapes(module, module)
        if options.text:
            from lwc.report.measure import check_text

            check_text(module, options.text, options.tokenizer)
        if options.output not in (None, "-"):
            module.spill_directory = str(_existing_folder(options.output))
        return module

    def _run_passes(
        self,
        config: PipelineConfig,
        instruments: Iterable[Instrument],
        *,
        explain: str | None = None,
    ) -> OptimizeResult:
        from lwc.optimizer import bind_pass, run_passes

        module = self._load()
        settings = self._run_settings(config, instruments, explain=explain)
        try:
            with self.progress.phase("verifying the input"):
                passes = (*bind_pass(config.bind), *config.passes)
                return run_passes(module, passes, settings, config.bind)
        finally:
            self._say(remark_lines(module.remarks, self.options.remarks))

    def _run_settings(
        self,
        config: PipelineConfig,
        instruments: Iterable[Instrument],
        *,
        explain: str | None = None,
    ) -> RunSettings:
        from lwc.optimizer import RunSettings

        return RunSettings(
            verify=config.verify,
            backend="onnxruntime" if self.options.emit else self.options.backend or "onnxruntime",
            threads=config.threads,
            seed=config.seed,
            max_memory=config.max_memory,
            grant=frozenset(config.grant),
            instruments=(*instruments, self.progress),
            progress=self.progress,
            explain=explain,
            calibration=self._calibration(),
            resume=self.options.resume,
            needs_calibration=self.options.sensitivity is None,
        )

    def _calibration(self) -> CalibrationFile | None:
        options = self.options
        if options.calibrate is None:
            return None
        from lwc.calibration.data import CalibrationFile

        given = {"samples": options.calibrate_samples, "window": options.calibrate_window}
        known = {name: number for name, number in given.items() if number is not None}
        return CalibrationFile(options.calibrate, options.tokenizer, **known)

    def _instruments(self) -> list[Instrument]:
        options, config = self.options, self.config
        found: list[Instrument] = []
        names = [pass_.name for pass_ in config.passes]
        for name in (*options.print_ir_before, *options.print_ir_after):
            if name not in names:
                raise UsageError(
                    f"pass '{name}' is not in the pipeline", remedy=did_you_mean(name, names)
                )
        if (
            options.print_ir_before
            or options.print_ir_after
            or options.print_ir_after_all
            or options.print_ir_after_change
        ):
            found.append(
                IrPrinter(
                    sys.stdout,
                    before=options.print_ir_before,
                    after=options.print_ir_after,
                    after_all=options.print_ir_after_all,
                    after_change=options.print_ir_after_change,
                )
            )
        if options.timing:
            found.append(TimingPrinter(sys.stderr))
        if options.pass_statistics:
            found.append(StatisticsPrinter(sys.stderr))
        if options.shapes:
            from lwc.cli.emit import ShapesCheck

            found.append(ShapesCheck(parse_shapes(options.shapes, "--shapes")))
        if options.pass_pipeline_crash_reproducer:
            from lwc.pipeline.reproducer import CrashReproducer

            path = options.pass_pipeline_crash_reproducer
            plugins = options.load_pass_plugin
            found.append(CrashReproducer(path, config, sys.stderr, plugins))
        return found

    def _say(self, lines: Iterable[str]) -> None:
        if not self.options.quiet:
            for line in lines:
                print(printable(line), file=sys.stderr)


def settings_of(options: argparse.Namespace) -> PipelineConfig:
    """Put the configuration file and the options of the command line together.

    Raises:
        UsageError: Both give a pipeline, or an option has a wrong value.
    """
    config = read_config(options.config) if options.config else PipelineConfig()
    if options.pass_pipeline is not None:
        if config.passes:
            raise UsageError(f"both -p and {options.config} give passes", remedy="drop one")
        config = replace(config, passes=resolve(options.pass_pipeline))
    bind = {**config.bind, **parse_counts(options.bind, "--bind")}
    config = replace(config, bind=bind, grant=(*config.grant, *options.grant))
    if options.max_memory is not None:
        config = replace(config, max_memory=parse_size(options.max_memory))
    given = {
        name: getattr(options, name)
        for name in ("verify", "seed", "threads")
        if getattr(options, name) is not None
    }
    return replace(config, **given)


def _existing_folder(path: str) -> Path:
    """Return the nearest folder above `path` that exists: spilled weights are made there."""
    folder = Path(os.path.abspath(path))
    while not folder.is_dir():
        folder = folder.parent
    return folder
