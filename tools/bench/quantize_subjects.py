"""What `quantize.py` quantizes: forms of one model as ONNX, and two halves of a text.

Everything is kept in the cache folder of the model's source (see `decode_models.py`).
"""

from __future__ import annotations

import functools
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.decode_models import Source, open_source, run
from bench.quantize_settings import Base
from fetch_models import model_path

import lwc
from lwc.calibration.data import CalibrationFile
from lwc.calibration.text import load_tokenizer, read_text
from lwc.core.module import Module
from lwc.passes.quantization.weight_uses import WeightUses, find_weights

CALIBRATION_LINES = 149
"""Lines of the text that quantizers may look at; the rest is for the evaluation."""

WINDOW = 512

_FUSE = "canonicalize,fuse-norm,fuse-activation,fuse-rotary,fuse-attention,canonicalize"


@functools.cache
def lwc_digest() -> str:
    """Return a hash of lwc's code and of this file: what they make depends on it."""
    made = hashlib.sha256()
    home = Path(lwc.__file__).parent
    for folder in ("core", "frontend", "calibration", "rewrite", "passes", "analysis"):
        for file in sorted((home / folder).resolve().rglob("*.py")):
            made.update(file.read_bytes())
    made.update(Path(__file__).read_bytes())  # the forms that are made here
    return made.hexdigest()[:12]


@dataclass(frozen=True)
class Subject:
    """A causal language model.

    Attributes:
        source: Where it comes from.
        samples: Windows of calibration.
        tokens: Tokens to evaluate on.
    """

    source: Source
    samples: int
    tokens: int

    def base(self, name: Base) -> Path:
        """Return the ONNX file of a form of the model, `logits` for every token, no cache.

        All but `float32` have embedding and head in 8 bits, whoever quantizes the rest: a quantizer
        that cannot reach a table which is shared by both must not be judged by it.
        """
        folder = self.source.keep(
            f"quantize-{name}-{lwc_digest()}", lambda at: _make_base(self, name, at)
        )
        return folder / "model.onnx"

    @functools.cache  # noqa: B019  # there is one subject
    def ids(self, calibration: bool) -> list[int]:
        """Return the tokens of one half of the text.

        Raises:
            SystemExit: There are too few.
        """
        lines = read_text(model_path("lee")).splitlines(keepends=True)
        half = lines[:CALIBRATION_LINES] if calibration else lines[CALIBRATION_LINES:]
        found = list(load_tokenizer(self.base("float32").parent)("".join(half)))
        wanted = self.samples * WINDOW if calibration else self.tokens + 1
        if len(found) < wanted:
            raise SystemExit(f"the text has {len(found)} tokens, {wanted} are asked for")
        return found[:wanted]

    def feeds(self) -> Path:
        """Return a folder with the calibration feeds as `.npz` files, the same for everybody."""
        return self.source.keep(f"quantize-feeds-{self.samples}", self._write_feeds)

    def _write_feeds(self, folder: Path) -> None:
        folder.mkdir()
        ids = self.ids(calibration=True)
        data = CalibrationFile(model_path("lee"), lambda _: ids, window=WINDOW)
        for index, feed in enumerate(data.feeds(lwc.load(self.base("float32")))):
            arrays: dict[str, Any] = dict(feed)
            np.savez(folder / f"{index:03}.npz", **arrays)

    @functools.cache  # noqa: B019
    def parameters(self) -> tuple[int, int]:
        """Return how many weights there are: all, and those of the layers alone."""
        module = lwc.load(self.base("float32"))
        stored = (value.const_value for value in module.graph.initializers.values())
        return (
            sum(tensor.size for tensor in stored if tensor is not None),
            sum(weight.tensor.size for weight in _layers(module)),
        )


def open_subject(layers: int | None, samples: int, tokens: int) -> Subject:
    """Return SmolLM2-135M, or its first layers."""
    return Subject(open_source(model_path("smollm2"), layers), samples, tokens)


def _make_base(subject: Subject, name: Base, folder: Path) -> None:
    """Write a form of the model."""
    if name == "float32":
        words = [sys.executable, "-m", "lwc.cli.opt", str(subject.source.gguf), "-q"]
        run([*words, "-o", f"{folder}/", "-p", _FUSE, "--grant", "all"])
        return
    module = lwc.optimize(subject.base("float32"), "rotate" if name == "rotated" else ()).module
    layers = ",".join(weight.value.name or "" for weight in _layers(module))
    tables = f"quantize-weights{{bits=8 exclude={layers}}}"
    lwc.optimize(module, tables).save(f"{folder}/")


def _layers(module: Module) -> list[WeightUses]:
    """Return the weights that are no embedding and no head: no extent is the vocabulary's."""
    weights = list(find_weights(module))
    tables = [weight for weight in weights if any(use.role == "Gather" for use in weight.uses)]
    words = {weight.tensor.shape[0] for weight in tables}
    return [weight for weight in weights if not words & set(weight.tensor.shape)]
