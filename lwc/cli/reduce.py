"""`--reduce`: a failing model and pipeline made small, and the command that replays the failure."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from lwc.core.errors import UsageError
from lwc.pipeline.spec import to_text

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.config import PipelineConfig
    from lwc.verify.reduction.failure import Failure
    from lwc.verify.reduction.reproduce import Reproducer

__all__ = ["SECONDS", "find_reproducer", "found_lines", "nothing_line", "replay_command"]

SECONDS = 90.0
"""Time for making the model small; what is found by then is written."""


def find_reproducer(
    module: Module, config: PipelineConfig, progress: Callable[[str], None]
) -> Reproducer | None:
    """Reduce a module and the passes of `config`; None where nothing fails.

    Raises:
        UsageError: There are no passes, or no checks.
    """
    from lwc.optimizer import bind_pass
    from lwc.verify.reduction.failure import Trial
    from lwc.verify.reduction.reproduce import reproduce

    passes = (*bind_pass(config.bind), *config.passes)
    if not passes:
        raise UsageError("--reduce needs passes that fail", remedy="add -p PIPELINE")
    trial = Trial(
        numeric=config.verify == "numeric",
        seed=config.seed,
        threads=config.threads,
        max_memory=config.max_memory,
        granted=frozenset(config.grant),
    )
    return reproduce(module, passes, trial, seconds=SECONDS, progress=progress)


def nothing_line(module: Module, config: PipelineConfig) -> str:
    """Say that no pass fails, and whether outputs were compared."""
    from lwc.core.diagnostics import describe
    from lwc.core.walk import is_random

    random = next(filter(is_random, module.nodes()), None)
    if config.verify != "numeric":
        return "no pass fails; outputs were not compared: --verify=structural"
    if random is not None:
        return f"no pass fails; outputs were not compared: {describe(random)} draws random numbers"
    return "no pass fails, and the outputs agree after each"


def found_lines(found: Reproducer, failure: Failure, path: str, plugins: Iterable[str]) -> str:
    """Say what was found.

    Args:
        found: The reproducer.
        failure: How the passes fail on the file.
        path: The file.
        plugins: What was loaded with `--load-pass-plugin`.
    """
    fewer = f", {found.passes_before} passes to {len(found.passes)}"
    return "\n".join(
        [
            f"{failure.kind}: {failure.message}",
            f"{found.nodes_before} nodes reduced to {found.nodes}{fewer}: {to_text(found.passes)}",
            f"replay with: {replay_command(found, path, plugins)}",
        ]
    )


def replay_command(found: Reproducer, path: str, plugins: Iterable[str]) -> str:
    """Return the command that shows the failure again."""
    trial = found.trial
    words = ["lwc-opt", path, "-p", to_text(found.passes)]
    words.append(f"--verify={'numeric' if trial.numeric else 'structural'}")
    for plugin in plugins:
        words += ["--load-pass-plugin", plugin]
    for granted in sorted(trial.granted):
        words += ["--grant", granted]
    settings = {"seed": trial.seed or None, "threads": trial.threads}
    settings["max-memory"] = trial.max_memory
    for name, number in settings.items():
        if number is not None:
            words += [f"--{name}", str(number)]
    return shlex.join(words)
