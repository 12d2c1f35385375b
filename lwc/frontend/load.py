"""Load a model from a path: the suffix chooses the front end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lwc.core.errors import InputError

if TYPE_CHECKING:
    from lwc.core.diagnostics import RemarkLog
    from lwc.core.module import Module

__all__ = ["load"]

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
