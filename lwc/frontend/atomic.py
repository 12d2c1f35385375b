"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from typing import BinaryIO, Self, cast

from lwc.core.errors import LwcError

__all__ = ["StagedFile", "link_into_place", "staged_folder", "sync_folder", "writing"]


@contextlib.contextmanager
def writing(target: str) -> Iterator[None]:
    """Turn a failing system call into one line that names the file.

    Raises:
        LwcError: The disk is full, the folder is missing or forbidden, or the like.
    """
    try:
        yield
    except OSError as error:
        raise LwcError(
            f"cannot be written: {error.strerror or error}",
            file=target,
            remedy="what was there before is untouched",
        ) from error


class StagedFile:
    """A temporary file that `commit` turns into its target; without that it is removed.

    Use it as a context manager. The content reaches the disk before the rename, so whoever
    reads the target finds the old content or the new, also after a power failure.

    Args:
        folder: The folder of the target; a rename works only within a file system.
        name: Base of the temporary name.

    Attributes:
        file: The file, open for reading and writing.
    """

    def __init__(self, folder: str, name: str) -> None:
        descriptor, self._path = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".tmp")
        self._committed = False
        try:
            self.file = cast(BinaryIO, os.fdopen(descriptor, "w+b"))
        except BaseException:
            os.unlink(self._path)
            raise

    def commit(self, target: str) -> None:
        """Rename the file to `target`, replacing what is there."""
        self.file.flush()
        os.fsync(self.file.fileno())
        os.chmod(self._path, _default_mode())
        os.replace(self._path, target)
        self._committed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            # Closing flushes; on a full disk that fails again, and the first error matters.
            with contextlib.suppress(OSError):
                self.file.close()
        finally:
            if not self._committed:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self._path)


@contextlib.contextmanager
def staged_folder(target: str) -> Iterator[str]:
    """Yield a new folder that becomes `target` when the block ends; if it raises, it is removed.

    What is there before is replaced as a whole; where `target` is a symbolic link, what it leads
    to. Killed at any moment, the old folder or the new one is there: Linux exchanges them in one
    step. Elsewhere a kill between two renames can leave the old one under a hidden name, from
    which the next call brings it back. Drafts of killed processes are removed where they can be.

    Raises:
        OSError: The folder cannot be made.
    """
    target = os.path.realpath(target)
    parent, name = os.path.split(target)
    os.makedirs(parent, exist_ok=True)
    _clear_up(parent, name)
    with _locked_draft(parent, name) as draft:
        try:
            yield draft
            for place, _, files in os.walk(draft):
                for file in files:
                    _sync(os.path.join(place, file))
                sync_folder(place)
            os.chmod(draft, 0o777 & ~_mask())
            _replace_folder(draft, target)
            sync_folder(parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def _replace_folder(draft: str, target: str) -> None:
    """Put `draft` in the place of `target`, which may be absent; leave the old one as `draft`."""
    if not os.path.lexists(target):
        os.rename(draft, target)
    elif not _exchange(draft, target):
        old = f"{draft}.old"
        os.rename(target, old)
        try:
            os.rename(draft, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: str, other: str) -> bool:
    """Exchange two names in one step; tell whether the system can."""
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    at_current, exchange = -100, 2
    if rename(at_current, os.fsencode(one), at_current, os.fsencode(other), exchange) == 0:
        return True
    error = ctypes.get_errno()
    if error in (errno.EINVAL, errno.ENOSYS):  # the file system, or the kernel, cannot
        return False
    raise OSError(error, os.strerror(error), other)


def _clear_up(parent: str, name: str) -> None:
    """Remove what killed processes left beside the folder `name`, or bring it back."""
    left = re.compile(rf"(\.{re.escape(name)}\.\w{{8}}\.tmp)(\.old)?")
    for entry in sorted(os.listdir(parent), reverse=True):
        found = left.fullmatch(entry)
        place = os.path.join(parent, entry)
        if found is None or not os.path.isdir(place):
            continue
        draft, target = os.path.join(parent, found[1]), os.path.join(parent, name)
        # Its process lives, another clears up at the same time, or it is of another user.
        lock = _locked(draft) if os.path.isdir(draft) else contextlib.nullcontext()
        with contextlib.suppress(OSError), lock:
            if found[2] and not os.path.lexists(target):
                os.rename(place, target)
            else:
                shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _locked_draft(parent: str, name: str) -> Iterator[str]:
    """Yield a new folder that is locked until the block or the process ends."""
    while True:
        draft = tempfile.mkdtemp(dir=parent, prefix=f".{name}.", suffix=".tmp")
        try:
            lock = _lock(draft)
        except (BlockingIOError, FileNotFoundError):
            continue  # another process takes it for that of a killed one
        try:
            if os.path.isdir(draft):
                yield draft
                return
        finally:
            os.close(lock)


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """Lock a folder until the block or the process ends; raises as `_lock` does."""
    lock = _lock(folder)
    try:
        yield
    finally:
        os.close(lock)


def _lock(folder: str) -> int:
    """Lock a folder and return what to close.

    Raises:
        BlockingIOError: Another process has locked it.
        OSError: It is not there any more, or cannot be opened.
    """
    import fcntl  # Unix has it

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def link_into_place(descriptor: int, target: str) -> None:
    """Give an open file without a name (O_TMPFILE) the name `target`, replacing what is there."""
    os.fsync(descriptor)
    os.fchmod(descriptor, _default_mode())
    folder, name = os.path.split(target)
    path = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.tmp")
    opened = os.open(folder, os.O_RDONLY)
    try:
        # Given any folder, Python asks the system to follow the link in /proc.
        os.link(f"/proc/self/fd/{descriptor}", path, src_dir_fd=opened, follow_symlinks=True)
        os.replace(path, target)
    finally:
        os.close(opened)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def sync_folder(folder: str) -> None:
    """Make the renames done in a folder last."""
    _sync(folder)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _default_mode() -> int:
    return 0o666 & ~_mask()


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
