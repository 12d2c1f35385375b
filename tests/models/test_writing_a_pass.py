"""docs/writing_a_pass.md does what it says, and lwc finds bugs planted in its example."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from run_page import Page, PageError

import lwc.verify

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "writing_a_pass.md"
EXAMPLE = ROOT / "docs" / "examples" / "lwc-swish"
PASS = EXAMPLE / "src" / "lwc_swish" / "fuse_swish.py"

# pip gets the setuptools that an isolated build needs from the network.
INSTALLED = importlib.util.find_spec("setuptools") is not None
BUILD = {"PIP_NO_BUILD_ISOLATION": "0"} if INSTALLED else {}
"""pip reads the variable backwards: 0 switches the isolation off."""


@pytest.mark.slow
def test_the_page_runs_and_shows_what_is_printed(tmp_path: Path) -> None:
    folder = tmp_path / "swish"
    folder.mkdir()
    environment = {**BUILD, "PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    Page(PAGE, folder.resolve(), environment).run()
    assert (folder / "swish.py").read_text() == PASS.read_text()
    assert "{0.2 batches=3}" in PAGE.read_text()


def test_the_example_takes_at_most_forty_lines() -> None:
    lines = PASS.read_text().splitlines()
    assert len(lines) <= 40
    assert f"takes {len(lines)} lines" in PAGE.read_text()


@pytest.mark.parametrize(
    ("shown", "printed", "sample", "agrees"),
    [
        ("a 0.25 s", "a 1.5 s", False, True),
        ("a 1 node", "a 2 nodes", False, False),
        ("a 1 node", "a 2 node", False, False),
        ("a 1 node", "a 2 node", True, True),
        ("%mul_0 = Mul(%x)", "%mul_12 = Mul(%input1)", True, True),
        ("%mul_0 = Mul(%x)", "%mul_0 = Add(%x)", True, False),
        ("a (outputs)", "a (structure)", True, False),
        ("scaled-swish x1", "plain-swish x1", True, False),
        ("…\nend", "one\ntwo\nend", False, True),
        ("…\nend", "one\nend\ntwo", False, False),
        ("a", "", False, False),
    ],
)
def test_pages_are_compared(
    shown: str, printed: str, sample: bool, agrees: bool, tmp_path: Path
) -> None:
    page = tmp_path / "page.md"
    kind = "console sample" if sample else "console"
    page.write_text(f"```text out.txt\n{printed}\n```\n\n```{kind}\n$ cat out.txt\n{shown}\n```\n")
    if agrees:
        Page(page, tmp_path).run()
    else:
        with pytest.raises(PageError, match=r"page.md:\d: \$ cat out.txt"):
            Page(page, tmp_path).run()


def test_a_page_is_written(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```text a.txt\nold\n```\n```diff a.txt\n-old\n+new\n```\n"
                    "```console\n$ cat a.txt\n$ false\n$ echo $?\nx\n```\nend\n")  # fmt: skip
    Page(page, tmp_path, write=True).run()
    assert page.read_text().endswith("$ cat a.txt\nnew\n$ false\n$ echo $?\n1\n```\nend\n")


PLANTED = {
    "broadcast ignored": (
        (" or not edit.same_shape(x, edit.root.outputs[0])", ""),
        "structure",
        "scaled-swish",
    ),
    "alpha forgotten": ((' or {"alpha": alpha}', ""), "outputs", "scaled-swish"),
    "always the alpha of QuickGelu": (
        (' or {"alpha": alpha}', ' or {"alpha": 1.702}'),
        "outputs",
        "scaled-swish",
    ),
    "the first of several alphas": (
        (
            "edit.scalar(scale)",
            "None if (a := edit.array(scale)) is None else float(a.ravel()[0])",
        ),
        "outputs",
        "scaled-swish",
    ),
    "another sigmoid": (
        ("op.Mul(x, op.Sigmoid(x))", "op.Mul(x, op.HardSigmoid(x))"),
        "outputs",
        "plain-swish",
    ),
    "an opset too early": ((">= 24", ">= 23"), "structure", "plain-swish"),
    "sigmoid of something else": (
        ("op.Mul(x, op.Sigmoid(op.Mul(x, scale)))", "op.Mul(x, op.Sigmoid(op.Add(x, scale)))"),
        "outputs",
        "scaled-swish",
    ),
}


@pytest.fixture
def plugin(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "planted.py"
    sys.modules.pop("planted", None)


def imported(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_reported_by_name(bug: str, plugin: Path) -> None:
    (old, new), clause, rule = PLANTED[bug]
    text = PASS.read_text()
    assert text.count(old) == 1
    plugin.write_text(text.replace(old, new))
    with pytest.raises(lwc.verify.PassBrokenError) as caught:
        lwc.verify.check_pass(imported(plugin).FuseSwish, folder=plugin.parent / "found")
    message = str(caught.value)
    assert message.startswith(f"fuse-swish breaks its contract ({clause})\n")
    assert f"\n  its rewrites: {rule} x1\n" in message
    assert caught.value.counterexample.nodes <= 4
    assert f"--check-contract --load-pass-plugin={plugin}" in message


@pytest.mark.slow
def test_the_example_package_is_installed_and_tested(tmp_path: Path) -> None:
    package = tmp_path / "lwc-swish"
    page = tmp_path / "page.md"
    page.write_text(
        "```console\n"
        f"$ cp -r {EXAMPLE} lwc-swish\n"
        "$ python -m pip install --quiet --no-deps --target site ./lwc-swish\n"
        "$ lwc-opt --list-passes | grep -A1 fuse-swish\n"
        "fuse-swish\n"
        "    (of package 'lwc-swish')\n"
        "$ lwc-opt gates.onnxtxt -p canonicalize,fuse-swish --verify=numeric -o fused.onnxtxt\n"
        "…\n"
        " 2 fuse-swish    2 -> 1 nodes, 0 B, 1 rewrites, outputs within 0 on 6 feeds, 0.25 s\n"
        "…\n"
        "$ cd lwc-swish && python -m pytest -q -p no:cacheprovider\n"
        "…\n"
        "5 passed in 20.00s\n"
        "```\n"
    )
    (tmp_path / "gates.onnxtxt").write_text(
        '<ir_version: 10, opset_import: ["" : 18]>\n'
        "gates (float[batch, 8] x) => (float[batch, 8] y) { s = Sigmoid (x) y = Mul (x, s) }\n"
    )
    path = os.pathsep.join([str(tmp_path / "site"), str(ROOT)])
    Page(page, tmp_path.resolve(), {**BUILD, "PYTHONPATH": path}).run()
    assert not (package / "src" / "build").exists()
