#!/usr/bin/env python3
"""Time text generation of SmolLM2-135M-Instruct: lwc, ONNX Runtime, GenAI, llama.cpp, PyTorch.

All contenders get the same weights (a GGUF file), the same prompt (a news text), the same threads,
and generate greedily. Each runs in a process of its own that is kept alive; they take turns, and
only one is active at a time. Measured for each length of the prompt:

- time to the first token, and from it the tokens of the prompt per second;
- tokens per second after the first one, at that context;
- most memory ever resident until then, mapped files included (lengths run in ascending order);
- how many tokens agree with PyTorch's: all of them, where a contender computes in float32.

Medians over the rounds, and ratios to `--base` within each round with their smallest and largest.

    python tools/bench/decode.py [--contenders NAME ...] [--lengths 16 512 2048] [--tokens 48]
        [--rounds 5] [--threads 2] [--base NAME] [--json FILE]
    python tools/bench/decode.py --install-peers

The first use makes the models, which takes some minutes, and keeps them in the cache folder.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import decode_models as models
from bench.decode_models import Source
from bench.decode_peers import Player, install_peers
from fetch_models import model_path

REST = 0.05
"""Seconds between turns, for the threads of the contender before to fall asleep."""


@dataclass(frozen=True)
class Contender:
    """One way to run the model.

    Attributes:
        module: What its process imports.
        runner: A key of `decode_worker.RUNNERS`.
        make: Makes what it loads.
        float32: It computes in float32 throughout, so its tokens are PyTorch's.
        options: What the runner takes besides threads and context.
    """

    module: str
    runner: str
    make: Callable[[Source], Path]
    float32: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


def _lwc(form: str) -> Contender:
    make = partial(models.lwc_model, form=form)
    return Contender("onnxruntime", "lwc", make, float32=form == "f32")


def _genai(precision: str, *options: str) -> Contender:
    make = partial(models.genai_folder, precision=precision, options=options)
    return Contender("onnxruntime_genai", "genai", make, float32=precision == "fp32")


def _llama(kind: str) -> Contender:
    make = partial(models.gguf_file, kind=kind)
    cache = {"cache": "f32"} if kind == "f32" else {}
    return Contender("llama_cpp", "llama.cpp", make, kind == "f32", cache)


CONTENDERS: dict[str, Contender] = {
    "pytorch": Contender("torch", "pytorch", models.huggingface_folder, float32=True),
    "onnxruntime": Contender("onnxruntime", "onnxruntime", models.cached_export, float32=True),
    "onnxruntime-fused": Contender("onnxruntime", "onnxruntime", models.fused_export, float32=True),
    "genai-f32": _genai("fp32"),
    "genai-int4": _genai("int4", *models.GENAI_BLOCKS),
    "genai-int4-tuned": _genai("int4", *models.GENAI_TUNED),
    "llama-f32": _llama("f32"),
    "llama-file": Contender("llama_cpp", "llama.cpp", lambda source: source.gguf),
    "llama-q8_0": _llama("q8_0"),
    "llama-q4_0": _llama("q4_0"),
    "llama-q4_k_m": _llama("q4_k_m"),
    **{f"lwc-{form}": _lwc(form) for form in models.LWC},
}
"""By name. `genai-int4` is what the model builder does by itself, `-tuned` with all that it offers;
`llama-file` runs the GGUF file as it is, in 4-bit blocks with a minimum (Q4_1); `lwc-int4` has the
same form of weights as `genai-int4`, `lwc-4bit` zero points and a head of 8 bits besides."""


@dataclass(frozen=True)
class Turn:
    """One prompt with its continuation.

    Attributes:
        first: Seconds to the first token.
        rate: Tokens per second after it; 0 where there were none.
        tokens: The continuation.
        peak: Most bytes resident so far.
    """

    first: float
    rate: float
    tokens: tuple[int, ...]
    peak: int

    @classmethod
    def of(cls, answer: Mapping[str, Any]) -> Turn:
        """Read what a process answered."""
        seconds, tokens = answer["seconds"], answer["tokens"]
        spent = seconds[-1] - seconds[0]
        return cls(
            seconds[0], (len(tokens) - 1) / spent if spent else 0.0, tuple(tokens), answer["peak"]
        )


@dataclass
class Field:
    """The contenders that run, and why others do not."""

    contenders: Mapping[str, Contender] = field(default_factory=lambda: CONTENDERS)
    players: dict[str, Player] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def skip(self, name: str, error: Exception) -> None:
        """Leave a contender out from now on."""
        self.skipped[name] = (
            f"{error}".strip().splitlines()[0] if f"{error}".strip() else repr(error)
        )
        print(f"{name} is left out: {self.skipped[name]}", file=sys.stderr)
        if player := self.players.pop(name, None):
            player.close()

    def enter(self, name: str, source: Source, threads: int, context: int) -> None:
        """Make a contender's model and start its process."""
        contender = self.contenders[name]
        options = {"threads": threads, "context": context, **contender.options}
        try:
            player = Player(contender.module, contender.runner, contender.make(source), options)
        except Exception as error:  # whatever a peer does wrong costs only itself
            self.skip(name, error)
            return
        self.players[name], self.versions[name] = player, player.version
        print(f"{name}: {player.version}", file=sys.stderr)

    def base(self, wanted: str) -> str:
        """Return what the others are compared with: the wanted one, if it runs."""
        if not self.players:
            raise SystemExit("no contender runs")
        return wanted if wanted in self.players else next(iter(self.players))

    def reference(self) -> str:
        """Return whose tokens are right: PyTorch's, or those of another one in float32."""
        exact = [
            name for name, each in self.contenders.items() if each.float32 and name in self.players
        ]
        return (exact or list(self.players))[0]

    def close(self) -> None:
        """End the processes."""
        for player in self.players.values():
            player.close()


Turns = dict[str, list[Turn]]


def measure(field_: Field, prompt: list[int], tokens: int, rounds: int) -> tuple[Turns, Turns]:
    """Let every contender continue a prompt, in turns.

    Returns:
        The turns of the rounds by contender, and the untimed ones before them.
    """
    warm: Turns = {name: [] for name in field_.players}
    timed: Turns = {name: [] for name in field_.players}
    for turn in range(rounds + 1):
        names = list(field_.players)
        for place in range(len(names)):
            name = names[(turn + place) % len(names)]
            time.sleep(REST)
            try:
                found = Turn.of(field_.players[name].generate(prompt, tokens))
            except RuntimeError as error:
                field_.skip(name, error)
                continue
            (timed if turn else warm)[name].append(found)
    return timed, warm


def equal_tokens(found: Sequence[int], wanted: Sequence[int]) -> int:
    """Return how many tokens agree before the first that does not."""
    return sum(
        1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(found, wanted, strict=False))
    )


def _ratio(figures: Sequence[float], base: Sequence[float]) -> dict[str, float] | None:
    """Compare round by round; None where a figure is missing."""
    if len(figures) != len(base) or not all(base):
        return None
    ratios = [mine / theirs for mine, theirs in zip(figures, base, strict=True)]
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}


def summarize(
    length: int,
    timed: Turns,
    warm: Turns,
    base: str,
    reference: Sequence[int],
    *,
    contenders: Mapping[str, Contender] = CONTENDERS,
) -> list[dict[str, Any]]:
    """Return a row for each contender that finished."""
    rows = []
    for name, turns in timed.items():
        if not turns or not timed[base]:
            continue
        speed = {each: [length / turn.first for turn in timed[each]] for each in (name, base)}
        decode = {each: [turn.rate for turn in timed[each]] for each in (name, base)}
        rows.append(
            {
                "contender": name,
                "prompt": length,
                "base": base,
                "first_token_seconds": statistics.median(turn.first for turn in turns),
                "prefill_per_second": statistics.median(speed[name]),
                "decode_per_second": statistics.median(decode[name]),
                "prefill_ratio": _ratio(speed[name], speed[base]),
                "decode_ratio": _ratio(decode[name], decode[base]),
                "peak_bytes": warm[name][0].peak,
                "equal_tokens": min(equal_tokens(turn.tokens, reference) for turn in turns),
                "tokens": len(turns[0].tokens),
                "float32": contenders[name].float32,
                "rounds": [{"first": turn.first, "rate": turn.rate} for turn in turns],
            }
        )
    return rows


def _with_ratio(text: str, ratio: Mapping[str, float] | None) -> str:
    if ratio is None:
        return text
    return f"{text} ({ratio['median']:.2f}x, {ratio['low']:.2f}-{ratio['high']:.2f})"


def show(rows: Sequence[Mapping[str, Any]], title: str, console: Console) -> None:
    """Print the table of one length."""
    table = Table(title=title)
    table.add_column("contender")
    for column in ("first token, ms", "prefill, tok/s", "decode, tok/s", "peak MB", "equal"):
        table.add_column(column, justify="right")
    for row in rows:
        equal = f"{row['equal_tokens']} of {row['tokens']}"
        differs = row["float32"] and row["equal_tokens"] < row["tokens"]
        table.add_row(
            row["contender"],
            f"{1e3 * row['first_token_seconds']:.1f}",
            _with_ratio(f"{row['prefill_per_second']:.0f}", row["prefill_ratio"]),
            _with_ratio(f"{row['decode_per_second']:.1f}", row["decode_ratio"]),
            f"{row['peak_bytes'] / 1e6:.0f}",
            f"{equal} DIFFERS" if differs else equal,
        )
    console.print(table)


def contest(
    field_: Field,
    prompt: list[int],
    tokens: int,
    rounds: int,
    *,
    bases: Sequence[str],
    title: str,
    console: Console,
) -> list[dict[str, Any]]:
    """Let every contender continue a prompt; print a table and return rows for each base.

    Args:
        field_: The contenders.
        prompt: Ids of the prompt.
        tokens: Tokens after it.
        rounds: Rounds after an untimed one.
        bases: What the others are compared with, if it runs.
        title: Of the table; what it compares is added.
        console: Where the table goes.
    """
    found, reference = [field_.base(base) for base in bases], field_.reference()
    timed, warm = measure(field_, prompt, tokens, rounds)
    wanted = next((turn.tokens for turn in warm[reference]), ())
    rows = []
    for base in dict.fromkeys(found):
        of_base = summarize(len(prompt), timed, warm, base, wanted, contenders=field_.contenders)
        show(of_base, f"{title} (median, ratio to {base}; equal to {reference}'s)", console)
        rows += of_base
    return rows


def compete(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run everything and return the document."""
    lengths, tokens = sorted(set(arguments.lengths)), arguments.tokens
    source = models.open_source(arguments.model or model_path("smollm2"), arguments.layers)
    text = models.prompt_tokens(source, model_path("lee"), lengths[-1])
    entered = Field()
    rows: list[dict[str, Any]] = []
    try:
        for name in arguments.contenders:
            entered.enter(name, source, arguments.threads, lengths[-1] + tokens)
        for length in lengths:
            title = f"{length} tokens of prompt, {tokens} more, {arguments.threads} threads"
            rows += contest(
                entered, text[:length], tokens, arguments.rounds,
                bases=[arguments.base], title=title, console=console,
            )  # fmt: skip
    finally:
        entered.close()
    for name, reason in entered.skipped.items():
        console.print(f"{name} is left out: {reason}")
    summary = {
        "model": source.gguf.name,
        "same_tokens_in_float32": all(
            row["equal_tokens"] == row["tokens"] for row in rows if row["float32"]
        ),
        "threads": arguments.threads,
        "tokens": tokens,
        "rounds": arguments.rounds,
        "versions": entered.versions,
        "skipped": entered.skipped,
    }
    return {"summary": summary, "rows": rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = list(CONTENDERS)
    parser.add_argument("--contenders", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--lengths", nargs="+", type=int, default=[16, 512, 2048])
    parser.add_argument("--tokens", type=int, default=48, help="tokens after each prompt")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after an untimed one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", choices=names, default="onnxruntime", metavar="NAME")
    parser.add_argument("--model", type=Path, help="another GGUF file")
    parser.add_argument("--layers", type=int, help="use only the first layers, for a quick run")
    parser.add_argument("--install-peers", action="store_true", help="install them, and end")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    if arguments.install_peers:
        install_peers()
        return
    if min(arguments.rounds, arguments.threads, *arguments.lengths) < 1 or arguments.tokens < 2:
        parser.error("rounds, threads and lengths are at least 1, tokens at least 2")
    document = compete(arguments, Console(width=None if sys.stdout.isatty() else 140))
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
    main()
