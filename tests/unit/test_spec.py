"""The pipeline's textual grammar: what is read, what is printed, what each error points at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from support import Idle

from lwc.core.errors import UsageError
from lwc.pipeline.grammar import parse_specs, print_specs
from lwc.pipeline.options import options_of, parse_value, type_name
from lwc.pipeline.passes import Pass
from lwc.pipeline.registry import Registry
from lwc.pipeline.spec import parse, resolve, to_spec, to_text


@dataclass(frozen=True)
class Tidy(Idle):
    """Tidy up."""

    name: ClassVar[str] = "tidy"


@dataclass(frozen=True)
class Everything(Idle):
    """Has an option of every kind."""

    name: ClassVar[str] = "every-thing"

    count: int = 3
    ratio: float = 0.5
    fast: bool = False
    label: str = "plain"
    bits: Literal[4, 8] = 4
    mode: Literal["slow", "quick"] = "slow"
    limit: int | None = None
    note: str | None = None
    either: int | str = 1
    ops: tuple[str, ...] = ("MatMul",)
    sizes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Convert(Idle):
    """Has a required positional option."""

    name: ClassVar[str] = "convert"
    positional: ClassVar[str] = "to"

    to: Literal["float16", "bfloat16"]
    keep_io: bool = False


@dataclass(frozen=True)
class Bind(Idle):
    """Takes free options."""

    name: ClassVar[str] = "bind"
    free_options: ClassVar[str] = "dims"

    dims: tuple[tuple[str, int], ...] = ()
    strict: bool = False

    def __post_init__(self) -> None:
        for name, size in self.dims:
            if size < 1:
                raise ValueError(f"dimension '{name}' must be positive")


@pytest.fixture(scope="module")
def registry() -> Registry:
    registry = Registry()
    for cls in (Tidy, Everything, Convert, Bind):
        registry.add(cls)
    return registry


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", []),
        ("  ", []),
        ("tidy", [Tidy()]),
        ("tidy{}", [Tidy()]),
        (" tidy ,\n tidy ", [Tidy(), Tidy()]),
        ("every-thing{count=-7 ratio=1e-5}", [Everything(count=-7, ratio=1e-5)]),
        ("every-thing{ratio=2 fast=true}", [Everything(ratio=2.0, fast=True)]),
        ("every-thing{ratio=-inf}", [Everything(ratio=float("-inf"))]),
        ("every-thing{bits=8 mode=quick}", [Everything(bits=8, mode="quick")]),
        ("every-thing{limit=5}", [Everything(limit=5)]),
        ("every-thing{limit=none note=none}", [Everything()]),
        ('every-thing{note="none"}', [Everything(note="none")]),
        ('every-thing{either="1"}', [Everything(either="1")]),
        ("every-thing{either=1}", [Everything(either=1)]),
        ("every-thing{ops=MatMul,Gemm}", [Everything(ops=("MatMul", "Gemm"))]),
        ("every-thing{ops= sizes=1,2}", [Everything(ops=(), sizes=(1, 2))]),
        ("every-thing{label='it is \"so\", {yes}'}", [Everything(label='it is "so", {yes}')]),
        (r'every-thing{label="a\n\"b\\"}', [Everything(label='a\n"b\\')]),
        ("every-thing{label=/model/layers.0/attn:0}", [Everything(label="/model/layers.0/attn:0")]),
        ("every-thing{\n  count=1\n  bits=8\n}", [Everything(count=1, bits=8)]),
        ("convert{float16}", [Convert("float16")]),
        ("convert{bfloat16 keep-io=true}", [Convert("bfloat16", keep_io=True)]),
        ("convert{keep-io=true to=float16}", [Convert("float16", keep_io=True)]),
        ("bind{batch=1 past_len=128}", [Bind((("batch", 1), ("past_len", 128)))]),
        ('bind{"past + 1"=4 strict=true}', [Bind((("past + 1", 4),), strict=True)]),
        ('bind{"strict"=4}', [Bind((("strict", 4),))]),
    ],
)
def test_text_is_read(text: str, expected: list[Pass], registry: Registry) -> None:
    assert list(parse(text, registry)) == expected


@pytest.mark.parametrize(
    ("pass_", "text"),
    [
        (Tidy(), "tidy"),
        (Everything(), "every-thing"),
        (Everything(ratio=1e-5, fast=True), "every-thing{ratio=1e-05 fast=true}"),
        (Everything(ops=("A", "B c")), 'every-thing{ops=A,"B c"}'),
        (Everything(ops=()), "every-thing{ops=}"),
        (Everything(note="none", either="1"), 'every-thing{note="none" either="1"}'),
        (Convert("float16"), "convert{float16}"),
        (Convert("bfloat16", keep_io=True), "convert{bfloat16 keep-io=true}"),
        (Bind((("a", 1), ("strict", 2))), 'bind{a=1 "strict"=2}'),
    ],
)
def test_pass_prints_only_what_differs(pass_: Pass, text: str, registry: Registry) -> None:
    assert to_spec(pass_) == text
    assert parse(text, registry) == (pass_,)


@pytest.mark.parametrize(
    ("text", "caret", "message"),
    [
        ("tidi", "^", "unknown pass 'tidi' (did you mean 'tidy'?)"),
        ("tidy,evry-thing", "     ^", "did you mean 'every-thing'?"),
        ("tidy,", "    ^", "a pass must follow ','"),
        (",tidy", "^", "expected the name of a pass"),
        ("tidy tidy", "     ^", "expected ',' or the end"),
        ("tidy}", "    ^", "'}' closes nothing"),
        ("tidy{", "    ^", "'{' is never closed"),
        ("every-thing{count=1", "           ^", "'{' is never closed"),
        ("every-thing{cuont=1}", "            ^", "no option 'cuont' (did you mean 'count'?)"),
        ("tidy{a=1}", "     ^", "no option 'a' (it has no options)"),
        ("every-thing{count=x}", "                  ^", "option 'count': expected int, got 'x'"),
        ('every-thing{count="1"}', "                  ^", "expected int"),
        ("every-thing{count=1.5}", "                  ^", "expected int"),
        ("every-thing{ratio=nan}", "                  ^", "expected float"),
        ("every-thing{fast=yes}", "                 ^", "expected bool, got 'yes'"),
        ("every-thing{bits=5}", "                 ^", "expected 4|8, got '5'"),
        ("every-thing{count=1,2}", "                  ^", "expected int, got a list of 2"),
        ("every-thing{count=}", "            ^", "expected int, got nothing"),
        ("every-thing{count=1 count=2}", "                    ^", "'count' is given twice"),
        ("every-thing{count=1, fast=true}", "                   ^", "separated by spaces"),
        ("every-thing{count=1,fast=true}", "                   ^", "spaces, not commas"),
        ("every-thing{label=a=b}", "                   ^", "must be in quotes"),
        ('every-thing{label="a}', "                  ^", "never closed"),
        ('every-thing{label="a"bits=4}', "                     ^", "expected a space or '}'"),
        ("every-thing{float16}", "            ^", "takes options as name=value"),
        ("convert", "^", "pass 'convert' needs option 'to' (float16|bfloat16)"),
        ("convert{keep-io=true float16}", "                     ^", "'to' comes first"),
        ("convert{float16 to=float16}", "                ^", "'to' is given twice"),
        ("convert{float15}", "        ^", "expected float16|bfloat16, got 'float15'"),
        ("bind{batch=one}", "           ^", "option 'batch': expected int, got 'one'"),
        ("bind{batch=1 batch=2}", "             ^", "'batch' is given twice"),
        ("tidy,bind{batch=0}", "     ^", "dimension 'batch' must be positive"),
    ],
)
def test_errors_point_at_the_place(text: str, caret: str, message: str, registry: Registry) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text, registry)
    first, shown, pointer = str(caught.value).split("\n")
    assert message in first
    assert shown == f"  {text}"
    assert pointer == f"  {caret}"
    assert caught.value.exit_code == 2


def test_a_text_of_several_lines_shows_the_line_with_the_error(registry: Registry) -> None:
    with pytest.raises(UsageError) as caught:
        parse("tidy,\n  evry-thing,\ntidy", registry)
    assert str(caught.value).split("\n")[1:] == ["    evry-thing,", "    ^"]


def test_a_value_of_a_wrong_type_cannot_be_printed() -> None:
    with pytest.raises(UsageError, match=r"option 'bits': expected 4\|8, got 5"):
        to_spec(Everything(bits=5))  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="option 'count': expected int, got True"):
        to_spec(Everything(count=True))


def test_resolve_takes_text_passes_and_both(registry: Registry) -> None:
    both = resolve(["tidy,convert{float16}", Everything(bits=8)], registry)
    assert both == (Tidy(), Convert("float16"), Everything(bits=8))
    assert resolve(Tidy()) == (Tidy(),)
    assert resolve("tidy", registry) == (Tidy(),)
    with pytest.raises(UsageError, match="not int"):
        resolve([3])  # type: ignore[list-item]


def test_syntax_is_kept_without_knowing_the_passes() -> None:
    text = 'a,b-c{1,2 x="y z" "q r"=s,"t"}'
    assert print_specs(parse_specs(text)) == text


def test_types_are_named() -> None:
    names = {option.name: type_name(option.type) for option in options_of(Everything)}
    assert names == {
        "count": "int",
        "ratio": "float",
        "fast": "bool",
        "label": "str",
        "bits": "4|8",
        "mode": "slow|quick",
        "limit": "int or none",
        "note": "str or none",
        "either": "int or str",
        "ops": "list of str",
        "sizes": "list of int",
    }


@pytest.mark.parametrize(
    "hint", [dict[str, int], list[int], bytes, tuple[int, str], int | tuple[int, ...]]
)
def test_a_type_without_a_spelling_is_refused(hint: object) -> None:
    with pytest.raises(UsageError, match="cannot have the type"):
        type_name(hint)


def test_large_integers_and_floats_are_exact() -> None:
    for value in (2**80, -(2**63)):
        assert parse_value(int, parse_specs(f"p{{a={value}}}")[0].arguments[0].values) == value
    assert to_text([Everything(ratio=0.1 + 0.2)]) == "every-thing{ratio=0.30000000000000004}"
