"""Whether the options of lwc-opt go together, and whether its files can be written."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from lwc.cli.arguments import MODEL_SUFFIXES, REPORT_SUFFIXES, parse_shapes, split_words
from lwc.core.errors import InputError, UsageError
from lwc.core.paths import is_folder_target
from lwc.frontend.atomic import StagedFile

__all__ = ["check_options"]

_ACTIONS = ("plan", "explain", "bisect", "reduce", "check_contract")
_NEVER_EMPTY = {
    "explain": "a pass",
    "reduce": "a file",
    "feeds": "a file",
    "calibrate": "a file or folder",
    "resume": "a folder",
    "emit": "a folder",
    "pass_pipeline_crash_reproducer": "a file",
}


def check_options(options: argparse.Namespace) -> None:
    """Check what single options do not show, before any work.

    Args:
        options: What `parse_arguments` read, with an input.

    Raises:
        InputError: There is no calibration data at the path that is given.
        UsageError: Options contradict or lack each other, or a file cannot be written where it is
            wanted.
    """
    for name, what in _NEVER_EMPTY.items():
        if getattr(options, name) == "":
            raise UsageError(f"--{name.replace('_', '-')} needs {what}, not nothing")
    if options.explain is not None:
        name, at, node = options.explain.partition("@")
        if not name or (at and not node):
            raise UsageError(f"--explain takes PASS or PASS@NODE, not '{options.explain}'")
    action = _action(options)
    if options.reduce:
        _check_reduced(options)
    if options.pass_pipeline_crash_reproducer:
        _check_reproducer(options)
    if options.feeds is not None and not options.check_contract:
        raise UsageError("--feeds needs a check", remedy="add --check-contract")
    for name in ("measure", "text"):
        if getattr(options, name) and not options.report:
            raise UsageError(f"--{name} needs a report to go into", remedy="add --report FILE.md")
    if options.tokenizer and not options.text and not options.calibrate:
        raise UsageError(
            "--tokenizer needs a text to read", remedy="add --text FILE or --calibrate PATH"
        )
    _check_calibration(options, action)
    _check_emitted(options)
    _check_written(options)


def _action(options: argparse.Namespace) -> str | None:
    """Return the option of the action, None where it is to optimize.

    Raises:
        UsageError: There are two, or another option asks for what the action does not do.
    """
    actions = [name.replace("_", "-") for name in _ACTIONS if getattr(options, name)]
    if not actions:
        return None
    action, *others = actions
    if others:
        raise UsageError(f"--{action} and --{others[0]} do not go together")
    writing = ("output", "report", "emit", "require_match", "resume")
    for name in (*writing, "pass_pipeline_crash_reproducer"):
        if getattr(options, name):
            option = name.replace("_", "-")
            what = "its own file only" if action == "reduce" else "nothing"
            raise UsageError(f"--{action} writes {what} and does not go with --{option}")
    if options.calibrate and action in ("plan", "reduce", "check-contract"):
        raise UsageError(f"--{action} takes no calibration data", remedy="drop --calibrate")
    return action


def _check_reduced(options: argparse.Namespace) -> None:
    if not options.reduce.lower().endswith(MODEL_SUFFIXES):
        raise UsageError(
            f"cannot write '{options.reduce}': its suffix names no format that lwc writes",
            remedy=f"end it in {' or '.join(reversed(MODEL_SUFFIXES))}",
        )
    if options.verify == "none":
        raise UsageError("--reduce needs checks", remedy="drop --verify=none")
    _check_place(options.reduce)
    _check_other_file(options.reduce, options.input, "the input")


def _check_calibration(options: argparse.Namespace, action: str | None) -> None:
    if options.sensitivity is not None and action is not None:
        raise UsageError(f"--{action} and --sensitivity do not go together")
    if options.sensitivity is not None and not options.calibrate:
        raise UsageError("--sensitivity needs calibration data", remedy="add --calibrate PATH")
    if options.calibrate and not os.path.exists(options.calibrate):
        raise InputError("no such file or folder with calibration data", file=options.calibrate)
    for name in ("calibrate_samples", "calibrate_window", "resume"):
        if getattr(options, name) is not None and not options.calibrate:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} needs calibration data", remedy="add --calibrate PATH")
    if options.resume and os.path.exists(options.resume) and not os.path.isdir(options.resume):
        raise UsageError(f"--resume '{options.resume}': it is a file", remedy="name a folder")


def _check_emitted(options: argparse.Namespace) -> None:
    if options.emit is None:
        for name in ("arch", "shapes"):
            if getattr(options, name):
                raise UsageError(f"--{name} is for what is emitted", remedy="add --emit DIR")
        return
    if options.backend != "triton":
        given = f"the backend '{options.backend}' writes no code" if options.backend else None
        raise UsageError(given or "--emit needs a backend", remedy="use --backend=triton")
    from lwc.backends.triton.architectures import architecture
    from lwc.backends.triton.availability import require_triton

    require_triton()
    for name in split_words(options.arch, "--arch"):
        architecture(name)
    parse_shapes(options.shapes, "--shapes")
    from lwc.backends.triton.folder import check_folder

    _check_other_file(options.emit, options.input, "the input")
    check_folder(options.emit)
    _check_writable(os.path.realpath(options.emit))
    folder = Path(os.path.realpath(options.emit))
    files = [options.input, options.output, options.resume, options.text, options.tokenizer]
    files += [options.calibrate, options.config, options.pass_pipeline_crash_reproducer]
    for path in (*files, *options.report):
        if path and path != "-" and Path(os.path.realpath(path)).is_relative_to(folder):
            raise UsageError(
                f"'{path}' lies in what --emit replaces", remedy=f"keep it outside of '{folder}'"
            )


def _check_written(options: argparse.Namespace) -> None:
    for path in options.report:
        if Path(path).suffix.lower() not in REPORT_SUFFIXES:
            raise UsageError(
                f"no report format for '{path}'", remedy=f"end it in {', '.join(REPORT_SUFFIXES)}"
            )
        _check_place(path)
    output = options.output
    if output in (None, "-"):
        return
    if is_folder_target(output):
        _check_writable(os.path.join(output, "model.onnx"))
    else:
        if not output.lower().endswith(MODEL_SUFFIXES):
            raise UsageError(
                f"cannot write '{output}': its suffix names no format that lwc writes",
                remedy=f"end it in {' or '.join(MODEL_SUFFIXES)}, or in / for a folder",
            )
        _check_place(output)


def _check_place(path: str) -> None:
    """Check before any work that a file can be put at `path`."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise UsageError(f"cannot write '{path}': there is no folder '{folder}'")
    if os.path.isdir(path):
        raise UsageError(f"cannot write '{path}': it is a folder", remedy="name a file")
    _check_writable(path)


def _check_writable(path: str) -> None:
    """Check before any work that files can be put beside `path`, or where its folder is made."""
    folder, name = os.path.split(os.path.abspath(path))
    while not os.path.lexists(folder):
        folder, name = os.path.split(folder)
    try:
        with StagedFile(folder, name):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write '{path}': no file can be made in '{folder}': {error.strerror or error}",
            remedy="name another place",
        ) from error


def _check_other_file(path: str, needed: str, what: str) -> None:
    """Check that `path` is not, nor lies in, what the user needs still, such as the input."""
    real, other = os.path.realpath(path), os.path.realpath(needed)
    exist = os.path.exists(path) and os.path.exists(needed)
    if real == other or (exist and os.path.samefile(path, needed)):
        raise UsageError(f"'{path}' is {what} itself", remedy="name another file")
    if exist and os.path.isdir(needed) and Path(real).is_relative_to(other):
        raise UsageError(f"'{path}' is a part of {what}", remedy="name another file")


def _check_reproducer(options: argparse.Namespace) -> None:
    """Check before any work where the model of a crash reproducer goes, and the YAML beside it."""
    from lwc.pipeline.reproducer import script_of

    model = options.pass_pipeline_crash_reproducer
    _check_place(model)
    for path in (model, script_of(model)):
        _check_place(path)
        _check_other_file(path, options.input, "the input")
        if options.config:
            _check_other_file(path, options.config, "the configuration")
        if options.output not in (None, "-"):
            _check_other_file(path, options.output, "the output")
