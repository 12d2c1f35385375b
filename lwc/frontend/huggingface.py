"""Hugging Face folders in: `config.json`, safetensors and tokenizer, read offline.

Text models only: a decoder becomes `input_ids, attention_mask, position_ids -> logits`, without a
key-value cache; an encoder `input_ids, attention_mask[, token_type_ids]` -> its own outputs.
Attention is traced in its eager form: for Llama that is a tenth fewer nodes than PyTorch's
scaled dot product attention, and rows whose mask is all zero stay finite in both.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lwc.core.diagnostics import Remark, RemarkLog
from lwc.core.errors import InputError, MissingExtraError
from lwc.core.module import Module
from lwc.frontend.torch_trace import trace

__all__ = ["ATTENTION", "companion_files", "offline", "read_huggingface", "trace_text_model"]

ATTENTION = "eager"

_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "config_sentence_transformers.json",
    "sentence_bert_config.json",
    "modules.json",
)

_CAUSAL = ("ForCausalLM", "LMHeadModel")


def read_huggingface(directory: str | Path, *, remarks: RemarkLog | None = None) -> Module:
    """Read a folder with `config.json` and weights, through transformers, without a network.

    The class is the one `architectures` in `config.json` names, and the plain encoder or decoder
    where it names none.

    Raises:
        InputError: The folder is incomplete or damaged, or its model is no text decoder or encoder.
        MissingExtraError: transformers is not installed.
    """
    folder = Path(directory)
    config_file = folder / "config.json"
    try:
        names = json.loads(config_file.read_text(encoding="utf-8")).get("architectures")
    except FileNotFoundError as error:
        raise InputError("has no config.json", file=folder) from error
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"is no model configuration: {error}", file=config_file) from error
    with offline():
        model = _load(folder, names[0] if names else "AutoModel")
    module = trace_text_model(model, remarks=remarks)
    return module.with_source(
        path=str(folder), format="huggingface", companions=companion_files(folder)
    )


def _load(folder: Path, name: str) -> Any:
    import transformers

    kind = getattr(transformers, name, None)
    if kind is None:
        raise InputError(
            f"transformers {transformers.__version__} has no architecture '{name}'",
            file=folder / "config.json",
        )
    try:
        model, info = kind.from_pretrained(
            folder,
            local_files_only=True,
            dtype="float32",
            attn_implementation=ATTENTION,
            output_loading_info=True,
        )
    except Exception as error:
        # transformers raises OSError, ValueError, SafetensorError, RuntimeError and others here.
        raise InputError(
            f"transformers cannot load the model: {_summary(error)}", file=folder
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise InputError(
            f"the weights lack '{missing[0]}'"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
            file=folder,
            remedy="get the folder anew; missing weights would be random",
        )
    return model


def trace_text_model(model: Any, *, remarks: RemarkLog | None = None) -> Module:
    """Trace a transformers text model with symbolic dimensions `batch` and `sequence`.

    Raises:
        InputError: The model is no text decoder or encoder, or cannot be traced.
    """
    import torch

    config = model.config
    name = type(model).__name__
    if getattr(config, "is_encoder_decoder", False) or model.main_input_name != "input_ids":
        raise InputError(
            f"{name} is no text decoder or encoder",
            remedy="export its parts with lwc.trace",
        )
    causal = name.endswith(_CAUSAL)
    config.use_cache = False
    config.return_dict = True
    ids = torch.ones(2, 4, dtype=torch.int64)
    feed = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    accepted = inspect.signature(model.forward).parameters
    if causal and "position_ids" in accepted:
        feed["position_ids"] = torch.arange(4).repeat(2, 1)
    elif "token_type_ids" in accepted and getattr(config, "type_vocab_size", 0) > 1:
        feed["token_type_ids"] = torch.zeros_like(ids)
    model.eval()
    with torch.no_grad():
        outputs = list(model(**feed))
    module = trace(
        model,
        (),
        feed,
        dynamic_shapes={key: {0: "batch", 1: "sequence"} for key in feed},
        input_names=list(feed),
        output_names=outputs,
    )
    if remarks is not None:
        for remark in module.remarks:
            remarks.emit(remark)
        module.remarks = remarks
    if causal and "position_ids" not in feed:
        module.remarks.emit(
            Remark("note", "huggingface", f"{name} takes no position_ids: the graph has none")
        )
    return module


def companion_files(folder: Path) -> dict[str, str]:
    """Return the files that belong beside a model in `folder`, by name."""
    return {name: str(folder / name) for name in _COMPANIONS if (folder / name).is_file()}


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Keep transformers off the network, and quiet: no progress bars, no advice.

    Raises:
        MissingExtraError: transformers or PyTorch is not installed.
    """
    try:
        import torch
        import transformers
    except ModuleNotFoundError as error:
        raise MissingExtraError("reading a language model", "hf") from error
    del torch
    chatter = transformers.utils.logging
    level, bars = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    chatter.set_verbosity(logging.CRITICAL)
    chatter.disable_progress_bar()
    try:
        yield
    finally:
        chatter.set_verbosity(level)
        if bars:
            chatter.enable_progress_bar()


def _summary(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}"
