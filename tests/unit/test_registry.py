"""Finding passes: the static table, entry points, plugins."""

from __future__ import annotations

import importlib.metadata
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

import lwc.passes
from lwc.cli.listing import list_passes
from lwc.core.errors import MissingExtraError, UsageError
from lwc.pipeline.builtin import BUILTIN
from lwc.pipeline.passes import Exact, Lossy, Pass, PassContext, PassResult
from lwc.pipeline.registry import (
    OptionInfo,
    PassInfo,
    Registry,
    default_registry,
    describe_pass,
)

PLUGIN = """
from dataclasses import dataclass
from typing import ClassVar
from lwc.pipeline.passes import Lossy, Pass, PassContext, PassResult

@dataclass(frozen=True)
class {cls}(Pass):
    \"\"\"Come from outside.\"\"\"

    name: ClassVar[str] = "{name}"
    contract: ClassVar[Lossy] = Lossy()

    strength: float = 0.5

    def run(self, module, ctx):
        return PassResult(False)
"""


@dataclass(frozen=True)
class Own(Pass):
    """Do something.

    At length.

    Attributes:
        mode: How: fast
            or slow.
        sizes: Which.
    """

    name: ClassVar[str] = "own"
    contract: ClassVar[Exact] = Exact()
    positional: ClassVar[str] = "mode"
    free_options: ClassVar[str] = "sizes"

    mode: str
    ops: tuple[str, ...] = ("a b", "c")
    sizes: tuple[tuple[str, int], ...] = ()

    def run(self, module: object, ctx: PassContext) -> PassResult:
        return PassResult(False)


DEFINES_A_PASS = re.compile(r"\((Rule)?Pass\):|^@function_pass", re.MULTILINE)


@pytest.fixture
def forget_modules() -> Iterator[None]:
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if name.startswith("lwc_test_"):
            del sys.modules[name]


def test_the_static_table_says_what_the_classes_say() -> None:
    registry = default_registry()
    for info in BUILTIN:
        actual = describe_pass(registry.load(info.name))
        assert info == actual, f"run tools/pass_table.py: the table should have {actual}"


def test_every_pass_file_is_in_the_table() -> None:
    folder = Path(lwc.passes.__path__[0])
    files = {
        file.stem.replace("_", "-")
        for file in folder.glob("*/*.py")
        if DEFINES_A_PASS.search(file.read_text(encoding="utf-8"))
    }
    assert {info.name for info in BUILTIN} == files
    assert [info.name for info in BUILTIN] == sorted(info.name for info in BUILTIN)


def test_class_names_are_the_pass_names() -> None:
    for info in BUILTIN:
        snake = info.name.replace("-", "_")
        camel = "".join(word.capitalize() for word in info.name.split("-"))
        # A function pass goes by the name of its function.
        assert info.target.endswith((f".{snake}:{camel}", f".{snake}:{snake}"))


def test_a_class_is_described() -> None:
    assert describe_pass(Own) == PassInfo(
        name="own",
        target=f"{__name__}:Own",
        summary="Do something.",
        contract="exact",
        options=(
            OptionInfo("mode", "str", None, "How: fast or slow.", positional=True),
            OptionInfo("ops", "list of str", '"a b",c'),
            OptionInfo("*", "int", "", "Which."),
        ),
    )


def test_passes_are_listed() -> None:
    registry = Registry()
    registry.add(Own)
    assert list_passes(registry.infos(), "text").splitlines() == [
        "own [exact]",
        "    Do something.",
        "      [mode=]str (required)",
        "          How: fast or slow.",
        '      ops=list of str, by default "a b",c',
        "      NAME=int (any number of them)",
        "          Which.",
    ]
    (entry,) = json.loads(list_passes(registry.infos(), "json"))
    assert entry["name"] == "own"
    assert entry["options"][0] == {
        "name": "mode",
        "type": "str",
        "default": None,
        "help": "How: fast or slow.",
        "positional": True,
    }


def test_a_plugin_file_is_loaded(tmp_path: Path, forget_modules: None) -> None:
    file = tmp_path / "lwc_test_plugin.py"
    file.write_text(PLUGIN.format(cls="Outside", name="outside"))
    registry = Registry()
    (cls,) = registry.load_plugin(str(file))
    assert registry.load("outside") is cls
    assert registry.infos() == [
        PassInfo(
            "outside",
            f"{file}:Outside",
            "Come from outside.",
            "lossy",
            (OptionInfo("strength", "float", "0.5"),),
        )
    ]


def test_a_plugin_package_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_modules: None
) -> None:
    package = tmp_path / "lwc_test_package"
    package.mkdir()
    (package / "inner.py").write_text(PLUGIN.format(cls="Inner", name="inner"))
    (package / "__init__.py").write_text("from .inner import Inner\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [cls.name for cls in Registry().load_plugin("lwc_test_package")] == ["inner"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 1\n", "defines no pass"),
        ("import lwc_test_missing\n", "bad.py:1: ModuleNotFoundError: No module named 'lwc_t"),
        ("1 +\n", "lwc_test_bad.py:1: SyntaxError: invalid syntax"),
        ("from lwc.pipeline.passes import Pass\n", "defines no pass"),
        (
            PLUGIN.replace("@dataclass(frozen=True)", "").format(cls="A", name="a"),
            "not a dataclass",
        ),
        (
            PLUGIN.replace("name: ClassVar", "nom: ClassVar").format(cls="A", name="a"),
            "lacks a name",
        ),
        (PLUGIN.replace("float", "bytes").format(cls="A", name="a"), "cannot have the type"),
        (
            PLUGIN.format(cls="A", name="a") + PLUGIN.format(cls="B", name="a"),
            "two passes are named 'a': .*lwc_test_bad.py:A and .*lwc_test_bad.py:B",
        ),
    ],
)
def test_a_bad_plugin_is_one_line(
    source: str, message: str, tmp_path: Path, forget_modules: None
) -> None:
    file = tmp_path / "lwc_test_bad.py"
    file.write_text(source)
    with pytest.raises(UsageError, match=message) as caught:
        Registry().load_plugin(str(file))
    assert "\n" not in str(caught.value)


def test_a_missing_plugin_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="plugin 'lwc_test_none' cannot be imported: No module"):
        Registry().load_plugin("lwc_test_none")
    with pytest.raises(UsageError, match="No such file"):
        Registry().load_plugin(str(tmp_path / "none.py"))


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("lwc_test_none:A", "cannot be loaded from lwc_test_none:A: No module named"),
        ("lwc.pipeline.passes:Nothing", "has no attribute 'Nothing'"),
        ("lwc.pipeline.passes:PassContext", "is not a Pass"),
        (f"{__name__}:Own", "calls itself 'own'"),
    ],
)
def test_a_pass_that_cannot_be_loaded_is_one_line(target: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        Registry((PassInfo("gone", target, ""),)).load("gone")
    assert "\n" not in str(caught.value)


def test_errors_with_a_remedy_of_their_own_pass_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forget_modules: None
) -> None:
    (tmp_path / "lwc_test_extra.py").write_text(
        "from lwc.core.errors import MissingExtraError\n"
        "raise MissingExtraError('training', 'torch')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingExtraError, match=r"pip install -e '\.\[torch\]'"):
        Registry((PassInfo("p", "lwc_test_extra:P", ""),)).load("p")


def _install(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    point = importlib.metadata.EntryPoint(name, value, "lwc.passes")

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return [point] if group == "lwc.passes" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


def test_passes_of_installed_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "own", f"{__name__}:Own")
    registry = Registry(entry_points=True)
    assert [info.name for info in registry.infos()] == ["own"]
    assert registry.load("own") is sys.modules[__name__].Own
    assert Registry(entry_points=True).load("own").name == "own"


def test_an_installed_pass_cannot_take_a_known_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, "own", "elsewhere:Own")
    registry = Registry((PassInfo("own", f"{__name__}:Own", ""),), entry_points=True)
    with pytest.raises(UsageError, match="two passes are named 'own'"):
        registry.infos()


def test_the_same_pass_may_be_added_twice() -> None:
    registry = Registry()
    registry.add(Own)
    registry.add(Own)
    assert len(registry.infos()) == 1


def test_contracts_are_named() -> None:
    @dataclass(frozen=True)
    class Rough(Own):
        name: ClassVar[str] = "rough"
        contract: ClassVar[Lossy] = Lossy()  # type: ignore[assignment]

    assert describe_pass(Rough).contract == "lossy"
