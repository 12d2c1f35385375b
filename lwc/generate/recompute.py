"""Decoding without a cache: every step computes the whole sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self, TypeAlias

import numpy as np

from lwc.backends.base import Executable
from lwc.backends.decoding import CacheInterface, Moves
from lwc.core.errors import LwcError

__all__ = ["RecomputingDecoder", "looks_ahead"]

Array: TypeAlias = np.ndarray[Any, Any]

_PROBE = 8
"""Tokens of the two texts that are compared."""

_NOISE = 0.05
"""Relative change of logits that activations rounded to 8 bits together may bring about."""


class RecomputingDecoder:
    """Runs a model without a cache as `lwc.backends.decoding.Decoder` says.

    Args:
        executable: The compiled model; it is closed with the decoder.
        interface: Its inputs and outputs.
    """

    cache_bytes = 0
    cache_mode = "none"

    def __init__(self, executable: Executable, interface: CacheInterface) -> None:
        self._executable, self._interface = executable, interface
        self._ids = np.zeros((1, 0), np.int64)

    @property
    def cached(self) -> Sequence[int]:
        """Tokens so far, by sequence."""
        return [self._ids.shape[1]] * len(self._ids)

    def start(self, capacity: int, *, batch: int = 1, budget: int | None = None) -> None:
        """Forget the tokens so far."""
        self._ids = np.zeros((batch, 0), np.int64)

    def step(
        self, ids: Array, positions: Array, *, every: bool = False, row: int | None = None
    ) -> Array:
        """Run all tokens so far and new ones; see `Decoder.step`."""
        assert row is None
        self._ids = np.concatenate([self._ids, ids], axis=1)
        length, new = self._ids.shape[1], ids.shape[1]
        known = {
            self._interface.ids: self._ids,
            self._interface.mask: np.ones_like(self._ids),
            self._interface.positions: np.broadcast_to(np.arange(length), self._ids.shape),
            self._interface.keep: np.array(new if every else 1),
        }
        feed = {name: np.ascontiguousarray(array) for name, array in known.items() if name}
        logits = self._executable.run(feed, [self._interface.logits])[self._interface.logits]
        if not every:
            return np.asarray(logits[:, -1])
        if logits.shape[1] < new:
            raise LwcError(
                f"the model gives the logits of {logits.shape[1]} of {new} tokens",
                remedy="run the tokens one by one, or leave last-logits out",
            )
        return np.asarray(logits[:, -new:])

    def masses(self) -> Array:
        """Raise: there is no cache."""
        raise LwcError("a model without a cache has no entries to weigh")

    def cut(self, moves: Moves) -> None:
        """Raise: there is no cache."""
        raise LwcError("a model without a cache has no entries to drop")

    def close(self) -> None:
        """Free the model."""
        self._executable.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def looks_ahead(decoder: RecomputingDecoder, words: int) -> bool:
    """Tell whether the logits of a token depend on tokens behind it, as an encoder's do.

    The first token of two texts that differ in all others is compared. A model that gives the
    logits of the last token only is taken for a decoder.

    Args:
        decoder: The model; it forgets its tokens.
        words: Number of different tokens, at least 2.
    """
    found = []
    for others in (np.zeros(_PROBE - 1, np.int64), np.arange(1, _PROBE) % (words - 1) + 1):
        decoder.start(_PROBE)
        try:
            logits = decoder.step(np.append(0, others)[None], np.arange(_PROBE)[None], every=True)
        except LwcError:
            return False
        found.append(logits[0, 0].astype(np.float64))
    first, second = found
    return bool(np.linalg.norm(first - second) > _NOISE * np.linalg.norm(first))
