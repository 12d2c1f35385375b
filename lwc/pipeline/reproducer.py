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

__all__ = ["CrashReproducer", "script_of"]

_FIRST_LINE = "# Written by lwc: what failed on the model beside it."
"""Tells a file that may be replaced from one of the user's."""


def script_of(model: str) -> str:
    """Return the YAML file that goes beside the model of a crash reproducer."""
    return str(Path(model).with_suffix(".yaml"))


def _is_ours(script: Path) -> bool:
    """Tell whether nothing of the user's is in the way."""
    try:
        with script.open("rb") as file:
            return file.readline().strip() == _FIRST_LINE.encode()
    except OSError:  # there is none; one that cannot be read cannot be written either, later
        return not script.exists()


class CrashReproducer(Instrument):
    """Writes `FILE.onnx` and `FILE.yaml` when a pass or its verification fails.

    Args:
        path: The model file to write; large weights go beside it.
        config: The settings of the run, written with the failing pass and those after it.
        stream: Where to tell the command that replays the failure.
        plugins: What was loaded with `--load-pass-plugin`; the replay needs it too.

    Raises:
        UsageError: `path` is no `.onnx` file, or `FILE.yaml` is not one that a reproducer wrote.
    """

    needs_copy: ClassVar[bool] = True

    def __init__(
        self, path: str, config: PipelineConfig, stream: TextIO, plugins: Sequence[str] = ()
    ) -> None:
        self._model = Path(path)
        if self._model.suffix != ".onnx":
            raise UsageError(f"a crash reproducer is an .onnx file, not '{path}'")
        self._script = Path(script_of(path))
        if not _is_ours(self._script):
            raise UsageError(
                f"'{self._script}' exists and is no crash reproducer", remedy="name another file"
            )
        self._config = config
        self._stream = stream
        self._plugins = plugins

    def on_error(
        self, pass_: Pass, before: Module | None, rest: Sequence[Pass], error: BaseException
    ) -> None:
        """Write both files, unless the failure is not the pass's."""
        if before is None or isinstance(error, OSError | MemoryError | KeyboardInterrupt):
            return
        from lwc.frontend.atomic import StagedFile
        from lwc.frontend.onnx_writer import save

        replay = dataclasses.replace(self._config, passes=tuple(rest), bind={})
        try:
            text = f"{_FIRST_LINE}\n{to_yaml(replay)}"
            with StagedFile(str(self._script.parent), self._script.name) as staged:
                staged.file.write(text.encode())
                save(before, self._model)
                staged.commit(str(self._script))
        except (OSError, LwcError) as problem:
            self._stream.write(f"the crash reproducer cannot be written: {problem}\n")
            return
        words = ["lwc-opt", str(self._model), "--config", str(self._script)]
        for plugin in self._plugins:
            words += ["--load-pass-plugin", plugin]
        self._stream.write(f"reproduce with: {shlex.join(words)}\n")
