"""Several prompts at once: one step gives a token to each."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from lwc.backends.decoding import Decoder
from lwc.core.errors import LwcError, UsageError
from lwc.generate.detokenize import Detokenizer, StopStrings
from lwc.generate.feeding import Feeder
from lwc.generate.result import Generated, Settings, Stopped
from lwc.generate.sampling import Sampler, Sampling
from lwc.generate.tokenizer import TextTokenizer

__all__ = ["generate_batch"]

Array: TypeAlias = np.ndarray[Any, Any]


class _Row:
    """The text of one sequence so far."""

    def __init__(self, prompt: Sequence[int], tokenizer: TextTokenizer, settings: Settings) -> None:
        self.prompt = prompt
        self.tokens: list[int] = []
        self.stopped: Stopped | None = None
        self.last = 0.0
        given = settings.stop_tokens
        self._ends = tokenizer.stop_tokens if given is None else given
        self._most = settings.max_new_tokens
        self._words, self._stop = Detokenizer(tokenizer.decode), StopStrings(settings.stop)
        self.text = ""

    def add(self, token: int, now: float) -> None:
        """Take a token, unless the text has ended."""
        if self.stopped is not None:
            return
        self.tokens.append(token)
        self.last = now
        if token in self._ends:
            self.stopped = "stop token"
        else:
            self.text += self._stop.add(self._words.add(token))
            if self._stop.found is None and len(self.tokens) == self._most:
                self.stopped = "length"
        if self.stopped is not None:
            self.text += self._stop.add(self._words.end()) + self._stop.end()
        if self._stop.found is not None:
            self.stopped = "stop string"


def generate_batch(
    feeder: Feeder, tokenizer: TextTokenizer, prompts: Sequence[Sequence[int]], settings: Settings
) -> list[Generated]:
    """Continue prompts together until all have ended; each row draws with a seed of its own.

    Prompts of one length need no padding and are right for every model. Where they differ,
    GroupQueryAttention takes each sequence at its own length in buffers that are written in place:
    prompts are run one by one into their rows of the buffers (it takes several tokens after a past
    for one sequence only), and then a step runs all rows, right-padded by the mask. Rows that have
    ended go on with the others; what they give is dropped.

    Args:
        feeder: The model.
        tokenizer: Its tokenizer.
        prompts: Tokens of each prompt.
        settings: How; the seed of row N is N more.

    Raises:
        UsageError: There is no prompt.
        LwcError: The model cannot run these prompts together.
    """
    if not prompts:
        raise UsageError("a batch has at least one prompt")
    lengths = np.array([len(prompt) for prompt in prompts])
    _check(feeder, lengths)
    decoder = feeder.prepare()
    decoder.start(int(lengths.max()) + settings.max_new_tokens - 1, batch=len(prompts))
    base = settings.sampling
    samplers = [
        Sampler(Sampling(base.temperature, base.top_k, base.top_p, base.seed + number))
        for number in range(len(prompts))
    ]
    rows = [_Row(prompt, tokenizer, settings) for prompt in prompts]
    begun = time.perf_counter()
    with feeder.explaining(int(lengths.max())):
        logits = _prefill(feeder, decoder, prompts, settings.chunk)
    first = 0.0
    while True:
        tokens = [sampler.draw(row) for sampler, row in zip(samplers, logits, strict=True)]
        now = time.perf_counter()
        first = first or now
        for row, token in zip(rows, tokens, strict=True):
            row.add(token, now)
        if all(row.stopped is not None for row in rows):
            break
        with feeder.explaining(int(lengths.max()) + 1):
            logits = decoder.step(np.array(tokens, np.int64)[:, None], lengths[:, None])
        lengths = lengths + 1
    return [_result(row, feeder, first - begun, row.last - first) for row in rows]


def _check(feeder: Feeder, lengths: Array) -> None:
    if feeder.cuts:
        raise LwcError(
            "a cache that is cut holds one sequence",
            remedy="generate the texts one by one, or keep the full cache",
        )
    if len(set(lengths.tolist())) == 1:
        return
    shown = " and ".join(str(each) for each in sorted({int(lengths.min()), int(lengths.max())}))
    if not feeder.interface.in_place:
        raise LwcError(
            f"prompts of {shown} tokens cannot run together: only GroupQueryAttention takes "
            "sequences of different lengths",
            remedy="generate the texts one by one, or run fuse-attention and add-kv-cache",
        )
    feeder.check_positions()


def _prefill(
    feeder: Feeder, decoder: Decoder, prompts: Sequence[Sequence[int]], chunk: int
) -> Array:
    """Run the prompts; return the logits of the last token of each, `[batch, vocabulary]`."""
    if not feeder.interface.in_place:
        ids = np.array(prompts, np.int64)
        return decoder.step(ids, np.broadcast_to(np.arange(ids.shape[1]), ids.shape))
    last = []
    for row, prompt in enumerate(prompts):
        for start in range(0, len(prompt), chunk):
            piece = np.array([prompt[start : start + chunk]], np.int64)
            positions = np.arange(start, start + piece.shape[1])[None]
            logits = decoder.step(piece, positions, row=row)
        last.append(logits[0])
    return np.stack(last)


def _result(row: _Row, feeder: Feeder, first: float, after: float) -> Generated:
    assert row.stopped is not None
    return Generated.of(
        feeder, row.text, row.tokens,
        prompt=len(row.prompt), stopped=row.stopped, first=first, after=after,
    )  # fmt: skip
