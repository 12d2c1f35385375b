"""The fastest tilings: which candidates are measured, and what is kept of it. Nothing runs."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[triton]'")

from lwc.backends.triton.architectures import architecture  # noqa: E402
from lwc.backends.triton.kernels.activation import activation_operation  # noqa: E402
from lwc.backends.triton.kernels.w4a16_matmul import w4a16_operation  # noqa: E402
from lwc.backends.triton.operation import (  # noqa: E402
    Access,
    Configuration,
    Launch,
    Least,
    Operation,
    Work,
)
from lwc.backends.triton.tuning import (  # noqa: E402
    Tunings,
    predicted_seconds,
    promising,
    tuned,
)

ROOT = Path(__file__).parents[2]
GPU = architecture("A100")


def operation(costs: Mapping[str, tuple[int, int]], name: str = "thing") -> Operation:
    """Describe an operation whose candidates move some bytes in some programs."""
    candidates = tuple(Configuration({word: 1}) for word in costs)

    def prepare(configuration: Configuration) -> tuple[Launch, ...]:
        (word,) = configuration.tiles
        nbytes, programs = costs[word]
        work = Work((Access("x", nbytes, nbytes),), 1, "float32")
        return (Launch(None, (programs,), {}, {}, configuration, work),)

    return Operation(name, candidates, prepare, (), Least(1, 1), key=("float16", 4096))


def names(candidates: tuple[Configuration, ...]) -> list[str]:
    return [word for each in candidates for word in each.tiles]


def measure_in(times: Mapping[str, float], measured: list[str]) -> Callable[[Any], float]:
    """Return a measurer that looks times up, of a call that `tuned` makes."""

    def measure(call: Any) -> float:
        (launches,) = call.__defaults__
        (word,) = launches[0].configuration.tiles
        measured.append(word)
        return times[word]

    return measure


def test_the_first_and_those_within_twice_the_best_prediction_are_measured() -> None:
    many = 1000
    costs = {
        "first": (90 * 2**20, many),  # predicted to be slow, and a guess that may be right
        "best": (10 * 2**20, many),
        "near": (19 * 2**20, many),
        "far": (21 * 2**20, many),
        "few": (10 * 2**20, GPU.multiprocessors // 3),  # a third of the device is used
    }
    assert names(promising(operation(costs), GPU)) == ["first", "best", "near"]
    measured: list[str] = []
    times = dict.fromkeys(costs, 1.0) | {"near": 0.5}
    found = tuned(operation(costs), measure_in(times, measured), promising(operation(costs), GPU))
    assert measured == ["first", "best", "near"]
    assert names((found,)) == ["near"]


def test_predictions_are_the_roofline() -> None:
    (launch,) = operation({"a": (2**30, GPU.multiprocessors)}).prepare(Configuration({"a": 1}))
    assert predicted_seconds(launch, GPU) == 2**30 / GPU.bandwidth
    busy = replace(launch, work=Work(launch.work.accesses, 10**12, "float16"))
    assert predicted_seconds(busy, GPU) == 10**12 / GPU.peak["float16"]
    assert predicted_seconds(replace(launch, grid=(27, 2)), GPU) == 2 * 2**30 / GPU.bandwidth


@pytest.mark.parametrize("rows", [1, 64, 4096])
def test_real_candidates_are_pruned_but_not_all(rows: int) -> None:
    def meta(*shape: int, dtype: Any = torch.float16) -> Any:
        return torch.empty(shape, dtype=dtype, device="meta")

    made = w4a16_operation(
        meta(rows, 4096), meta(4096, 16, 128, dtype=torch.uint8),
        meta(16, 4096, dtype=torch.int32), None, None, GPU, columns=4096, group_size=128,
    )  # fmt: skip
    kept = promising(made, GPU)
    assert kept[0] is made.candidates[0]
    assert 1 <= len(kept) <= len(made.candidates)


COSTS = {"one": (2**20, 500), "two": (2**20, 500)}

PROGRAM = """
import sys
sys.path[:0] = sys.argv[2:]
from lwc.backends.triton.tuning import Tunings
from test_triton_tuning import COSTS, GPU, operation
def refuse(call):
    raise SystemExit("measured again")
print(Tunings.of(sys.argv[1]).fastest(operation(COSTS), GPU, refuse).tiles)
"""


def test_another_process_takes_what_was_measured_and_another_device_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LWC_CACHE", str(tmp_path))
    measured: list[str] = []
    measure = measure_in({"one": 2.0, "two": 1.0}, measured)
    tunings = Tunings.of("NVIDIA A100-SXM4-80GB")
    assert names((tunings.fastest(operation(COSTS), GPU, measure),)) == ["two"]
    assert tunings.fastest(operation(COSTS), GPU, measure) == Configuration({"two": 1})
    assert measured == ["one", "two"]

    def elsewhere(device: str) -> str:
        command = [sys.executable, "-c", PROGRAM, device, str(Path(__file__).parent)]
        ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        return ended.stdout.strip() or ended.stderr.strip().splitlines()[-1]

    assert elsewhere("NVIDIA A100-SXM4-80GB") == "{'two': 1}"
    assert elsewhere("NVIDIA H100 80GB HBM3") == "measured again"


def test_other_kernels_and_other_versions_have_files_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import triton

    from lwc.backends.triton import tuning

    monkeypatch.setenv("LWC_CACHE", str(tmp_path))
    places = {Tunings.of("A100").path}
    monkeypatch.setattr(tuning, "_kernel_sources", lambda: "changed")
    places.add(Tunings.of("A100").path)
    monkeypatch.setattr(triton, "__version__", "0.0")
    places.add(Tunings.of("A100").path)
    assert len(places) == 3


def stored(**changed: Any) -> str:
    tiling = {"tiles": {"x": 1}, "warps": 1, "stages": 1, "registers": 0}
    return json.dumps({"format": 1, "fastest": {"a": tiling | changed}})


@pytest.mark.parametrize(
    "content",
    [
        "", "{", "[]", '{"format": 1}', '{"format": 9, "fastest": {}}',
        '{"format": 1, "fastest": 3}', stored(tiles={"x": "y"}), stored(warps=1.5),
        stored(more=1), '{"format": 1, "fastest": {"a": {"tiles": {}}}}',
    ],
)  # fmt: skip
def test_a_damaged_file_is_ignored_with_a_warning_and_written_anew(
    content: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LWC_CACHE", str(tmp_path))
    path = Tunings.of("A100").path
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.warns(UserWarning, match="cannot be read as tilings"):
        tunings = Tunings.of("A100")
    tunings.fastest(operation(COSTS), GPU, measure_in({"one": 1.0, "two": 2.0}, []))
    assert names(tuple(Tunings.of("A100").known.values())) == ["one"]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_a_kept_tiling_that_is_no_candidate_is_measured_anew(tmp_path: Path) -> None:
    """Readable nonsense, or a tiling that the kernel does not take."""
    measured: list[str] = []
    tunings = Tunings(tmp_path / "kept.json")
    key = "thing ('float16', 4096)"
    tunings.known[key] = Configuration({"one": 7})
    for _ in range(2):
        found = tunings.fastest(
            operation(COSTS), GPU, measure_in({"one": 2.0, "two": 1.0}, measured)
        )
        assert found == Configuration({"two": 1})
    assert measured == ["one", "two"]
    assert list(tunings.known) == [key]


def test_what_others_wrote_meanwhile_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LWC_CACHE", str(tmp_path))
    measure = measure_in({"one": 1.0, "two": 2.0}, [])
    first, second = Tunings.of("A100"), Tunings.of("A100")
    first.fastest(operation(COSTS, "mine"), GPU, measure)
    second.fastest(operation(COSTS, "yours"), GPU, measure)
    assert len(Tunings.of("A100").known) == 2
    kept = json.loads(first.path.read_text())["fastest"]
    assert list(kept) == ["mine ('float16', 4096)", "yours ('float16', 4096)"]


def test_a_cache_that_cannot_be_written_is_told_and_nothing_is_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LWC_CACHE", str(tmp_path / "file"))
    tunings = Tunings.of("A100")
    with pytest.warns(UserWarning, match="tilings are not kept"):
        found = tunings.fastest(operation(COSTS), GPU, measure_in({"one": 1.0, "two": 2.0}, []))
    assert names((found,)) == ["one"]


def test_keys_of_operations_tell_types_and_sizes() -> None:
    def made(dtype: Any, columns: int) -> Operation:
        x = torch.empty((4, columns), dtype=dtype, device="meta")
        return activation_operation(x, x, "silu")

    keys = {f"{each.name} {each.key}" for each in (
        made(torch.float16, 64), made(torch.float32, 64), made(torch.float16, 128),
    )}  # fmt: skip
    assert len(keys) == 3
