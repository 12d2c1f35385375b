"""docs/pipeline_syntax.md: every example in it works and every error is shown as it is."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path

import pytest

from lwc.cli.opt import main
from lwc.pipeline.config import from_yaml, to_yaml
from lwc.pipeline.registry import Registry
from lwc.pipeline.spec import parse

TEXT = (Path(__file__).parents[2] / "docs" / "pipeline_syntax.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    return [text for name, text in found if name == language]


@pytest.mark.parametrize("block", [each for each in blocks("") if each.startswith("$ lwc-opt")])
def test_errors_are_shown_as_they_are(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, _, expected = block.partition("\n")
    assert main(shlex.split(command)[2:]) == 2
    assert capsys.readouterr().err == expected


def test_yaml() -> None:
    (text,) = blocks("yaml")
    config = from_yaml(text)
    assert [pass_.name for pass_ in config.passes] == [
        "canonicalize",
        "quantize-weights",
        "canonicalize",
        "infer-shapes",
    ]
    assert config.max_memory == 2_000_000_000
    assert from_yaml(to_yaml(config)) == config


def test_python() -> None:
    objects, own = blocks("python")
    exec(compile(objects, "docs", "exec"), {})
    module = types.ModuleType("lwc_docs_example")
    sys.modules[module.__name__] = module
    try:
        exec(compile(own, "docs", "exec"), module.__dict__)
        registry = Registry()
        registry.add(module.CountRelus)
        (pass_,) = parse("count-relus{warn-above=3}", registry)
        assert pass_ == module.CountRelus(warn_above=3)
    finally:
        del sys.modules[module.__name__]


def test_pipelines_in_the_prose() -> None:
    found = [
        text
        for text in re.findall(r"`([a-z][a-z-]*\{[^`]*\})`", TEXT)
        if not text.startswith("passes:")
    ]
    assert len(found) >= 4
    for text in found:
        assert parse(text)
