"""From a path, by its suffix, or from a model in memory, by its type, to a Module."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lwc.core.errors import InputError

if TYPE_CHECKING:
    from lwc.core.diagnostics import RemarkLog
    from lwc.core.module import Module

__all__ = ["as_module", "load"]

_MODEL_FILES = ("model.onnx", "model.onnxtxt")


def load(
    path: str | os.PathLike[str],
    *,
    follow_symlinks: bool = False,
    remarks: RemarkLog | None = None,
    keep_gguf_blocks: bool = False,
) -> Module:
    """Read a model.

    Args:
        path: A `.onnx`, `.onnxtxt` or `.gguf` file, a folder that lwc wrote (`model.onnx` beside
            its companions), or a Hugging Face folder.
        follow_symlinks: Accept external data that symbolic links place outside the model's
            folder, as a Hugging Face cache does.
        remarks: Where the front end reports; the module's own log by default.
        keep_gguf_blocks: Keep GGUF's quantized blocks instead of decoding them to float.

    Raises:
        InputError: The path holds no model that lwc can read.
        MissingExtraError: The format needs a package that is not installed.
    """
    if not isinstance(path, str | os.PathLike):
        raise InputError(
            f"a {type(path).__name__} is no path",
            remedy="lwc.trace reads PyTorch modules; lwc.optimize takes models in memory",
        )
    place = Path(path)
    if os.path.isdir(path):
        return _load_folder(place, follow_symlinks=follow_symlinks, remarks=remarks)
    suffix = place.suffix.lower()
    if suffix == ".gguf":
        from lwc.frontend.gguf_reader import read_gguf

        return read_gguf(place, keep_blocks=keep_gguf_blocks, remarks=remarks)
    from lwc.frontend.onnx_reader import read_onnx, read_onnx_text

    if suffix == ".onnx":
        return read_onnx(place, follow_symlinks=follow_symlinks, remarks=remarks)
    if suffix == ".onnxtxt":
        return read_onnx_text(place, follow_symlinks=follow_symlinks, remarks=remarks)
    if not os.path.exists(path):
        raise InputError("does not exist", file=place, remedy="check the path")
    raise InputError(
        f"has the suffix '{suffix}', which names no format lwc reads",
        file=place,
        remedy="give a .onnx, .onnxtxt or .gguf file, or a Hugging Face folder",
    )


def as_module(
    graph: Any,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    copy: bool = False,
) -> Module:
    """Turn anything that is a model into a module.

    Args:
        graph: See `lwc.optimizer.optimize`.
        args: Example inputs of a PyTorch module.
        kwargs: Example inputs by name.
        dynamic_shapes: As `torch.export.export` takes it.
        copy: Copy the graph of what is a module already, with its remarks, so that it may be
            changed; weights are shared.

    Raises:
        InputError: It is no model.
    """
    from lwc.core.module import Module

    if isinstance(graph, str | os.PathLike):
        return load(graph)
    if _is_instance(graph, "lwc.optimizer", "OptimizeResult"):
        graph = graph.module
    if isinstance(graph, Module):
        return _with_remarks(graph.clone(), graph) if copy else graph
    if _is_instance(graph, "onnx_ir", "Model"):
        return Module(graph.clone())
    if _is_instance(graph, "onnx", "ModelProto"):
        from lwc.frontend.onnx_reader import from_proto

        return from_proto(graph)
    if _is_instance(graph, "torch.nn", "Module") and not (args or kwargs):
        _check_needs_no_inputs(graph)
    if _is_instance(graph, "torch.nn", "Module") or _is_instance(
        graph, "torch.export", "ExportedProgram"
    ):
        from lwc.frontend.torch_trace import trace

        return trace(
            graph, args, None if kwargs is None else dict(kwargs), dynamic_shapes=dynamic_shapes
        )
    raise InputError(
        f"a {type(graph).__name__} is no model",
        remedy="give a path, Module, onnx_ir.Model, ModelProto, nn.Module or ExportedProgram",
    )


def _check_needs_no_inputs(graph: Any) -> None:
    try:
        inspect.signature(graph.forward).bind()
    except ValueError:  # it does not tell
        return
    except TypeError as error:
        raise InputError(
            f"a {type(graph).__name__} is traced with example inputs, and none are given",
            remedy="make a module of it by lwc.trace(module, args) first",
        ) from error


def _with_remarks(twin: Module, module: Module) -> Module:
    for remark in module.remarks:
        twin.remarks.emit(remark)
    return twin


def _is_instance(value: object, module: str, name: str) -> bool:
    """Like isinstance, without importing the module: a value of a class implies its import."""
    home = sys.modules.get(module)
    return home is not None and isinstance(value, getattr(home, name))


def _load_folder(place: Path, *, follow_symlinks: bool, remarks: RemarkLog | None) -> Module:
    for name in _MODEL_FILES:
        if os.path.isfile(place / name):
            module = load(place / name, follow_symlinks=follow_symlinks, remarks=remarks)
            return module.with_source(companions=_companions(place))
    if os.path.isfile(place / "config.json"):
        from lwc.frontend.huggingface import read_huggingface

        return read_huggingface(place, remarks=remarks)
    raise InputError(
        "is a folder with neither model.onnx nor config.json",
        file=place,
        remedy="give a model file, or a folder that holds a model",
    )


def _companions(place: Path) -> dict[str, str]:
    """Return the small files beside a model: config, tokenizer, chat template."""
    suffixes = {".json", ".txt", ".jinja", ".model"}
    return {
        file.name: str(file)
        for file in sorted(place.iterdir())
        if file.suffix in suffixes and file.is_file()
    }
