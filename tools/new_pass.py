"""Writes a new pass that works: a small example to change. Started by tools/new-pass."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import keyword
import re
import shutil
import string
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import lwc
from lwc.core.errors import LwcError, UsageError
from lwc.pipeline.registry import default_registry

ROOT = Path(__file__).parents[1]
TEMPLATES = ROOT / "tools" / "templates"
EXAMPLE = ROOT / "docs" / "examples" / "lwc-swish"
SHARED = ("pyproject.toml", "lwc/pipeline/builtin.py", "docs/passes.md")
"""Files of the project in which a new pass is entered."""
KINDS = ("rule", "function", "pass")

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_AREA = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")


def _check_name(name: str) -> None:
    if _NAME.fullmatch(name) is None:
        raise UsageError(f"'{name}' is not in kebab-case", remedy="write it like fuse-swish")
    for word in (name.replace("-", "_"), _class_name(name)):
        if keyword.iskeyword(word):
            raise UsageError(f"'{word}' is a word of Python", remedy="write it like fuse-swish")
    if _class_name(name) in lwc.__all__:
        raise UsageError(f"'{_class_name(name)}' is a name of lwc", remedy="choose another")
    for info in default_registry().infos():
        if info.name == name:
            raise UsageError(f"there is a pass '{name}': {info.target}")


def _check_absent(*files: Path) -> None:
    for file in files:
        if file.exists():
            raise UsageError(f"'{file}' exists")


def _class_name(name: str) -> str:
    return "".join(word.capitalize() for word in name.split("-"))


def write_pass(name: str, kind: str, area: str) -> list[Path]:
    """Write a pass of lwc, its test and its entries in the table and on the page of passes.

    Args:
        name: Its kebab-case name.
        kind: One of `KINDS`.
        area: The folder of `passes/`; made and listed in pyproject.toml where it is new.

    Returns:
        The files that are new.

    Raises:
        UsageError: The name is taken, not in kebab case or a word of Python, or a file exists.
        LwcError: The pass cannot be entered; nothing is left of it then.
    """
    _check_name(name)
    if importlib.util.find_spec("ruff") is None:
        raise UsageError("what it writes is formatted by ruff", remedy="pip install -e '.[dev]'")
    if _AREA.fullmatch(area) is None or keyword.iskeyword(area):
        raise UsageError(f"area '{area}' is no name of a folder", remedy="write it like low_rank")
    snake = name.replace("-", "_")
    home = ROOT / "passes" / area
    files = {
        f"{kind}.py.in": home / f"{snake}.py",
        f"test_{kind}.py.in": ROOT / "tests" / "unit" / f"test_{snake}.py",
    }
    _check_absent(*files.values())
    words = {"name": name, "snake": snake, "Class": _class_name(name), "area": area}
    made = list(files.values())
    new = [*made] if home.exists() else [*made, home]
    with _undone_on_failure(new, [ROOT / name for name in SHARED]):
        if not home.exists():
            home.mkdir()
            (home / "__init__.py").write_text(f'"""Passes: {area.replace("_", " ")}."""\n')
            made.insert(0, home / "__init__.py")
            _list_package(f"lwc.passes.{area}")
        for template, file in files.items():
            text = string.Template((TEMPLATES / template).read_text(encoding="utf-8"))
            file.write_text(text.substitute(words), encoding="utf-8")
        paths = [str(file) for file in made]
        _run("-m", "ruff", "format", "-q", *paths)
        _run("-m", "ruff", "check", "-q", "--select", "I,RUF022", "--fix", *paths)
        _run(str(ROOT / "tools" / "pass_table.py"))
    return made


@contextlib.contextmanager
def _undone_on_failure(new: Sequence[Path], changed: Sequence[Path] = ()) -> Iterator[None]:
    """Where the body fails, remove what is new and write what was changed as it was."""
    kept = {file: file.read_bytes() for file in changed if file.exists()}
    try:
        yield
    except BaseException:
        for path in new:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        for file, content in kept.items():
            if file.read_bytes() != content:
                file.write_bytes(content)
        raise


def _run(*words: str) -> None:
    """Run Python on the project."""
    command = [sys.executable, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit {done.returncode}"]
        tool = words[1] if words[0] == "-m" else Path(words[0]).name
        raise LwcError(f"{tool} failed: {said[-1]}")


def _list_package(name: str) -> None:
    """Put a package into the sorted list of pyproject.toml."""
    file = ROOT / "pyproject.toml"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    listed = [n for n, line in enumerate(lines) if line.startswith('  "lwc.')]
    entry = f'  "{name}",\n'
    place = next((n for n in listed if lines[n].strip('", \n') > name), listed[-1] + 1)
    lines.insert(place, entry)
    file.write_text("".join(lines), encoding="utf-8")


def write_package(name: str, folder: Path) -> list[Path]:
    """Write a plugin package: docs/examples/lwc-swish under other names.

    Args:
        name: The kebab-case name of its pass.
        folder: Where it goes; the folder's name becomes the package's.

    Returns:
        The files.

    Raises:
        UsageError: A name is taken, not in kebab case or a word of Python, or the folder exists.
    """
    _check_name(name)
    package = folder.absolute().name
    if _NAME.fullmatch(package) is None or keyword.iskeyword(package):
        raise UsageError(
            f"'{package}' is no name of a package", remedy="call the folder like lwc-swish"
        )
    _check_absent(folder)
    renamed = {
        "lwc-swish": package,
        "lwc_swish": package.replace("-", "_"),
        "fuse-swish": name,
        "fuse_swish": name.replace("-", "_"),
        "FuseSwish": _class_name(name),
    }
    pattern = re.compile("|".join(renamed))
    made = []
    new = [each for each in (folder, *folder.parents) if not each.exists()]
    with _undone_on_failure(new):
        for source in sorted(EXAMPLE.rglob("*")):
            inner = source.relative_to(EXAMPLE)
            if not source.is_file() or not _is_source(inner):
                continue
            target = folder / pattern.sub(lambda found: renamed[found[0]], str(inner))
            target.parent.mkdir(parents=True, exist_ok=True)
            text = source.read_text(encoding="utf-8")
            target.write_text(pattern.sub(lambda found: renamed[found[0]], text), encoding="utf-8")
            shutil.copymode(source, target)
            made.append(target)
    return made


def _is_source(inner: Path) -> bool:
    """Tell whether a file of the example is one of its own, not left by a build or a test."""
    return inner.suffix in (".py", ".toml", ".md") and inner.parts[0] != "build"


def main() -> int:
    parser = argparse.ArgumentParser(prog="new-pass", description="Write a new pass that works.")
    parser.add_argument("name", help="the pass's name in kebab-case, such as fuse-swish")
    parser.add_argument("--kind", choices=KINDS, default="rule", help="what it is made of")
    parser.add_argument("--area", default="cleanup", help="the folder of passes/ it goes to")
    parser.add_argument("--package", metavar="DIR", type=Path, help="write a plugin package there")
    options = parser.parse_args()
    try:
        if options.package is not None:
            made = write_package(options.name, options.package)
        else:
            made = write_pass(options.name, options.kind, options.area)
    except (LwcError, OSError) as error:
        print(f"new-pass: error: {error}", file=sys.stderr)
        return 2
    for file in made:
        print(f"wrote {file}")
    if options.package is None:
        print("updated lwc/pipeline/builtin.py and docs/passes.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
