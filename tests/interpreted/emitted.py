"""Emitted modules, imported from their folder and run in the interpreter; dry runs beside runs."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from fx_agreement import parsed, run_fx
from safetensors.torch import save_file
from tiny_llama import as_module, tiny_llama

import lwc
from lwc.backends.triton.architectures import nearest
from lwc.backends.triton.dry_run import dry_run
from lwc.backends.triton.emit import emit
from lwc.backends.triton.lower import placements
from lwc.backends.triton.operation import Launch
from lwc.backends.triton.session import TritonBackend
from lwc.core.errors import InputError, LwcError

FUSED = "fuse-norm,fuse-activation,canonicalize,quantize-weights{bits=4 symmetric=true}"
RTOL = 2e-3
"""Of the norm: scales are rounded to float16, by 2**-11 at most, in each of a dozen products."""


NAMES = [
    *("device", "NoneType", "pytree", "torch", "inf", "nan", "self", "class", "None", "getattr"),
    *("日本", "_", "__1", "__x", "a.__1", "a.日本", "1", "Path", "attach", "fx_layout", "Model"),
    *("load", "FOLDER", "forward", "super", "slice", "float", "py_torch", "training"),
]


@functools.cache
def decoder() -> lwc.Module:
    """A decoder with a cache, which turns queries and keys by positions that it counts."""
    module = as_module(tiny_llama(), "gqa-rotary")
    return lwc.optimize(module, FUSED, grant="all", backend=None).module


def feed(module: lwc.Module, new: int, past: int) -> dict[str, Any]:
    random = np.random.default_rng(new)
    found: dict[str, Any] = {
        "input_ids": random.integers(0, 60, (2, new)),
        "attention_mask": np.ones((2, past + new), np.int64),
    }
    for value in module.graph.inputs:
        if value.name not in found:
            found[value.name or ""] = random.normal(size=(2, 2, past, 16)).astype(np.float32)
    return found


def imported(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("emitted_model", folder / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("new", "past"), [(7, 0), (1, 9)])
def test_a_decoder_with_its_cache(new: int, past: int, tmp_path: Path) -> None:
    module = decoder()
    emit(module, tmp_path / "out", architectures=[])
    model = imported(tmp_path / "out").load(device="cpu")
    given = feed(module, new, past)
    found = model(*(torch.from_numpy(given[value.name or ""]) for value in module.graph.inputs))
    for a, b in zip(found, run_fx(module, given), strict=True):
        assert np.linalg.norm(a.numpy() - b) <= RTOL * np.linalg.norm(b)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits(dtype: str) -> None:
    """The kernels round less often than PyTorch does, each time by 2**-11 or 2**-8 at most.

    There are some ten roundings of a layer, which add up as random steps.
    """
    passes = f"fuse-norm,fuse-activation,convert-dtype{{{dtype}}},canonicalize"
    module = lwc.optimize(as_module(tiny_llama(), "gqa-rotary"), passes, backend=None).module
    given = feed(module, 7, 0)
    with TritonBackend().compile(module) as executable:
        assert ("flash_kernel", "decode_kernel") in {
            each.kernels for each in placements(executable.graph_module)
        }
        found = list(executable.run(given).values())
    step = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[dtype]
    for a, b in zip(found, run_fx(module, given), strict=True):
        assert a.dtype == b.dtype
        a, b = a.astype(float), b.astype(float)  # noqa: PLW2901
        assert np.linalg.norm(a - b) <= 20**0.5 * step * np.linalg.norm(b)


def test_a_tensor_that_is_read_under_two_names_is_written_once(tmp_path: Path) -> None:
    module = parsed("""<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 2] x) => (float[n, 2] y, float[n, 2] z)
        <float[2, 2] a = {1, 2, 3, 4}, float[2, 2] b = {0, 0, 0, 0}>
        { y = MatMul(x, a)  z = MatMul(x, b) }""")
    module.graph.initializers["b"].const_value = module.graph.initializers["a"].const_value
    emit(module, tmp_path / "out", architectures=[])
    model = imported(tmp_path / "out").load(device="cpu")
    assert list(model.state_dict()) == ["a"]
    y, z = model(torch.eye(2))
    assert y.tolist() == z.tolist() == [[1, 2], [3, 4]]


def damaged(file: Path, how: Any) -> None:
    if how == "missing":
        file.unlink()
    elif isinstance(how, int):
        file.write_bytes(file.read_bytes()[:how])
    else:
        save_file(how, file)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("missing", "the weights cannot be read: No such file"),
        (0, "the weights cannot be read: Error while deserializing header: header too small"),
        (-1, "the weights cannot be read: Error while deserializing header: incomplete metadata"),
        ({"v": torch.ones(2, 2)}, "'w' is not there, and float32 [2, 2] in model.py"),
        (
            {"v": torch.ones(2, 2), "w": torch.ones(2, 2)},
            "'v' is float32 [2, 2], and not there in model.py",
        ),
        ({"w": torch.ones(2, 3)}, "'w' is float32 [2, 3], and float32 [2, 2] in model.py"),
        (  # which would be loaded, and computed with
            {"w": torch.ones(2, 2, dtype=torch.float16)},
            "'w' is float16 [2, 2], and float32 [2, 2] in model.py",
        ),
    ],
    ids=["missing", "empty", "cut", "renamed", "more", "shape", "type"],
)
def test_weights_that_are_not_those_of_the_model(how: Any, told: str, tmp_path: Path) -> None:
    module = parsed("""<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 2] x) => (float[n, 2] y) <float[2, 2] w = {1, 2, 3, 4}> { y = MatMul(x, w) }""")
    emit(module, tmp_path / "out", architectures=[])
    file = tmp_path / "out" / "weights.safetensors"
    damaged(file, how)
    with pytest.raises(InputError) as caught:
        imported(tmp_path / "out").load(device="cpu")
    assert str(caught.value).startswith(f"{file}: {told}")
    assert str(caught.value).endswith("(emit the folder anew, and keep its files together)")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_loading_says_what_to_do(tmp_path: Path) -> None:
    module = parsed("""<ir_version: 10, opset_import: ["" : 20]>
        g (float[n] x) => (float[n] y) { y = Abs(x) }""")
    emit(module, tmp_path / "out", architectures=[])
    with pytest.raises(LwcError, match=r"no GPU to load the weights to \(set TRITON_INTERPRET=1"):
        imported(tmp_path / "out").load()


def test_what_is_not_python_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    module = parsed("""<ir_version: 10, opset_import: ["" : 20]>
        g (bool c, float[n] x) => (float[n] y)
        { y = If (c) <then_branch = t () => (float[n] a) { a = Abs(x) },
                      else_branch = e () => (float[n] b) { b = Neg(x) }> }""")
    with pytest.raises(LwcError, match=r"If .*: it reads a nested graph: that cannot be emitted"):
        emit(module, tmp_path / "out", architectures=[])
    with pytest.raises(LwcError, match="is for Triton's interpreter here and cannot be compiled"):
        emit(decoder(), tmp_path / "out", architectures=[nearest(80)])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("new", "past"), [(7, 0), (1, 9)])
def test_a_dry_run_records_what_a_run_launches(
    new: int, past: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = decoder()
    lowered = lwc.to_triton(module)
    given = feed(module, new, past)
    inputs = [torch.from_numpy(given[value.name or ""]) for value in module.graph.inputs]
    ran: list[Launch] = []
    run = Launch.run

    def watched(launch: Launch) -> None:
        ran.append(launch)
        run(launch)

    monkeypatch.setattr(Launch, "run", watched)
    with torch.no_grad():
        lowered(*inputs)
    recorded = dry_run(lowered, inputs, nearest(0))
    flat = [launch for launches in recorded.values() for launch in launches]
    assert [_facts(launch) for launch in flat] == [_facts(launch) for launch in ran]
    attends = "decode_kernel" if past else "flash_kernel"
    assert attends in {launch.name for launch in flat}


def _facts(launch: Launch) -> Any:
    plain = {
        name: (tuple(value.shape), value.stride(), value.dtype)
        if isinstance(value, torch.Tensor)
        else value
        for name, value in launch.arguments.items()
    }
    return launch.name, launch.grid, plain, launch.compiled_for


def test_a_dry_run_says_where_a_number_is_missing() -> None:
    module = parsed(
        """<ir_version: 10, opset_import: ["" : 20]>
        g (float x) => (int64[m] y) <int64 i = {0}, int64 d = {1}>
        { s = Cast<to = 7>(x)  y = Range(i, s, d) }"""
    )
    with pytest.raises(LwcError, match="what it would launch is not known"):
        dry_run(lwc.to_triton(module), [torch.tensor(3.0)], nearest(0))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("of", ["x", "o", "w", "v", "y", "g"])
def test_modules_of_any_names_run(name: str, of: str, tmp_path: Path) -> None:
    """Of an input, a weight, an output, or the graph; `inf` and `nan` are in the code."""
    module = parsed("""<ir_version: 10, opset_import: ["" : 20]>
        g (float[n, 2] x, float[n, 2] o) => (float[n, 2] y)
        <float[2] w = {2, 4}, float[2] v = {1, 2}>
        { a = Mul(x, w)  b = LeakyRelu <alpha = 1.5> (a)  c = LeakyRelu <alpha = 0.5> (b)
          d = Mul(c, o)  s = Shape(d)  z = ConstantOfShape(s)  e = Add(d, z)  y = Add(e, v) }""")
    graph = module.graph
    named = [*graph.inputs, *graph.initializers.values(), *graph.outputs]
    values = {value.name: value for value in named}
    for node, alpha in zip(list(graph)[1:3], (np.inf, np.nan), strict=True):
        node.attributes["alpha"] = ir.AttrFloat32("alpha", alpha)
    if of == "g":
        graph.name = name
    else:
        values[of].name = name
    other = {"w": "v", "v": "w"}.get(of)
    if other is not None:  # two weights whose names have nothing that Python allows
        values[other].name = "二"
    emit(module, tmp_path / "out", architectures=[])
    model = imported(tmp_path / "out").load(device="cpu")
    found = model(torch.tensor([[3.0, 5.0]]), torch.tensor([[1.0, 10.0]]))
    assert found.tolist() == [[7, 202]]
