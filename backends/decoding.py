"""What a decoder with a cache is, and the protocol of what runs it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CacheInterface", "CacheTensor", "Decoder", "Moves"]


@dataclass(frozen=True)
class CacheTensor:
    """Keys or values of one layer: what goes in as past and comes out as present.

    Attributes:
        past: The input, `[batch, heads, past, size]`.
        present: The output, `[batch, heads, past + new, size]`.
        heads: Heads of keys and values.
        size: Size of a head.
        dtype: Its numpy type.
    """

    past: str
    present: str
    heads: int
    size: int
    dtype: np.dtype[Any]

    @property
    def bytes_per_token(self) -> int:
        """What a token of one sequence takes."""
        return self.heads * self.size * self.dtype.itemsize


@dataclass(frozen=True)
class CacheInterface:
    """The inputs and outputs of a decoder, by what they are for.

    Attributes:
        ids: Token ids, int64 `[batch, new]`.
        logits: The output of logits, `[batch, new or 1, vocabulary]`.
        mask: 1 for every cached and new token, int64 `[batch, past + new]`; None if there is none.
        positions: Positions of the new tokens, int64 `[batch, new]`; None if there is none.
        keep: The number of last positions whose logits are computed, int64 `[]`, 0 for all; None
            if there is no such input.
        tensors: Keys and values, layer by layer; none for a model without a cache.
        in_place: Every layer writes new keys and values into the buffer of the past where both are
            bound to the same.
        masses: An output with the attention that each cached and new token got from the new ones,
            `[layers, heads, past + new]`; None if there is none.
    """

    ids: str
    logits: str
    mask: str | None = None
    positions: str | None = None
    keep: str | None = None
    tensors: tuple[CacheTensor, ...] = ()
    in_place: bool = False
    masses: str | None = None

    @property
    def bytes_per_token(self) -> int:
        """What a token of one sequence takes in the cache."""
        return sum(tensor.bytes_per_token for tensor in self.tensors)


@dataclass(frozen=True, eq=False)
class Moves:
    """How a cache is cut down to a budget: entries behind it go to the places of dropped ones.

    Attributes:
        kept: Entries that remain, the same number in every layer and head.
        places: Where entries go, below `kept`, `[layers, heads, moved]`; an axis of layers or heads
            may be 1.
        entries: Which ones go there, of the same shape.
    """

    kept: int
    places: np.ndarray[Any, Any]
    entries: np.ndarray[Any, Any]


class Decoder(AbstractContextManager["Decoder"], Protocol):
    """Runs a decoder step by step. Leaving its `with` block frees it."""

    @property
    def cached(self) -> Sequence[int]:
        """Tokens in the cache, by sequence."""

    @property
    def cache_bytes(self) -> int:
        """The most bytes that the buffers of the cache took since `start`."""

    @property
    def cache_mode(self) -> str:
        """How the cache is kept: `in place`, `ping-pong`, `fixed` or `none`."""

    def start(self, capacity: int, *, batch: int = 1, budget: int | None = None) -> None:
        """Empty the cache.

        Args:
            capacity: The most tokens of one sequence that are cached and new in a step.
            batch: Number of sequences.
            budget: The most tokens that remain cached after a step where `cut` is used.
        """

    def step(
        self,
        ids: np.ndarray[Any, Any],
        positions: np.ndarray[Any, Any],
        *,
        every: bool = False,
        row: int | None = None,
    ) -> np.ndarray[Any, Any]:
        """Run new tokens, and add them to the cache.

        Args:
            ids: The tokens, int64 `[batch, new]`, `[1, new]` with `row`.
            positions: Their positions, of the same shape.
            every: Return the logits of every new token.
            row: The one sequence to run.

        Returns:
            Logits of the last token `[batch, vocabulary]`, or of every one `[batch, new,
            vocabulary]`. The next step may overwrite them.

        Raises:
            LwcError: The model fails, or gives no logits for every token.
        """

    def masses(self) -> np.ndarray[Any, Any]:
        """Return the attention that entries got in the last step, `[layers, heads, cached]`."""

    def cut(self, moves: Moves) -> None:
        """Cut the cache down; of one sequence only."""

    def close(self) -> None:
        """Free what the decoder holds."""

    def __enter__(self) -> Self:
        """Return the decoder."""
