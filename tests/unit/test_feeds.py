"""Feeds: what inputs mean, valid random values, shapes found by trial, text, files."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.calibration.feeds import FeedSpec, dim_names, load_feeds, make_feed
from lwc.calibration.inputs import InputRole, RoleKind, input_role
from lwc.calibration.text import id_input, load_tokenizer, text_feeds, token_feed, windows
from lwc.calibration.trials import working_feeds
from lwc.core.errors import InputError, LwcError
from lwc.core.module import Module

HEADER = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "f" : 1]>\n'


def parse(text: str, functions: str = "") -> Module:
    return Module(ir.from_onnx_text(HEADER + text + functions))


def role(module: Module, name: str) -> InputRole:
    return input_role(module, next(v for v in module.graph.inputs if v.name == name))


def zeros(kind: str, name: str, *shape: int) -> str:
    """Spell an initializer in ONNX text."""
    return f"{kind}{list(shape)} {name} = {{{', '.join('0' * math.prod(shape))}}}"


TABLE, KINDS, PLACES = (
    zeros("float", name, rows, 4) for name, rows in (("table", 11), ("kinds", 2), ("places", 7))
)


@pytest.fixture
def encoder() -> Module:
    return parse(
        "g (int64[batch, seq] a, int32[batch, seq] b, int64[batch, seq] c, int64[batch, seq] "
        "position_ids) => (float[batch, seq, 4] y)\n"
        f"<{TABLE}, {KINDS}, {PLACES}>\n"
        "{ a2 = Identity(a) words = Gather(table, a2) b2 = Cast<to=7>(b) types = Gather(kinds, b2)"
        " at = Gather(places, position_ids) s = Add(words, types) s2 = Add(s, at)"
        " c2 = Cast<to=1>(c) y = Mul(s2, c2) }"
    )


def test_integers_are_bounded_by_the_tables_they_index(encoder: Module) -> None:
    assert role(encoder, "a") == InputRole(RoleKind.IDS, 0, 10)
    assert role(encoder, "b") == InputRole(RoleKind.IDS, 0, 1)
    assert role(encoder, "c").kind is RoleKind.MASK
    assert role(encoder, "position_ids") == InputRole(RoleKind.POSITIONS, 0, 6)


def test_bounds_through_subgraphs_and_computed_tables() -> None:
    module = parse(
        "g (bool p, int64[n] a, int64[n] b) => (float[n, 4] y, float[n, 4] z)\n"
        f"<{zeros('float', 'small', 5, 4)}, {zeros('uint8', 'stored', 9, 4)}, float one = {{1}}>\n"
        "{ y = If (p) <then_branch = t () => (float[n, 4] u) { u = Gather(small, a) },"
        " else_branch = e () => (float[n, 4] v) { v = Gather(small, a) }>"
        " scaled = DequantizeLinear(stored, one) z = Gather(scaled, b) }"
    )
    assert role(module, "a") == InputRole(RoleKind.IDS, 0, 4)
    assert role(module, "b") == InputRole(RoleKind.IDS, 0, 8)
    assert role(module, "p").kind is RoleKind.FLAG


def test_bounds_by_a_table_that_a_branch_makes() -> None:
    module = parse(
        "g (int64[n] a, bool c) => (float[n, 4] y)\n"
        f"<{TABLE}, {KINDS}>\n"
        "{ t = If(c) <then_branch = t () => (float[p, 4] u) { u = Neg(table) },"
        " else_branch = e () => (float[q, 4] v) { v = Neg(kinds) }>"
        " s = Identity(t) y = Gather(s, a) }"
    )
    assert role(module, "a") == InputRole(RoleKind.IDS, 0, 1)


def test_a_scaled_table_whose_scale_comes_first_says_nothing() -> None:
    module = parse(
        "g (int64[n] a) => (float[n, 4] y)\n"
        f"<{TABLE}, float unit = {{1}}>\n"
        "{ s = Mul(unit, table) y = Gather(s, a) }"
    )
    assert role(module, "a").kind is RoleKind.MASK


def test_bounds_of_a_function_argument() -> None:
    module = parse(
        "g (int64[n] c) => (float[n, 4] w) { w = f.look(c) }",
        '\n<domain: "f", opset_import: ["" : 21]>\nlook (ids) => (out)\n'
        "{ table = Constant<value = float[3, 2] {1,2,3,4,5,6}>() out = Gather(table, ids) }",
    )
    found = role(module, "c")
    assert found.kind is RoleKind.IDS
    assert found.high == 2


def test_compared_with_constants() -> None:
    module = parse(
        "g (int32[n, 8] bytes, int64 rate) => (bool[n, 8, 4] y, bool z)\n"
        "<int32[4] codes = {0, 1, 2, 3}, int64 sixteen = {16000}, int64[3] shape = {0, 8, 1}>\n"
        "{ r = Reshape(bytes, shape) y = Equal(r, codes) z = Equal(sixteen, rate) }"
    )
    assert role(module, "bytes") == InputRole(RoleKind.IDS, 0, 3)
    assert make_feed(module)["rate"] == 16000


def test_roles_by_type_rank_and_name() -> None:
    module = parse(
        "g (float[n, 3, h, w] photo, float[n, 5] plain, float[n, t] attention_mask, bool flag,"
        " bool[n] mask, string[n] words, int64 sr) => (float[n, 5] y) { y = Identity(plain) }"
    )
    kinds = {value.name: input_role(module, value).kind for value in module.graph.inputs}
    assert kinds == {
        "photo": RoleKind.IMAGE,
        "plain": RoleKind.NUMBERS,
        "attention_mask": RoleKind.MASK,
        "flag": RoleKind.FLAG,
        "mask": RoleKind.MASK,
        "words": RoleKind.TEXT,
        "sr": RoleKind.IDS,
    }
    feed = make_feed(module, {"n": 2, "t": 3})
    assert {name: array.shape for name, array in feed.items()} == {
        "photo": (2, 3, 224, 224),
        "plain": (2, 5),
        "attention_mask": (2, 3),
        "flag": (),
        "mask": (2,),
        "words": (2,),
        "sr": (),
    }
    assert feed["photo"].min() >= 0
    assert feed["photo"].max() <= 1
    assert feed["plain"].min() < 0
    assert feed["attention_mask"].all()
    assert feed["mask"].all()
    assert not feed["flag"]
    assert feed["sr"] == 16000
    assert feed["words"].dtype == object


def test_values_are_valid_and_seeded(encoder: Module) -> None:
    feed = make_feed(encoder, {"batch": 40, "seq": 7}, seed=3)
    assert feed["a"].dtype == np.int64
    assert feed["b"].dtype == np.int32
    assert set(np.unique(feed["a"])) == set(range(11))
    assert set(np.unique(feed["b"])) == {0, 1}
    assert (feed["c"] == 1).all()
    assert (feed["position_ids"] == np.arange(7)).all()
    again = make_feed(encoder, {"batch": 40, "seq": 7}, seed=3)
    other = make_feed(encoder, {"batch": 40, "seq": 7}, seed=4)
    assert all((feed[name] == again[name]).all() for name in feed)
    assert (feed["a"] != other["a"]).any()


def test_positions_stay_within_their_table(encoder: Module) -> None:
    feed = make_feed(encoder, {"seq": 9})
    assert feed["position_ids"].tolist() == [[0, 1, 2, 3, 4, 5, 6, 0, 1]]


def test_dimensions_expressions_and_anonymous_ones() -> None:
    module = parse(
        "g (int64[batch, total] mask, float[batch, 2, past, 8] keys, float[?, ?] x)"
        " => (float[batch] y) { y = Identity(keys) }"
    )
    module.graph.inputs[0].shape = ir.Shape(["batch", "past + seq"])
    module.graph.inputs[2].shape = ir.Shape(["?", None])
    assert dim_names(module) == {
        "batch": "batch",
        "past": "past",
        "seq": "length",
        "x:0": "batch",
        "x:1": "length",
    }
    feed = make_feed(module, {"past": 5, "seq": 3, "x:1": 9})
    assert feed["mask"].shape == (1, 8)
    assert feed["keys"].shape == (1, 2, 5, 8)
    assert feed["x"].shape == (1, 9)


def test_unknown_dimension_is_an_error(encoder: Module) -> None:
    with pytest.raises(InputError, match=r"no input has a dimension 'sequence' .*batch, seq"):
        make_feed(encoder, {"sequence": 3})


def test_spec_overrides(encoder: Module) -> None:
    mask = np.zeros((2, 4), np.int64)
    spec = FeedSpec(dims={"batch": 2, "seq": 4}, ranges={"a": (3, 5)}, values={"c": mask})
    feed = make_feed(encoder, spec=spec)
    assert feed["a"].shape == (2, 4)
    assert 3 <= feed["a"].min() <= feed["a"].max() <= 5
    assert feed["c"] is mask


def test_input_without_shape_needs_a_value() -> None:
    module = parse("g (float x) => (float y) { y = Identity(x) }")
    module.graph.inputs[0].shape = None
    with pytest.raises(LwcError, match=r"input 'x': it has no known shape .*values="):
        make_feed(module)
    x = np.ones(3, np.float32)
    assert make_feed(module, spec=FeedSpec(values={"x": x}))["x"] is x


def test_inputs_with_defaults_are_not_fed() -> None:
    module = parse("g (float[2] x, float[2] b = {1, 2}) => (float[2] y) { y = Add(x, b) }")
    assert list(make_feed(module)) == ["x"]


def run_feeds(module: Module, count: int = 2, spec: FeedSpec | None = None) -> list[dict[str, Any]]:
    with OnnxRuntimeBackend().compile(module, threads=1, optimize="none") as compiled:
        found = working_feeds(module, compiled, count, spec=spec or FeedSpec())
        for feed in found:
            compiled.run(feed)
    assert found
    return found


def test_working_feeds_differ_in_every_dimension() -> None:
    module = parse(
        f"g (int64[batch, seq] a) => (float[batch, seq, 4] y) <{TABLE}>\n{{ y = Gather(table, a) }}"
    )
    first, second = (feed["a"].shape for feed in run_feeds(module))
    assert first[0] != second[0]
    assert first[1] != second[1]
    assert {feed["a"].shape for feed in run_feeds(module, 3)} >= {first, second}


def test_working_feeds_find_a_height_the_file_does_not_state() -> None:
    """A MatMul over the height wants 48."""
    module = parse(
        "g (float[N, 3, H, W] x) => (float[N, 3, W, 2] y)\n"
        f"<{zeros('float', 'w', 48, 2)}>\n"
        "{ t = Transpose<perm = [0, 1, 3, 2]>(x) y = MatMul(t, w) }"
    )
    shapes = [feed["x"].shape for feed in run_feeds(module)]
    assert [shape[2] for shape in shapes] == [48, 48]
    assert shapes[0] != shapes[1]


@pytest.mark.parametrize("name", [None, "state_d1"])
def test_working_feeds_find_that_an_unnamed_dimension_is_the_batch(name: str | None) -> None:
    module = parse(
        "g (float[b, s] x, float[2, c, 1] state) => (float[b, s] y)\n"
        "<int64 zero = {0}> { first = Gather(state, zero) y = Concat<axis = 1>(x, first) }"
    )
    module.graph.inputs[1].shape = ir.Shape([2, name, 1])
    for feed in run_feeds(module):
        assert feed["state"].shape[1] == feed["x"].shape[0]


def test_working_feeds_keep_what_the_user_fixed() -> None:
    module = parse("g (float[b, s] x) => (float[b, s] y) { y = Identity(x) }")
    shapes = [feed["x"].shape for feed in run_feeds(module, spec=FeedSpec(dims={"s": 5}))]
    assert [shape[1] for shape in shapes] == [5, 5]
    assert shapes[0][0] != shapes[1][0]


def test_fixed_dimensions_give_one_feed() -> None:
    module = parse("g (float[2, 3] x) => (float[2, 3] y) { y = Identity(x) }")
    assert len(run_feeds(module)) == 1


def test_a_model_that_never_runs_is_an_error_with_the_first_reason() -> None:
    module = parse(
        "g (float[n, 7] x) => (float[m] y) <int64[1] five = {5}> { y = Reshape(x, five) }"
    )
    with pytest.raises(LwcError, match=r"none of the input shapes tried.*Reshape"):
        run_feeds(module)


def test_load_feeds(tmp_path: Path) -> None:
    for index in (1, 0):
        np.savez(tmp_path / f"{index}.npz", x=np.full(2, index))
    assert [feed["x"][0] for feed in load_feeds(tmp_path)] == [0, 1]
    assert [list(feed) for feed in load_feeds(tmp_path / "1.npz")] == [["x"]]


def test_load_feeds_errors(tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("nothing")
    np.save(tmp_path / "one.npy", np.ones(2))
    np.savez(tmp_path / "objects.npz", x=np.array([{}], object))
    for name in ("text.npz", "one.npy", "objects.npz", "absent.npz"):
        with pytest.raises(InputError, match=name):
            list(load_feeds(tmp_path / name))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no \.npz"):
        list(load_feeds(tmp_path / "empty"))


def test_windows_cover_every_position_once() -> None:
    assert list(windows(10, 4, 4)) == [(0, 4, 0), (4, 8, 4), (8, 10, 8)]
    assert list(windows(10, 4, 2)) == [(0, 4, 0), (2, 6, 4), (4, 8, 6), (6, 10, 8)]
    assert list(windows(3, 4, 1)) == [(0, 3, 0)]
    assert list(windows(0, 4, 1)) == []
    for count in range(1, 30):
        for window in range(1, 8):
            for stride in range(1, window + 1):
                found = list(windows(count, window, stride))
                scored = [at for _, stop, first in found for at in range(first, stop)]
                assert scored == list(range(count))
                assert all(start <= first for start, _, first in found)
                assert all(stop - start <= window for start, stop, _ in found)
    with pytest.raises(ValueError, match="between 1 and the window"):
        list(windows(10, 4, 5))


@pytest.fixture
def decoder() -> Module:
    module = parse(
        "g (int64[batch, seq] tokens, int64[batch, seq] types, int64[batch, total] attention_mask,"
        " int64[batch, seq] position_ids, float[batch, 2, past, 8] keys) => (float[batch, seq] y)\n"
        f"<{zeros('float', 'table', 50, 4)}, {KINDS}>\n"
        "{ a = Gather(table, tokens) b = Gather(kinds, types) y = Add(a, b) }"
    )
    module.graph.inputs[2].shape = ir.Shape(["batch", "past + seq"])
    return module


def test_token_feed(decoder: Module) -> None:
    ids = np.array([[5, 6, 7], [8, 9, 49]])
    assert id_input(decoder).name == "tokens"
    feed = token_feed(decoder, ids)
    assert feed["tokens"].tolist() == ids.tolist()
    assert feed["types"].tolist() == [[0] * 3] * 2
    assert feed["attention_mask"].tolist() == [[1] * 3] * 2
    assert feed["position_ids"].tolist() == [[0, 1, 2]] * 2
    assert feed["keys"].shape == (2, 2, 0, 8)


def test_token_feed_needs_token_ids() -> None:
    module = parse("g (float[n, 5] x) => (float[n, 5] y) { y = Identity(x) }")
    with pytest.raises(LwcError, match="takes no token ids"):
        token_feed(module, np.zeros((1, 3), np.int64))


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    words = tokenizers.models.WordLevel({"a": 0, "b": 1, "c": 2, "<unk>": 3}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(words)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=64)
    tokenizer.enable_truncation(4)
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    assert json.loads(file.read_text())["padding"]
    return file


def test_tokenizers_neither_pad_nor_truncate(tokenizer_file: Path) -> None:
    model = tokenizer_file.with_name("model.onnx")
    model.write_bytes(b"")
    for path in (tokenizer_file, tokenizer_file.parent, model):
        assert list(load_tokenizer(path)("a b c d a b")) == [0, 1, 2, 3, 0, 1]


def test_tokenizer_errors(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="not a tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "model.onnx").write_bytes(b"")
    with pytest.raises(InputError, match=r"no tokenizer\.json beside it"):
        load_tokenizer(tmp_path / "sub" / "model.onnx")


def test_text_feeds_batch_full_windows(decoder: Module, tokenizer_file: Path) -> None:
    text = " ".join("abcabcabcab")
    feeds = list(text_feeds(decoder, tokenizer_file, text, window=3, batch=2))
    assert [feed["tokens"].tolist() for feed in feeds] == [
        [[0, 1, 2], [0, 1, 2]],
        [[0, 1, 2]],
        [[0, 1]],
    ]
    overlapping = list(text_feeds(decoder, tokenizer_file, "a b c a", window=3, stride=1))
    assert [feed["tokens"].tolist() for feed in overlapping] == [[[0, 1, 2]], [[1, 2, 0]]]
