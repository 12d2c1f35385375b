"""A `FeedSpec` as JSON: what is known of a model's inputs, beside the model.

{"dims": {"N": 3}, "ranges": {"x": [0, 9]}, "vocabularies": {"ids": 100},
 "masks": {"mask": "ones"}, "values": {"y": {"type": "FLOAT", "shape": [2], "data": [1, 2]}}}
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from lwc.calibration.feeds import FeedSpec
from lwc.core.errors import InputError, UsageError

__all__ = ["read_feed_spec", "write_feed_spec"]

Array = np.ndarray[Any, Any]


def write_feed_spec(spec: FeedSpec, path: str | Path) -> None:
    """Write a file that `read_feed_spec` reads; what is not given is left out.

    Raises:
        UsageError: A value holds what JSON cannot, such as bytes.
        OSError: The file cannot be written.
    """
    parts = {item.name: dict(getattr(spec, item.name)) for item in dataclasses.fields(spec)}
    try:
        parts["values"] = {name: _to_json(array) for name, array in spec.values.items()}
        text = json.dumps({name: part for name, part in parts.items() if part})
    except TypeError as error:
        raise UsageError(f"feeds cannot be written: {error}") from error
    Path(path).write_text(f"{text}\n", encoding="utf-8")


def read_feed_spec(path: str | Path) -> FeedSpec:
    """Read what `write_feed_spec` wrote, or a person.

    Raises:
        InputError: There is no such file, or it holds something else.
        UsageError: A range is empty, or the like; see `FeedSpec`.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"cannot read the feeds: {reason}", file=str(path)) from error
    except ValueError as error:
        raise InputError(f"the feeds are no JSON: {error}", file=str(path)) from error
    known = [item.name for item in dataclasses.fields(FeedSpec)]
    if not isinstance(content, Mapping) or any(
        name not in known or not isinstance(part, Mapping) for name, part in content.items()
    ):
        raise InputError(
            "the feeds are no mapping of mappings",
            file=str(path),
            remedy=f"it may have: {', '.join(known)}",
        )
    try:
        return FeedSpec(
            dims={name: int(extent) for name, extent in content.get("dims", {}).items()},
            ranges={name: (low, high) for name, (low, high) in content.get("ranges", {}).items()},
            vocabularies={n: int(count) for n, count in content.get("vocabularies", {}).items()},
            masks=content.get("masks", {}),
            values={name: _from_json(each) for name, each in content.get("values", {}).items()},
        )
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"a part of the feeds cannot be read: {error}", file=str(path)) from error


def _to_json(array: Array) -> dict[str, Any]:
    array = np.asarray(array)
    kind = ir.DataType.from_numpy(array.dtype)
    data = array.ravel()
    if kind.is_floating_point():
        data = data.astype(np.float64)
    return {"type": kind.name, "shape": list(array.shape), "data": data.tolist()}


def _from_json(each: Mapping[str, Any]) -> Array:
    kind = ir.DataType[each["type"]]
    return np.array(each["data"]).astype(kind.numpy()).reshape(each["shape"])
