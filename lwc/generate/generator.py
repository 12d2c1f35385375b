"""Text from a prompt: streamed, measured, with a cache that keeps what a policy says."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

from lwc.core.diagnostics import RemarkLog
from lwc.core.errors import InputError
from lwc.evaluate.execution import ModelLike, module_of
from lwc.generate.ahead import work_ahead
from lwc.generate.detokenize import Detokenizer, StopStrings
from lwc.generate.feeding import Feeder
from lwc.generate.policies import CachePolicy, FullCache
from lwc.generate.result import Generated, Settings, Stopped
from lwc.generate.sampling import Sampler
from lwc.generate.tokenizer import TextTokenizer, load_text_tokenizer, tokenizer_of

__all__ = ["Generated", "Settings", "TextGenerator", "TextStream"]


class TextGenerator(AbstractContextManager["TextGenerator"]):
    """A language model with its tokenizer.

    Args:
        model: The model, or its path.
        tokenizer: A tokenizer or the path of one; by default the one that came with the model.
        cache: What the cache keeps; everything by default.
        threads: Threads of one operator; one per core by default.
        ahead: Compute the next token while the text of the last one is made and dealt with.

    Raises:
        LwcError: The model is no decoder, or its cache cannot be cut as `cache` wants.
        InputError: The model or the tokenizer cannot be read.
    """

    def __init__(
        self,
        model: ModelLike,
        tokenizer: TextTokenizer | str | Path | None = None,
        *,
        cache: CachePolicy | None = None,
        threads: int | None = None,
        ahead: bool = True,
    ) -> None:
        module = module_of(model)
        if tokenizer is None:
            tokenizer = tokenizer_of(module)
        elif not isinstance(tokenizer, TextTokenizer):
            tokenizer = load_text_tokenizer(tokenizer)
        self.tokenizer: TextTokenizer = tokenizer
        self.remarks: RemarkLog = module.remarks
        self._feeder = Feeder(module, cache or FullCache(), threads)
        self._ahead = ahead
        self._stream: TextStream | None = None

    def generate(
        self,
        prompt: str | Sequence[int],
        settings: Settings | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generated:
        """Continue a prompt.

        Args:
            prompt: Text, or tokens (such as those of `tokenizer.chat`).
            settings: How.
            on_text: Called with each piece of text when it is certain.
        """
        stream = self.stream(prompt, settings)
        for piece in stream:
            if on_text is not None:
                on_text(piece)
        return stream.result

    def stream(self, prompt: str | Sequence[int], settings: Settings | None = None) -> TextStream:
        """Continue a prompt; the text comes in pieces, and is generated as they are taken.

        There is one cache: an earlier stream that has not ended is closed.

        Raises:
            InputError: The prompt has no tokens.
        """
        ids = self._encoded(prompt)
        if self._stream is not None:
            self._stream.close()
        self._stream = TextStream(
            self._feeder, self.tokenizer, ids, settings or Settings(), ahead=self._ahead
        )
        return self._stream

    def generate_batch(
        self, prompts: Sequence[str | Sequence[int]], settings: Settings | None = None
    ) -> list[Generated]:
        """Continue several prompts at once; see `lwc.generate.batch.generate_batch`."""
        from lwc.generate.batch import generate_batch

        if self._stream is not None:
            self._stream.close()
        ids = [self._encoded(prompt) for prompt in prompts]
        return generate_batch(self._feeder, self.tokenizer, ids, settings or Settings())

    def _encoded(self, prompt: str | Sequence[int]) -> list[int]:
        ids = self.tokenizer.encode(prompt, True) if isinstance(prompt, str) else list(prompt)
        if not ids:
            raise InputError("the prompt has no tokens")
        return ids

    def close(self) -> None:
        """Free the model."""
        if self._stream is not None:
            self._stream.close()
        self._feeder.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class TextStream(Iterator[str]):
    """Pieces of text as they become certain; made by `TextGenerator.stream`."""

    def __init__(
        self,
        feeder: Feeder,
        tokenizer: TextTokenizer,
        ids: Sequence[int],
        settings: Settings,
        *,
        ahead: bool,
    ) -> None:
        self._feeder, self._ids, self._settings = feeder, ids, settings
        given = settings.stop_tokens
        self._ends = tokenizer.stop_tokens if given is None else given
        self._words, self._stop = Detokenizer(tokenizer.decode), StopStrings(settings.stop)
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._times: list[float] = []
        self._stopped: Stopped = "length"
        self._began = 0.0
        self._result: Generated | None = None
        steps = self._steps()
        self._pieces = self._read(work_ahead(steps) if ahead else steps)

    @property
    def result(self) -> Generated:
        """The whole text, when the stream has ended.

        Raises:
            RuntimeError: It has not.
        """
        if self._result is None:
            raise RuntimeError("the stream has not ended")
        return self._result

    def __next__(self) -> str:
        return next(self._pieces)

    def close(self) -> None:
        """Stop generating; there is no result then."""
        self._pieces.close()

    def _steps(self) -> Generator[tuple[int, float]]:
        """Yield tokens and when each was known, in seconds of `time.perf_counter`."""
        settings, ids = self._settings, self._ids
        sampler = Sampler(settings.sampling)
        chunk = min(settings.chunk, len(ids))
        self._feeder.start(len(ids) + settings.max_new_tokens - 1, chunk)
        self._began = time.perf_counter()
        for start in range(0, len(ids), chunk):
            logits = self._feeder.feed(ids[start : start + chunk])
        for number in range(settings.max_new_tokens):
            token = sampler.draw(logits)
            yield token, time.perf_counter()
            if token in self._ends or number == settings.max_new_tokens - 1:
                return
            logits = self._feeder.feed([token])

    def _read(self, steps: Generator[tuple[int, float]]) -> Generator[str]:
        """Turn tokens into text, and end at a stop string."""
        for token, known in steps:
            self._tokens.append(token)
            self._times.append(known)
            if token in self._ends:
                self._stopped = "stop token"
                break
            yield from self._piece(self._stop.add(self._words.add(token)))
            if self._stop.found is not None:
                break
        steps.close()
        if self._stop.found is None:
            yield from self._piece(self._stop.add(self._words.end()))
        if self._stop.found is None:
            yield from self._piece(self._stop.end())
        else:
            self._stopped = "stop string"
        self._result = self._summary()

    def _piece(self, text: str) -> Iterator[str]:
        if text:
            self._text.append(text)
            yield text

    def _summary(self) -> Generated:
        first, after = self._times[0] - self._began, self._times[-1] - self._times[0]
        return Generated.of(
            self._feeder, "".join(self._text), self._tokens,
            prompt=len(self._ids), stopped=self._stopped, first=first, after=after,
        )  # fmt: skip
