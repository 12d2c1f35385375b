"""What `lwc-opt --emit` writes, or says where it cannot. Kernels are compiled, and none runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[triton]'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are for Triton's interpreter here", allow_module_level=True)

from support import run_interpreted  # noqa: E402
from tiny_llama import as_module, tiny_llama  # noqa: E402

from lwc.backends.triton.ahead import compile_ahead  # noqa: E402
from lwc.backends.triton.architectures import architecture  # noqa: E402
from lwc.backends.triton.emit import emit  # noqa: E402
from lwc.backends.triton.folder import check_folder  # noqa: E402
from lwc.cli.arguments import parse_arguments  # noqa: E402
from lwc.cli.emit import example_shapes  # noqa: E402
from lwc.cli.opt import main  # noqa: E402
from lwc.core.errors import LwcError, UsageError  # noqa: E402
from lwc.frontend.load import load  # noqa: E402
from lwc.wiring import BACKENDS  # noqa: E402

ROOT = Path(__file__).parents[2]

MODEL = """<ir_version: 10, opset_import: ["" : 23]>
    mlp (float[batch, length, 64] x) => (float[batch, length, 64] y, float[batch, length, 64] z)
    <float[64] w = {%s}>
    { n = RMSNormalization(x, w)  s = Sigmoid(n)  g = Mul(n, s)  y = Mul(g, x)
      z = RMSNormalization <stash_type = 11> (y, w) }""" % ", ".join(["2"] * 64)  # noqa: UP031


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "mlp.onnx"
    onnx.save(onnx.parser.parse_model(MODEL), path)
    return path


def emitted(model: Path, folder: Path, *more: str) -> int:
    words = [str(model), "-p", "fuse-activation", "--backend=triton", f"--emit={folder}"]
    return main([*words, "--arch", "sm_80,H100", "--shapes", "batch=2,length=3", *more])


def test_a_folder_with_all_that_is_needed(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert emitted(model, folder, "--remarks=all") == 0
    told = capsys.readouterr()
    assert told.out == ""
    assert (
        f"wrote {folder}: 3 nodes in kernels, 1 in PyTorch; compiled 2 for sm_80, 2 for sm_90"
        in (told.err)
    )
    assert "missed: triton at RMSNormalization -> 'z': stays in PyTorch" in told.err
    assert sorted(path.name for path in folder.iterdir()) == [
        "kernels", "manifest.json", "model.py", "weights.safetensors",
    ]  # fmt: skip
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["architectures"] == ["sm_80", "sm_90"]
    assert manifest["inputs"] == {"x": "float [batch, length, 64]"}
    assert manifest["shapes"] == [{"batch": 2, "length": 3}]
    assert [(node["op"], node.get("kernels", node.get("torch"))) for node in manifest["nodes"]] == [
        ("RMSNormalization", ["norm_kernel"]),
        ("com.microsoft::QuickGelu", ["activation_kernel"]),
        ("Mul", ["activation_kernel"]),
        ("RMSNormalization", "its statistics are not taken in float32"),
    ]


def test_kernels_come_with_what_launches_them(model: Path, tmp_path: Path) -> None:
    assert emitted(model, tmp_path / "out", "-q") == 0
    folder = tmp_path / "out" / "kernels" / "sm_90"
    cubins = sorted(folder.glob("*.cubin"))
    assert [path.stem.partition("-")[0] for path in cubins] == ["activation_kernel", "norm_kernel"]
    for cubin in cubins:
        assert cubin.read_bytes()[:4] == b"\x7fELF"
        facts: dict[str, Any] = json.loads(cubin.with_suffix(".json").read_text())
        assert facts["entry"].encode() in cubin.read_bytes()
        assert facts["architecture"] == "sm_90"
        assert facts["spilled_bytes"] == 0
        assert 0 < facts["registers"] <= 255
        plain = {name for name, kind in facts["signature"].items() if kind != "constexpr"}
        assert set(facts["divisible_by_16"]) <= plain
        assert set(facts["constants"]) == set(facts["signature"]) - plain
        (launched,) = facts["launches"]
        assert launched["shape"] == 0
        assert len(launched["grid"]) == 3


def test_the_module_runs_where_kernels_do(model: Path, tmp_path: Path) -> None:
    assert emitted(model, tmp_path / "out", "-q") == 0
    program = (
        "import torch\n"
        "from model import load\n"
        "x = torch.linspace(-3, 3, 128).reshape(1, 2, 64)\n"
        "y, z = load(device='cpu')(x)\n"
        "n = torch.nn.functional.rms_norm(x, (64,), torch.full((64,), 2.0), 1e-5)\n"
        "torch.testing.assert_close(y, torch.nn.functional.silu(n) * x, rtol=1e-5, atol=1e-6)\n"
        "print('same')\n"
    )
    assert run_interpreted(program, tmp_path / "out") == "same\n"


def test_what_was_emitted_before_is_replaced_as_a_whole_or_stays(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "out"
    assert emitted(model, folder, "-q") == 0
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "model.cpython-311.opt-1.pyc").write_text("made anew by Python")
    before = (folder / "manifest.json").stat().st_ino

    def fails(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("safetensors.torch.save_file", fails)
        assert emitted(model, folder, "-q") == 1
    assert (folder / "manifest.json").stat().st_ino == before
    assert emitted(model, folder, "-q") == 0
    assert not (folder / "__pycache__").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlp.onnx", "out"]


@pytest.mark.parametrize(
    "foreign",
    [
        "notes.txt",
        "kernels/sm_90/mine.cubin",
        "__pycache__/notes.txt",
        "__pycache__/mine.cpython-311.pyc",
        "kernels/__pycache__/model.cpython-311.pyc",
        "__pycache__/more/model.cpython-311.pyc",
    ],
)
def test_files_that_were_not_emitted_are_not_lost(
    foreign: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert emitted(model, folder, "-q") == 0
    (folder / foreign).parent.mkdir(parents=True, exist_ok=True)
    (folder / foreign).write_text("kept")
    told = f"cannot emit to '{folder}': '{foreign}' in it would be lost"
    assert emitted(model, folder, "-q") == 2
    assert told in capsys.readouterr().err
    with pytest.raises(UsageError, match="would be lost"):
        emit(load(model), folder, architectures=[architecture("sm_90")])
    assert (folder / foreign).read_text() == "kept"


def test_files_that_come_while_kernels_are_compiled_are_not_lost(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert emitted(model, folder, "-q") == 0

    def disturbed(*given: Any) -> Any:
        (folder / "notes.txt").write_text("kept")
        return compile_ahead(*given)

    monkeypatch.setattr("lwc.backends.triton.emit.compile_ahead", disturbed)
    assert emitted(model, folder, "-q") == 2
    assert "'notes.txt' in it would be lost" in capsys.readouterr().err
    assert (folder / "notes.txt").read_text() == "kept"


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "{",
        "[]",
        '{"files": ["mine"]}',
        '{"format": 2}',
        '{"format": 1, "lwc": "0.1.0", "files": ["mine", "manifest.json"]}',
    ],
)
def test_a_manifest_of_others_is_no_leave_to_replace(manifest: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(UsageError, match="and 1 more in it would be lost"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--emit=out"], "--emit needs a backend (use --backend=triton)"),
        (["--emit=out", "--backend=fx"], "the backend 'fx' writes no code (use --backend=triton)"),
        (["--emit="], "--emit needs a folder, not nothing"),
        (["--arch=sm_90"], "--arch is for what is emitted (add --emit DIR)"),
        (["--shapes=n=3"], "--shapes is for what is emitted (add --emit DIR)"),
        (["--emit=out", "--backend=triton", "--arch=V100"], "no architecture is called 'V100'"),
        (
            ["--emit=out", "--backend=triton", "--arch=sm_80,"],
            "--arch takes names joined by commas, not 'sm_80,'",
        ),
        pytest.param(
            ["--emit=/proc/none/out", "--backend=triton"],
            "cannot write '/proc/none/out': no file can be made in '/proc'",
            marks=pytest.mark.skipif(not Path("/proc").is_dir(), reason="it is Linux's"),
        ),
        (["--emit=out", "--backend=triton", "--shapes=x"], "--shapes takes NAME=N, not 'x'"),
        (["--emit=mlp.onnx", "--backend=triton"], "'mlp.onnx' is the input itself"),
        (["--emit=.", "--backend=triton"], "cannot emit to '.': 'mlp.onnx' in it would be lost"),
        (
            ["--emit=out", "--backend=triton", "-o", "out/small.onnx"],
            "lies in what --emit replaces",
        ),
        (["--emit=o", "--backend=triton", "--report", "o/r.md"], "'o/r.md' lies in what --emit"),
        (["--emit=out", "--backend=triton", "--plan"], "--plan writes nothing"),
        (["--backend=tpu"], "argument --backend: invalid choice: 'tpu'"),
    ],
)
def test_what_cannot_be_is_told_before_any_work(
    words: list[str], told: str, model: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(model.parent)
    assert main([model.name, *words]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert len(error.splitlines()) == 1
    assert [path.name for path in model.parent.iterdir()] == [model.name]


def test_the_page_runs() -> None:
    script, page = ROOT / "tools" / "run_page.py", ROOT / "docs" / "triton.md"
    ended = subprocess.run([sys.executable, script, page], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_every_backend_can_be_asked_for() -> None:
    for name in BACKENDS:
        assert parse_arguments([f"--backend={name}"]).backend == name


@pytest.mark.parametrize(
    ("words", "ran"),
    [
        ("tokens=3 -p fuse-activation", []),
        ("length=3 -p fuse-activation --bind=length=2", ["bind-dims"]),
        (  # from then on no pass may bring the dimension
            "tokens=3 -p fuse-norm,convert-dtype{keep-io=false},fuse-activation",
            ["fuse-norm", "convert-dtype"],
        ),
        (
            "tokens=3 -p fuse-norm,convert-dtype{keep-io=false}",
            ["fuse-norm", "convert-dtype"],
        ),
    ],
)
def test_a_dimension_that_is_not_there_is_told_before_passes_run(
    words: str, ran: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--backend=triton", f"--emit={tmp_path / 'out'}", "-q", "--print-ir-after-all"]
    assert main([str(model), *given, "--shapes", *words.split()]) == 2
    told = capsys.readouterr()
    name = words.partition("=")[0]
    assert f"no input has a dimension '{name}' (the dimensions are batch" in told.err
    assert re.findall("after ([a-z-]+)", told.out) == ran
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        (
            "batch=2,length=0",
            "no kernel is launched where batch=2, length=0, as nothing is computed",
        ),
        ("length=10000000000000", "the inputs do not fit into memory where length=10000000000000"),
    ],
)
def test_shapes_for_which_nothing_is_compiled_are_refused(
    shape: str, told: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["-q", "--backend=triton", f"--emit={tmp_path / 'out'}", "-p", "fuse-activation"]
    assert main([str(model), *words, "--arch=sm_80", f"--shapes={shape}"]) == 1
    assert f"error: {model}: {told}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_integers_that_do_not_fit_into_memory_are_told_with_their_node(tmp_path: Path) -> None:
    path = tmp_path / "large.onnx"
    large = 10**15  # of 8 bytes, hundred times: more than there are addresses
    text = f"""<ir_version: 10, opset_import: ["" : 23]> g (float[s] x) => (int64[s, {large}] y)
        <int64[1] large = {{{large}}}>
        {{ n = Shape(x)  e = Concat <axis = 0> (n, large)
           y = ConstantOfShape <value = int64[1] {{7}}> (e) }}"""
    onnx.save(onnx.parser.parse_model(text), path)
    told = r"large.onnx: ConstantOfShape -> 'y': the integers .* into memory \(give smaller numbers"
    with pytest.raises(LwcError, match=told):
        emit(load(path), tmp_path / "o", architectures=[architecture("A100")], shapes=[{"s": 100}])


@pytest.mark.parametrize(("failing", "code"), [("--shapes=tokens=3", 2), ("--sensitivity", 1)])
def test_where_code_cannot_be_emitted_or_layers_ranked_nothing_is_written(
    failing: str, code: int, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "small.onnx").write_bytes(b"old")
    np.savez(tmp_path / "odd.npz", other=np.zeros(3))
    words = ["-q", "-o", str(tmp_path / "small.onnx"), "--calibrate", str(tmp_path / "odd.npz")]
    assert emitted(model, tmp_path / "out", failing, *words) == code
    assert (tmp_path / "small.onnx").read_bytes() == b"old"
    assert not (tmp_path / "out").exists()


def test_decoders_are_compiled_for_a_prompt_and_for_a_token_behind_it() -> None:
    module = as_module(tiny_llama(), "gqa-rotary")
    assert example_shapes(module) == [
        {"batch": 1, "sequence": 512, "past": 0, "total": 512},
        {"batch": 1, "sequence": 1, "past": 512, "total": 513},
    ]
