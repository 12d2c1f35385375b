"""How a text is generated, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from lwc.core.errors import UsageError
from lwc.generate.feeding import CHUNK, Feeder
from lwc.generate.sampling import Sampling

__all__ = ["Generated", "Settings", "Stopped"]

Stopped: TypeAlias = Literal["stop token", "stop string", "length"]


@dataclass(frozen=True)
class Settings:
    """How a text is generated.

    Attributes:
        max_new_tokens: The most tokens.
        sampling: How they are drawn; the most likely one by default.
        stop: Strings that end the text before them.
        stop_tokens: Tokens that end it; those of the tokenizer where None.
        chunk: Tokens of the prompt in one step.
    """

    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    stop_tokens: frozenset[int] | None = None
    chunk: int = CHUNK

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "chunk"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name.replace('_', '-')} is at least 1")
        if "" in self.stop:
            raise UsageError("stop takes texts of at least one character")


@dataclass(frozen=True)
class Generated:
    """A text and what it took.

    Attributes:
        text: The text, without what ended it.
        tokens: Its tokens, with the one that ended it.
        prompt_tokens: Tokens of the prompt.
        stopped: What ended it.
        seconds_to_first: From the prompt's tokens to the first new one.
        prefill_per_second: Tokens of the prompt per second until then.
        decode_per_second: Tokens per second after the first; None if there were none.
        cache_mode: How the cache was kept; see `lwc.backends.decoding.Decoder`.
        cache_tokens: Tokens the cache keeps of those that were fed.
        cache_bytes: The most bytes of its buffers.
    """

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    stopped: Stopped
    seconds_to_first: float
    prefill_per_second: float
    decode_per_second: float | None
    cache_mode: str
    cache_tokens: int
    cache_bytes: int

    @classmethod
    def of(
        cls,
        feeder: Feeder,
        text: str,
        tokens: Sequence[int],
        *,
        prompt: int,
        stopped: Stopped,
        first: float,
        after: float,
    ) -> Generated:
        """Sum up a text.

        Args:
            feeder: What ran the model.
            text: The text.
            tokens: Its tokens.
            prompt: Tokens of the prompt.
            stopped: What ended it.
            first: Seconds to the first token.
            after: Seconds from the first token to the last.
        """
        decoder = feeder.decoder
        return cls(
            text=text,
            tokens=tuple(tokens),
            prompt_tokens=prompt,
            stopped=stopped,
            seconds_to_first=first,
            prefill_per_second=prompt / first,
            decode_per_second=(len(tokens) - 1) / after if after else None,
            cache_mode=decoder.cache_mode,
            cache_tokens=feeder.kept(prompt + len(tokens) - 1),
            cache_bytes=decoder.cache_bytes,
        )

    def as_dict(self) -> dict[str, Any]:
        """Return it as data for JSON."""
        return {**asdict(self), "tokens": list(self.tokens)}
