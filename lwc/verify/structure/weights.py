"""Are the weights what they were? Modules share them, so that no pass may write into one."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import onnx_ir as ir

__all__ = ["WeightContents"]

_InMemory: TypeAlias = ir.Tensor[Any] | ir.PackedTensor[Any]
_IN_MEMORY = (ir.Tensor, ir.PackedTensor)


@dataclass(frozen=True)
class WeightContents:
    """Checksums of the weights that can be written into: arrays in memory.

    What lies in files is mapped to be read, and NumPy refuses to write there.

    Attributes:
        sums: By identity, each weight and its checksum; the weight is kept, so that no other
            takes its identity.
    """

    sums: dict[int, tuple[_InMemory, int]]

    @classmethod
    def of(cls, tensors: Iterable[Any], known: WeightContents | None = None) -> WeightContents:
        """Read weights.

        Args:
            tensors: The weights; see `lwc.core.module.Fingerprint`.
            known: Contents that were just checked: those weights are not read again.
        """
        found = {} if known is None else known.sums
        sums: dict[int, tuple[_InMemory, int]] = {}
        for tensor in tensors:
            if isinstance(tensor, _IN_MEMORY) and id(tensor) not in sums:
                before = found.get(id(tensor))
                checksum = _checksum(tensor) if before is None else before[1]
                if checksum is not None:
                    sums[id(tensor)] = tensor, checksum
        return cls(sums)

    def problem(self) -> str | None:
        """Say which weight has been written into since, or return None."""
        for tensor, checksum in self.sums.values():
            if _checksum(tensor) != checksum:
                return f"it writes into weight '{tensor.name}', which other modules share"
        return None


def _checksum(tensor: _InMemory) -> int | None:
    """Return the checksum of a weight, or None where it cannot be written into."""
    array = tensor.numpy_packed() if isinstance(tensor, ir.PackedTensor) else tensor.numpy()
    if array.dtype.kind == "O" or not array.flags.writeable:
        return None
    return zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
