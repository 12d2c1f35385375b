"""Pipelines as YAML."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from lwc.core.errors import InputError, UsageError
from lwc.pipeline.config import PipelineConfig, from_yaml, read_config, to_yaml
from lwc.pipeline.passes import Pass, PassContext, PassResult
from lwc.pipeline.registry import Registry
from lwc.pipeline.spec import parse


@dataclass(frozen=True)
class Tidy(Pass):
    """Tidy up."""

    name: ClassVar[str] = "tidy"
    free_options: ClassVar[str] = "dims"

    bits: int = 4
    rate: float = 0.5
    fast: bool = False
    note: str | None = None
    ops: tuple[str, ...] = ("MatMul",)
    dims: tuple[tuple[str, int], ...] = ()

    def run(self, module: object, ctx: PassContext) -> PassResult:
        return PassResult(False)


@pytest.fixture(scope="module")
def registry() -> Registry:
    registry = Registry()
    registry.add(Tidy)
    return registry


def test_everything_is_read(registry: Registry) -> None:
    text = """
# a comment
passes:
  - tidy
  - tidy: {bits: 8, rate: 1e-5, ops: [MatMul, Gemm], fast: true}
  - tidy:
      ops:
        - "a b"
      note: null
      batch: 1
  - tidy{bits=2},tidy{bits=3}
bind: {batch: 1, "past + 1": 128}
require-match: {tidy: 2}
verify: numeric
seed: 7
threads: 2
max-memory: 1000000
grant: [the mask, positions]
"""
    assert from_yaml(text, registry) == PipelineConfig(
        passes=(
            Tidy(),
            Tidy(bits=8, rate=1e-5, ops=("MatMul", "Gemm"), fast=True),
            Tidy(ops=("a b",), dims=(("batch", 1),)),
            Tidy(bits=2),
            Tidy(bits=3),
        ),
        bind={"batch": 1, "past + 1": 128},
        require_match={"tidy": 2},
        verify="numeric",
        seed=7,
        threads=2,
        max_memory=1_000_000,
        grant=("the mask", "positions"),
    )


def test_the_pipeline_may_be_one_text(registry: Registry) -> None:
    config = from_yaml("passes: tidy,tidy{bits=8 ops=MatMul,Gemm}", registry)
    assert config.passes == parse("tidy,tidy{bits=8 ops=MatMul,Gemm}", registry)


@pytest.mark.parametrize("text", ["", "# nothing\n", "passes:\n", "passes: []\n", "bind: {}\n"])
def test_empty_is_the_empty_pipeline(text: str, registry: Registry) -> None:
    assert from_yaml(text, registry) == PipelineConfig()


def test_it_prints_what_a_person_would_write(registry: Registry) -> None:
    config = PipelineConfig((Tidy(), Tidy(bits=8, ops=("MatMul", "Gemm"))), bind={"batch": 1})
    assert to_yaml(config) == (
        "passes:\n- tidy\n- tidy: {bits: 8, ops: [MatMul, Gemm]}\nbind: {batch: 1}\n"
    )


@pytest.mark.parametrize(
    "word",
    ["none", "null", "true", "no", "1", "1e5", "~", "", "*.weight", "a: b", "#", "é\n\t", "-"],
)
def test_strings_that_yaml_would_take_for_something_else(word: str, registry: Registry) -> None:
    config = PipelineConfig((Tidy(note=word, ops=(word, "x")),), bind={word: 1}, grant=(word,))
    assert from_yaml(to_yaml(config), registry) == config


def test_a_free_option_named_like_a_declared_one(registry: Registry) -> None:
    config = PipelineConfig((Tidy(dims=(("bits", 3), ("batch", 1))),))
    assert from_yaml(to_yaml(config), registry) == config


@pytest.mark.parametrize(
    ("text", "message", "line", "caret"),
    [
        ("passes: [tidi]", "unknown pass 'tidi' (did you mean 'tidy'?)", "tidi", 0),
        ("passes:\n- tidi: {}", "unknown pass 'tidi'", "- tidi: {}", 2),
        ("passes:\n- tidy: {bits: four}", "expected int, got 'four'", "- tidy: {bits: four}", 15),
        ("passes:\n- tidy: {bits: 1, bits: 2}", "given twice", "- tidy: {bits: 1, bits: 2}", 18),
        ("passes:\n- tidy: {fast: yes}", "expected bool", "- tidy: {fast: yes}", 15),
        ("passes:\n- tidy: [4]", "expected a mapping", "- tidy: [4]", 8),
        ("passes:\n- {tidy: {}, tody: {}}", "one pass here", "- {tidy: {}, tody: {}}", 2),
        ("passes:\n- tidy: {ops: [[a]]}", "a single value", "- tidy: {ops: [[a]]}", 15),
        ("bnid: {}", "unknown setting 'bnid' (did you mean 'bind'?)", "bnid: {}", 0),
        ("seed: 1\nseed: 2", "'seed' is given twice", "seed: 2", 0),
        ("verify: maybe", "expected none|structural|numeric", "verify: maybe", 8),
        ("bind: {batch: one}", "'batch': expected int", "bind: {batch: one}", 14),
        ("passes: [tidy", "not YAML", "passes: [tidy", 13),
        ("- tidy", "expected a mapping", "- tidy", 0),
    ],
)
def test_errors_point_at_the_place(
    text: str, message: str, line: str, caret: int, registry: Registry
) -> None:
    with pytest.raises(UsageError) as caught:
        from_yaml(text, registry)
    first, shown, pointer = str(caught.value).split("\n")
    assert message in first
    assert shown == f"  {line}"
    assert pointer == f"  {' ' * caret}^"


def test_deep_nesting_is_an_error_of_usage(registry: Registry) -> None:
    with pytest.raises(UsageError, match="nests too deeply"):
        from_yaml("passes: " + "[" * 100_000, registry)


def test_a_file_is_named_in_its_errors(tmp_path: Path, registry: Registry) -> None:
    file = tmp_path / "p.yaml"
    file.write_text("passes: [tidy]\nsed: 1\n")
    with pytest.raises(UsageError, match=r"p\.yaml: unknown setting 'sed'"):
        read_config(str(file), registry)
    with pytest.raises(InputError, match=r"no\.yaml: cannot read the configuration: No such file"):
        read_config(str(tmp_path / "no.yaml"), registry)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        read_config(str(file), registry)
