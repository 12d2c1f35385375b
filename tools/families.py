#!/usr/bin/env python3
"""Small models of many transformer families with random weights, by both of torch's exporters.

    python tools/families.py --list
    python tools/families.py llama-sdpa-dynamo -o llama.onnx

Nothing is downloaded: `transformers` makes each architecture from its configuration. Batch and
sequence stay symbolic. What each model holds (attention, norms, activations, rotary embeddings) is
counted from its configuration, so that fusions can be compared with what there is to fuse.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from fetch_models import cache_folder

LAYERS, HIDDEN, HEADS, VOCABULARY = 2, 64, 4, 100
SPELLING = 2
"""Counts up when the files would be exported otherwise: cached ones of before are not used."""

EXPORTERS = ("dynamo", "script")
IMPLEMENTATIONS = ("eager", "sdpa")


@dataclass(frozen=True)
class Expected:
    """What there is to fuse in a model.

    Attributes:
        attention: Attention layers, cross attention counted apart.
        norm: LayerNorm and RMSNorm.
        activation: Activations of the feed-forward layers.
        rotary: Tensors that get rotary positions: query and key of each layer.
    """

    attention: int
    norm: int
    activation: int
    rotary: int = 0


@dataclass(frozen=True)
class Family:
    """How to make a small model of one architecture.

    Attributes:
        kind: `encoder`, `decoder`, `seq2seq`, `vision`, or `alibi`: a decoder that no operator
            with a cache can express.
        config: Name of the configuration class in transformers.
        model: Name of the model class.
        expected: What there is to fuse.
        options: Options of the configuration.
        implementations: Those of attention that the architecture has.
    """

    kind: str
    config: str
    model: str
    expected: Expected
    options: dict[str, Any] = field(default_factory=dict)
    implementations: tuple[str, ...] = IMPLEMENTATIONS


def _sizes(**more: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 2 * HIDDEN,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 512,
        **more,
    }


_GROUPED = {"num_key_value_heads": 2}
_T5 = {"d_model": HIDDEN, "d_kv": 16, "d_ff": 128, "num_layers": LAYERS, "num_heads": HEADS}

FAMILIES: dict[str, Family] = {
    "bert": Family("encoder", "BertConfig", "BertModel", Expected(2, 5, 2), _sizes()),
    "roberta": Family("encoder", "RobertaConfig", "RobertaModel", Expected(2, 5, 2), _sizes()),
    "distilbert": Family(
        "encoder",
        "DistilBertConfig",
        "DistilBertModel",
        Expected(2, 5, 2),
        {
            "dim": HIDDEN,
            "n_layers": LAYERS,
            "n_heads": HEADS,
            "hidden_dim": 128,
            "vocab_size": VOCABULARY,
        },
    ),
    "gpt2": Family(
        "decoder",
        "GPT2Config",
        "GPT2LMHeadModel",
        Expected(2, 5, 2),
        {
            "n_embd": HIDDEN,
            "n_layer": LAYERS,
            "n_head": HEADS,
            "vocab_size": VOCABULARY,
            "n_positions": 512,
        },
    ),
    "opt": Family(
        "decoder",
        "OPTConfig",
        "OPTForCausalLM",
        Expected(2, 5, 0),
        {**_sizes(ffn_dim=128, word_embed_proj_dim=HIDDEN)},
    ),
    "llama": Family(
        "decoder", "LlamaConfig", "LlamaForCausalLM", Expected(2, 5, 2, 4), _sizes(**_GROUPED)
    ),
    "mistral": Family(
        "decoder",
        "MistralConfig",
        "MistralForCausalLM",
        Expected(2, 5, 2, 4),
        _sizes(**_GROUPED, sliding_window=8),
    ),
    "qwen2": Family(
        "decoder", "Qwen2Config", "Qwen2ForCausalLM", Expected(2, 5, 2, 4), _sizes(**_GROUPED)
    ),
    "qwen3": Family(
        "decoder",
        "Qwen3Config",
        "Qwen3ForCausalLM",
        Expected(2, 9, 2, 4),
        _sizes(**_GROUPED, head_dim=16),
    ),
    "gemma": Family(
        "decoder",
        "GemmaConfig",
        "GemmaForCausalLM",
        Expected(2, 5, 2, 4),
        _sizes(**_GROUPED, head_dim=16),
    ),
    "gemma2": Family(
        "decoder",
        "Gemma2Config",
        "Gemma2ForCausalLM",
        Expected(2, 9, 2, 4),
        _sizes(**_GROUPED, head_dim=16, sliding_window=8),
        ("eager",),
    ),
    "phi": Family("decoder", "PhiConfig", "PhiForCausalLM", Expected(2, 3, 2, 4), _sizes()),
    "phi3": Family(
        "decoder",
        "Phi3Config",
        "Phi3ForCausalLM",
        Expected(2, 5, 2, 4),
        _sizes(**_GROUPED, pad_token_id=0),
    ),
    "bloom": Family(
        "alibi",
        "BloomConfig",
        "BloomForCausalLM",
        Expected(2, 6, 2),
        {"hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "vocab_size": VOCABULARY},
        ("eager",),
    ),
    "deberta": Family(
        "encoder",
        "DebertaV2Config",
        "DebertaV2Model",
        Expected(2, 5, 2),
        _sizes(relative_attention=True, pos_att_type=["p2c", "c2p"]),
        ("eager",),
    ),
    "neox": Family(
        "decoder", "GPTNeoXConfig", "GPTNeoXForCausalLM", Expected(2, 5, 2, 4), _sizes()
    ),
    "bart": Family(
        "seq2seq",
        "BartConfig",
        "BartModel",
        Expected(6, 12, 4),
        {
            "d_model": HIDDEN,
            "encoder_layers": LAYERS,
            "decoder_layers": LAYERS,
            "vocab_size": VOCABULARY,
            "encoder_attention_heads": HEADS,
            "decoder_attention_heads": HEADS,
            "encoder_ffn_dim": 128,
            "decoder_ffn_dim": 128,
            "max_position_embeddings": 512,
        },
    ),
    "t5": Family(
        "seq2seq",
        "T5Config",
        "T5Model",
        Expected(6, 12, 0),
        {**_T5, "vocab_size": VOCABULARY, "decoder_start_token_id": 0},
    ),
    "vit": Family(
        "vision",
        "ViTConfig",
        "ViTModel",
        Expected(2, 5, 2),
        _sizes(image_size=32, patch_size=8),
    ),
}


@dataclass(frozen=True)
class Variant:
    """One export of a family.

    Attributes:
        family: A key of `FAMILIES`.
        implementation: `eager` or `sdpa`.
        exporter: `dynamo` (torch.export) or `script` (TorchScript).
    """

    family: str
    implementation: str
    exporter: str

    @property
    def name(self) -> str:
        """The name on the command line."""
        return f"{self.family}-{self.implementation}-{self.exporter}"

    @property
    def expected(self) -> Expected:
        """What there is to fuse."""
        return FAMILIES[self.family].expected


def variants(families: Sequence[str] = tuple(FAMILIES)) -> list[Variant]:
    """Return every export of these families."""
    return [
        Variant(family, implementation, exporter)
        for family in families
        for implementation in FAMILIES[family].implementations
        for exporter in EXPORTERS
    ]


def build(family: str, implementation: str) -> Any:
    """Make a model with seeded random weights."""
    import torch
    import transformers

    made = FAMILIES[family]
    config = getattr(transformers, made.config)(**made.options)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = getattr(transformers, made.model)(config).eval()
    # Fresh norms are all ones and biases all zeros: rewrites that forget them would pass.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def _wrap(model: Any, names: Sequence[str]) -> Any:
    import torch

    class First(torch.nn.Module):  # type: ignore[misc]
        """Takes its inputs by position and returns the first output."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *tensors: Any) -> Any:
            given = dict(zip(names, tensors, strict=True))
            more = {} if "pixel_values" in given else {"use_cache": False}
            if model.config.model_type in ("bert", "roberta", "distilbert"):
                more = {}
            return self.model(**given, **more, return_dict=True)[0]

    return First()


def _inputs(kind: str) -> dict[str, tuple[Any, dict[int, str]]]:
    """Return example inputs with the names of their free axes."""
    import torch

    ids = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
    axes = {0: "batch", 1: "sequence"}
    if kind == "vision":
        return {"pixel_values": (torch.rand(2, 3, 32, 32), {0: "batch"})}
    made = {"input_ids": (ids, axes), "attention_mask": (torch.ones_like(ids), axes)}
    if kind == "seq2seq":
        made["decoder_input_ids"] = (ids[:, :7].clone(), {0: "batch", 1: "decoder_sequence"})
    return made


def _free_axes(axes: Sequence[dict[int, str]]) -> tuple[dict[int, Any], ...]:
    """Return torch's own dimensions: axes of one name are one dimension."""
    import torch

    made = {name: torch.export.Dim(name) for names in axes for name in names.values()}
    return tuple({axis: made[name] for axis, name in names.items()} for names in axes)


def export(model: Any, kind: str, exporter: str, path: Path, *, opset: int = 18) -> Path:
    """Write a model as ONNX; batch and sequence are symbolic, the same in every input."""
    import torch

    inputs = _inputs(kind)
    tensors = tuple(tensor for tensor, _ in inputs.values())
    axes = {name: names for name, (_, names) in inputs.items()}
    wrapped = _wrap(model, list(inputs))
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        torch.no_grad(),
    ):
        warnings.simplefilter("ignore")
        if exporter == "dynamo":
            torch.onnx.export(
                wrapped, tensors, str(path), dynamo=True,
                dynamic_shapes=(_free_axes(list(axes.values())),),
                input_names=list(inputs), output_names=["output"], opset_version=opset,
                external_data=False, optimize=True, verbose=False,
            )  # fmt: skip
        else:
            torch.onnx.export(
                wrapped, tensors, str(path), dynamo=False, dynamic_axes=axes,
                input_names=list(inputs), output_names=["output"], opset_version=min(opset, 18),
            )  # fmt: skip
    return path


def variant_path(variant: Variant) -> Path:
    """Return the exported file in the cache folder, made if it is missing."""
    path = cache_folder() / f"families-{SPELLING}" / f"{variant.name}.onnx"
    if not path.exists():
        model = build(variant.family, variant.implementation)
        part = path.with_suffix(f".{os.getpid()}.onnx")  # tests run in several processes
        export(model, FAMILIES[variant.family].kind, variant.exporter, part)
        part.replace(path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="FAMILY-IMPLEMENTATION-EXPORTER; all by default")
    parser.add_argument("--list", action="store_true", help="print the names")
    arguments = parser.parse_args()
    for variant in variants():
        if arguments.list:
            print(variant.name)
        elif not arguments.names or variant.name in arguments.names:
            try:
                print(variant_path(variant))
            except Exception as error:
                print(f"{variant.name}: {type(error).__name__}: {str(error)[:200]}")


if __name__ == "__main__":
    main()
