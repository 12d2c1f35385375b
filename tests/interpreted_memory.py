"""What kernels touch in the interpreter, held to the tensors that they are launched with.

On a GPU what lies beside a tensor is another one, or nobody's; here it would mostly be read or
written unnoticed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from lwc.backends.triton.operation import Launch

__all__ = ["watch"]


class _Elements:
    """The addresses of a tensor's elements."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._first = tensor.data_ptr()
        self._size = tensor.element_size()
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        own = torch.zeros(last + 1 if tensor.numel() else 0, dtype=torch.bool)
        if tensor.numel():
            own.as_strided(tensor.shape, tensor.stride()).fill_(True)
        self._own = own.numpy()

    def hold(self, addresses: Any) -> bool:
        """Tell whether all addresses are of elements."""
        place, rest = np.divmod(addresses - self._first, self._size)
        inside = (place >= 0) & (place < len(self._own)) & (rest == 0)
        return bool(inside.all() and self._own[place].all())


def watch(patch: pytest.MonkeyPatch) -> None:
    """Have loads and stores fail that touch what is no element of a tensor of their launch.

    What a load gives where its mask is off and no other value is named is anything on a GPU: here
    it becomes NaN, or the largest integer.
    """
    load, store, run = (
        InterpreterBuilder.create_masked_load,
        InterpreterBuilder.create_masked_store,
        Launch.run,
    )
    tensors: list[_Elements] = []

    def check(pointers: Any, mask: Any) -> None:
        addresses = pointers.data[mask.data.astype(bool)].astype(np.int64)
        if addresses.size and not any(tensor.hold(addresses) for tensor in tensors):
            raise AssertionError("a kernel touches what is no element of its tensors")

    def checked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        check(pointers, mask)
        found = load(self, pointers, mask, other, *rest)
        if other is None:
            floating = np.issubdtype(found.data.dtype, np.floating)
            anything = np.nan if floating else np.iinfo(found.data.dtype).max
            data = np.where(mask.data.astype(bool), found.data, anything)
            return TensorHandle(data.astype(found.data.dtype), found.dtype)
        return found

    def checked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check(pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def launched(self: Launch) -> None:
        given = [x for x in self.arguments.values() if isinstance(x, torch.Tensor)]
        tensors[:] = map(_Elements, given)
        run(self)

    patch.setattr(InterpreterBuilder, "create_masked_load", checked_load)
    patch.setattr(InterpreterBuilder, "create_masked_store", checked_store)
    patch.setattr(Launch, "run", launched)
