"""`lwc::DynamicQuantMatMul`: its layout, its function, and the native kernels that replace it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from dialect import Case, draw_case, expected, module_of, variants
from hypothesis import given, settings
from hypothesis import strategies as st

from lwc.backends.onnxruntime import custom_operators
from lwc.backends.onnxruntime.custom_operators import instruction_set
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.core.dialect import DynamicQuantMatMul
from lwc.core.errors import LwcError, PassError
from lwc.core.quant_layout import pack_codes, pack_columns, packed_bytes, unpack_codes
from lwc.verify.structure.well_formed import verify_structure

Array = np.ndarray[Any, Any]

BACKEND = OnnxRuntimeBackend()

needs_native = pytest.mark.skipif(instruction_set() is None, reason="no C++ compiler at install")

# Products are exact in integers; what is left is float32 rounding of a few sums per output, and
# 1.5e-7 of the kernels' erf.
TOLERANCE = 1e-5


def run(case: Case, x: Array, *, native: bool, opset: int = 21) -> Array:
    with BACKEND.compile(module_of(case, opset), threads=1, native=native) as executable:
        return executable.run({"x": x})["y"]


def inputs(rng: np.random.Generator, rows: int, width: int) -> Array:
    return (rng.normal(size=(rows, width)) + 0.3).astype(np.float32)


def error(found: Array, wanted: Array) -> float:
    return float(np.abs(found - wanted).max() / max(np.abs(wanted).max(), 1e-6))


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    inputs=st.integers(1, 70),
    columns=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_codes_survive_packing(bits: int, inputs: int, columns: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (inputs, columns)).astype(np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.nbytes == packed_bytes(inputs, columns, bits)
    np.testing.assert_array_equal(unpack_codes(packed, bits, inputs, columns), codes)


def test_the_layout_is_as_documented() -> None:
    """Four inputs of a column side by side; the low bits of a byte hold the earlier line."""
    codes = np.zeros((32, 16), np.uint8)
    codes[5, 3] = 7  # line 1, column 3, second of four
    assert np.flatnonzero(pack_codes(codes, 8)[0]).tolist() == [64 + 4 * 3 + 1]
    packed = pack_codes(codes, 4)[0]
    assert np.flatnonzero(packed).tolist() == [4 * 3 + 1]
    assert packed[13] == 7 << 4
    planes = pack_codes(codes, 3)[0]
    assert np.flatnonzero(planes).tolist() == [13, 128 + 13]
    assert (planes[13], planes[128 + 13]) == (3 << 2, 1 << 1)
    rows = np.arange(2 * 17).reshape(2, 17)
    assert pack_columns(rows).shape == (2, 2, 16)
    assert pack_columns(rows)[1, :, 0].tolist() == [16, 33]


@pytest.mark.parametrize("opset", [17, 18, 21])
def test_the_function_computes_the_formula(opset: int) -> None:
    rng = np.random.default_rng(opset)
    for variant in variants(rng, 12):
        case = draw_case(rng, variant, np.float32)
        verify_structure(module_of(case, opset))
        x = inputs(rng, 5, variant.K)
        x[2] = 0
        found = run(case, x, native=False, opset=opset)
        assert error(found, expected(case, x)) < TOLERANCE, variant


@needs_native
def test_the_kernels_compute_the_formula() -> None:
    rng = np.random.default_rng(1)
    for variant in variants(rng, 60):
        case = draw_case(rng, variant, (np.float16, np.float32)[rng.integers(2)])
        with BACKEND.compile(module_of(case), threads=2) as executable:
            for rows in (1, 2, 3, 4, 13, 40, 130):
                x = inputs(rng, rows, variant.K)
                x[rows // 2] = 0
                found = executable.run({"x": x})["y"]
                assert error(found, expected(case, x)) < TOLERANCE, (variant, rows)


@needs_native
@pytest.mark.parametrize("name", ["plain", "avx2", "avx512-vnni"])
def test_every_instruction_set_computes_the_same(name: str) -> None:
    """In a process of its own, since the kernels are chosen once."""
    probe = [sys.executable, "-c", _PROBE]
    chosen, worst = probed(probe, name).split()
    assert chosen == name
    assert float(worst) < TOLERANCE


def probed(command: list[str], name: str) -> str:
    """Run a command with the kernels of an instruction set, where this processor has it."""
    done = subprocess.run(
        command,
        env={**os.environ, "LWC_ISA": name, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    if done.returncode and f"LWC_ISA={name} names no kernels" in done.stderr:
        pytest.skip(f"this processor has no {name}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


_PROBE = """
import numpy as np
from dialect import draw_case, expected, module_of, variants
from lwc.backends.onnxruntime.custom_operators import instruction_set
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
rng = np.random.default_rng(5)
worst = 0.0
for variant in variants(rng, 40):
    case = draw_case(rng, variant, np.float16)
    with OnnxRuntimeBackend().compile(module_of(case), threads=1) as executable:
        for rows in (1, 3, 29):
            x = rng.normal(size=(rows, variant.K)).astype(np.float32)
            y, wanted = executable.run({"x": x})["y"], expected(case, x)
            worst = max(worst, float(np.abs(y - wanted).max() / max(np.abs(wanted).max(), 1e-6)))
print(instruction_set(), worst)
"""


@needs_native
@pytest.mark.parametrize("name", ["plain", "avx2", "avx512-vnni"])
@pytest.mark.parametrize("bits", [4, 8])
def test_extremes_do_not_saturate(name: str, bits: int) -> None:
    """Sums of the largest codes and activations, which overflow 16 bits two at a time."""
    code = f"""
import numpy as np
from dialect import Case, module_of
from lwc.backends.onnxruntime.custom_operators import instruction_set
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.core.dialect import DynamicQuantMatMul
K, N = 2048, 16
variant = DynamicQuantMatMul(K, N, {bits}, zero_points=1)
for fill in (0, {(1 << bits) - 1}):
    case = Case(variant, np.full((K, N), fill, np.uint8), np.ones((1, N), np.float32),
                np.full((1, N), {1 << (bits - 1)}, np.uint8), np.zeros(N, np.float32))
    with OnnxRuntimeBackend().compile(module_of(case), threads=1) as executable:
        for sign in (1, -1):
            for rows in (1, 12):
                x = np.full((rows, K), sign * 127, np.float32)
                y = executable.run({{"x": x}})["y"]
                wanted = sign * 127 * K * (fill - {1 << (bits - 1)})
                assert (y == wanted).all(), (y[0, 0], wanted)
print(instruction_set())
"""
    run_with(name, code)


def _without_vnni() -> bool:
    flags = Path("/proc/cpuinfo").read_text() if sys.platform == "linux" else ""
    return "avx2" in flags and "vnni" not in flags


@pytest.mark.skipif(not _without_vnni(), reason="only AVX2 without VNNI sums pairs in 16 bits")
def test_the_stock_operator_saturates() -> None:
    """255 · 127 twice is 64,770, and becomes 32,767: what lwc's kernels are there to avoid."""
    graph = onnx.parser.parse_model("""
        <ir_version: 9, opset_import: ["" : 20]>
        g (uint8[1, 64] x) => (int32[1, 8] y) <int8[64, 8] w> { y = MatMulInteger (x, w) }""")
    weight = onnx.numpy_helper.from_array(np.full((64, 8), 127, np.int8), "w")
    graph.graph.initializer.append(weight)
    session = ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, 64), 255, np.uint8)})
    assert (found == 32 * 32767).all()


def run_with(name: str, code: str) -> None:
    """Run code that prints the instruction set in a process with the kernels of that name."""
    assert probed([sys.executable, "-c", code], name) == name


def test_a_session_of_ones_own_is_told_that_there_are_no_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(custom_operators, "_library", lambda: None)
    with pytest.raises(LwcError, match="were not built here"):
        custom_operators.register(ort.SessionOptions())


@needs_native
@pytest.mark.parametrize("name", ["nonsense", "AVX2"])
def test_an_unknown_instruction_set_is_refused(name: str) -> None:
    asked = """
from lwc.backends.onnxruntime.custom_operators import instruction_set
instruction_set()"""
    registered = """
import onnxruntime as ort
from lwc.backends.onnxruntime._native import __file__
ort.SessionOptions().register_custom_ops_library(__file__)"""
    compiled = """
import numpy as np
from dialect import draw_case, module_of, variants
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
rng = np.random.default_rng(5)
case = draw_case(rng, next(iter(variants(rng, 1))), np.float16)
OnnxRuntimeBackend().compile(module_of(case))"""
    for code in (asked, registered, compiled):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "LWC_ISA": name, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode
        assert f"LWC_ISA={name} names no kernels" in done.stderr
        assert "plain" in done.stderr.splitlines()[-1]
        assert ("UsageError" in done.stderr) == (code is not registered)


@needs_native
@pytest.mark.parametrize("name", ["plain", "avx2", "avx512-vnni"])
def test_sums_over_many_inputs_fit(name: str) -> None:
    """255 * 127 times 70000 exceeds 31 bits; so do the products of codes and zero points."""
    run_with(
        name,
        """
import numpy as np
from dialect import Case, expected, module_of
from lwc.backends.onnxruntime.custom_operators import instruction_set
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.core.dialect import DynamicQuantMatMul
K, N = 70000, 16
for code, zero in ((255, 0), (0, 255)):
    variant = DynamicQuantMatMul(K, N, 8, zero_points=1)
    case = Case(variant, np.full((K, N), code, np.uint8), np.full((1, N), 1e-3, np.float32),
                np.full((1, N), zero, np.uint8), np.zeros(N, np.float32))
    with OnnxRuntimeBackend().compile(module_of(case), threads=1) as executable:
        for rows in (1, 5):
            x = np.ones((rows, K), np.float32)
            np.testing.assert_allclose(
                executable.run({"x": x})["y"], expected(case, x), rtol=1e-5)
print(instruction_set())
""",
    )


@needs_native
@pytest.mark.parametrize("name", ["plain", "avx2", "avx512-vnni"])
@pytest.mark.parametrize("block", [0, 32])
def test_denormal_rows_keep_their_signs(name: str, block: int) -> None:
    """127 steps of a denormal size may not reach the largest; codes of 64 and more are 1 % off."""
    run_with(
        name,
        f"""
import numpy as np
from dialect import draw_case, expected, module_of
from lwc.backends.onnxruntime.custom_operators import instruction_set
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.core.dialect import DynamicQuantMatMul
variant = DynamicQuantMatMul(32, 16, 8, {block}, int({block} > 0))
case = draw_case(np.random.default_rng(0), variant, np.float32)
case.scales[...] *= np.float32(1e32)
x = np.zeros((8, 32), np.float32)
# In steps of the smallest number.
for row, top in enumerate((127, 150, 190, 191, 317, 1000, 16129, 1 << 22)):
    x.view(np.uint32)[row, :2] = top, top // 2 | 1 << 31
with OnnxRuntimeBackend().compile(module_of(case), threads=1) as executable:
    y, wanted = executable.run({{"x": x}})["y"], expected(case, x)
off = np.abs(y - wanted).max(axis=1) / np.abs(wanted).max(axis=1)
assert (off < 0.01).all(), off
print(instruction_set())
""",
    )


@needs_native
def test_blocks_of_more_than_their_sums_hold_are_refused() -> None:
    case = draw_case(
        np.random.default_rng(7), DynamicQuantMatMul(64, 16, 4, 1 << 16, 1), np.float32
    )
    with pytest.raises(LwcError, match="multiple of 32 up to 32768"):
        BACKEND.compile(module_of(case), threads=1)


@needs_native
@pytest.mark.parametrize("block", [0, 32])
def test_rows_that_are_not_finite_are_no_numbers(block: int) -> None:
    rng = np.random.default_rng(3)
    variant = DynamicQuantMatMul(64, 20, 4, block, int(block > 0))
    case = draw_case(rng, variant, np.float32)
    x = inputs(rng, 6, 64)
    x[1, 3], x[4, 63] = np.nan, -np.inf
    for native in (False, True):
        y = run(case, x, native=native)
        assert np.isnan(y).all(axis=1).tolist() == [False, True, False, False, True, False]


@needs_native
def test_no_rows_and_threads() -> None:
    rng = np.random.default_rng(4)
    variant = DynamicQuantMatMul(96, 1000, 4, 32, 1, zero_points=1)
    case = draw_case(rng, variant, np.float16)
    with (
        BACKEND.compile(module_of(case), threads=1) as one,
        BACKEND.compile(module_of(case), threads=2) as two,
    ):
        assert one.run({"x": np.zeros((0, 96), np.float32)})["y"].shape == (0, 1000)
        for rows in (1, 200):
            x = inputs(rng, rows, 96)
            np.testing.assert_array_equal(one.run({"x": x})["y"], two.run({"x": x})["y"])


@needs_native
def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    rng = np.random.default_rng(6)
    case = draw_case(rng, DynamicQuantMatMul(64, 20, 4, 32, 1), np.float32)
    module = module_of(case)
    wrong = pack_codes(case.codes[:32], 4)
    module.replace_initializer(module.graph.initializers["codes"], ir.tensor(wrong))
    with (
        BACKEND.compile(module, threads=1) as executable,
        pytest.raises(LwcError, match=r"product.*codes have 512 elements instead of 1024"),
    ):
        executable.run({"x": inputs(rng, 2, 64)})


def test_kernels_are_there_where_a_compiler_is() -> None:
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    if (shutil.which("g++") is None and shutil.which("c++") is None) or not headers.exists():
        pytest.skip("no C++ compiler, or no headers of Python")
    assert instruction_set() is not None


def test_their_absence_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_operators, "_library", lambda: None)
    rng = np.random.default_rng(7)
    case = draw_case(rng, DynamicQuantMatMul(64, 20, 4, 32, 1), np.float32)
    module = module_of(case)
    for _ in range(2):
        with BACKEND.compile(module) as executable:
            executable.run({"x": inputs(rng, 2, 64)})
    said = [remark for remark in module.remarks if "native operators" in remark.message]
    assert len(said) == 1
    assert said[0].kind == "warning"


def test_another_version_of_the_domain_is_refused() -> None:
    case = draw_case(np.random.default_rng(8), DynamicQuantMatMul(64, 20, 4), np.float32)
    module = module_of(case)
    module.model.graph.opset_imports["lwc"] = 0
    with pytest.raises(PassError, match="domain 'lwc' is declared at version 0"):
        DynamicQuantMatMul(64, 20, 3).declare(module)
