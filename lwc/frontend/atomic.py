"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
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

    What is there before is replaced as a whole.

    Raises:
        OSError: The folder cannot be made.
    """
    parent, name = os.path.split(os.path.abspath(target))
    os.makedirs(parent, exist_ok=True)
    draft = tempfile.mkdtemp(dir=parent, prefix=f".{name}.", suffix=".tmp")
    old = f"{draft}.old"
    try:
        yield draft
        for place, _, files in os.walk(draft):
            for file in files:
                _sync(os.path.join(place, file))
            sync_folder(place)
        os.chmod(draft, 0o777 & ~_mask())
        if os.path.isdir(target):
            os.rename(target, old)
        os.rename(draft, target)
        sync_folder(parent)
    except BaseException:
        if os.path.isdir(old):
            os.rename(old, target)
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


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
