"""From exceptions to exit codes, with one line each; shared by all programs."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from lwc.core.errors import LwcError, Terminated, one_line
from lwc.core.text import printable

__all__ = ["EXIT_CODES", "guarded"]

EXIT_CODES = """\
exit codes:
  0    done
  1    a pass, the verification or the system (disk full, out of memory) failed
  2    wrong usage or unreadable input
  3    a required match or target was missed
  130  interrupted (143 by SIGTERM)
"""

_INTERRUPTED = 130
_TERMINATED = 143


def guarded(program: str, run: Callable[[], int], *, debug: bool = False) -> int:
    """Call `run` and return its exit code, or that of what it raised.

    Every failure is one line on stderr; nothing is printed when the reader of stdout has gone.
    SIGTERM ends the program like Ctrl-C does: what was being written is removed.

    Args:
        program: The program's name, put before errors.
        run: The program.
        debug: Print the traceback too.
    """
    _stand_in_for_closed_streams()
    _end_cleanly_on_sigterm()
    if not debug:  # lines without a name, of values that have a shape and no type
        logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    try:
        code = run()
        sys.stdout.flush()
        return code
    except SystemExit:
        raise
    except BaseException as error:
        _settle_stdout()
        if debug:
            traceback.print_exc()
        line, code = _outcome(error)
    if line:
        print(f"{program}: {printable(line)}", file=sys.stderr)
    return code


def _outcome(error: BaseException) -> tuple[str, int]:
    """Return the line that describes an error, and the exit code."""
    if isinstance(error, BrokenPipeError):
        return "", 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", _INTERRUPTED
    if isinstance(error, LwcError):
        return f"error: {error}", error.exit_code
    if isinstance(error, MemoryError):
        return "error: out of memory", 1
    if isinstance(error, OSError):
        return f"error: {_describe(error)}", 1
    return f"error: internal error: {one_line(error)} (--debug shows where)", 1


def _describe(error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        reason = f"{reason} (the old output, if any, is untouched)"
    return f"{error.filename}: {reason}" if error.filename else reason


def _stand_in_for_closed_streams() -> None:
    """Give the streams that the caller closed (`>&-`) something to write to."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _settle_stdout() -> None:
    """Flush stdout; where that fails, drop its buffer, so that exiting does not fail again."""
    try:
        sys.stdout.flush()
        return
    except (OSError, ValueError):
        pass
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


def _end_cleanly_on_sigterm() -> None:
    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise Terminated(_TERMINATED)

    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, end)
