"""Triton kernels compiled ahead of time: registers, spills and the instructions they are made of.

Nothing runs: there is no GPU.
"""

from __future__ import annotations

import os
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="Triton is not installed: pip install -e '.[triton]'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are for Triton's interpreter here", allow_module_level=True)

from lwc.backends.triton import launch  # noqa: E402
from lwc.backends.triton.ahead import (  # noqa: E402
    Compiled,
    compile_ahead,
    performance_losses,
)
from lwc.backends.triton.architectures import ARCHITECTURES, architecture  # noqa: E402
from lwc.backends.triton.kernels.activation import (  # noqa: E402
    ACTIVATIONS,
    activation_operation,
)
from lwc.backends.triton.kernels.decode_attention import decode_operation  # noqa: E402
from lwc.backends.triton.kernels.flash_attention import Attended, flash_operation  # noqa: E402
from lwc.backends.triton.kernels.norm import norm_operation  # noqa: E402
from lwc.backends.triton.kernels.rotary import rotary_operation  # noqa: E402
from lwc.backends.triton.operation import Configuration, Operation  # noqa: E402
from lwc.backends.triton.tuning import tuned  # noqa: E402
from lwc.core.errors import LwcError  # noqa: E402

EVERY = pytest.mark.parametrize("gpu", ARCHITECTURES, ids=lambda gpu: gpu.target)


def meta(*shape: int, dtype: Any = torch.float16) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta")


def compiled(operation: Operation, gpu: Any, index: int = 0) -> list[Compiled]:
    return [compile_ahead(launch, gpu) for launch in operation.prepare(operation.candidates[index])]


@EVERY
@pytest.mark.parametrize("columns", [576, 4096, 16384])
def test_norms_keep_their_rows_in_registers(gpu: Any, columns: int) -> None:
    x, weight = meta(512, columns, dtype=torch.bfloat16), meta(columns, dtype=torch.bfloat16)
    operation = norm_operation(x, weight, weight, x, gpu, eps=1e-6, centred=True)
    for index in range(len(operation.candidates)):
        (kernel,) = compiled(operation, gpu, index)
        assert kernel.spills == 0
        assert kernel.resident >= 1
        assert "ld.global.v4.b32" in kernel.ptx
        (work,) = (made.work for made in operation.prepare(operation.candidates[index]))
        assert work.from_memory(gpu.l2) == operation.least.nbytes


def test_occupancy_is_limited_by_what_runs_out_first() -> None:
    gpu = architecture("sm_80")
    assert gpu.resident_blocks(registers=32, shared=0, warps=4) == 16
    assert gpu.resident_blocks(registers=255, shared=0, warps=4) == 2
    assert gpu.resident_blocks(registers=32, shared=100 * 1024, warps=4) == 1
    assert gpu.resident_blocks(registers=32, shared=164 * 1024, warps=4) == 0
    assert gpu.resident_blocks(registers=16, shared=0, warps=1) == 32


def test_without_a_gpu_the_message_says_what_to_do() -> None:
    with pytest.raises(LwcError, match=r"need a GPU and the tensors lie on cpu .*TRITON_INTERPRET"):
        launch.rms_norm(torch.ones(2, 8), None)


@EVERY
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_loads_its_angles_once_a_token(gpu: Any, interleaved: bool) -> None:
    packed, table = meta(2, 512, 48, 128), meta(4096, 64)
    positions = meta(2, 512, dtype=torch.int64)
    operation = rotary_operation(
        packed[:, :, :40], table, table, positions, gpu, interleaved=interleaved
    )
    (kernel,) = compiled(operation, gpu)
    assert kernel.spills == 0
    assert "ld.global.v4.b32" in kernel.ptx
    (made,) = operation.prepare(operation.candidates[0])
    assert made.work.requested <= 1.01 * operation.least.nbytes


@EVERY
def test_activations_move_what_they_must(gpu: Any) -> None:
    both = meta(64, 2 * 11008)
    for function in ACTIVATIONS:
        operation = activation_operation(both[:, :11008], both[:, 11008:], function)
        (kernel,) = compiled(operation, gpu)
        assert kernel.spills == 0
        assert "ld.global.v4.b32" in kernel.ptx
        (made,) = operation.prepare(operation.candidates[0])
        assert made.work.requested == operation.least.nbytes


def tensor_cores(gpu: Any) -> str:
    return {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}[gpu.capability]


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize(
    ("dtype", "size", "options"),
    [
        (torch.bfloat16, 128, {"attended": Attended(right=0)}),
        (torch.float16, 64, {"attended": Attended(left=1024, right=0), "cap": 50.0}),
        (torch.bfloat16, 64, {"attended": Attended(), "masked": True}),
        (torch.bfloat16, 128, {"attended": Attended(right=0), "packed": True}),
    ],
    ids=["causal", "window and cap", "mask", "packed"],
)
def test_prompts_use_tensor_cores_and_load_ahead(
    gpu: Any, dtype: Any, size: int, options: dict[str, Any]
) -> None:
    operation = prompt(gpu, dtype, size, **options)
    (kernel,) = compiled(operation, gpu)
    assert kernel.spills == 0
    assert kernel.resident >= 1
    assert kernel.asynchronous
    assert kernel.tensor_core
    assert all(name.startswith(tensor_cores(gpu)) for name in kernel.tensor_core)
    if gpu.capability < 100:  # tcgen05 states the type in a descriptor
        kind = "bf16" if dtype == torch.bfloat16 else "f16"
        assert all(f".f32.{kind}.{kind}" in name for name in kernel.tensor_core)
    assert "tf32" not in kernel.ptx
    assert performance_losses(kernel) == []


@pytest.mark.slow
@EVERY
def test_float32_is_not_rounded_to_tf32(gpu: Any) -> None:
    (kernel,) = compiled(prompt(gpu, torch.float32, 64, Attended(right=0)), gpu)
    q, cache = meta(1, 9, 1, 64, dtype=torch.float32), meta(1, 3, 512, 64, dtype=torch.float32)
    first, second = compiled(decode_operation(q, cache, cache, gpu), gpu)
    for each in (kernel, first, second):
        assert each.spills == 0
        assert not each.tensor_core
        assert "tf32" not in each.ptx
    for each in (kernel, first):
        assert each.asynchronous


@pytest.mark.slow
@EVERY
@pytest.mark.parametrize(("heads", "queries"), [(32, 1), (64, 4)])
def test_new_tokens_read_the_cache_once(gpu: Any, heads: int, queries: int) -> None:
    q, cache = meta(2, heads, queries, 128), meta(2, 8, 8192, 128)
    lengths = meta(2, dtype=torch.int32)
    operation = decode_operation(q, cache, cache, gpu, key_lengths=lengths)
    first, second = compiled(operation, gpu)
    assert first.spills == second.spills == 0
    assert first.asynchronous
    # Tiles of 16 rows are too low for the instructions that came after mma.sync.
    assert first.tensor_core
    assert all(name.startswith("mma.sync") for name in first.tensor_core)
    assert all("f16.f16" in name for name in first.tensor_core)
    launches = operation.prepare(operation.candidates[0])
    asked = sum(launch.work.requested for launch in launches)
    assert asked <= 1.1 * operation.least.nbytes
    (keys,) = (access for access in launches[0].work.accesses if access.tensor == "k")
    assert keys.requested == keys.once == 2 * 8 * 8192 * 128 * 2


def test_many_splits_are_joined_in_registers() -> None:
    gpu = architecture("H100")
    q, cache = meta(1, 8, 1, 256), meta(1, 1, 2**18, 256)
    operation = decode_operation(q, cache, cache, gpu)
    assert operation.candidates[0]["SPLITS"] == 128
    _, second = operation.prepare(operation.candidates[0])
    assert compile_ahead(second, gpu).spills == 0


SMALL = {"QUERIES": 16, "KEYS": 16, "SIZE": 32, "VALUE_SIZE": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "packed": {"query_starts": (4,), "key_starts": (4,), "longest": (9, 9)},
    "lengths and a window of 1": {"key_lengths": (1,), "attended": Attended(left=1, right=1)},
    "capped, from an offset": {"attended": Attended(right=0, offset=1), "cap": 3.0},
    "boolean mask": {"mask": (1, 1, 9, 9)},
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("indices", [torch.int32, torch.int64])
def test_variants_of_prompts_compile(variant: str, indices: Any) -> None:
    """The interpreter takes what the compiler refuses, such as values that change their type."""
    gpu = architecture("H100")
    options = dict(VARIANTS[variant])
    attended = options.pop("attended", Attended(right=0))
    for name in ("query_starts", "key_starts", "key_lengths"):
        if name in options:
            options[name] = meta(*options[name], dtype=indices)
    if "mask" in options:
        options["mask"] = meta(*options["mask"], dtype=torch.int8).expand(1, 4, 9, 9)
    q, k, v = meta(1, 4, 9, 20), meta(1, 2, 9, 20), meta(1, 2, 9, 16)
    operation = flash_operation(q, k, v, attended, gpu, **options)
    (made,) = operation.prepare(Configuration(SMALL))
    assert compile_ahead(made, gpu).spills == 0


@pytest.mark.slow
@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("left", [None, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_variants_of_decoding_compile(splits: int, left: int | None, masked: bool) -> None:
    gpu = architecture("H100")
    q, k, v = meta(1, 4, 3, 20), meta(1, 2, 90, 20), meta(1, 2, 90, 16)
    mask = meta(1, 1, 3, 90, dtype=torch.int8).expand(1, 4, 3, 90) if masked else None
    lengths = meta(1, dtype=torch.int64) if masked else None
    operation = decode_operation(q, k, v, gpu, mask=mask, left=left, key_lengths=lengths, cap=2.0)
    tiles = {"ROWS": 16, "KEYS": 16, "SIZE": 32, "VALUE_SIZE": 16, "SPLITS": splits}
    launches = operation.prepare(Configuration(tiles))
    assert len(launches) == (1 if splits == 1 else 2)
    for made in launches:
        assert compile_ahead(made, gpu).spills == 0


def prompt(
    gpu: Any, dtype: Any, size: int, attended: Attended, *, masked: bool = False,
    packed: bool = False, cap: float = 0.0,
) -> Operation:  # fmt: skip
    q, k = meta(1, 32, 4096, size, dtype=dtype), meta(1, 8, 4096, size, dtype=dtype)
    mask = meta(1, 1, 4096, 4096, dtype=dtype).expand(1, 32, 4096, 4096) if masked else None
    starts = meta(5, dtype=torch.int64) if packed else None
    return flash_operation(
        q, k, k, attended, gpu, mask=mask, cap=cap,
        query_starts=starts, key_starts=starts, longest=(2048, 2048) if packed else None,
    )  # fmt: skip


def brute(attended: Attended, queries: int, keys: int) -> list[list[bool]]:
    offset = keys - queries if attended.offset is None else attended.offset
    far = keys + queries + abs(offset)
    left = far if attended.left is None else attended.left
    right = far if attended.right is None else attended.right
    return [
        [-left <= key - (query + offset) <= right for key in range(keys)]
        for query in range(queries)
    ]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 70), keys=st.integers(0, 70), left=st.none() | st.integers(-9, 90),
    right=st.none() | st.integers(-9, 90), offset=st.none() | st.integers(-90, 90),
)  # fmt: skip
def test_pairs_are_counted_without_a_walk(
    queries: int, keys: int, left: int | None, right: int | None, offset: int | None
) -> None:
    attended = Attended(left, right, offset)
    pairs = sum(map(sum, brute(attended, queries, keys)))
    assert attended.pairs(queries, keys) == pairs
    assert attended.pairs(2**20, 2**20) <= 2**40  # at once


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    queries=st.integers(1, 70), keys=st.integers(1, 70), left=st.none() | st.integers(0, 40),
    right=st.none() | st.integers(0, 40),
)  # fmt: skip
def test_work_is_counted_as_the_tiles_do_it(
    queries: int, keys: int, left: int | None, right: int | None
) -> None:
    attended = Attended(left, right)
    q, k = meta(2, 4, queries, 16), meta(2, 2, keys, 16)
    operation = flash_operation(q, k, k, attended, architecture("sm_80"))
    pairs = brute(attended, queries, keys)
    assert operation.least.flops == 2 * 2 * 4 * 32 * sum(map(sum, pairs))
    touched = sum(any(row[key] for row in pairs) for key in range(keys))
    assert operation.least.nbytes == 2 * 2 * 32 * (4 * queries + 2 * touched)
    tiles = {"QUERIES": 16, "KEYS": 16, "SIZE": 16, "VALUE_SIZE": 16}
    (made,) = operation.prepare(Configuration(tiles))
    blocks = loaded = 0
    for top in range(0, queries, 16):
        rows = pairs[top : top + 16]
        for start in range(0, keys, 16):
            if any(any(row[start : start + 16]) for row in rows):
                blocks += 1
                loaded += min(16, keys - start)
    work = made.work
    assert work.flops == 2 * 2 * 4 * blocks * 16 * 16 * 32
    (asked,) = (access.requested for access in work.accesses if access.tensor == "k")
    assert asked == 2 * 4 * loaded * 16 * 2


def test_the_fastest_tiling_is_kept_and_those_that_do_not_fit_are_left_out() -> None:
    from triton.runtime.errors import OutOfResources

    both = meta(1, 64)
    operation = activation_operation(both, both, "relu")
    times = iter([3.0, None, 1.0])

    def measure(_: Any) -> float:
        time = next(times)
        if time is None:
            raise OutOfResources(1, 2, "shared memory")
        return time

    assert tuned(operation, measure) is operation.candidates[2]
    times = iter([None, None, None])
    with pytest.raises(LwcError, match="no tiling of gated relu fits"):
        tuned(operation, measure)
