"""GGUF in: the graph comes from transformers' model of the architecture, the weights from the file.

transformers builds the model with memory that is never touched, it is traced, and each
initializer becomes a tensor that decodes its blocks from the memory-mapped file when it is read:
at no time is the whole model in memory.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lwc.core.diagnostics import Remark, RemarkLog
from lwc.core.errors import InputError, LwcError
from lwc.core.module import Module
from lwc.core.paths import cache_folder
from lwc.frontend.gguf_blocks import StoredWeight, keep_quantized_blocks
from lwc.frontend.gguf_file import GgufFile, GgufTensor
from lwc.frontend.huggingface import ATTENTION, companion_files, offline, trace_text_model

__all__ = ["read_gguf"]

_ROPE_FACTORS = "rope_freqs.weight"


def read_gguf(
    path: str | Path,
    *,
    keep_blocks: bool = False,
    accuracy_level: int = 4,
    remarks: RemarkLog | None = None,
) -> Module:
    """Read a GGUF decoder as `input_ids, attention_mask, position_ids -> logits`.

    Tokenizer, chat template and configuration come along as companions. They are made by
    transformers from the file's header and kept in lwc's cache folder.

    Args:
        path: The file.
        keep_blocks: Keep the file's Q4_0, Q4_1 and Q8_0 blocks (`keep_quantized_blocks` says
            how) instead of decoding them to float32.
        accuracy_level: With `keep_blocks`, the attribute of that name on MatMulNBits: 4 computes
            with activations rounded to int8, 1 in float32.
        remarks: Where to report; the module's own log by default.

    Raises:
        InputError: The file is damaged, or its architecture is not one that transformers reads.
        MissingExtraError: gguf or transformers is not installed.
    """
    file = GgufFile(Path(path))
    remarks = remarks or RemarkLog()
    with offline():
        folder = _companion_folder(file, remarks)
        model, mapping = _skeleton(file, folder)
    module = trace_text_model(model, remarks=remarks)
    stored = _bind_weights(module, file, model, mapping)
    if keep_blocks:
        keep_quantized_blocks(module, file, stored, accuracy_level=accuracy_level)
    return module.with_source(path=str(path), format="gguf", companions=companion_files(folder))


# Configuration and tokenizer


def _companion_folder(file: GgufFile, remarks: RemarkLog) -> Path:
    """Return a cached folder with the configuration and tokenizer that the header describes."""
    import transformers

    key = hashlib.sha256(transformers.__version__.encode() + file.header).hexdigest()[:16]
    folder = cache_folder() / "gguf" / key
    if not folder.is_dir():
        with _made_at(folder) as draft:
            _write_companions(file, draft)
    if not (folder / "tokenizer.json").is_file():
        remarks.emit(
            Remark("warning", "gguf", "transformers cannot make a tokenizer from this file")
        )
    return folder


def _write_companions(file: GgufFile, folder: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    place: dict[str, Any] = {"gguf_file": file.path.name, "local_files_only": True}
    with _transformers_errors(file):
        config = AutoConfig.from_pretrained(file.path.parent, **place)
        with torch.device("meta"):
            config.architectures = [type(AutoModelForCausalLM.from_config(config)).__name__]
        config.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
        if "tokenizer.ggml.model" in file.metadata:
            AutoTokenizer.from_pretrained(file.path.parent, **place).save_pretrained(folder)


@contextlib.contextmanager
def _made_at(folder: Path) -> Iterator[Path]:
    """Give a folder to fill, and put it at `folder` when it is complete."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
    except OSError as error:
        raise LwcError(
            f"cannot write to the cache folder: {error.strerror}",
            file=folder.parent,
            remedy="set LWC_CACHE to a folder that can be written",
        ) from error
    try:
        yield draft
        with contextlib.suppress(FileExistsError):
            os.replace(draft, folder)
    except OSError:
        if not folder.is_dir():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


# Model and weights


@dataclass(frozen=True)
class _Mapping:
    """How the tensors of a GGUF file become the parameters of a transformers model.

    Attributes:
        names: GGUF name of each parameter.
        convert: Undoes what llama.cpp did to a tensor, such as permuting the rows of q and k.
    """

    names: dict[str, str]
    convert: Callable[[np.ndarray[Any, Any], str], np.ndarray[Any, Any]]


def _skeleton(file: GgufFile, folder: Path) -> tuple[Any, _Mapping]:
    """Make the model with untouched memory for its parameters, and the mapping of its tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    with _transformers_errors(file):
        config = AutoConfig.from_pretrained(folder)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(
                config, dtype="float32", attn_implementation=ATTENTION
            )
            model.tie_weights()
        processor = TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)(
            config=config.to_dict()
        )
        with _one_name_table():
            found = get_gguf_hf_weights_map(model, processor)
    names = {ours: theirs for theirs, ours in found.items()}

    def convert(content: np.ndarray[Any, Any], name: str) -> np.ndarray[Any, Any]:
        state: dict[str, dict[str, Any]] = {"tensors": {}}
        return np.asarray(
            processor.process(weights=content, name=name, parsed_parameters=state).weights
        )

    _scale_rope(file, model)
    return model, _Mapping(names, convert)


@contextlib.contextmanager
def _one_name_table() -> Iterator[None]:
    """Make gguf's table of an architecture's names once: transformers asks for it at each module.

    For a decoder of thirty layers that is 400 tables and a tenth of the time to read it.
    """
    import gguf

    make = gguf.get_tensor_name_map
    gguf.get_tensor_name_map = functools.cache(make)
    try:
        yield
    finally:
        gguf.get_tensor_name_map = make


def _scale_rope(file: GgufFile, model: Any) -> None:
    """Divide the rotary frequencies by the factors some files carry (Llama 3.1's long context)."""
    import torch

    stored = file.tensors.get(_ROPE_FACTORS)
    if stored is None:
        return
    tables = [
        table for name, table in model.named_buffers() if name.endswith("rotary_emb.inv_freq")
    ]
    factors = torch.from_numpy(file.decode(stored).copy())
    if len(tables) != 1 or tables[0].shape != factors.shape:
        raise InputError(
            f"{_ROPE_FACTORS} does not fit the model's rotary frequencies", file=file.path
        )
    tables[0].div_(factors)


def _bind_weights(
    module: Module, file: GgufFile, model: Any, mapping: _Mapping
) -> dict[str, StoredWeight]:
    """Point each initializer that is a parameter to its tensor in the file."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first_names = {parameter: name for name, parameter in model.named_parameters()}
    stored = {}
    for name, value in module.graph.initializers.items():
        if name not in parameters:
            continue
        owner = first_names[parameters[name]]
        tensor = file.tensors.get(mapping.names.get(owner, ""))
        shape = tuple(parameters[name].shape)
        if tensor is None or not _fits(tensor, shape, mapping):
            raise InputError(
                f"has no tensor for the parameter '{name}' {list(shape)} of {type(model).__name__}",
                file=file.path,
                remedy="lwc reads architectures that store each parameter as one tensor",
            )
        module.replace_initializer(value, _lazy(file, tensor, shape, mapping))
        stored[name] = StoredWeight(tensor, _row_order(tensor, mapping))
    return stored


def _fits(tensor: GgufTensor, shape: tuple[int, ...], mapping: _Mapping) -> bool:
    probe = np.broadcast_to(np.float32(-1), tensor.shape)
    return bool(mapping.convert(probe, tensor.name).shape == shape)


def _lazy(
    file: GgufFile, tensor: GgufTensor, shape: tuple[int, ...], mapping: _Mapping
) -> ir.LazyTensor:
    def content() -> ir.TensorProtocol:
        values = mapping.convert(file.decode(tensor), tensor.name)
        return ir.Tensor(np.ascontiguousarray(values, np.float32))

    return ir.LazyTensor(content, ir.DataType.FLOAT, ir.Shape(shape), name=None)


def _row_order(tensor: GgufTensor, mapping: _Mapping) -> np.ndarray[Any, Any] | None:
    """Return where each row of a matrix comes from, if the conversion only moves rows."""
    if len(tensor.shape) != 2:
        return None
    numbers = np.arange(tensor.shape[0])[:, None]
    try:
        moved = mapping.convert(numbers, tensor.name)
    except ValueError:  # it reshapes columns, which the probe has only one of
        return None
    return moved[:, 0] if moved.shape == numbers.shape else None


@contextlib.contextmanager
def _transformers_errors(file: GgufFile) -> Iterator[None]:
    """Turn what transformers and gguf raise for a file they cannot read into one line."""
    try:
        yield
    except (
        ValueError,
        KeyError,
        NotImplementedError,
        IndexError,
        TypeError,
        AttributeError,
    ) as error:
        text = " ".join(str(error).split())
        raise InputError(
            f"transformers cannot read the architecture '{file.architecture}': "
            f"{type(error).__name__}: {text[:200]}",
            file=file.path,
        ) from error
