"""Perplexity of a model whose cache is cut as it goes."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lwc.core.errors import InputError, UsageError
from lwc.evaluate.execution import ModelLike, module_of
from lwc.evaluate.perplexity import Perplexity, token_losses
from lwc.generate.feeding import Feeder
from lwc.generate.policies import CachePolicy, FullCache

__all__ = ["perplexity_with_cache"]


def perplexity_with_cache(
    model: ModelLike,
    tokens: Sequence[int],
    policy: CachePolicy | None = None,
    *,
    chunk: int = 1,
    threads: int | None = None,
) -> Perplexity:
    """Measure how well a model predicts tokens from what its cache kept of those before.

    Every token but the first is predicted once, from the tokens themselves (teacher forcing).

    Args:
        model: A model with a cache.
        tokens: The text.
        policy: What the cache keeps; everything by default.
        chunk: Tokens fed at once. The cache is cut between chunks: a token sees what was kept
            before its chunk, and those of its chunk before it. 1 is what generation does.
        threads: Threads of one operator.

    Returns:
        The perplexity; its `window` is the most tokens a prediction sees, its `stride` the chunk.

    Raises:
        InputError: There are fewer than two tokens.
        LwcError: The model has no cache that can be cut so, or gives too few logits for a chunk.
    """
    policy = policy or FullCache()
    if len(tokens) < 2:
        raise InputError("perplexity needs a text of at least two tokens")
    if chunk < 1:
        raise UsageError(f"a chunk has at least 1 token, not {chunk}")
    given, wanted = list(tokens[:-1]), np.asarray(tokens[1:], np.int64)
    losses = []
    with Feeder(module_of(model), policy, threads) as feeder:
        feeder.start(len(given), chunk)
        for start in range(0, len(given), chunk):
            logits = feeder.feed(given[start : start + chunk], every=True)
            losses.append(token_losses(logits, wanted[start : start + chunk]))
    nll = np.concatenate(losses)
    held = len(given) if policy.budget is None else min(len(given), policy.budget + chunk)
    return Perplexity(math.exp(float(nll.mean())), len(nll), nll, held, chunk)
