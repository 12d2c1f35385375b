"""Counterexamples: a graph on which a pass breaks its contract, in a file, and how to replay it."""

from __future__ import annotations

import hashlib
import os
import shlex
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lwc.calibration.feed_file import write_feed_spec
from lwc.calibration.feeds import FeedSpec
from lwc.core.errors import LwcError, UsageError
from lwc.core.printer import print_module
from lwc.pipeline.registry import default_registry
from lwc.pipeline.spec import to_spec
from lwc.verify.contract.clauses import ContractSettings, ContractViolation, check_contract

if TYPE_CHECKING:
    from lwc.core.module import Module
    from lwc.pipeline.passes import Pass

__all__ = ["Counterexample", "write_counterexample"]

FOLDER_VARIABLE = "LWC_COUNTEREXAMPLES"
"""Environment variable that names the folder of counterexamples."""


@dataclass(frozen=True)
class Counterexample:
    """A graph on which a pass breaks its contract.

    Attributes:
        path: The file that holds it, or None where it could not be written.
        nodes: Number of its nodes.
        text: The graph as lwc prints it.
        command: What replays it.
    """

    path: Path | None
    nodes: int
    text: str
    command: str


def write_counterexample(
    pass_: Pass,
    module: Module,
    violation: ContractViolation,
    settings: ContractSettings,
    folder: str | os.PathLike[str] | None = None,
) -> Counterexample:
    """Write a graph and say how to replay it.

    The file is text where text shows the failure, and a binary `.onnx` file where it does not.
    What `settings` say of the feeds goes beside it, into a `.feeds.json` file.

    Args:
        pass_: The pass.
        module: The graph.
        violation: What it showed.
        settings: How it was checked.
        folder: Where the file goes; `$LWC_COUNTEREXAMPLES`, or a folder of the system's temporary
            folder, by default.
    """
    nodes = sum(1 for _ in module.nodes())
    text = print_module(module)
    place = Path(folder or os.environ.get(FOLDER_VARIABLE) or _default_folder())
    digest = hashlib.sha1(text.encode()).hexdigest()[:8]
    stem = f"{pass_.name}-{violation.clause.replace(' ', '-')}-{digest}"
    for suffix in (".onnxtxt", ".onnx"):
        path = place / f"{stem}{suffix}"
        try:
            place.mkdir(parents=True, exist_ok=True)
            if _replays(pass_, module, violation, settings, path):
                return Counterexample(path, nodes, text, _command(pass_, path, settings))
        except OSError as error:
            return Counterexample(None, nodes, text, f"not written: {error}")
    return Counterexample(
        path, nodes, text, f"{_command(pass_, path, settings)}  # may not show it"
    )


def _default_folder() -> Path:
    return Path(tempfile.gettempdir()) / "lwc-counterexamples"


def _replays(
    pass_: Pass,
    module: Module,
    violation: ContractViolation,
    settings: ContractSettings,
    path: Path,
) -> bool:
    """Write a graph, read it back, and tell whether it still shows the failure."""
    from lwc.frontend.load import load
    from lwc.frontend.onnx_writer import save

    try:
        save(module, path)
        check_contract(pass_, load(path), settings)
    except ContractViolation as found:
        return found.clause == violation.clause
    except LwcError:
        return False
    return False


def _command(pass_: Pass, path: Path, settings: ContractSettings) -> str:
    words = ["lwc-opt", str(path), "-p", to_spec(pass_), "--check-contract"]
    words += [f"--grant={grant}" for grant in sorted(settings.granted)]
    if settings.seed:
        words.append(f"--seed={settings.seed}")
    plugin = _plugin(pass_)
    if plugin is not None:
        words.append(f"--load-pass-plugin={plugin}")
    if settings.feeds == FeedSpec():
        return shlex.join(words)
    feeds = path.with_suffix(".feeds.json")
    try:
        write_feed_spec(settings.feeds, feeds)
    except UsageError:
        return f"{shlex.join(words)}  # on other feeds than feeds= gives"
    return shlex.join([*words, f"--feeds={feeds}"])


def _plugin(pass_: Pass) -> str | None:
    """Return the file that defines a pass which the registry does not have."""
    cls = type(pass_)
    target = f"{cls.__module__}:{cls.__qualname__}"
    if any(info.target == target for info in default_registry().infos()):
        return None
    home = sys.modules.get(cls.__module__)
    return getattr(home, "__file__", None) or cls.__module__
