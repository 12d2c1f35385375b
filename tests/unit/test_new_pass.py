"""tools/new-pass: what it writes works as it is."""

from __future__ import annotations

import errno
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lwc.core.errors import LwcError

ROOT = Path(__file__).parents[2]
COPIED = ("lwc", "passes", "backends", "docs", "tools")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the project to write into."""
    folder = tmp_path_factory.mktemp("checkout")
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for name in COPIED:
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
    (folder / "tests" / "unit").mkdir(parents=True)
    shutil.copy(ROOT / "tests" / "support.py", folder / "tests")
    shutil.copy(ROOT / "tests" / "unit" / "test_registry.py", folder / "tests" / "unit")
    shutil.copy(ROOT / "tests" / "unit" / "test_passes_page.py", folder / "tests" / "unit")
    shutil.copy(ROOT / "pyproject.toml", folder)
    if (checked := ROOT / ".mypy_cache").exists():  # what is as it was is not checked anew
        shutil.copytree(checked, folder / ".mypy_cache")
    return folder


def call(*words: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words,
        cwd=folder,
        env={
            **os.environ,
            "VIRTUAL_ENV": str(Path(sys.prefix)),
            "PYTHONPATH": str(folder),
            **environment,
        },
        capture_output=True,
        text=True,
        check=False,
    )


def new_pass(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return call(str(folder / "tools" / "new-pass"), *words, folder=folder)


@pytest.mark.slow
def test_new_passes_work_as_they_are(checkout: Path) -> None:
    files, tests = [], []
    for kind in ("rule", "function", "pass"):
        done = new_pass(checkout, f"tidy-{kind}", f"--kind={kind}", "--area=low_rank")
        assert done.returncode == 0, done.stderr
        files.append(f"passes/low_rank/tidy_{kind}.py")
        tests.append(f"tests/unit/test_tidy_{kind}.py")
        assert all((checkout / name).exists() for name in (files[-1], tests[-1]))
        assert f"## tidy-{kind}\n" in (checkout / "docs" / "passes.md").read_text()
    listed = (checkout / "pyproject.toml").read_text()
    assert listed.index('"lwc.passes.cleanup.linear"') < listed.index('"lwc.passes.low_rank"')
    assert listed.index('"lwc.passes.low_rank"') < listed.index('"lwc.passes.quantization"')
    tests += ["tests/unit/test_registry.py", "tests/unit/test_passes_page.py"]
    for words in (
        ("ruff", "format", "--check", *files, *tests),
        ("ruff", "check", *files, *tests),
        ("mypy", "lwc", "tests"),
        ("pytest", "-q", *tests),
        ("lwc.cli.opt", "--list-passes"),
    ):
        done = call(sys.executable, "-m", *words, folder=checkout)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    for kind in ("rule", "function", "pass"):
        assert f"\ntidy-{kind} [exact]\n    Drop double negations.\n" in done.stdout


@pytest.mark.slow
def test_names_that_cannot_be_are_refused_in_one_line(checkout: Path) -> None:
    before = sorted(checkout.rglob("*.py"))
    for words, message in (
        (("canonicalize",), "there is a pass 'canonicalize': lwc.passes.cleanup.canonicalize:"),
        (("FuseSwish",), "'FuseSwish' is not in kebab-case (write it like fuse-swish)"),
        (("fuse_swish",), "'fuse_swish' is not in kebab-case"),
        (("packing", "--area=quantization"), "packing.py' exists"),
        (("fuse-swish", "--area=../out"), "area '../out' is no name of a folder"),
        (("fuse-swish", "--package", "Swish!"), "'Swish!' is no name of a package"),
        (("fuse-swish", "--package", "docs"), "'docs' exists"),
        (("class",), "'class' is a word of Python (write it like fuse-swish)"),
        (("class", "--package", "lwc-new"), "'class' is a word of Python"),
        (("fuse-swish", "--area=lambda"), "area 'lambda' is no name of a folder"),
        (("fuse-swish", "--package", "import"), "'import' is no name of a package"),
        (("none",), "'None' is a word of Python"),
        (("rule-pass",), "'RulePass' is a name of lwc"),
    ):
        done = new_pass(checkout, *words)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.startswith("new-pass: error: ")
        assert done.stderr.count("\n") == 1
    assert sorted(checkout.rglob("*.py")) == before


def test_what_was_made_before_a_failure_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "new_pass.py"))
    for name in ("tools", "passes/cleanup", "tests/unit"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copy(ROOT / "tools" / "pass_table.py", tmp_path / "tools")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    for words in (("cleanup",), ("low_rank",)):
        monkeypatch.setitem(tool["write_pass"].__globals__, "ROOT", tmp_path)
        # The table of passes cannot be made here: there is no lwc to write it into.
        with pytest.raises(LwcError, match=r"pass_table\.py failed"):
            tool["write_pass"]("tidy-up", "rule", *words)
        left = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
        cached = {"__pycache__", ".ruff_cache"}
        assert {file for file in left if cached.isdisjoint(file.parts)} == set(before)
        assert all(left[file] == content for file, content in before.items())
        assert not (tmp_path / "passes" / "low_rank").exists()


def test_a_package_that_cannot_be_finished_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "new_pass.py"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copymode", full)
    with pytest.raises(OSError, match="No space left"):
        tool["write_package"]("melt-gates", tmp_path / "more" / "lwc-melt")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_new_package_works_as_it_is(tmp_path: Path) -> None:
    done = call(
        str(ROOT / "tools" / "new-pass"), "melt-gates", "--package", "lwc-melt", folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    package = tmp_path / "lwc-melt"
    written = {str(file.relative_to(package)) for file in package.rglob("*") if file.is_file()}
    assert written == {
        "README.md",
        "pyproject.toml",
        "src/lwc_melt/__init__.py",
        "src/lwc_melt/melt_gates.py",
        "tests/test_melt_gates.py",
    }
    text = "".join((package / name).read_text() for name in written)
    assert re.search("(fuse|lwc)[-_]swish|FuseSwish", text) is None
    done = call(
        sys.executable,
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"),
        folder=package,
        PYTHONPATH=f"{package / 'src'}{os.pathsep}{ROOT}",
    )
    assert done.returncode == 0, done.stdout
