"""How fast the models of `quantize.py` generate, in turns, by the processes of `decode.py`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.decode import Contender, Field, contest
from bench.decode_models import Source, run
from bench.decode_peers import Absent
from bench.quantize_results import Results, Unmade
from bench.quantize_settings import REFERENCE, Setting

DECODE = "add-kv-cache,last-logits,canonicalize,pack-projections{when=decode}"
"""What makes a decoder of a model without a cache, whoever quantized it."""


def contender(results: Results, setting: Setting, *, whole: bool = False) -> Contender:
    """Return how a row's model generates, or runs over a `whole` prompt for all of its logits.

    Raises:
        Unmade: There is no such model.
    """
    model = results.make(setting)["model"]
    exact = setting.name == REFERENCE
    if whole:
        if setting.quantizer in ("gguf", "genai"):
            raise Unmade("has no form without a cache")
        return Contender("onnxruntime", "forward", lambda source: model, exact)
    if setting.quantizer == "gguf":
        cache = {"cache": "f32"} if setting.options["kind"] == "f32" else {}
        return Contender("llama_cpp", "llama.cpp", lambda source: model, bool(cache), cache)
    if setting.quantizer == "genai":
        return Contender("onnxruntime_genai", "genai", lambda source: model.parent)
    return Contender("onnxruntime", "lwc", partial(_decoder, model=model), exact)


def _decoder(source: Source, model: Path) -> Path:
    """Return a folder with the model and a cache, made anew each time: lwc may have changed."""
    folder = source.home / "quantize" / f"decoder-{model.parent.name}"
    shutil.rmtree(folder, ignore_errors=True)
    words = [sys.executable, "-m", "lwc.cli.opt", str(model), "-q", "-o", f"{folder}/"]
    run([*words, "-p", DECODE, "--grant", "all"])
    return folder


def speed_rows(
    results: Results,
    settings: Sequence[Setting],
    *,
    prompt: int,
    tokens: int,
    rounds: int,
    bases: Sequence[str],
    console: Console,
) -> list[dict[str, Any]]:
    """Let all models continue the same prompt; print a table and return rows for each base.

    Ratios are to the base within each round, with their smallest and largest. With one token,
    models without a cache compute the logits of the whole prompt.
    """
    whole = tokens == 1
    section = "prompt" if whole else "speed"
    contenders, rows = {}, []
    for setting in settings:
        try:
            contenders[setting.name] = contender(results, setting, whole=whole)
        except (Unmade, Absent) as error:
            rows.append({"section": section, "setting": setting.name, "error": str(error)})
    entered = Field(contenders=contenders)
    try:
        for name in contenders:
            entered.enter(name, results.subject.source, results.threads, prompt + tokens)
        ids = results.subject.ids(calibration=False)[:prompt]
        after = "all logits" if whole else f"{tokens} more"
        title = f"{prompt} tokens of prompt, {after}, {results.threads} threads"
        found = contest(entered, ids, tokens, rounds, bases=bases, title=title, console=console)
    finally:
        entered.close()
    for name, reason in entered.skipped.items():
        rows.append({"section": section, "setting": name, "error": reason})
    for row in rows:
        console.print(f"{row['setting']}: {row['error']}", markup=False)
    return [{"section": section, "setting": row.pop("contender"), **row} for row in found] + rows
