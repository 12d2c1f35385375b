"""Triton kernels compiled ahead of time: registers, spills and the instructions they are made of.

Nothing runs: there is no GPU.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("triton", reason="Triton is not installed: pip install 'lwc[triton]'")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("kernels are for Triton's interpreter here", allow_module_level=True)

from lwc.backends.triton import launch  # noqa: E402
from lwc.backends.triton.ahead import Compiled, compile_ahead  # noqa: E402
from lwc.backends.triton.architectures import ARCHITECTURES, architecture  # noqa: E402
from lwc.backends.triton.kernels.norm import norm_operation  # noqa: E402
from lwc.backends.triton.operation import Operation  # noqa: E402
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
