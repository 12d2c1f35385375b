"""The parts of text generation: sampling, pieces of text, stop strings, working ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwc.core.errors import LwcError, UsageError
from lwc.generate.ahead import work_ahead
from lwc.generate.detokenize import Detokenizer, StopStrings
from lwc.generate.sampling import Sampler, Sampling

tokenizers = pytest.importorskip("tokenizers")

TEXT = "naïve 中文 😀👩‍🚀 end"


# Sampling


def test_greedy_takes_the_first_of_the_largest() -> None:
    assert Sampler(Sampling()).draw(np.array([0, 3, 1, 3], np.float32)) == 1


def frequencies(sampling: Sampling, logits: Any, draws: int = 4000) -> Any:
    sampler = Sampler(sampling)
    drawn = [sampler.draw(logits) for _ in range(draws)]
    return np.bincount(drawn, minlength=len(logits)) / draws


def wanted(logits: Any, temperature: float, top_k: int | None, top_p: float | None) -> Any:
    """Filter and normalise, by sorting everything."""
    shares = np.exp(logits.astype(np.float64) / temperature)
    shares /= shares.sum()
    order = np.argsort(-shares, kind="stable")
    kept = order[:top_k]
    if top_p is not None:
        within = np.cumsum(shares[kept]) / shares[kept].sum()
        kept = kept[: int(np.searchsorted(within, top_p)) + 1]
    result = np.zeros_like(shares)
    result[kept] = shares[kept] / shares[kept].sum()
    return result


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.5, None, None), (1.0, 3, None), (1.3, None, 0.6), (1.0, 4, 0.5)],
)
def test_tokens_come_as_often_as_they_are_likely(
    temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = np.array([1.0, 2.5, 0.1, 2.5, -1.0, 2.0, 0.5], np.float32)
    expected = wanted(logits, temperature, top_k, top_p)
    found = frequencies(Sampling(temperature, top_k, top_p, seed=3), logits)
    assert ((found > 0) <= (expected > 0)).all()
    # Five standard deviations of a count of 4000 draws.
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected * (1 - expected) / 4000)).all()


@pytest.mark.parametrize("top_p", [0.001, 0.5, 0.9, 0.999, 1.0])
@pytest.mark.parametrize("top_k", [None, 50, 1000, 5000])
def test_candidates_of_a_large_vocabulary_are_those_of_sorting(
    top_p: float, top_k: int | None
) -> None:
    logits = np.random.default_rng(0).standard_normal(3000).astype(np.float32)
    found, _ = Sampler(Sampling(1.0, top_k, top_p))._candidates(logits, float(logits.max()))
    expected = np.flatnonzero(wanted(logits, 1.0, top_k, top_p))
    # At the edge of top_p, rounding decides about the last one.
    assert len(set(found.tolist()) ^ set(expected.tolist())) <= 1


def test_the_seed_says_all() -> None:
    logits = np.zeros(50, np.float32)
    draws = [[Sampler(Sampling(1.0, seed=seed)).draw(logits) for _ in range(9)] for seed in (1, 2)]
    samplers = [Sampler(Sampling(1.0, seed=1)) for _ in range(2)]
    one, two = ([sampler.draw(logits) for _ in range(9)] for sampler in samplers)
    assert one == two
    assert draws[0] != draws[1]


@pytest.mark.parametrize("temperature", [1e-300, 1e-6])
def test_a_tiny_temperature_is_greedy(temperature: float) -> None:
    assert Sampler(Sampling(temperature)).draw(np.array([0, 9, 8.5], np.float32)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(bad: float) -> None:
    with pytest.raises(LwcError, match="largest logit is"):
        Sampler(Sampling()).draw(np.array([0, bad, 1], np.float32))


@pytest.mark.parametrize(
    "options", [{"temperature": -1}, {"temperature": np.nan}, {"top_k": 0}, {"top_p": 0.0},
                {"top_p": 1.1}, {"seed": -1}]
)  # fmt: skip
def test_options_of_sampling_are_checked(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Sampling(**options)


# Pieces of text


def pieces_of(decode: Callable[[Sequence[int]], str], tokens: Sequence[int]) -> list[str]:
    words = Detokenizer(decode)
    return [*(words.add(token) for token in tokens), words.end()]


def byte_level() -> Any:
    """Make a tokenizer with one token for each byte, as GPT-2's begins."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


def byte_fallback() -> Any:
    """Make a tokenizer with words and bytes, as Llama's is."""
    vocabulary = {"<unk>": 0, **{f"<0x{n:02X}>": n + 1 for n in range(256)}}
    for letter in ("▁", *map(chr, range(97, 123))):
        vocabulary[letter] = len(vocabulary)
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
    )
    made.normalizer = tokenizers.normalizers.Replace(" ", "▁")
    kinds = tokenizers.decoders
    made.decoder = kinds.Sequence(
        [kinds.Replace("▁", " "), kinds.ByteFallback(), kinds.Fuse(), kinds.Strip(" ", 1, 0)]
    )
    return made


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_characters_come_whole(make: Callable[[], Any]) -> None:
    tokenizer = make()
    tokens = tokenizer.encode(TEXT).ids
    assert len(tokens) > len(TEXT)
    pieces = pieces_of(tokenizer.decode, tokens)
    assert "".join(pieces) == TEXT
    assert not any("�" in piece for piece in pieces)
    # Each piece comes with the token that completes it.
    known = ["".join(pieces[: n + 1]) for n in range(len(tokens))]
    for count, text in enumerate(known, start=1):
        whole = tokenizer.decode(tokens[:count])
        if not whole.endswith("�"):
            assert text == whole


@given(st.text(max_size=12), st.data())
@settings(max_examples=150, deadline=None)
def test_tokens_may_begin_and_end_anywhere_in_a_character(text: str, data: st.DataObject) -> None:
    coded = text.encode("utf-8", "ignore")
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(coded) - 1)))))
    parts = [coded[a:b] for a, b in zip([0, *cuts], [*cuts, len(coded)], strict=True)]

    def decode(tokens: Sequence[int]) -> str:
        return b"".join(parts[token] for token in tokens).decode("utf-8", "replace")

    assert "".join(pieces_of(decode, range(len(parts)))) == coded.decode()


def test_bytes_that_are_no_text_are_given_in_the_end() -> None:
    parts = [b"a", b"\xff", b"b", *[b"\x80"] * 50, b"\xe4\xb8"]

    def decode(tokens: Sequence[int]) -> str:
        return b"".join(parts[token] for token in tokens).decode("utf-8", "replace")

    pieces = pieces_of(decode, range(len(parts)))
    assert "".join(pieces) == "a�b" + "�" * 50 + "�"
    assert pieces[:3] == ["a", "", "�b"]


@pytest.mark.parametrize(
    ("stop", "text", "expected"),
    [
        (["end"], "the end is", "the "),
        (["end"], "the e", "the e"),
        (["aab"], "aaab", "a"),
        (["abc", "b"], "xabc", "xa"),
        (["ab", "xab"], "xabc", ""),
        (["", "z"], "abc", "abc"),
        ([], "abc", "abc"),
    ],
)
def test_text_ends_before_a_stop_string(stop: list[str], text: str, expected: str) -> None:
    for size in range(1, len(text) + 1):
        held = StopStrings(stop)
        pieces = [held.add(text[at : at + size]) for at in range(0, len(text), size)]
        assert "".join([*pieces, held.end()]) == expected
        assert (held.found is not None) == (expected != text)


def test_what_begins_no_stop_string_is_not_held_back() -> None:
    held = StopStrings(["end", "nnn"])
    assert [held.add(piece) for piece in ("pen", "n", "y", "e", "x")] == ["p", "e", "nny", "", "ex"]


# Working ahead


def test_items_come_in_order_and_errors_where_they_were_made() -> None:
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("three")

    ahead = work_ahead(items())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(ValueError, match="three"):
        next(ahead)


def test_two_items_are_made_ahead_and_none_after_closing() -> None:
    made: list[int] = []
    taken = threading.Event()

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            if number == 2:
                taken.set()
            yield number

    ahead = work_ahead(items())
    assert next(ahead) == 0
    assert taken.wait(10)
    ahead.close()
    assert made == [0, 1, 2]
    assert not any(thread.name == "lwc-work-ahead" for thread in threading.enumerate())
