"""The package holds what the folders hold, in a checkout and in a wheel."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _packages_in_folders() -> set[str]:
    found = set()
    for top, name in (("lwc", "lwc"), ("passes", "lwc.passes"), ("backends", "lwc.backends")):
        for folder, _, files in os.walk(ROOT / top):  # does not follow the links in lwc/
            if "__init__.py" in files:
                inner = Path(folder).relative_to(ROOT / top).parts
                found.add(".".join((name, *inner)))
    return found


def test_every_folder_is_listed_and_every_listed_package_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = project["tool"]["setuptools"]["packages"]
    assert set(listed) == _packages_in_folders()
    assert listed == sorted(listed)
    assert len(listed) == len(set(listed))


def test_every_folder_with_modules_is_a_package() -> None:
    for top in ("lwc", "passes", "backends"):
        for folder, _, files in os.walk(ROOT / top):
            if any(name.endswith(".py") for name in files):
                assert "__init__.py" in files, folder


@pytest.mark.parametrize("name", ["passes", "backends"])
def test_links_are_relative(name: str) -> None:
    link = ROOT / "lwc" / name
    assert link.is_symlink()
    assert os.readlink(link) == f"../{name}"


@pytest.mark.slow
@pytest.mark.parametrize("compiler", [True, False])
def test_a_wheel_holds_every_module_and_template(tmp_path: Path, compiler: bool) -> None:
    """Without a C++ compiler it is built all the same."""
    source = tmp_path / "source"  # setuptools leaves a build folder beside what it builds
    for name in ("lwc", "passes", "backends"):
        shutil.copytree(ROOT / name, source / name, symlinks=True)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path)]
    quick = tmp_path / "quick"  # what it compiles is not run: three quarters of the time is -O3
    quick.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    quick.chmod(0o755)
    cxx = str(quick) if compiler else "false"
    environment = {**os.environ, "CC": cxx, "CXX": cxx}
    subprocess.run([*command, str(source)], check=True, capture_output=True, env=environment)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = set()
    for top, name in (("lwc", "lwc"), ("passes", "lwc/passes"), ("backends", "lwc/backends")):
        for folder, _, files in os.walk(ROOT / top):
            for file in files:
                if file.endswith((".py", ".jinja", "py.typed")):
                    inner = Path(folder, file).relative_to(ROOT / top)
                    expected.add(f"{name}/{inner}")
    assert expected <= held
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if compiler and (shutil.which("c++") is None or not headers.exists()):
        return
    native = [name for name in held if name.startswith("lwc/backends/onnxruntime/_native.")]
    assert len(native) == compiler
