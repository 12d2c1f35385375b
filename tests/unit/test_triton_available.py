"""What users are told where Triton or a GPU is missing."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import util
from pathlib import Path

import pytest

from lwc.backends.triton import availability
from lwc.backends.triton.architectures import ARCHITECTURES, architecture, nearest
from lwc.core.errors import MissingExtraError, UsageError

ROOT = Path(__file__).parents[2]
MISSING = (
    "the Triton backend needs an optional dependency (pip install -e '.[triton]' in a clone of lwc)"
)
ABS = '<ir_version: 9, opset_import: ["" : 17]> g (float x) => (float y) { y = Abs(x) }'


@pytest.mark.parametrize("missing", ["torch", "triton"])
def test_a_missing_extra_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find = util.find_spec
    monkeypatch.setattr(
        availability, "find_spec", lambda name: None if name == missing else find("sys")
    )
    with pytest.raises(MissingExtraError) as raised:
        availability.require_triton()
    assert str(raised.value) == MISSING


@pytest.mark.parametrize(
    ("interpret", "device", "told"),
    [
        ("0", "cpu", "Triton kernels need a GPU and the tensors lie on cpu (move them to cuda, "),
        ("1", "meta", "Triton's interpreter is on and the tensors lie on meta (unset "),
        ("1", "both", "tensors lie on cpu and meta: one device is needed"),
    ],
)
def test_where_no_kernel_runs_one_line_says_why(interpret: str, device: str, told: str) -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[triton]'")
    program = (
        "import torch\n"
        "from lwc.backends.triton import launch\n"
        "from lwc.core.errors import LwcError\n"
        f"devices = ('cpu', 'meta') if {device!r} == 'both' else ({device!r},) * 2\n"
        "x, weight = (torch.ones(2, 8, device=device) for device in devices)\n"
        "try:\n"
        "    launch.rms_norm(x, weight[0])\n"
        "except LwcError as error:\n"
        "    print(error)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": interpret},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ended.stdout.startswith(told), ended.stderr
    assert len(ended.stdout.splitlines()) == 1


def test_architectures_are_found_by_name_target_and_capability() -> None:
    assert [architecture(gpu.name.lower()) for gpu in ARCHITECTURES] == list(ARCHITECTURES)
    assert [architecture(gpu.target) for gpu in ARCHITECTURES] == list(ARCHITECTURES)
    assert [nearest(found).name for found in (75, 80, 89, 90, 103, 120)] == [
        "A100", "A100", "A100", "H100", "B200", "B200",
    ]  # fmt: skip
    with pytest.raises(UsageError, match="no architecture is called 'V100'"):
        architecture("V100")


@pytest.mark.parametrize("missing", ["torch", "triton"])
def test_lwc_works_without_the_extra_and_names_it_when_asked(missing: str) -> None:
    program = (
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "def find_others(name, path=None, target=None):\n"
        f"    return None if name == {missing!r} else find(name, path, target)\n"
        "PathFinder.find_spec = find_others\n"
        "import onnx.parser\n"
        "import lwc\n"
        "from lwc.core.errors import LwcError\n"
        f"text = {ABS!r}\n"
        "module = lwc.optimize(onnx.parser.parse_model(text), 'canonicalize').module\n"
        "for ask in (\n"
        "    lambda: lwc.to_triton(module),\n"
        "    lambda: lwc.wiring.find_backend('triton')(),\n"
        "):\n"
        "    try:\n"
        "        ask()\n"
        "    except LwcError as error:\n"
        "        print(error)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.stdout == 2 * f"{MISSING}\n", ended.stderr[-2000:]


def test_the_backend_asks_for_a_gpu() -> None:
    pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[triton]'")
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    program = (
        "import onnx.parser\n"
        "import lwc\n"
        "from lwc.core.errors import LwcError\n"
        f"text = {ABS!r}\n"
        "module = lwc.optimize(onnx.parser.parse_model(text)).module\n"
        "try:\n"
        "    lwc.wiring.find_backend('triton')().compile(module)\n"
        "except LwcError as error:\n"
        "    print(error)\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    needed = "Triton kernels need a GPU and the tensors lie on cpu (move them to cuda, or set "
    assert ended.stdout.startswith(needed), ended.stderr[-2000:]
    assert len(ended.stdout.splitlines()) == 1
