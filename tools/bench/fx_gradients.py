#!/usr/bin/env python3
"""Compare the gradients of every weight of a lowered model with those that transformers takes.

The same weights, tokens and loss: transformers' own model beside `lwc.to_fx` of what lwc reads and
of what its fusions make of it. Weights are paired by their content, as they are or transposed, also
as a part of a packed one.

    python tools/bench/fx_gradients.py [--layers N] [--tokens N] [--json FILE]
    python tools/bench/fx_gradients.py --models minilm --pipelines read
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.decode_models import huggingface_folder, open_source, prompt_tokens
from fetch_models import model_path

import lwc
from lwc.calibration.text import load_tokenizer, read_text
from lwc.core.module import Module
from lwc.frontend.huggingface import offline

Tensors = Mapping[str, torch.Tensor]
Loss = Callable[[torch.Tensor], torch.Tensor]

FUSED = "canonicalize,fuse-norm{skip=all},fuse-activation,fuse-rotary,fuse-attention"
PIPELINES = {
    "read": "",
    "fused": FUSED,
    "mha": f"{FUSED}{{form=mha}}",
    "packed": f"{FUSED},pack-projections{{when=always}}",
}
MODELS = ("smollm2", "minilm")

NOTHING = 1e-5
"""A gradient this much smaller than the largest is one of 0, and only rounding: the bias of keys
moves all scores of a row alike, which softmax does not see."""


@dataclass(frozen=True)
class Weight:
    """One weight of a model.

    Attributes:
        name: Its name in transformers.
        cosine: Of the angle between the two gradients; 1 where both are 0.
        error: Norm of their difference, by that of transformers' gradient.
    """

    name: str
    cosine: float
    error: float


@dataclass(frozen=True)
class Row:
    """The weights of one kind in all layers.

    Attributes:
        model: Which model.
        pipeline: A key of `PIPELINES`.
        kind: The name without the number of the layer.
        weights: How many there are.
        cosine: The least cosine.
        error: The greatest relative error.
    """

    model: str
    pipeline: str
    kind: str
    weights: int
    cosine: float
    error: float


@dataclass(frozen=True)
class Subject:
    """A model in both forms, and what is asked of it.

    Attributes:
        model: The model in transformers.
        module: The model in lwc.
        feed: Inputs by name.
        loss: A number from the output.
    """

    model: torch.nn.Module
    module: Module
    feed: Tensors
    loss: Loss


def smollm2(layers: int | None, tokens: int) -> Subject:
    """Return SmolLM2 or its first layers, with the cross-entropy of the next tokens of a text."""
    from transformers import AutoModelForCausalLM

    source = open_source(model_path("smollm2"), layers)
    with offline():
        model = AutoModelForCausalLM.from_pretrained(
            huggingface_folder(source), dtype=torch.float32, local_files_only=True
        )
    ids = torch.tensor([prompt_tokens(source, model_path("lee"), tokens)])
    feed = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(tokens)[None],
    }

    def loss(logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])

    return Subject(model, lwc.load(source.gguf), feed, loss)


def minilm(layers: int | None, tokens: int) -> Subject:
    """Return MiniLM, two texts of which one is padded, and a random direction of its output."""
    from transformers import AutoModel

    folder = model_path("minilm")
    with offline():
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    ids = torch.tensor(load_tokenizer(folder)(read_text(model_path("lee")))[: 2 * tokens])
    mask = torch.ones(2, tokens, dtype=torch.int64)
    mask[1, tokens // 2 :] = 0
    ids = ids.reshape(2, tokens)
    feed = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
    width = model.config.hidden_size
    direction = torch.randn(2, tokens, width, generator=torch.Generator().manual_seed(0))

    def loss(hidden: torch.Tensor) -> torch.Tensor:
        # What padded positions hold is nobody's business.
        return (hidden * direction * mask.unsqueeze(-1)).sum()

    return Subject(model, lwc.load(folder), feed, loss)


def wanted_gradients(subject: Subject) -> dict[str, torch.Tensor]:
    """Return the gradient of each weight of the model in transformers that has one."""
    model = subject.model.eval()
    subject.loss(model(**subject.feed)[0]).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def compare(subject: Subject, wanted: Tensors, passes: str) -> list[Weight]:
    """Compare the gradients of what passes make of a module with the wanted ones.

    Raises:
        SystemExit: A weight is not among those of the lowered module, or gets no gradient.
    """
    module = subject.module
    if passes:
        module = lwc.optimize(module.clone(), passes, grant="all").module
    lowered = lwc.to_fx(module)
    given = [subject.feed[name] for name in lowered.meta["lwc"]["inputs"]]
    result = lowered(*given)
    subject.loss(result[0] if isinstance(result, tuple) else result).backward()
    held = dict(subject.model.named_parameters())
    found = _paired({name: held[name].detach() for name in wanted}, lowered)
    largest = max(float(gradient.norm()) for gradient in wanted.values())
    return [
        _agreement(name, found[name], gradient, NOTHING * largest)
        for name, gradient in wanted.items()
    ]


def _paired(weights: Tensors, lowered: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the gradients in a lowered module of weights given by name, in their shapes."""
    free = dict(lowered.named_parameters())
    found = {}
    # Whole ones first: a small one may also be a part of a larger by chance.
    for name, weight in sorted(weights.items(), key=lambda item: -item[1].numel()):
        choices = [name] if name in free else list(free)
        place = next(filter(None, (_place(weight, free[each], each) for each in choices)), None)
        if place is None:
            raise SystemExit(f"the lowered module has no weight like '{name}'")
        key, start, turned = place
        gradient = free[key].grad
        if gradient is None:
            raise SystemExit(f"'{key}' has no gradient, '{name}' in transformers has one")
        upright = gradient.T if turned else gradient
        found[name] = upright[start : start + len(weight)]
        if upright.shape == weight.shape:
            del free[key]
    return found


def _place(weight: torch.Tensor, held: torch.Tensor, key: str) -> tuple[str, int, bool] | None:
    """Find a weight in another: the first row it has there, and whether that lies transposed."""
    for turned in (False, True) if weight.dim() == 2 else (False,):
        upright = held.detach().T if turned and held.dim() == 2 else held.detach()
        fits = upright.dim() == weight.dim() and upright.shape[1:] == weight.shape[1:]
        if not fits or len(upright) < len(weight):
            continue
        firsts = upright[: len(upright) - len(weight) + 1] == weight[:1]
        for start in firsts.reshape(len(firsts), -1).all(1).nonzero().flatten().tolist():
            if torch.equal(upright[start : start + len(weight)], weight):
                return key, start, turned
    return None


def _agreement(name: str, found: torch.Tensor, wanted: torch.Tensor, nothing: float) -> Weight:
    a, b = found.double().flatten(), wanted.double().flatten()
    if max(a.norm(), b.norm()) < nothing:
        return Weight(name, 1.0, 0.0)
    norms = a.norm() * b.norm()
    cosine = float(a @ b / norms) if norms > 0 else 0.0
    return Weight(name, cosine, float((a - b).norm() / b.norm().clamp(min=1e-300)))


def by_kind(model: str, pipeline: str, weights: Sequence[Weight]) -> list[Row]:
    """Gather weights whose names differ by the number of a layer only."""
    kinds: dict[str, list[Weight]] = {}
    for weight in weights:
        kind = re.sub(r"(?:.*\.)?layers?\.\d+\.|^model\.", "", weight.name)
        kinds.setdefault(kind, []).append(weight)
    return [
        Row(
            model,
            pipeline,
            kind,
            len(group),
            min(weight.cosine for weight in group),
            max(weight.error for weight in group),
        )
        for kind, group in kinds.items()
    ]


def rows_of(
    models: Sequence[str], pipelines: Sequence[str], layers: int | None, tokens: int
) -> list[Row]:
    """Compare each model after each pipeline."""
    rows = []
    for name in models:
        subject = {"smollm2": smollm2, "minilm": minilm}[name](layers, tokens)
        wanted = wanted_gradients(subject)
        for pipeline in pipelines:
            rows += by_kind(name, pipeline, compare(subject, wanted, PIPELINES[pipeline]))
    return rows


def show(rows: Sequence[Row], console: Console) -> dict[str, Any]:
    """Print the least cosines; return the worst of each model and pipeline."""
    pipelines = list(dict.fromkeys(row.pipeline for row in rows))
    table = Table("model", "weight", "count", *pipelines)
    cells: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        cells.setdefault((row.model, row.kind, str(row.weights)), []).append(f"{row.cosine:.9f}")
    for key, cosines in cells.items():
        table.add_row(*key, *cosines)
    console.print(table)
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.model}, {row.pipeline}", []).append(row)
    summary = {
        key: {
            "weights": sum(row.weights for row in group),
            "cosine": min(row.cosine for row in group),
            "error": max(row.error for row in group),
        }
        for key, group in groups.items()
    }
    for title, worst in summary.items():
        console.print(
            f"{title}: {worst['weights']} weights, cosine {worst['cosine']:.9f} or more, "
            f"error {worst['error']:.1e} or less"
        )
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    parser.add_argument("--layers", type=int, metavar="N", help="first layers of SmolLM2 only")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of each text")
    parser.add_argument("--json", metavar="FILE", type=Path)
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    rows = rows_of(arguments.models, arguments.pipelines, arguments.layers, arguments.tokens)
    summary = show(rows, console)
    if arguments.json:
        figures = {"summary": summary, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
