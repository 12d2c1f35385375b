"""Kernels of products compiled ahead of time, and what they count; nothing runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[triton]'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are for Triton's interpreter here", allow_module_level=True)

from lwc.backends.triton.ahead import compile_ahead  # noqa: E402
from lwc.backends.triton.architectures import ARCHITECTURES, Architecture, architecture  # noqa: E402
from lwc.backends.triton.kernels.quantize_rows import quantize_rows_operation  # noqa: E402
from lwc.backends.triton.kernels.tiled_bitmap_matmul import tiled_bitmap_operation  # noqa: E402
from lwc.backends.triton.kernels.tiled_csl_matmul import tiled_csl_launch  # noqa: E402
from lwc.backends.triton.kernels.w4a16_matmul import w4a16_operation  # noqa: E402
from lwc.backends.triton.kernels.w8a8_matmul import w8a8_operation  # noqa: E402
from lwc.backends.triton.operation import Configuration, Operation  # noqa: E402

EVERY = pytest.mark.parametrize("gpu", ARCHITECTURES, ids=lambda gpu: gpu.target)
DEPTH, COLUMNS = 4096, 4096


def meta(*shape: int, dtype: Any = torch.float16) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta")


def w8a8(rows: int, gpu: Architecture) -> Operation:
    x, w = meta(rows, DEPTH, dtype=torch.int8), meta(COLUMNS, DEPTH, dtype=torch.int8)
    scales = meta(rows, dtype=torch.float32), meta(COLUMNS, dtype=torch.float32)
    return w8a8_operation(
        x, scales[0], w, scales[1], meta(COLUMNS), gpu, dtype=torch.float16, function="silu"
    )


def w4a16(rows: int, gpu: Architecture, group_size: int = 128) -> Operation:
    pairs = DEPTH // (2 * group_size)
    return w4a16_operation(
        meta(rows, DEPTH), meta(COLUMNS, pairs, group_size, dtype=torch.uint8),
        meta(pairs, COLUMNS, dtype=torch.int32), meta(pairs, COLUMNS, dtype=torch.uint8),
        meta(COLUMNS), gpu, columns=COLUMNS, group_size=group_size, function="gelu",
    )  # fmt: skip


def sparse(rows: int, gpu: Architecture, sparsity: float = 0.8) -> Operation:
    tiles = COLUMNS // 128, DEPTH // 64
    share = 1 - sparsity**2
    pairs = meta(int(COLUMNS * DEPTH // 2 * share), dtype=torch.int32)
    return tiled_bitmap_operation(
        meta(rows, DEPTH), meta(*tiles, 512, dtype=torch.uint8), pairs,
        meta(tiles[0] * tiles[1] + 1, dtype=torch.int32), meta(COLUMNS), gpu,
        columns=COLUMNS, fullest=int(4096 * share) + 150,
    )  # fmt: skip


KINDS: dict[str, Callable[[int, Architecture], Operation]] = {
    "w8a8": w8a8,
    "w4a16": w4a16,
    "sparse": sparse,
}


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 2048])
def test_products_use_tensor_cores_and_copy_ahead(kind: str, rows: int, gpu: Any) -> None:
    operation = KINDS[kind](rows, gpu)
    launches = operation.prepare(operation.candidates[0])
    assert len(launches) == (1 if rows > 1 else 2)  # a token's depth is split
    kernels = [compile_ahead(launch, gpu) for launch in launches]
    assert all(kernel.spills == 0 and kernel.resident >= 1 for kernel in kernels)
    types = {"s32.s8.s8", "kind::i8"} if kind == "w8a8" else {"f32.f16.f16", "kind::f16"}
    assert kernels[0].tensor_core
    for instruction in kernels[0].tensor_core:
        assert any(name in instruction for name in types), instruction
    loop = kernels[0].ptx.split("$L__BB0_")
    assert any("cp.async" in block and "bra" in block for block in loop[2:])
    family = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[gpu.capability]
    assert all(name.startswith(family) for name in kernels[0].tensor_core)


@EVERY
@pytest.mark.parametrize("depth", [576, 4096, 28672])
def test_rows_are_rounded_in_registers(gpu: Any, depth: int) -> None:
    operation = quantize_rows_operation(meta(64, depth))
    for candidate in operation.candidates:
        (launch,) = operation.prepare(candidate)
        assert compile_ahead(launch, gpu).spills == 0
        assert launch.work.from_memory(gpu.l2) == operation.least.nbytes


@EVERY
@pytest.mark.parametrize("rows", [16, 64])
def test_tiled_csl_is_scattered_to_shared_memory(gpu: Any, rows: int) -> None:
    """Compiled only: Gluon has no interpreter."""
    configuration = Configuration({"ROWS": rows, "SPLIT": 4}, warps=4, stages=1)
    launch = tiled_csl_launch(
        meta(rows, DEPTH), meta(COLUMNS * DEPTH // 5, dtype=torch.int32),
        meta(32 * 64 + 2, dtype=torch.int32), meta(4, rows, COLUMNS, dtype=torch.float32),
        fullest=1780, configuration=configuration,
    )  # fmt: skip
    kernel = compile_ahead(launch, gpu)
    assert kernel.spills == 0
    assert kernel.resident >= 2
    (loop,) = [block for block in kernel.ptx.split("$L__BB0_") if "mma.sync" in block]
    assert all(name.startswith("mma.sync.aligned.m16n8k16") for name in kernel.tensor_core)
    assert loop.index("ld.global.v4.b32") < loop.index("mma.sync")  # the next tile's nonzeros
    assert loop.count("ld.global.v4.b32") == 2048 // 128 // 4
    assert "cp.async.cg" in loop
    # Each of 16 nonzeros of a thread is a store of its own: before the loop, and in it.
    assert kernel.ptx.count("st.shared.b16") == 2 * 2048 // 128


def test_bytes_are_counted_from_the_tiling() -> None:
    gpu = architecture("sm_80")
    operation = w8a8(300, gpu)
    sizes = {"ROWS": 128, "COLUMNS": 256, "DEPTH": 32, "PIECES": 2, "GROUP": 8}
    (launch,) = operation.prepare(Configuration({**sizes, "SPLIT": 1}, 8, 3))
    found = {access.tensor: (access.once, access.requested) for access in launch.work.accesses}
    assert found == {
        "x": (300 * 4096, 300 * 4096 * 16),
        "w": (4096 * 4096, 4096 * 4096 * 3),
        "x_scale": (300 * 4, 300 * 4 * 16),
        "w_scale": (4096 * 4, 4096 * 4 * 3),
        "bias": (4096 * 2, 4096 * 2 * 3),
        "out": (300 * 4096 * 2, 300 * 4096 * 2),
    }
    assert launch.work.flops == 2 * 384 * 4096 * 4096
    assert launch.grid == (3 * 16, 1)
    first, second = operation.prepare(Configuration({**sizes, "SPLIT": 4}, 8, 3))
    assert [access.tensor for access in first.work.accesses] == ["x", "w", "parts"]
    assert first.work.accesses[-1].once == second.work.accesses[0].once == 4 * 300 * 4096 * 4
    assert {access.tensor for access in second.work.accesses} == {
        *("parts", "x_scale", "w_scale", "bias", "out")
    }
    exact = 300 * 4096 * (1 + 2) + 4096 * 4096 + 300 * 4 + 4096 * (4 + 2)
    assert operation.least.nbytes == exact


def test_scales_of_large_groups_are_loaded_for_each_piece() -> None:
    operation = w4a16(1, architecture("sm_90"))
    sizes = {"ROWS": 16, "COLUMNS": 128, "PIECE": 32, "GROUP": 8, "SPLIT": 1}
    (launch,) = operation.prepare(Configuration(sizes, 4, 3))
    scales = next(access for access in launch.work.accesses if access.tensor == "scales")
    assert scales.requested == 4 * scales.once == 4 * (4096 // 128) * 4096 * 2


@EVERY
@pytest.mark.parametrize("kind", KINDS)
def test_tilings_fit_and_begin_with_what_fills_the_gpu(kind: str, gpu: Any) -> None:
    for rows in (1, 17, 64, 500, 4096):
        operation = KINDS[kind](rows, gpu)
        assert operation.candidates
        first = operation.candidates[0]
        programs = -(-rows // first["ROWS"]) * -(-COLUMNS // first["COLUMNS"]) * first["SPLIT"]
        assert programs >= gpu.multiprocessors
        for candidate in operation.candidates:
            accumulators = candidate["ROWS"] * candidate["COLUMNS"] // (32 * candidate.warps)
            assert accumulators <= 128
            assert candidate["ROWS"] < 2 * max(rows, 16)
