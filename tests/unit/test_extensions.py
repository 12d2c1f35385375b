"""Operators and kernels of one's own: plugins and packages that bring them, and no pass."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from fx_agreement import parsed  # noqa: E402

import lwc  # noqa: E402
from lwc.backends.fx import registry as operators  # noqa: E402
from lwc.backends.triton.kernels import NAMES  # noqa: E402
from lwc.cli.opt import main  # noqa: E402
from lwc.core import extensions  # noqa: E402
from lwc.core.errors import UsageError  # noqa: E402
from lwc.core.module import Module  # noqa: E402
from lwc.pipeline.plugins import import_installed  # noqa: E402
from lwc.pipeline.registry import Registry, default_registry  # noqa: E402

ROOT = Path(__file__).parents[2]

MODEL = """<ir_version: 10, opset_import: ["" : 20, "com.example" : 1]>
g (float[n, 32] x) => (float[n, 32] y)
<float[32, 32] w = {%s}>
{ a = com.example.Bent <alpha = 0.5> (x)  y = MatMul(a, w) }
""" % ", ".join(f"{i * i % 17 - 8}" for i in range(1024))  # noqa: UP031

BENT = """\
from lwc.backends.fx.registry import op


@op("com.example::Bent")
def bent(x, *, alpha=1.0):
    return x + alpha * x * x
"""

KERNEL = """\
from lwc.backends.fx.registry import op
from lwc.backends.triton import launch
from lwc.backends.triton.lowerings.registry import Results, Site, kernel


@op("com.example::Bent")
def bent(x, *, alpha=1.0):
    return x + alpha * x * x


@kernel("com.example::Bent", runs="activation_kernel")
def gated(site: Site) -> Results:
    x = site.given("x")
    return {0: site.call(launch.gated_activation, x, x, "relu")}
"""


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give each test tables and a registry of its own: what is registered stays."""
    lwc.to_fx(parsed('<ir_version: 9, opset_import: ["" : 20]> g (float x) => (float x) {}'))
    tables: list[dict[str, Any]] = [operators._LOWERINGS]
    if util.find_spec("triton"):
        from lwc.backends.triton.lowerings.registry import KERNELS

        tables.append(KERNELS)
    before = [dict(table) for table in tables]
    monkeypatch.setattr(extensions, "_REGISTERED", [])
    monkeypatch.setattr(extensions, "_EXTENDING", set())
    default_registry.cache_clear()
    import_installed.cache_clear()
    yield
    for table, kept in zip(tables, before, strict=True):
        table.clear()
        table.update(kept)
    default_registry.cache_clear()
    import_installed.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.onnxtxt").write_text(MODEL)
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(8, 32)).astype("f"))
    return tmp_path


def calibrated(folder: Path, *words: str) -> int:
    """Run a pass that has the fx backend run the model."""
    passes = "quantize-weights{bits=4 method=gptq block-size=32}"
    given = [f"--calibrate={folder / 'data.npz'}", "--backend=fx", "-o", str(folder / "out.onnx")]
    return main([str(folder / "model.onnxtxt"), "-q", "-p", passes, *given, *words])


def test_a_plugin_may_register_operators_only(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "bent.py").write_text(BENT)
    assert calibrated(folder) == 1
    assert "the fx backend has no lowering of com.example::Bent" in capsys.readouterr().err
    assert calibrated(folder, f"--load-pass-plugin={folder / 'bent.py'}") == 0
    assert capsys.readouterr().err == ""


def test_a_plugin_of_operators_may_be_loaded_twice(folder: Path) -> None:
    """The file is run again, and what it defines then is what counts."""
    (folder / "bent.py").write_text(BENT)
    assert Registry().load_plugin(str(folder / "bent.py")) == []
    (folder / "bent.py").write_text(BENT.replace("x + alpha", "x - alpha"))
    assert Registry().load_plugin(str(folder / "bent.py")) == []
    (lowering,) = operators._LOWERINGS["com.example::Bent"]
    assert lowering.function(3, alpha=1) == -6


def test_a_module_that_was_imported_before_is_a_plugin_too(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "lwc_test_bent.py").write_text(BENT)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "lwc_test_bent", raising=False)
    importlib.import_module("lwc_test_bent")
    assert Registry().load_plugin("lwc_test_bent") == []


@pytest.mark.parametrize(
    "text",
    [
        "import math\nfrom lwc.backends.fx.registry import direct\n"
        "direct({'com.example::Bent': math.exp})",
        "import lwc_test_helper",
        "from lwc_test_package import other",
    ],
)
def test_operators_may_be_registered_by_what_a_plugin_uses(
    text: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "lwc_test_package").mkdir()
    (folder / "lwc_test_package" / "__init__.py").write_text("from . import bent\nother = 1\n")
    (folder / "lwc_test_package" / "bent.py").write_text(BENT)
    (folder / "lwc_test_helper.py").write_text(BENT)
    (folder / "plugin.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    for name in ("lwc_test_helper", "lwc_test_package", "lwc_test_package.bent"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert Registry().load_plugin(str(folder / "plugin.py")) == []
    assert "com.example::Bent" in operators._LOWERINGS
    if "package" in text:  # known by what is registered inside of it
        assert Registry().load_plugin("lwc_test_package") == []


def test_two_functions_of_one_name_are_two(folder: Path) -> None:
    (folder / "bent.py").write_text(f"{BENT}\n\n{BENT}")
    with pytest.raises(UsageError, match=r"bent.py:12: ValueError: operator '.*' is registered"):
        Registry().load_plugin(str(folder / "bent.py"))


def test_names_of_operators_are_taken_before_any_module_was_lowered() -> None:
    script = (
        "from lwc.backends.fx.registry import direct\n"
        "try: direct({'Relu': lambda x: x})\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "operator 'Relu' is registered twice since version 1\n"


@pytest.mark.parametrize("name", ["Gelu", "Shape", "com.example::Twice com.example::Twice"])
def test_an_operator_has_one_function(name: str, folder: Path) -> None:
    """Of lwc's own too, whether or not their table was read before."""
    text = f"{BENT}\n\n@op('com.example::Twice')\ndef other(x):\n    return x\n"
    (folder / "bent.py").write_text(text.replace("com.example::Bent", name))
    line = 9 if "Twice" in name else 4
    with pytest.raises(
        UsageError, match=rf"bent.py:{line}: ValueError: operator '.*' is registered"
    ):
        Registry().load_plugin(str(folder / "bent.py"))


def test_what_a_plugin_may_register_is_told(folder: Path) -> None:
    (folder / "none.py").write_text("x = 1\n")
    with pytest.raises(UsageError) as caught:
        Registry().load_plugin(str(folder / "none.py"))
    assert str(caught.value) == (
        f"plugin '{folder / 'none.py'}' defines no pass, no operator and no kernel (derive a class "
        "from lwc.Pass, or decorate a function with op of lwc.backends.fx.registry, or with kernel "
        "of lwc.backends.triton.lowerings.registry)"
    )


def installed(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, group: str) -> None:
    """Pretend that a package has `text` as its module and names it in a group."""
    (folder / "lwc_test_brought.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "lwc_test_brought", raising=False)
    point = importlib.metadata.EntryPoint("mine", "lwc_test_brought", group)
    monkeypatch.setattr(
        importlib.metadata,
        "entry_points",
        lambda *, group: [point] if group == point.group else [],
    )


def test_packages_bring_operators(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed(monkeypatch, folder, BENT, "lwc.operators")
    assert calibrated(folder) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("x = 1\n", "lwc.operators: lwc_test_brought defines no operator and no kernel (decorate"),
        ("import lwc_test_missing\n", "lwc.operators cannot be imported: {file}:1: ModuleNotFound"),
    ],
)
def test_packages_that_bring_nothing_are_told(
    text: str, told: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, folder, text, "lwc.operators")
    wanted = told.replace("{file}", str(folder / "lwc_test_brought.py"))
    for _ in range(2):
        with pytest.raises(UsageError, match=re.escape(f"entry point 'mine' in {wanted}")):
            lwc.to_fx(parsed(MODEL))


def test_the_names_of_kernels_are_those_of_their_files() -> None:
    files = (ROOT / "backends" / "triton" / "kernels").glob("*.py")
    found = [
        name
        for file in files
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.M)
    ]
    assert sorted(found) == sorted(NAMES)


def kernels_of(module: Module) -> list[tuple[str, ...]]:
    from lwc.backends.triton.lower import placements

    return [each.kernels for each in placements(lwc.to_triton(module))]


@pytest.mark.parametrize("package", [False, True])
def test_kernels_come_likewise(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, package: bool
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[triton]'")
    if package:
        installed(monkeypatch, folder, KERNEL, "lwc.kernels")
    else:
        (folder / "bent.py").write_text(KERNEL)
        assert Registry().load_plugin(str(folder / "bent.py")) == []
    assert kernels_of(parsed(MODEL)) == [("activation_kernel",), ()]
    from lwc.backends.triton.emit import emit

    # Its output is declared and not inferred: lwc has no shape rule for an operator on the way.
    assert len(emit(parsed(MODEL), folder / "out", architectures=[]).placements) == 2


def test_a_kernel_must_exist(folder: Path) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[triton]'")
    file = folder / "bent.py"
    for run, hint in (
        (
            "nope_kernel",
            "did you mean 'norm_kernel'?",
        ),
        ("twirl", "import yours where its lowering is defined"),
    ):
        file.write_text(KERNEL.replace('"activation_kernel"', f'"activation_kernel {run}"'))
        with pytest.raises(UsageError) as caught:
            Registry().load_plugin(str(file))
        assert f"{file}:11: ValueError: there is no kernel '{run}' ({hint})" in str(caught.value)
    file.write_text(KERNEL.replace('"activation_kernel"', '"bent"'))  # known where it is written
    Registry().load_plugin(str(file))
