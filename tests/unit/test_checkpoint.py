"""Results that are kept: what was put comes back or is computed again, and keys tell all apart."""

from __future__ import annotations

import dataclasses
import math
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import module_of

import lwc.calibration.checkpoint
from lwc.analysis.manager import AnalysisManager
from lwc.backends.onnxruntime.session import make_runner
from lwc.calibration.checkpoint import (
    CheckpointFolder,
    Trail,
    feeds_digest,
    module_digest,
    surroundings,
)
from lwc.calibration.collect import collect
from lwc.calibration.statistics import AbsMax, Gram, Histogram, MeanAbs, Sample, Statistic
from lwc.core.errors import InputError, LwcError
from lwc.core.module import Module
from lwc.pipeline.passes import PassContext

Array = np.ndarray[Any, Any]

MODEL = """g (float[n, 4] x, int64[n] i) => (float[n, 2] y)
    <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}>
    { a = LeakyRelu <alpha = 0.5> (x)
      b = MatMul (a, w)
      c = If (t) <then_branch = p () => (float[n, 2] d) <float[2] u = {1, 2}> { d = Add (b, u) },
                  else_branch = q () => (float[n, 2] e) { e = Neg (b) }>
      y = Relu (c) }""".replace("int64[n] i", "int64[n] i, bool t")

TYPES = [np.float32, np.float64, np.float16, np.uint8, np.int64, np.bool_]


def unheard(message: str) -> None:
    raise AssertionError(message)


@st.composite
def entries(draw: Callable[..., Any]) -> dict[str, Array]:
    random = np.random.default_rng(draw(st.integers(0, 99)))
    shapes = st.lists(st.integers(0, 4), max_size=3)
    made = {}
    for name in draw(st.lists(st.text(max_size=4), max_size=3, unique=True)):
        shape, dtype = draw(shapes), np.dtype(draw(st.sampled_from(TYPES)))
        size = math.prod(shape) * dtype.itemsize
        content = random.integers(0, 2 if dtype == np.bool_ else 256, size, np.uint8)
        made[name] = content.view(dtype).reshape(shape)
    return made


@settings(deadline=None, derandomize=True)  # disks take their time
@given(entries())
def test_what_was_put_comes_back(entry: dict[str, Array]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        checksum = CheckpointFolder(folder).put("things", "k", entry)
        found = CheckpointFolder(folder).get("things", "k", unheard)
        assert found is not None
        assert found[1] == checksum
        assert list(found[0]) == list(entry)
        for name, array in found[0].items():
            assert (array.dtype, array.shape) == (entry[name].dtype, entry[name].shape)
            assert array.tobytes() == entry[name].tobytes()
            assert array.flags.aligned
            assert array.flags.writeable
        assert len(list(Path(folder).iterdir())) == 1


@settings(deadline=None, derandomize=True)
@given(entries(), st.floats(0, 1), st.integers(1, 255), st.booleans())
def test_a_damaged_file_is_none(
    entry: dict[str, Array], place: float, bits: int, cut: bool
) -> None:
    """A bit that flipped, or an end that is missing, wherever it is."""
    with tempfile.TemporaryDirectory() as folder:
        kept = CheckpointFolder(folder)
        kept.put("things", "k", entry)
        (path,) = Path(folder).iterdir()
        content = bytearray(path.read_bytes())
        at = min(int(place * len(content)), len(content) - 1)
        content[at] ^= bits
        path.write_bytes(content[:at] if cut else content)
        heard: list[str] = []
        assert kept.get("things", "k", heard.append) is None
        assert heard == [f"{path} is damaged; what it held is computed again"]
        kept.put("things", "k", entry)
        assert kept.get("things", "k", unheard) is not None


def test_a_file_under_another_name_is_none(tmp_path: Path) -> None:
    kept = CheckpointFolder(tmp_path / "made")
    kept.put("things", "k", {"a": np.ones(3)})
    (path,) = (tmp_path / "made").iterdir()
    path.rename(path.with_name("things-other.lwc"))
    heard: list[str] = []
    assert kept.get("things", "k", unheard) is None
    assert kept.get("things", "other", heard.append) is None
    assert len(heard) == 1


def test_what_cannot_be_kept(tmp_path: Path) -> None:
    kept = CheckpointFolder(tmp_path)
    with pytest.raises(TypeError, match="'a' of a result holds"):
        kept.put("things", "k", {"a": np.array(["text"])})
    assert not list(tmp_path.iterdir())
    (tmp_path / "things-k.lwc").mkdir()
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        kept.get("things", "k", unheard)
    with pytest.raises(LwcError, match=r"things-k\.lwc: cannot be written"):
        kept.put("things", "k", {})
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(LwcError, match="file: cannot be written: File exists"):
        CheckpointFolder(file)


def test_many_write_one_folder(tmp_path: Path) -> None:
    """Whoever looks finds a whole result or none, and nothing temporary is left."""
    wanted = {str(key): np.full(1 << 14, key) for key in range(4)}

    def work(turn: int) -> None:
        kept = CheckpointFolder(tmp_path)
        for key, array in wanted.items():
            found = kept.get("things", key, unheard)
            if found is not None:
                np.testing.assert_array_equal(found[0]["a"], array)
            kept.put("things", key, {"a": array})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(40)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"things-{key}.lwc" for key in wanted
    ]


class Largest(Statistic):
    """The largest number of each batch: a statistic that grows."""

    def __init__(self) -> None:
        self.found: list[Any] = []

    def update(self, batch: Array) -> None:
        self.found.append(batch.max(axis=0))


class Few(Sample):
    """Fewer rows than two batches have."""

    def __init__(self) -> None:
        super().__init__(7, seed=3)


@pytest.mark.parametrize("kind", [AbsMax, MeanAbs, Gram, Histogram, Largest, Few])
@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.integers(0, 99), st.integers(0, 3))
def test_a_statistic_goes_on_from_its_state(kind: type[Statistic], seed: int, seen: int) -> None:
    random = np.random.default_rng(seed)
    batches = [random.standard_normal((5, 3)).astype(np.float32) * n for n in range(1, 4)]
    whole, before, after = kind(), kind(), kind()
    for batch in batches:
        whole.update(batch)
    for batch in batches[:seen]:
        before.update(batch)
    with tempfile.TemporaryDirectory() as folder:
        CheckpointFolder(folder).put("things", "k", before.state())
        found = CheckpointFolder(folder).get("things", "k", unheard)
    assert found is not None
    after.restore(found[0])
    for batch in batches[seen:]:
        after.update(batch)
    assert {name: type(each) for name, each in vars(after).items()} == {
        name: type(each) for name, each in vars(whole).items()
    }
    for name, array in whole.state().items():
        np.testing.assert_array_equal(after.state()[name], array)


def feeds_of(seed: int = 0) -> list[dict[str, Array]]:
    random = np.random.default_rng(seed)
    return [
        {
            "x": random.standard_normal((rows, 4)).astype(np.float32),
            "i": random.integers(0, 9, rows),
            "t": np.array(rows % 2 == 0),
        }
        for rows in (2, 3, 2)
    ]


@dataclasses.dataclass
class Run:
    """All that a result rests on."""

    module: Module
    feeds: list[dict[str, Array]]
    spec: str = "p{a=1}"
    facts: Any = ("method", 0.01)
    backend: str = "b 1.0"
    threads: int | None = 1
    version: str = "0.1.0"
    before: Any = 1.0

    def trail(self, folder: str) -> Trail:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("lwc.__version__", self.version)
            kept = CheckpointFolder(folder, surroundings(self.backend, self.threads))
        ctx = PassContext(AnalysisManager(self.module), checkpoint=kept, spec=self.spec)
        made = Trail.begin(ctx, self.module, lambda: self.feeds, self.facts)
        made.put("things", "before", {"a": np.asarray(self.before)})
        made.advance()
        return made


def change_weight(run: Run, at: int) -> None:
    """Flip the last bit of one number, in the main graph or in a branch."""
    graph = list(run.module.graphs())[at % 2]
    (value,) = graph.initializers.values()
    assert value.const_value is not None
    array = value.const_value.numpy().copy()
    array.reshape(-1).view(np.uint32)[at % array.size] ^= 1
    value.const_value = ir.Tensor(array, name=value.name)


def change_token(run: Run, at: int) -> None:
    run.feeds[at % 3]["i"][at % 2] += 1


def change_number(run: Run, at: int) -> None:
    run.feeds[at % 3]["x"].reshape(-1).view(np.uint32)[at % 8] ^= 1


def change_attribute(run: Run, at: int) -> None:
    node = run.module.graph[0]
    node.attributes["alpha"] = ir.AttrFloat32("alpha", 0.5 + (at + 1) / 1024)


def change_node(run: Run, at: int) -> None:
    next(node for node in run.module.nodes() if node.op_type == "Neg").op_type = "Abs"


CHANGES: list[Callable[[Run, int], object]] = [
    change_weight,
    change_token,
    change_number,
    change_attribute,
    change_node,
    lambda run, at: run.feeds.pop(at % 3),
    lambda run, at: run.feeds.append(run.feeds[at % 3]),
    lambda run, at: run.feeds.reverse(),
    lambda run, at: run.feeds[at % 3].update(i=run.feeds[at % 3]["i"].astype(np.int32)),
    lambda run, at: run.feeds[at % 3].update(x=run.feeds[at % 3]["x"].reshape(4, -1)),
    lambda run, at: run.feeds[at % 3].update(z=run.feeds[at % 3].pop("i")),
    lambda run, at: setattr(run, "spec", "p{a=2}"),
    lambda run, at: setattr(run, "facts", ("method", 0.01 + (at + 1) / 1024)),
    lambda run, at: setattr(run, "backend", "b 1.1"),
    lambda run, at: setattr(run, "threads", at + 2),
    lambda run, at: setattr(run, "version", "0.1.1"),
    lambda run, at: setattr(run, "before", 1.0 + (at + 1) / 1024),
]


@settings(deadline=None, derandomize=True)
@given(st.none() | st.sampled_from(CHANGES), st.integers(0, 11))
def test_any_change_is_another_key(change: Callable[[Run, int], object] | None, at: int) -> None:
    plain, changed = Run(module_of(MODEL), feeds_of()), Run(module_of(MODEL), feeds_of())
    if change is not None:
        change(changed, at)
    with tempfile.TemporaryDirectory() as folder:
        plain.trail(folder).put("things", "k", {"a": np.ones(1)})
        trail = changed.trail(folder)
        assert (trail.get("things", "k") is None) == (change is not None)
        assert trail.get("things", "l") is None
        assert trail.get("others", "k") is None


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"])
def test_threads_of_libraries_are_another_key(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change the order of sums."""
    found = []
    for count in ("1", "2", None):
        monkeypatch.delenv(name, raising=False)
        if count is not None:
            monkeypatch.setenv(name, count)
        found.append(surroundings("b 1.0", 1))
    assert len(set(map(repr, found))) == 3


def test_keys_rest_on_contents_alone(tmp_path: Path) -> None:
    """Not on where the weights and feeds lie in memory, nor on the order of a feed's inputs."""
    first, second = module_of(MODEL), module_of(MODEL)
    second.with_source(path="elsewhere.onnx")
    (value,) = second.graph.initializers.values()
    assert value.const_value is not None
    value.const_value = second.store.put_tensor(value.const_value)
    assert module_digest(first) == module_digest(second) == module_digest(second.clone())
    feeds = feeds_of()
    turned = [dict(reversed(feed.items())) for feed in feeds]
    turned[0]["x"] = np.asfortranarray(turned[0]["x"])
    assert feeds_digest(feeds) == feeds_digest(turned)
    words = [np.array(["a", "bc"]), np.array(["a", "bd"])]
    objects = [array.astype(object) for array in words]
    assert len({feeds_digest([{"s": array}]) for array in (*words, *objects)}) == 4
    assert feeds_digest([{"s": objects[0]}]) == feeds_digest([{"s": objects[0].copy()}])


def test_nothing_is_hashed_or_kept_where_it_is_not_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lwc.calibration.checkpoint, "module_digest", unheard)
    monkeypatch.setattr(lwc.calibration.checkpoint, "feeds_digest", unheard)
    module = module_of(MODEL)
    trail = Trail.begin(PassContext(AnalysisManager(module)), module, feeds_of)
    entry = {"a": np.ones(2)}
    assert trail.put("things", "k", entry) is entry
    trail.advance()
    assert trail.get("things", "k") is None
    assert not trail.reaches([[("things", "k")]])


def test_a_trail_tells_whether_all_of_it_is_there(tmp_path: Path) -> None:
    run = Run(module_of(MODEL), feeds_of())
    steps = [[("a", "1"), ("b", "2")], [], [("a", "3")]]
    written = run.trail(str(tmp_path))
    for step in steps:
        assert not run.trail(str(tmp_path)).reaches(steps)
        for kind, name in step:
            written.put(kind, name, {})
        written.advance()
    assert run.trail(str(tmp_path)).reaches(steps)
    next(tmp_path.glob("b-*")).write_bytes(b"")
    assert not run.trail(str(tmp_path)).reaches(steps)


NUMBERS = """g (float[batch, 4] x) => (float[batch, 4] y)
    { a = Abs (x) b = Neg (a) c = Relu (b) y = Add (c, x) }"""


@pytest.mark.parametrize(("limit", "runs"), [(None, 1), (2 * 5 * 4 * 4, 2)])
def test_statistics_are_collected_once(limit: int | None, runs: int, tmp_path: Path) -> None:
    opened: list[list[str]] = []

    def collected(limit: int | None, *kinds: type[Statistic]) -> list[Statistic]:
        module = module_of(NUMBERS)
        rows = [feed["x"] for feed in feeds_of()] + [np.ones((5, 4), np.float32)]

        def runner(made: Module, expose: Any) -> Any:
            opened.append(list(expose))
            return make_runner(made, expose)

        ctx = PassContext(
            AnalysisManager(module), make_runner=runner, max_memory=limit,
            calibration=lambda module: [{"x": each} for each in rows],
            checkpoint=CheckpointFolder(tmp_path),
        )  # fmt: skip
        made = {node.outputs[0]: [kind() for kind in kinds] for node in list(module.graph)[:3]}
        assert collect(module, made, ctx) == 4
        assert ctx.checkpoint is not None
        resumed.append(dict(ctx.checkpoint.taken))
        return [statistic for each in made.values() for statistic in each]

    resumed: list[dict[str, int]] = []
    first = collected(limit, AbsMax, MeanAbs)
    second = collected(limit, AbsMax, MeanAbs)
    assert len(opened) == runs
    assert resumed == [{"statistics": 0}, {"statistics": 3}]
    for a, b in zip(first, second, strict=True):
        assert a.state().keys() == b.state().keys()
        assert all(np.array_equal(a.state()[name], b.state()[name]) for name in a.state())
    collected(limit, AbsMax, Gram)
    collected(1, AbsMax, MeanAbs)
    # With two runs, `c` was fetched alone before.
    assert opened[2 * runs :] == [["a"], ["b"], ["c"]][: 4 - runs]


def test_a_pass_is_told_of_damage(tmp_path: Path) -> None:
    run = Run(module_of(MODEL), feeds_of())
    run.trail(str(tmp_path)).put("others", "k", {})
    next(tmp_path.glob("others-*")).write_bytes(b"")
    assert run.trail(str(tmp_path)).get("others", "k") is None
    assert ["is damaged" in str(each) for each in _warnings(run.module.remarks)] == [True]


def _warnings(remarks: Iterable[Any]) -> list[Any]:
    return [each for each in remarks if each.kind == "warning"]
