"""Perplexity of a causal language model on a text."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lwc.backends.base import Backend
from lwc.calibration.text import Tokenize, load_tokenizer, token_feed, windows
from lwc.core.errors import InputError, LwcError
from lwc.core.module import Module
from lwc.evaluate.execution import ModelLike, executable, module_of

__all__ = ["Perplexity", "PerplexityRatio", "perplexity", "token_losses"]

Array = np.ndarray[Any, Any]

_MAX_POWER = math.log(sys.float_info.max)
_ROWS = 64
"""Rows of logits turned to float64 at once."""


@dataclass(frozen=True, eq=False)
class Perplexity:
    """How well a model predicts a text.

    Attributes:
        value: `exp(mean(nll_per_token))`.
        tokens: Tokens predicted.
        nll_per_token: Negative log-likelihood of each, in nats, `[tokens]`.
        window: Most tokens of context a prediction sees, itself included.
        stride: Tokens between the starts of windows.
    """

    value: float
    tokens: int
    nll_per_token: Array
    window: int
    stride: int

    def over(self, reference: Perplexity) -> PerplexityRatio:
        """Divide by another model's perplexity on the same tokens.

        The standard error is that of the mean of the paired differences per token: far smaller
        than that of either perplexity, since most of the variation is the text's.
        """
        if self.tokens != reference.tokens:
            raise ValueError(
                f"{self.tokens} tokens cannot be paired with {reference.tokens}: "
                "evaluate both on the same text"
            )
        difference = self.nll_per_token - reference.nll_per_token
        ratio = _exp(float(difference.mean()))
        error = float(difference.std(ddof=1)) / math.sqrt(self.tokens) if self.tokens > 1 else 0.0
        return PerplexityRatio(ratio, ratio * error)


@dataclass(frozen=True)
class PerplexityRatio:
    """One perplexity over another.

    Attributes:
        ratio: Below 1 where the first model predicts better.
        standard_error: Of the ratio, from the paired differences.
    """

    ratio: float
    standard_error: float


def perplexity(
    model: ModelLike,
    tokenizer: Tokenize | str | Path,
    text: str,
    *,
    window: int = 512,
    stride: int = 512,
    max_tokens: int | None = 4097,
    threads: int | None = None,
    backend: Backend | None = None,
) -> Perplexity:
    """Measure how well a causal language model predicts `text`.

    Every token but the first is predicted once. A window feeds `window` tokens and predicts the
    one after each; with a stride below the window, windows overlap and only the positions that
    no earlier window covered are scored, each with at least `window - stride` tokens of context.
    No token is put before the text. Logits are handled one window at a time.

    Args:
        model: The model; its first output of rank 3 (or the one called `logits`) holds logits
            `[batch, sequence, vocabulary]`.
        tokenizer: A tokenizer, or the path of one (see `load_tokenizer`).
        text: The text.
        window: Tokens fed at once.
        stride: Tokens between the starts of windows.
        max_tokens: Tokens of the text to use, all by default where None.
        threads: Threads of one operator.
        backend: What runs the model; ONNX Runtime by default.

    Raises:
        InputError: The text has fewer than two tokens.
        LwcError: The model takes no token ids or gives no logits.
    """
    module = module_of(model)
    tokenize = tokenizer if callable(tokenizer) else load_tokenizer(tokenizer)
    ids = np.asarray(tokenize(text)[:max_tokens], np.int64)
    if len(ids) < 2:
        raise InputError("perplexity needs a text of at least two tokens")
    logits_name = _logits_output(module)
    losses = []
    with executable(module, threads=threads, backend=backend) as compiled:
        for start, stop, scored in windows(len(ids) - 1, window, stride):
            feed = token_feed(module, ids[None, start:stop])
            logits = compiled.run(feed, [logits_name])[logits_name]
            _check_logits(logits, stop - start, ids, module, logits_name)
            losses.append(token_losses(logits[0, scored - start :], ids[scored + 1 : stop + 1]))
    nll = np.concatenate(losses)
    return Perplexity(_exp(float(nll.mean())), len(nll), nll, window, stride)


def _exp(power: float) -> float:
    """Return e to `power`, infinite where no float holds it."""
    return math.inf if power > _MAX_POWER else math.exp(power)


def _logits_output(module: Module) -> str:
    outputs = module.graph.outputs
    ranked = [value for value in outputs if value.shape is None or len(value.shape) == 3]
    named = [value for value in outputs if value.name == "logits"]
    chosen: Sequence[Any] = named or ranked
    if not chosen:
        raise LwcError(
            "no output is logits [batch, sequence, vocabulary]",
            file=module.source.path,
            remedy="give a causal language model",
        )
    return chosen[0].name or ""


def _check_logits(logits: Array, length: int, ids: Array, module: Module, name: str) -> None:
    if logits.ndim != 3 or logits.shape[1] != length or logits.shape[2] <= ids.max():
        raise LwcError(
            f"output '{name}' has shape {list(logits.shape)}, which is no logits of {length} "
            f"tokens with ids up to {ids.max()}",
            file=module.source.path,
            remedy="give a causal language model and its own tokenizer",
        )


def token_losses(logits: Array, targets: Array) -> Array:
    """Return `logsumexp(logits) - logits[target]` of each row, in float64, `[rows]`."""
    losses = np.empty(len(targets))
    for start in range(0, len(targets), _ROWS):
        rows = logits[start : start + _ROWS].astype(np.float64)
        wanted = targets[start : start + _ROWS]
        top = rows.max(axis=1)
        total = np.log(np.exp(rows - top[:, None]).sum(axis=1))
        losses[start : start + len(rows)] = top + total - rows[np.arange(len(rows)), wanted]
    return losses
