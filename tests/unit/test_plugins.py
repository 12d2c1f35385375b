"""Malformed plugins: each gives one clear line and leaves the module as it was."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx.parser
import pytest

import lwc
from lwc.cli.opt import main
from lwc.core.errors import PassError, Terminated, UsageError, VerificationError
from lwc.core.module import Module
from lwc.frontend.onnx_reader import from_proto
from lwc.pipeline.manager import PassManager
from lwc.pipeline.passes import Pass
from lwc.pipeline.registry import Registry, default_registry

MODEL = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[n, 2] x) => (float[n, 2] y)
<float[2, 2] w = {1, 2, 3, 4}>
{
  a = Identity(x)
  b = Relu(a)
  y = MatMul(b, w)
}
"""

HEAD = """\
from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from lwc import Approximate, Exact, Lossy, Pass, PassResult


def damage(module):
    module.graph.outputs[0].name = "broken"
    module.graph.initializers["w"].name = "v"
    module.model.ir_version = 3


"""

BODY = '''\
@dataclass(frozen=True)
class Mine(Pass):
    """Do something."""

    name: ClassVar[str] = "mine"

    def run(self, module, ctx):
        return PassResult(False)
'''

FIRST = HEAD.count("\n") + 1
"""The line of a plugin where its class begins."""


def plugin(**changes: str) -> str:
    """Return the text of a plugin with lines of the class replaced: name, run, result."""
    parts = {
        "decorator": "@dataclass(frozen=True)",
        "class": "class Mine(Pass):",
        "name": 'name: ClassVar[str] = "mine"',
        "more": "",
        "run": "def run(self, module, ctx):",
        "result": "return PassResult(False)",
        **changes,
    }
    lines = [parts["decorator"], parts["class"], '    """Do something."""', ""]
    lines += [f"    {line}" for line in (parts["name"], *parts["more"].split("\n")) if line]
    if parts["run"]:
        lines += ["", f"    {parts['run']}"]
        lines += [f"        {line}" for line in parts["result"].split("\n")]
    return HEAD + "\n".join(lines) + "\n"


LOADING = {
    "a syntax error": ("def f(:\n", "{file}:1: SyntaxError: "),
    "a missing import": (
        "x = 1\nimport lwc_test_missing\n",
        "{file}:2: ModuleNotFoundError: No module named 'lwc_test_missing'",
    ),
    "a missing name": ("from lwc import Passs\n", "{file}:1: ImportError: "),
    "an error two lines long": ("raise ValueError('a\\nb')\n", "{file}:1: ValueError: a b"),
    "an error in a library": (
        "import json\n\njson.loads('{{')\n",
        "{file}:3: JSONDecodeError: Expecting",
    ),
    "the end of the program": ("import sys\nsys.exit(0)\n", "{file}:2: SystemExit: it ends the"),
    "a file that is not there": (
        "open('/nonexistent/file')\n",
        "{file}:1: FileNotFoundError: No such file or directory",
    ),
    "a null byte": ("x = 1\0\n", "cannot be imported: "),
    "nothing": (
        "x = 1\n",
        "plugin '{file}' defines no pass, no operator and no kernel (derive a class from",
    ),
    "a class that is no pass": (
        "class Fuse:\n    name = 'fuse'\n    def run(self, module, ctx): pass\n",
        "its class Fuse has a run method but is no Pass (derive it from lwc.Pass)",
    ),
    "no dataclass": (
        plugin(decorator="", more="size: int = 3"),
        "{file}:Mine is not a dataclass (put @dataclass(",
    ),
    "a promise that is not known": (
        plugin(more='never_more = frozenset("nodes")'),
        "{file}:Mine says never_more = frozenset(",
    ),
    "a reason that is none": (
        plugin(more="changes_again = True"),
        "{file}:Mine has a changes_again that is no reason",
    ),
    "a negative noise": (
        plugin(more="contract = Lossy(noise=-1)"),
        "{file}:Mine has no valid contract: noise is a number from 0 on, not -1",
    ),
    "not frozen": (
        plugin(decorator="@dataclass"),
        f"{{file}}:{FIRST}: TypeError: cannot inherit non-frozen dataclass from a frozen one",
    ),
    "a mutable default": (
        plugin(more="ops: list[str] = []"),
        f"{{file}}:{FIRST}: ValueError: mutable default",
    ),
    "no run": (plugin(run=""), "{file}:Mine lacks a run method"),
    "no name": (plugin(name=""), "{file}:Mine lacks a name"),
    "a name that is no string": (plugin(name="name = 3"), "{file}:Mine lacks a name"),
    "a name of another case": (
        plugin(name='name = "MyPass"'),
        "{file}:Mine has the name 'MyPass', which is not in kebab-case",
    ),
    "a name with a space": (plugin(name='name = "my pass"'), "not in kebab-case"),
    "the name of a built-in pass": (
        plugin(name='name = "canonicalize"'),
        "two passes are named 'canonicalize': lwc.passes.cleanup.canonicalize:Canonicalize and "
        "{file}:Mine",
    ),
    "two classes of one name": (
        plugin() + BODY.replace("Mine", "Other"),
        "two passes are named 'mine': {file}:Mine and {file}:Other",
    ),
    "an option of an unknown type": (
        plugin(more="table: dict[str, int] = None"),
        "{file}:Mine: an option of a pass cannot have the type dict[str, int]",
    ),
    "an option of a type that is not there": (
        plugin(more="size: Size = 3"),
        "{file}:Mine: the options of Mine have no readable type: name 'Size'",
    ),
    "a default of another type": (
        plugin(more='size: int = "big"'),
        "the options of {file}:Mine cannot be read: ValueError: expected int, got 'big'",
    ),
    "too few parameters": (
        plugin(run="def run(self, module):"),
        "{file}:Mine has a run that takes (self, module), not (self, module, ctx)",
    ),
    "too many parameters": (
        plugin(run="def run(self, module, ctx, more):"),
        "{file}:Mine has a run that takes (self, module, ctx, more), not",
    ),
    "a generator": (plugin(result="yield"), "has a run that returns before it is done"),
    "a coroutine": (plugin(run="async def run(self, module, ctx):"), "returns before it is done"),
    "a run that is no method": (plugin(more="run = 3", run=""), "has a run that is no method"),
    "a method where a property is meant": (
        plugin(more="def keeps_interface(self): return False"),
        "has a method keeps_interface (make it a property)",
    ),
    "a class as the contract": (
        plugin(more="contract = Exact"),
        "{file}:Mine has no valid contract: it is the class Exact, not an object of it",
    ),
    "a word as the contract": (
        plugin(more='contract = "exact"'),
        "{file}:Mine has no valid contract: 'exact' is none of Exact, Approximate and Lossy",
    ),
    "a negative bound": (
        plugin(more="contract = Approximate(-1e-3, 0.0)"),
        "{file}:Mine has no valid contract: rtol is a number from 0 on, not -0.001",
    ),
    "a bound that is no number": (
        plugin(more="contract = Approximate(0.0, math.nan)"),
        "atol is a number from 0 on, not nan",
    ),
    "assumptions that are no tuple": (
        plugin(more='contract = Exact("inputs are finite")'),
        "assumptions are a tuple of strings, not 'inputs are finite'",
    ),
    "a positional option that is no field": (
        plugin(more='positional: ClassVar[str] = "size"'),
        "{file}:Mine says positional = 'size', which is no field of it",
    ),
}
"""Plugins that must be refused when they are loaded, with a part of the line."""

RUNNING = {
    "an error midway": ("damage(module)\nraise KeyError('lost')", "pass 'mine': KeyError: 'lost'"),
    "an error of two lines": ("damage(module)\nraise ValueError('a\\nb')", "ValueError: a b"),
    "an error without words": ("damage(module)\nassert False", "pass 'mine': AssertionError"),
    "the end of the program": (
        "damage(module)\nsys.exit(0)",
        "pass 'mine': it tried to end the program with 0",
    ),
    "None": ("damage(module)\nreturn None", "run returned NoneType, not a PassResult"),
    "True": ("return True", "run returned bool, not a PassResult"),
    "the class": ("return PassResult", "run returned type, not a PassResult"),
    "a count as changed": ("return PassResult(3)", "changed is True or False, not 3"),
    "None as changed": ("return PassResult(None)", "changed is True or False, not None"),
    "one analysis": ("return PassResult(False, int)", "preserved is a set of analyses, not"),
    "what is no analysis": (
        "return PassResult(False, frozenset({int}))",
        "preserved has <class 'int'>, which is no Analysis",
    ),
    "statistics that are none": (
        "return PassResult(False, statistics=[1])",
        "statistics is a table of figures by name, not [1]",
    ),
    "a statistic that is no figure": (
        "return PassResult(False, statistics={'nodes': [1]})",
        "statistics['nodes'] is a number or a string, not [1]",
    ),
    "a statistic without a name": (
        "return PassResult(False, statistics={1: 2})",
        "statistics has the key 1, which is no string",
    ),
    "negative rewrites": (
        "return PassResult(False, rewrites={'r': -1})",
        "rewrites['r'] is a count, not -1",
    ),
    "half rewrites": (
        "return PassResult(False, rewrites={'r': 0.5})",
        "rewrites['r'] is a count, not 0.5",
    ),
    "a broken graph": ("damage(module)\nreturn PassResult(True)", "pass 'mine': "),
    "a hidden change": (
        "module.graph.node(1).metadata_props['a'] = 'b'\nreturn PassResult(False)",
        "pass 'mine': it reports no change, but the module differs",
    ),
    "a change that is none": (
        "return PassResult(True)",
        "pass 'mine': it reports a change, but the module is the same",
    ),
}
"""Bodies of `run` that must fail when they run, with a part of the line."""


@pytest.fixture(autouse=True)
def fresh_registry() -> Iterator[None]:
    """Give each test a default registry of its own: plugins stay in it."""
    default_registry.cache_clear()
    yield
    default_registry.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.onnxtxt").write_text(MODEL)
    return tmp_path


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def run_cli(folder: Path, *words: str) -> tuple[int, Path]:
    output = folder / "out.onnx"
    model = str(folder / "model.onnxtxt")
    return main([model, "-o", str(output), *words]), output


def one_line_of(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the only line on stderr."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    assert "internal error" not in err
    return err


@pytest.mark.parametrize("case", LOADING)
def test_what_is_malformed_is_refused_when_it_is_loaded(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message = LOADING[case]
    file = write(folder, text.replace("{{", "{"))
    code, output = run_cli(folder, f"--load-pass-plugin={file}", "-p", "canonicalize")
    assert code == 2
    assert not output.exists()
    assert message.replace("{file}", str(file)) in one_line_of(capsys)
    with pytest.raises(UsageError):
        Registry().load("mine")


@pytest.mark.parametrize("case", RUNNING)
def test_what_fails_when_it_runs_writes_nothing(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body, message = RUNNING[case]
    file = write(folder, plugin(result=body))
    code, output = run_cli(folder, f"--load-pass-plugin={file}", "-p", "mine")
    assert code == 1
    assert not output.exists()
    err = capsys.readouterr().err
    assert message in err.splitlines()[0], err
    assert "Traceback" not in err
    assert "internal error" not in err


@pytest.mark.parametrize("case", RUNNING)
def test_what_fails_when_it_runs_leaves_the_module_as_it_was(case: str, folder: Path) -> None:
    body, message = RUNNING[case]
    (cls,) = Registry().load_plugin(str(write(folder, plugin(result=body))))
    module = from_proto(onnx.parser.parse_model(MODEL))
    before = module.fingerprint()
    with pytest.raises((PassError, VerificationError)) as caught:
        lwc.optimize(module, passes=[cls()])
    assert message in str(caught.value)
    assert module.fingerprint() == before
    with pytest.raises((PassError, VerificationError)):
        PassManager([cls()]).run(module)
    assert module.fingerprint() == before


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "MemoryError", "OSError", "GeneratorExit"])
def test_any_exception_leaves_the_module_as_it_was(error: str, folder: Path) -> None:
    text = plugin(result=f"damage(module)\nraise {error}")
    (cls,) = Registry().load_plugin(str(write(folder, text)))
    module = from_proto(onnx.parser.parse_model(MODEL))
    before = module.fingerprint()
    with pytest.raises(getattr(__import__("builtins"), error)):
        PassManager([cls()]).run(module)
    assert module.fingerprint() == before


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ("KeyboardInterrupt", 130, "interrupted"),
        ("MemoryError", 1, "out of memory"),
        ("GeneratorExit", 1, "GeneratorExit"),
    ],
)
def test_exceptions_of_the_system_are_one_line_too(
    error: str, code: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(folder, plugin(result=f"damage(module)\nraise {error}"))
    got, output = run_cli(folder, f"--load-pass-plugin={file}", "-p", "mine")
    assert got == code
    assert not output.exists()
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_an_interrupt_while_a_plugin_is_imported(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(folder, "raise KeyboardInterrupt\n")
    assert run_cli(folder, f"--load-pass-plugin={file}")[0] == 130
    assert one_line_of(capsys) == "lwc-opt: interrupted\n"


def test_being_told_to_end_is_not_taken_for_a_fault_of_the_pass(folder: Path) -> None:
    text = plugin(result="from lwc.core.errors import Terminated\nraise Terminated(143)")
    (cls,) = Registry().load_plugin(str(write(folder, text)))
    module = from_proto(onnx.parser.parse_model(MODEL))
    with pytest.raises(Terminated):
        PassManager([cls()]).run(module)


def test_a_plugin_that_is_not_there(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, reason in (
        (f"{folder}/none.py", "No such file or directory"),
        ("lwc_test_none", "No module named 'lwc_test_none'"),
        ("lwc_test_none.inner", "No module named 'lwc_test_none'"),
        ("", "cannot be imported"),
        (".relative", "cannot be imported"),
    ):
        assert run_cli(folder, f"--load-pass-plugin={name}")[0] == 2
        assert reason in one_line_of(capsys)


ODD = "def __post_init__(self):\n    "


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        ("raise ValueError('size is odd')", "pass 'mine': size is odd"),
        ("raise RuntimeError('size\\nis odd')", "options: RuntimeError: size is odd"),
        ("raise KeyError('size')", "pass 'mine' cannot be made with these options: KeyError"),
        ("sys.exit(0)", "pass 'mine' cannot be made with these options: SystemExit: 0"),
    ],
)
def test_options_that_a_class_refuses(
    raised: str, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = plugin(more=f"size: int = 3\n{ODD}{raised}")
    file = write(folder, text)
    code, output = run_cli(folder, f"--load-pass-plugin={file}", "-p", "mine{size=4}")
    assert code == 2
    assert not output.exists()
    line, *caret = capsys.readouterr().err.splitlines()
    assert message in line
    assert [each.strip() for each in caret] == ["mine{size=4}", "^"]


def test_an_option_without_a_default_must_be_given(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(folder, plugin(more="size: int"))
    assert run_cli(folder, f"--load-pass-plugin={file}", "-p", "mine")[0] == 2
    assert "pass 'mine' needs option 'size' (int)" in capsys.readouterr().err
    assert run_cli(folder, f"--load-pass-plugin={file}", "-p", "mine{size=3}")[0] == 0


def test_a_plugin_hides_no_other_module(folder: Path) -> None:
    file = write(folder, plugin(), "json.py")
    registry = Registry()
    (cls,) = registry.load_plugin(str(file))
    assert sys.modules["json"] is json
    assert registry.load("mine") is cls
    assert lwc.optimize(from_proto(onnx.parser.parse_model(MODEL)), passes=[cls()]).record.passes


def test_a_plugin_that_fails_leaves_no_module_behind(folder: Path) -> None:
    before = set(sys.modules)
    with pytest.raises(UsageError):
        Registry().load_plugin(str(write(folder, "raise ValueError\n")))
    assert {name for name in set(sys.modules) - before if "mine" in name} == set()


def test_files_of_one_name_are_two_plugins(folder: Path) -> None:
    registry = Registry()
    for number in (1, 2):
        inner = folder / str(number)
        inner.mkdir()
        text = plugin(name=f'name = "mine-{number}"', result=f"return PassResult({number} > 5)")
        registry.load_plugin(str(write(inner, text)))
    one, two = registry.load("mine-1"), registry.load("mine-2")
    assert (one.name, two.name) == ("mine-1", "mine-2")
    inner = folder / "3"
    inner.mkdir()
    with pytest.raises(UsageError, match=r"two passes are named 'mine-1': .*/1/mine.py:Mine and"):
        registry.load_plugin(str(write(inner, plugin(name='name = "mine-1"'))))


def test_a_plugin_may_be_loaded_twice(folder: Path) -> None:
    registry = Registry()
    file = str(write(folder, plugin()))
    registry.load_plugin(file)
    (again,) = registry.load_plugin(file)
    assert registry.load("mine") is again
    assert len(registry.infos()) == 1


def test_all_passes_of_a_plugin_are_known_or_none(folder: Path) -> None:
    registry = Registry()
    second = plugin(name='name = "Bad"').replace(HEAD, "").replace("Mine", "Other")
    with pytest.raises(UsageError, match="kebab-case"):
        registry.load_plugin(str(write(folder, plugin() + second)))
    assert registry.infos() == []


def test_bases_are_no_passes(folder: Path) -> None:
    base = plugin(name="", run="").replace("Mine", "Base")
    text = base + BODY.replace("(Pass)", "(Base)")
    assert [cls.__name__ for cls in Registry().load_plugin(str(write(folder, text)))] == ["Mine"]


def load_class(folder: Path, text: str) -> type[Pass]:
    """Make a malformed class, as a notebook does: no registry sees it."""
    space: dict[str, Any] = {"__name__": "notebook"}
    sys.modules["notebook"] = type(sys)("notebook")
    exec(compile(text, str(folder / "cell"), "exec"), space)
    cls = space["Mine"]
    assert isinstance(cls, type)
    return cls


@pytest.mark.parametrize(
    "case", ["a negative bound", "too few parameters", "a name of another case", "a generator"]
)
def test_objects_are_checked_like_plugins(case: str, folder: Path) -> None:
    text, message = LOADING[case]
    cls = load_class(folder, text)
    with pytest.raises(UsageError) as caught:
        lwc.optimize(from_proto(onnx.parser.parse_model(MODEL)), passes=[cls()])
    assert message.replace("{file}", "notebook") in str(caught.value)


def test_a_class_is_no_pass_object(folder: Path) -> None:
    cls = load_class(folder, plugin())
    module = from_proto(onnx.parser.parse_model(MODEL))
    with pytest.raises(UsageError, match=r"Mine is a class, not a pass \(give Mine\(\)\)"):
        lwc.optimize(module, passes=[cls])  # type: ignore[list-item]
    with pytest.raises(UsageError, match="a pass is a string or a Pass object, not int"):
        lwc.optimize(module, passes=[3])  # type: ignore[list-item]


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, value: str) -> None:
    """Pretend that a package with `text` as its module registers `value` as the pass 'mine'."""
    write(folder, text, "lwc_test_installed.py")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "lwc_test_installed", raising=False)
    point = importlib.metadata.EntryPoint("mine", value, "lwc.passes")

    def entry_points(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return [point] if group == "lwc.passes" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)


@pytest.mark.parametrize(
    "case",
    [
        ("import lwc_test_missing\n", "Mine", "lwc_test_installed.py:1: ModuleNotFoundError: No"),
        ("import sys\nsys.exit(0)\n", "Mine", "lwc_test_installed.py:2: SystemExit: it ends"),
        (plugin(), "Ours", "has no attribute 'Ours'"),
        (plugin(), "HEAD", "cannot be loaded"),
        (plugin(name='name = "other"'), "Mine", "calls itself 'other'"),
        (plugin(run="def run(self):"), "Mine", "Mine has a run that takes (self), not"),
        (plugin(more="contract = 3"), "Mine", "Mine has no valid contract: 3 is none of"),
        (plugin(name="name = 'My'"), "Mine", "lwc_test_installed:Mine has the name 'My'"),
    ],
)
def test_installed_passes_are_checked_when_they_are_used(
    case: tuple[str, str, str],
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text, name, message = case
    install(monkeypatch, folder, text, f"lwc_test_installed:{name}")
    code, output = run_cli(folder, "-p", "mine")
    assert code == 2
    assert not output.exists()
    line, *caret = capsys.readouterr().err.splitlines()
    assert "pass 'mine'" in line
    assert message in line
    assert [each.strip() for each in caret] == ["mine", "^"]


def test_an_installed_pass_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, folder, plugin(), "lwc_test_installed:Mine")
    code, output = run_cli(folder, "-p", "mine")
    assert code == 0
    assert output.exists()


def test_an_installed_pass_and_a_plugin_of_one_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    install(monkeypatch, folder, plugin(), "lwc_test_installed:Mine")
    file = write(folder, plugin())
    assert run_cli(folder, f"--load-pass-plugin={file}")[0] == 2
    assert "two passes are named 'mine': lwc_test_installed:Mine and " in one_line_of(capsys)


def test_the_program_itself_survives_a_pass_that_exits(folder: Path) -> None:
    """In a process of its own: a pass that calls sys.exit(0) must not look like success."""
    file = write(folder, plugin(result="sys.exit(0)"))
    words = [str(folder / "model.onnxtxt"), "-o", str(folder / "out.onnx"), "-p", "mine"]
    done = subprocess.run(
        [sys.executable, "-m", "lwc.cli.opt", *words, f"--load-pass-plugin={file}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr == ("lwc-opt: error: pass 'mine': it tried to end the program with 0\n")
    assert not (folder / "out.onnx").exists()


def test_the_well_formed_plugin_of_these_tests_works(folder: Path) -> None:
    """What the cases above change is all that is wrong with them."""
    file = write(folder, plugin())
    code, output = run_cli(folder, f"--load-pass-plugin={file}", "-p", "mine")
    assert code == 0
    assert isinstance(lwc.load(output), Module)
