"""Folders that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lwc.frontend import atomic
from lwc.frontend.atomic import staged_folder

ROOT = Path(__file__).parents[2]
FILES = 20

WRITER = f"""
import sys
from pathlib import Path
from typing import Any
from lwc.frontend import atomic
if sys.argv[2] == "without-exchange":
    atomic._exchange = lambda one, other: False
for turn in range(10**6):
    with atomic.staged_folder(sys.argv[1]) as draft:
        for number in range({FILES}):
            Path(draft, str(number)).write_text(str(turn))
    if turn == 1:
        print("begun", flush=True)
"""


def write(target: Path, text: str) -> None:
    with staged_folder(str(target)) as draft:
        Path(draft, "file").write_text(text)


def fail(target: Path, look: Callable[[], None]) -> None:
    """Begin a folder, look around, and give up."""
    with staged_folder(str(target)):
        look()
        raise ZeroDivisionError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("way", ["exchange", "without-exchange"])
def test_a_killed_writer_leaves_a_whole_folder(way: str, tmp_path: Path) -> None:
    if way == "exchange" and sys.platform != "linux":
        pytest.skip("only Linux exchanges two names in one step")
    target = tmp_path / "out"
    chance = random.Random(0)
    seen: list[int] = []
    for _ in range(6):
        words = [sys.executable, "-c", WRITER, str(target), way]
        with subprocess.Popen(words, stdout=subprocess.PIPE, cwd=ROOT) as writer:
            assert writer.stdout is not None
            assert writer.stdout.readline() == b"begun\n"
            time.sleep(chance.uniform(0, 0.02))
            writer.send_signal(signal.SIGKILL)
        if way == "exchange":
            assert target.is_dir()
        with pytest.raises(ZeroDivisionError):
            fail(target, lambda: seen.append(len(names(tmp_path))))
        contents = {path.read_text() for path in target.iterdir()}
        assert len(contents) == 1
        assert len(names(target)) == FILES
        assert names(tmp_path) == ["out"]
    # What killed processes left was cleared up before: the target and the new draft.
    assert seen == [2] * 6


def test_a_folder_is_for_all_whom_the_mask_lets(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write(tmp_path / "out", "new")
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_link_stays_a_link(
    exchanges: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchanges:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    write(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file").read_text() == "new"
    assert names(tmp_path) == ["link", "real"]


def test_what_two_renames_left_comes_back(tmp_path: Path) -> None:
    (tmp_path / ".out.abcd1234.tmp.old").mkdir()
    (tmp_path / ".out.abcd1234.tmp.old" / "file").write_text("old")
    (tmp_path / ".out.abcd1234.tmp").mkdir()
    seen: list[str] = []
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "out", lambda: seen.append((tmp_path / "out" / "file").read_text()))
    assert seen == ["old"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("left", [".out.abcd1234.tmp", ".out.abcd1234.tmp.old"])
@pytest.mark.parametrize("why", ["vanished", "of another user"])
def test_drafts_that_cannot_be_cleared_up_do_no_harm(
    why: str, left: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = tmp_path / ".out.abcd1234.tmp"
    (tmp_path / left).mkdir()
    draft.mkdir(exist_ok=True)
    opened = os.open

    def failing(path: str, flags: int, **more: Any) -> int:
        if str(path) == str(draft):
            if why == "of another user":
                raise PermissionError(13, "Permission denied", path)
            os.rmdir(path)
        return opened(path, flags, **more)

    monkeypatch.setattr(os, "open", failing)
    write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert draft.exists() == (why == "of another user")


def test_what_another_brings_back_first_is_left_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / ".out.abcd1234.tmp.old"
    old.mkdir()
    (old / "file").write_text("old")
    rename = os.rename

    def late(source: str, target: str) -> None:
        if str(source) == str(old) and old.exists():
            rename(source, target)  # the other
        rename(source, target)

    monkeypatch.setattr(os, "rename", late)
    seen: list[str] = []
    with pytest.raises(ZeroDivisionError):
        fail(tmp_path / "out", lambda: seen.append((tmp_path / "out" / "file").read_text()))
    assert seen == ["old"]


@pytest.mark.parametrize("when", ["removed", "locked", "removed while it is opened"])
def test_a_draft_that_another_clears_up_before_it_is_locked_is_made_anew(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other takes it for that of a killed process."""
    make, lock = tempfile.mkdtemp, fcntl.flock
    first: list[str] = []

    def made(**where: str) -> str:
        draft: str = make(**where)
        if not first and when == "removed":
            os.rmdir(draft)
        first.append(draft)
        return draft

    def locked(descriptor: int, how: int) -> None:
        if len(first) == 1 and when != "removed":
            os.rmdir(first[0])
            if when == "locked":
                raise BlockingIOError
        lock(descriptor, how)

    monkeypatch.setattr(tempfile, "mkdtemp", made)
    monkeypatch.setattr(fcntl, "flock", locked)
    write(tmp_path / "out", "new")
    assert (tmp_path / "out" / "file").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_drafts_of_others_are_left_alone(tmp_path: Path) -> None:
    others = [".out.txt", ".out.other.abcd1234.tmp", ".outabcd1234.tmp"]
    for other in others:
        (tmp_path / other).mkdir()
    with staged_folder(str(tmp_path / "out")) as first:
        Path(first, "file").write_text("first")
        write(tmp_path / "out", "second")
        assert os.path.isdir(first)
    assert (tmp_path / "out" / "file").read_text() == "first"
    assert names(tmp_path) == sorted([*others, "out"])
