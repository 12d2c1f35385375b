"""External data: weights in files beside the model, checked before anything opens them."""

from __future__ import annotations

import os
import stat
from typing import TYPE_CHECKING

import onnx_ir as ir

from lwc.core.errors import InputError
from lwc.core.weights import DataFile, FileTensor

if TYPE_CHECKING:
    import onnx

__all__ = ["DataFolder", "tensor_nbytes"]


def tensor_nbytes(dims: tuple[int, ...], dtype: ir.DataType) -> int:
    """Return the stored size of a tensor in bytes, elements packed."""
    elements = 1
    for dim in dims:
        elements *= dim
    return -(-elements * dtype.bitwidth // 8)


class DataFolder:
    """Opens the data files of one model, each once, and never one outside the model's folder.

    Args:
        model: Path of the model file, for messages; its folder is the boundary.
        follow_symlinks: Accept files that symbolic links place outside the folder, as a Hugging
            Face cache does. Locations that leave it by name are refused all the same.
    """

    def __init__(self, model: str | None, *, follow_symlinks: bool = False) -> None:
        self._model = model
        self._follow = follow_symlinks
        self._files: dict[str, DataFile] = {}

    def tensor(self, proto: onnx.TensorProto) -> FileTensor:
        """Return the tensor that `proto`, of known type and shape, says lies in a data file.

        Raises:
            InputError: The file is missing, out of bounds or too short, or the entry malformed.
        """
        name = proto.name or "a constant"
        entries = {entry.key: entry.value for entry in proto.external_data}
        file = self._open(entries.get("location", ""), name)
        dims, dtype = tuple(proto.dims), ir.DataType(proto.data_type)
        nbytes = tensor_nbytes(dims, dtype)
        offset = self._number(entries.get("offset"), 0, "offset", name)
        length = self._number(entries.get("length"), nbytes, "length", name)
        if length != nbytes:
            raise self._error(
                f"tensor '{name}' of type {dtype.name} and shape {list(dims)} needs {nbytes} bytes "
                f"but its external data has length {length}",
                "export the model again",
            )
        if offset + nbytes > file.size:
            raise self._error(
                f"tensor '{name}' ends at byte {offset + nbytes} of external data file "
                f"'{entries['location']}', which has {file.size} bytes",
                "the data file is truncated or belongs to another model: fetch it again",
            )
        return FileTensor(file, offset, dtype, ir.Shape(dims), proto.name)

    def _number(self, text: str | None, default: int, what: str, name: str) -> int:
        if text is None:
            return default
        if not (text.isascii() and text.isdigit()) or len(text) > 18:
            raise self._error(
                f"tensor '{name}' has {what} '{text[:40]}' in its external data, "
                "not a number of bytes",
                "export the model again",
            )
        return int(text)

    def _open(self, location: str, name: str) -> DataFile:
        known = self._files.get(location)
        if known is not None:
            return known
        if self._model is None:
            raise self._error(
                f"tensor '{name}' lies in data file '{location}', but the model has no path",
                "load the model from its file",
            )
        path = self._allowed_path(location, name)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise self._error(
                    f"external data '{location}' of tensor '{name}' is not a regular file",
                    "put the data file there",
                )
            file = DataFile(path)
        except FileNotFoundError:
            raise self._error(
                f"external data file '{location}' of tensor '{name}' is missing",
                "put it beside the model",
            ) from None
        except (OSError, ValueError) as error:
            raise self._error(
                f"external data file '{location}' of tensor '{name}' cannot be opened: "
                f"{getattr(error, 'strerror', None) or error}",
                "check the path and its permissions",
            ) from None
        self._files[location] = file
        return file

    def _allowed_path(self, location: str, name: str) -> str:
        folder = os.path.dirname(os.path.abspath(self._model or ""))
        outside = "external data must lie in the model's folder: move it there and export again"
        if not location or "\0" in location:
            raise self._error(f"tensor '{name}' names no external data file", "export again")
        if os.path.isabs(location) or location[:1] == "\\" or location[1:2] == ":":
            raise self._error(
                f"tensor '{name}' has its external data at the absolute path '{location}'", outside
            )
        path = os.path.normpath(os.path.join(folder, location))
        if os.path.commonpath([folder, path]) != folder or "..\\" in location:
            raise self._error(
                f"tensor '{name}' has its data outside the model's folder, at '{location}'",
                outside,
            )
        real_folder, real_path = os.path.realpath(folder), os.path.realpath(path)
        if os.path.commonpath([real_folder, real_path]) != real_folder and not self._follow:
            raise self._error(
                f"tensor '{name}' has its external data at '{location}', a symbolic link that "
                "leaves the model's folder",
                "use --follow-symlinks if you trust it",
            )
        return path

    def _error(self, message: str, remedy: str) -> InputError:
        return InputError(message, file=self._model, remedy=remedy)
