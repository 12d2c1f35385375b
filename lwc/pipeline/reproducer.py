"""The crash reproducer: the model before a failing pass, and the pipeline that fails on it."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TextIO

from lwc.core.errors import LwcError, UsageError
from lwc.pipeline.config import PipelineConfig, to_yaml
from lwc.pipeline.instruments import Instrument

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import Pass

__all__ = ["CrashReproducer"]


class CrashReproducer(Instrument):
    """Writes `FILE.onnx` and `FILE.yaml` when a pass or its verification fails.

    Args:
        path: The model file to write; large weights go beside it.
        config: The settings of the run, written with the failing pass and those after it.
        stream: Where to tell the command that replays the failure.
        plugins: What was loaded with `--load-pass-plugin`; the replay needs it too.

    Raises:
        UsageError: `path` is no `.onnx` file.
    """

    needs_copy: ClassVar[bool] = True

    def __init__(
        self, path: str, config: PipelineConfig, stream: TextIO, plugins: Sequence[str] = ()
    ) -> None:
        self._model = Path(path)
        if self._model.suffix != ".onnx":
            raise UsageError(f"a crash reproducer is an .onnx file, not '{path}'")
        self._config = config
        self._stream = stream
        self._plugins = plugins

    def on_error(
        self, pass_: Pass, before: Module | None, rest: Sequence[Pass], error: BaseException
    ) -> None:
        """Write both files, unless the failure is not the pass's."""
        if before is None or isinstance(error, OSError | MemoryError | KeyboardInterrupt):
            return
        from lwc.frontend.onnx_writer import save

        script = self._model.with_suffix(".yaml")
        try:
            save(before, self._model)
            replay = dataclasses.replace(self._config, passes=tuple(rest), bind={})
            script.write_text(to_yaml(replay), encoding="utf-8")
        except (OSError, LwcError) as problem:
            self._stream.write(f"the crash reproducer cannot be written: {problem}\n")
            return
        words = ["lwc-opt", str(self._model), "--config", str(script)]
        for plugin in self._plugins:
            words += ["--load-pass-plugin", plugin]
        self._stream.write(f"reproduce with: {shlex.join(words)}\n")
