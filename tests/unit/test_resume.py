"""--resume: killed anywhere and started again, a calibrated run gives the same file."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

import lwc
from lwc.calibration.checkpoint import CheckpointFolder
from lwc.calibration.stages import Stages
from lwc.cli.opt import main
from lwc.core.errors import LwcError, UsageError
from lwc.passes.quantization import layerwise

Array = np.ndarray[Any, Any]

WIDTH, INNER, BLOCKS = 32, 48, 2
LAYERS = 3 * BLOCKS


def blocks() -> onnx.ModelProto:
    """Make a residual stream of gated layers, each behind a norm: what AWQ scales in two ways."""
    drawn = np.random.default_rng(0)
    nodes, last = [], "x"
    weights: dict[str, Array] = {}
    for b in range(BLOCKS):
        nodes.append(f"n{b} = RMSNormalization<axis = -1>({last}, s{b})")
        nodes += [f"p{b} = MatMul(n{b}, up{b})", f"q{b} = MatMul(n{b}, gate{b})"]
        nodes += [f"r{b} = Relu(q{b})", f"m{b} = Mul(r{b}, p{b})", f"d{b} = MatMul(m{b}, down{b})"]
        nodes.append(f"x{b} = Add({last}, d{b})")
        last = f"x{b}"
        weights |= {f"s{b}": np.exp(drawn.standard_normal(WIDTH))}
        weights |= {f"{name}{b}": drawn.standard_normal((WIDTH, INNER)) for name in ("up", "gate")}
        weights |= {f"down{b}": drawn.standard_normal((INNER, WIDTH)) / 8}
    text = "\n".join([*nodes, f"y = Identity({last})"])
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 23]> g (float[n, {WIDTH}] x) => '
        f"(float[n, {WIDTH}] y) {{ {text} }}"
    )
    for name, array in weights.items():
        tensor = ir.Tensor(array.astype(np.float32), name=name)
        proto.graph.initializer.append(ir.to_proto(tensor))
    return proto


def feeds(seed: int = 1, count: int = 3) -> list[dict[str, Array]]:
    drawn = np.random.default_rng(seed)
    return [{"x": drawn.standard_normal((20, WIDTH)).astype(np.float32)} for _ in range(count)]


def passes(method: str, **options: object) -> str:
    chosen = {"method": method, "block-size": 16, **options}
    written = " ".join(f"{name}={value}" for name, value in chosen.items())
    return f"smooth,quantize-weights{{{written}}}"


class Killed(BaseException):
    """Stands for a signal that no handler sees."""


def run(folder: Path, resume: Path | None, pipeline: str, **options: Any) -> tuple[bytes, Any]:
    """Return the file that is written, and the result."""
    given = {"calibration": feeds(), **options}
    result = lwc.optimize(given.pop("model", blocks()), pipeline, resume=resume, **given)
    result.save(folder / "out.onnx")
    return (folder / "out.onnx").read_bytes(), result


def resumed(result: Any) -> dict[str, int]:
    return {
        name.removesuffix(" resumed"): count
        for each in result.record.passes
        for name, count in each.statistics.items()
        if name.endswith(" resumed")
    }


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a counter of results to write before the run is killed: in `left`; None is all."""

    class Left:
        left: int | None = None

    real = CheckpointFolder.put

    def put(self: CheckpointFolder, kind: str, key: str, entry: Any) -> str:
        if Left.left == 0:
            raise Killed
        if Left.left is not None:
            Left.left -= 1
        return real(self, kind, key, entry)

    monkeypatch.setattr(CheckpointFolder, "put", put)
    return Left


def results(method: str) -> int:
    """Count what a whole run writes: statistics of smooth, layers, and factors of each group."""
    return 1 + LAYERS + (2 * BLOCKS if method == "awq" else 0)


@pytest.mark.parametrize(
    "pipeline",
    [
        "smooth{auto}",
        "smooth-quantize",
        "smooth-quantize{0.5 method=gptq}",
        "smooth-quantize{activations=static}",
        "llm-int8{3.0}",
    ],
)
def test_int8_activations_go_on_from_statistics(pipeline: str, tmp_path: Path) -> None:
    plain, _ = run(tmp_path, None, pipeline)
    kept = tmp_path / "kept"
    assert run(tmp_path, kept, pipeline)[0] == plain
    written = sorted(path.name for path in kept.iterdir())
    again, result = run(tmp_path, kept, pipeline)
    assert again == plain
    assert sorted(path.name for path in kept.iterdir()) == written
    assert result.record.passes[-1].statistics["statistics resumed"] > 0


@pytest.mark.parametrize("max_memory", [None, 1 << 20])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_killed_after_any_result(
    method: str, max_memory: int | None, killer: Any, tmp_path: Path
) -> None:
    """Every run is killed after one result more; the last one finds all of them."""
    options: dict[str, Any] = {"max_memory": max_memory}
    wanted, plain = run(tmp_path, None, passes(method), **options)
    assert not resumed(plain)
    for number in range(results(method) - 1):
        killer.left = 1
        with pytest.raises(Killed):
            run(tmp_path, tmp_path / "kept", passes(method), **options)
        assert len(list((tmp_path / "kept").iterdir())) == number + 1
        if number % 3 == 0:
            killer.left = None
            shutil.copytree(tmp_path / "kept", tmp_path / "copy")
            found, result = run(tmp_path, tmp_path / "copy", passes(method), **options)
            assert found == wanted
            assert sum(1 for _ in (tmp_path / "copy").iterdir()) == results(method)
            assert (
                sum(result.record.passes[1].statistics[name] for name in _kinds(method)) == number
            )
            shutil.rmtree(tmp_path / "copy")
    killer.left = 1
    for missing in (1, 0):
        found, result = run(tmp_path, tmp_path / "kept", passes(method), **options)
        assert found == wanted
        assert resumed(result)["layers"] == LAYERS - missing
    for a, b in zip(plain.record.passes, result.record.passes, strict=True):
        assert a.statistics == {n: s for n, s in b.statistics.items() if "resumed" not in n}
        assert a.remarks == b.remarks


def _kinds(method: str) -> list[str]:
    return ["layers resumed"] + ["factors resumed"] * (method == "awq")


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_finished_layers_are_not_computed_again(
    method: str, killer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    for name in ("gptq", "clipped", "input_factors"):
        real = getattr(layerwise, name)

        def counted(*words: Any, _name: str = name, _real: Any = real, **options: Any) -> Any:
            calls[_name] += 1
            return _real(*words, **options)

        monkeypatch.setattr(layerwise, name, counted)
    run(tmp_path, None, passes(method))
    whole, killer.left = calls.copy(), 4
    calls.clear()
    with pytest.raises(Killed):
        run(tmp_path, tmp_path / "kept", passes(method))
    killer.left = None
    run(tmp_path, tmp_path / "kept", passes(method))
    # The computation whose result could not be written is the only one done twice.
    assert (calls - whole).total() == 1
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Stages, "activations", None)
        run(tmp_path, tmp_path / "kept", passes(method))
    assert not calls


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_damaged_result_is_computed_again(method: str, tmp_path: Path) -> None:
    wanted, _ = run(tmp_path, tmp_path / "kept", passes(method))
    files = sorted((tmp_path / "kept").iterdir())
    assert len(files) == results(method)
    for number, path in enumerate(files):
        content = path.read_bytes()
        broken = bytearray(content)
        broken[number * 7 % len(content)] ^= 1
        path.write_bytes(content[: len(content) // 2] if number % 2 else broken)
        found, result = run(tmp_path, tmp_path / "kept", passes(method))
        assert found == wanted
        warnings = [each.message for each in result.module.remarks if each.kind == "warning"]
        assert warnings == [f"{path} is damaged; what it held is computed again"]
        assert path.read_bytes() == content
        whole = {"statistics": 4, "layers": LAYERS}
        whole |= {"factors": 2 * BLOCKS} if method == "awq" else {}
        kind = path.name.partition("-")[0]
        lost = 4 if kind == "statistics" else 1
        assert resumed(result) == {**whole, kind: whole[kind] - lost}


def other_weight() -> onnx.ModelProto:
    model = blocks()
    (last,) = (each for each in model.graph.initializer if each.name == "down1")
    array = onnx.numpy_helper.to_array(last).copy()
    array[3, 4] = np.nextafter(array[3, 4], np.float32(9))
    last.CopyFrom(onnx.numpy_helper.from_array(array, "down1"))
    return model


def other_number() -> list[dict[str, Array]]:
    changed = feeds()
    changed[2]["x"][3, 4] += 1
    return changed


@pytest.mark.parametrize(
    ("pipeline", "options"),
    [
        (passes("gptq"), {"model": other_weight()}),
        (passes("gptq"), {"calibration": other_number()}),
        (passes("gptq"), {"calibration": feeds(count=2)}),
        (passes("gptq"), {"threads": 2}),
        (passes("gptq", damping=0.02), {}),
        (passes("gptq", bits=8), {}),
        (passes("gptq", **{"act-order": "false"}), {}),
        (passes("gptq", exclude="up0"), {}),
        (passes("awq"), {}),
        ("smooth{0.4},quantize-weights{method=gptq block-size=16}", {}),
    ],
    ids=str,
)
def test_stale_results_are_not_used(pipeline: str, options: Any, tmp_path: Path) -> None:
    run(tmp_path, tmp_path / "kept", passes("gptq"))
    wanted, _ = run(tmp_path, None, pipeline, **options)
    found, result = run(tmp_path, tmp_path / "kept", pipeline, **options)
    assert found == wanted
    assert resumed(result)["layers"] == 0
    _, result = run(tmp_path, tmp_path / "kept", passes("gptq"))
    assert resumed(result) == {"statistics": 4, "layers": LAYERS}


def test_weights_that_stay_are_kept_as_such(tmp_path: Path, killer: Any) -> None:
    model = blocks()
    (first,) = (each for each in model.graph.initializer if each.name == "gate0")
    array = onnx.numpy_helper.to_array(first).copy()
    array[3, 4] = np.nan
    first.CopyFrom(onnx.numpy_helper.from_array(array, "gate0"))
    # The product behind is not finite: only what reads the first norm is looked at.
    pipeline = passes("awq", exclude="down0,up1,gate1,down1").partition(",")[2]
    wanted, _ = run(tmp_path, tmp_path / "kept", pipeline, model=model)
    killer.left = 0
    found, result = run(tmp_path, tmp_path / "kept", pipeline, model=model)
    assert found == wanted
    assert resumed(result) == {"factors": 1, "layers": 2}
    assert result.record.passes[0].statistics["weights quantized"] == 1


def test_it_needs_data_and_a_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is none"):
        lwc.optimize(blocks(), passes("gptq"), resume=tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(LwcError, match="file: cannot be written: File exists"):
        run(tmp_path, tmp_path / "file", passes("gptq"))


# The command line


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(blocks(), "in.onnx")
    Path("data").mkdir()
    for number, feed in enumerate(feeds()):
        np.savez(f"data/{number}.npz", x=feed["x"])
    return tmp_path


def words(method: str, *more: str, output: str = "out.onnx") -> list[str]:
    line = ["in.onnx", "-o", output, "-p", passes(method), "--calibrate", "data"]
    return [*line, "--threads", "1", *more]


def start(*line: str, before: str = "") -> subprocess.Popen[str]:
    """Start lwc-opt, after some lines of Python."""
    code = f"import sys\n{before}\nfrom lwc.cli.opt import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.Popen([sys.executable, "-c", code, *line], stderr=subprocess.PIPE, text=True)


SUICIDE = """
import os, signal
from lwc.calibration.checkpoint import CheckpointFolder
real, left = CheckpointFolder.put, [{}]
def put(*words):
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    left[0] -= 1
    return real(*words)
CheckpointFolder.put = put
"""


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_process_killed_after_some_results(
    method: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(method, output="wanted.onnx")) == 0
    for count in (1, 3):
        child = start(*words(method, "--resume", "kept"), before=SUICIDE.format(count))
        child.communicate(timeout=60)
        assert child.returncode == -9
        assert not Path("out.onnx").exists()
    capsys.readouterr()
    assert main(words(method, "--resume", "kept", "--report", "r.json")) == 0
    assert Path("out.onnx").read_bytes() == Path("wanted.onnx").read_bytes()
    layers = 3 if method == "gptq" else 2
    said = capsys.readouterr().err
    assert "4 statistics resumed" in said
    assert f"{layers} layers resumed" in said
    assert f'"layers resumed": {layers}' in Path("r.json").read_text()


@pytest.mark.parametrize(("method", "seed"), [("gptq", 0), ("gptq", 1), ("awq", 2), ("awq", 3)])
def test_a_process_killed_at_a_random_moment(method: str, seed: int, folder: Path) -> None:
    """From its first result on; it may be done before that, or killed while it writes a file."""
    assert main(words(method, output="wanted.onnx")) == 0
    child = start(*words(method, "--resume", "kept"))
    deadline = time.monotonic() + 60
    while not any(Path("kept").glob("*.lwc")) and time.monotonic() < deadline:
        time.sleep(0.002)
    time.sleep(random.Random(seed).uniform(0, 0.3))
    child.kill()
    child.communicate(timeout=60)
    Path("out.onnx").unlink(missing_ok=True)
    assert main(words(method, "--resume", "kept")) == 0
    assert Path("out.onnx").read_bytes() == Path("wanted.onnx").read_bytes()


def test_two_processes_at_a_time(folder: Path) -> None:
    assert main(words("awq", output="wanted.onnx")) == 0
    children = [
        start(*words("awq", "--resume", "kept", output=f"{name}.onnx")) for name in ("a", "b")
    ]
    for child, name in zip(children, ("a", "b"), strict=True):
        _, said = child.communicate(timeout=60)
        assert child.returncode == 0, said
        assert "damaged" not in said
        assert Path(f"{name}.onnx").read_bytes() == Path("wanted.onnx").read_bytes()
    assert len(list(Path("kept").iterdir())) == results("awq")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (["--resume", "kept"], "--resume needs calibration data (add --calibrate PATH)"),
        (["--calibrate", "data", "--resume", "in.onnx"], "--resume 'in.onnx': it is a file"),
        (["--calibrate", "data", "--resume", ""], "--resume needs a folder, not nothing"),
        (
            ["--calibrate", "data", "--resume", "kept", "--explain", "smooth"],
            "--explain writes nothing and does not go with --resume",
        ),
        (["--calibrate", "data", "--plan"], "--plan takes no calibration data (drop --calibrate)"),
    ],
)
def test_what_makes_no_sense(
    line: list[str], reason: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["in.onnx", "-p", "smooth", *line]) == 2
    error = capsys.readouterr().err
    assert reason in error
    assert len(error.splitlines()) == 1
    assert not Path("kept").exists()


@pytest.mark.parametrize("more", [[], ["--resume", "kept"]])
def test_data_that_no_pass_asks_for(
    more: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["in.onnx", "-o", "out.onnx", "--calibrate", "data"]
    assert main([*line, "-p", "canonicalize", *more]) == 0
    said = capsys.readouterr().err
    assert said.count("warning: calibration: no pass of the pipeline used the data") == 1
    assert ("; nothing is kept in 'kept'" in said) == bool(more)
    assert main([*line, "-p", "smooth"]) == 0
    assert "no pass of the pipeline" not in capsys.readouterr().err
