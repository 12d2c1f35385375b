"""Feeds: valid random inputs for any model, or those that files hold."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
import onnx_ir as ir

from lwc.calibration.inputs import InputRole, RoleKind, fed_inputs, input_role
from lwc.core.dims import evaluate, is_anonymous, parse_dim
from lwc.core.errors import InputError, LwcError, UsageError

if TYPE_CHECKING:
    from lwc.core.module import Module

__all__ = [
    "NO_SPEC",
    "Array",
    "Edge",
    "FeedSpec",
    "MaskKind",
    "ReadFeed",
    "check_dimensions",
    "dim_names",
    "fixed_dims",
    "load_feeds",
    "make_feed",
    "usual_extents",
]

Array = np.ndarray[Any, Any]

MaskKind: TypeAlias = Literal["ones", "right-padded", "left-padded", "random"]
"""What a mask keeps: everything; the first elements of each row, fewer in each further row; the
last ones; any, drawn at random, at least one in a row."""

Edge: TypeAlias = Literal["plain", "zeros", "huge", "tiny", "masked"]
"""How a feed is filled: as usual; numbers that are 0, a thousand times or a thousandth as large;
masks that differ from row to row, the first row masked as a whole."""

_SIZES: dict[Edge, float] = {"zeros": 0.0, "huge": 1e3, "tiny": 1e-3}


@dataclass(frozen=True)
class FeedSpec:
    """What the user knows about the inputs; everything else is found out or guessed.

    Attributes:
        dims: Extents by dimension name; an anonymous dimension is named `INPUT:AXIS`.
        ranges: Inclusive bounds of an input's elements, by input.
        vocabularies: Number of ids, by input: its elements lie in `[0, n)`.
        masks: What a mask keeps, by input; see `MaskKind`.
        values: Whole inputs, by name.
    """

    dims: Mapping[str, int] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    vocabularies: Mapping[str, int] = field(default_factory=dict)
    masks: Mapping[str, MaskKind] = field(default_factory=dict)
    values: Mapping[str, Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, kind in self.masks.items():
            if kind not in get_args(MaskKind):
                raise UsageError(
                    f"mask '{name}' cannot be {kind!r}",
                    remedy=f"it is one of {', '.join(get_args(MaskKind))}",
                )
        for name, count in self.vocabularies.items():
            if count < 1:
                raise UsageError(f"the vocabulary of '{name}' cannot have {count} ids")
        for name, (low, high) in self.ranges.items():
            if low > high:
                raise UsageError(f"the range of '{name}' is empty: {low} to {high}")

    def bounds(self, name: str) -> tuple[float, float] | None:
        """Return the inclusive bounds of an input's elements, where they are given."""
        if name in self.vocabularies:
            return (0, self.vocabularies[name] - 1)
        return self.ranges.get(name)


NO_SPEC = FeedSpec()
"""Nothing is known but what the model says."""


def make_feed(
    module: Module,
    bindings: Mapping[str, int] | None = None,
    seed: int = 0,
    *,
    spec: FeedSpec = NO_SPEC,
    edge: Edge = "plain",
) -> dict[str, Array]:
    """Make one valid random feed; the same seed gives the same feed.

    Ids stay within their tables, masks are ones, positions count up, images lie in [0, 1], other
    numbers are standard normal (see `lwc.calibration.inputs`). Dimensions that nothing binds get
    a usual extent: batch 1, sequence 16, past 8, height and width 224. Not every model runs at
    those; `lwc.calibration.trials` finds extents that do.

    Args:
        module: The model.
        bindings: Extents by dimension name, over `spec.dims`; `INPUT:AXIS` for anonymous ones.
        seed: Seed of the random numbers.
        spec: What the user knows about the inputs; it has the last word.
        edge: How numbers and masks are filled that `spec` does not describe.

    Raises:
        InputError: An extent is given to a dimension that no input has.
        LwcError: An input is no tensor or has no known rank, and `spec.values` lacks it.
    """
    known = {**spec.dims, **(bindings or {})}
    check_dimensions(module, known)
    extents = {**usual_extents(module), **known}
    feed = {}
    for value in fed_inputs(module):
        name = value.name or ""
        if name in spec.values:
            feed[name] = spec.values[name]
            continue
        shape = tuple(_extent(value, axis, extents) for axis in range(_rank(module, value)))
        rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
        dtype = _numpy_type(module, value)
        if name in spec.masks:
            feed[name] = _mask(shape, spec.masks[name], rng).astype(dtype)
            continue
        role, bounds = input_role(module, value), spec.bounds(name)
        feed[name] = _fill(role, shape, dtype, rng, bounds)
        if bounds is None and edge != "plain":
            feed[name] = _at_edge(feed[name], role, edge, rng)
    return feed


def usual_extents(module: Module) -> dict[str, int]:
    """Return the extents that `make_feed` gives the free dimensions where nothing binds them."""
    return {name: _USUAL[kind] for name, kind in dim_names(module).items()}


def fixed_dims(before: Module, after: Module) -> dict[str, int]:
    """Return the free dimensions of `before` that `after` fixed, with their extents."""
    fixed = {}
    shapes = {value.name: value.shape for value in after.graph.inputs}
    for value in fed_inputs(before):
        pairs = zip(value.shape or (), shapes.get(value.name) or (), strict=False)
        for axis, (dim, now) in enumerate(pairs):
            if isinstance(now, int) and now >= 0 and not isinstance(dim, int):
                name = dim.value
                fixed[f"{value.name}:{axis}" if is_anonymous(name) else str(name)] = now
    known = dim_names(before)
    return {name: extent for name, extent in fixed.items() if name in known}


def check_dimensions(module: Module, names: Iterable[str]) -> None:
    """Check that the inputs have free dimensions of these names.

    Raises:
        InputError: They have not.
    """
    known = dim_names(module)
    for name in names:
        if name not in known:
            raise InputError(
                f"no input has a dimension '{name}'",
                file=module.source.path,
                remedy=f"the dimensions are {', '.join(known) or 'all fixed'}",
            )


def dim_names(module: Module) -> dict[str, str]:
    """Return the free dimensions of the inputs and their kinds: batch, length, past or spatial.

    Named dimensions keep their names; an anonymous one is called `INPUT:AXIS`. Those the ONNX
    reader named (`INPUT_dAXIS`) say as little about their kind as anonymous ones.
    """
    found: dict[str, str] = {}
    for value in fed_inputs(module):
        for axis, dim in enumerate(value.shape or ()):
            if isinstance(dim, int) and dim >= 0:
                continue
            text = None if isinstance(dim, int) else dim.value
            if text is None or is_anonymous(text):
                name = f"{value.name}:{axis}"
                found.setdefault(name, _kind("", axis, len(value.shape or ())))
                continue
            for free in sorted(s.name for s in parse_dim(text).free_symbols):
                said = "" if free == f"{value.name}_d{axis}" else free
                found.setdefault(free, _kind(said, axis, len(value.shape or ())))
    return found


_USUAL = {"batch": 1, "length": 16, "past": 8, "spatial": 224}

_KINDS = (
    ("past", re.compile(r"past|cache", re.I)),
    ("batch", re.compile(r"batch|^[bn]$", re.I)),
    ("length", re.compile(r"seq|len|time|frames|samples|tokens|^[lst]$", re.I)),
    ("spatial", re.compile(r"height|width|^[hw]$", re.I)),
)


def _kind(name: str, axis: int, rank: int) -> str:
    for kind, pattern in _KINDS:
        if pattern.search(name):
            return kind
    if axis == 0:
        return "batch"
    return "spatial" if rank == 4 and axis >= 2 else "length"


def _extent(value: ir.Value, axis: int, extents: Mapping[str, int]) -> int:
    assert value.shape is not None
    dim = value.shape[axis]
    if isinstance(dim, int):
        return dim if dim >= 0 else extents[f"{value.name}:{axis}"]
    if is_anonymous(dim.value):
        return extents[f"{value.name}:{axis}"]
    return evaluate(parse_dim(dim.value or ""), extents)


def _rank(module: Module, value: ir.Value) -> int:
    if value.shape is None or not isinstance(value.type, ir.TensorType):
        raise LwcError(
            f"no feed can be made for input '{value.name}': it has no known shape",
            file=module.source.path,
            remedy="give it in FeedSpec(values=…) or in an .npz file",
        )
    return len(value.shape)


def _numpy_type(module: Module, value: ir.Value) -> np.dtype[Any]:
    if value.dtype is None:
        raise LwcError(
            f"no feed can be made for input '{value.name}': it has no element type",
            file=module.source.path,
        )
    return np.dtype(object) if value.dtype == ir.DataType.STRING else value.dtype.numpy()


def _fill(
    role: InputRole,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    rng: np.random.Generator,
    bounds: tuple[float, float] | None,
) -> Array:
    if bounds is not None:
        if dtype.kind in "iub":
            return np.asarray(rng.integers(int(bounds[0]), int(bounds[1]) + 1, shape)).astype(dtype)
        return np.asarray(rng.uniform(*bounds, shape)).astype(dtype)
    match role.kind:
        case RoleKind.IDS:
            return np.asarray(rng.integers(role.low, role.high + 1, shape)).astype(dtype)
        case RoleKind.POSITIONS:
            count = np.arange(shape[-1] if shape else 1) % (role.high + 1)
            return np.broadcast_to(count if shape else count[0], shape).astype(dtype)
        case RoleKind.MASK:
            return np.ones(shape, dtype)
        case RoleKind.FLAG:
            return np.zeros(shape, dtype)
        case RoleKind.IMAGE:
            return rng.random(shape, np.float32).astype(dtype)
        case RoleKind.TEXT:
            return np.full(shape, "a light model", dtype)
        case RoleKind.NUMBERS:
            return np.asarray(rng.standard_normal(shape, np.float32)).astype(dtype)


def _at_edge(array: Array, role: InputRole, edge: Edge, rng: np.random.Generator) -> Array:
    """Turn a usual feed of one input into that of an edge, where the edge concerns it."""
    if edge == "masked":
        if role.kind == RoleKind.FLAG:
            return np.ones_like(array)
        if role.kind != RoleKind.MASK or not array.ndim:
            return array
        mask = _mask(array.shape, "right-padded" if rng.random() < 0.5 else "random", rng)
        mask[(0,) * (mask.ndim - 1)] = False
        return mask.astype(array.dtype)
    if role.kind != RoleKind.NUMBERS:
        return array
    return np.asarray(array * _SIZES[edge]).astype(array.dtype)


def _mask(shape: tuple[int, ...], kind: MaskKind, rng: np.random.Generator) -> Array:
    """Return booleans that are true where the mask keeps something."""
    mask = np.ones(shape, np.bool_)
    if kind == "ones" or not mask.size or not shape:
        return mask
    if kind == "random":
        mask = np.asarray(rng.random(shape) < 0.5)
        kept = rng.integers(0, shape[-1], shape[:-1])
        np.put_along_axis(mask, kept[..., None], True, axis=-1)
        return mask
    rows, columns = mask.size // shape[-1], np.arange(shape[-1])
    lengths = np.maximum(1, shape[-1] - np.arange(rows) * shape[-1] // max(rows, 2))
    flat = mask.reshape(rows, shape[-1])
    flat[:] = columns < lengths[:, None]
    return mask if kind == "right-padded" else np.asarray(mask[..., ::-1])


class ReadFeed(dict[str, Array]):
    """A feed that knows where it was read: a file, and the line of it where it has many."""

    def __init__(self, feed: Mapping[str, Array], file: Path, line: int | None = None) -> None:
        super().__init__(feed)
        self.file = file
        self.line = line


def load_feeds(path: str | Path) -> Iterator[dict[str, Array]]:
    """Read feeds from an `.npz` file, or from every `.npz` file of a folder in name order.

    Each file holds one feed: an array for each graph input, by name.

    Raises:
        InputError: There is no such file, or one holds no plain arrays.
    """
    path = Path(path)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files:
        raise InputError("the folder holds no .npz file", file=path)
    for file in files:
        try:
            if file.exists() and not zipfile.is_zipfile(file):
                raise InputError(
                    "no feed can be read: it is no .npz archive",
                    file=file,
                    remedy="use numpy.savez; a text is not named .npz",
                )
            with np.load(file, allow_pickle=False) as arrays:
                yield ReadFeed({name: _plain(arrays, name, file) for name in arrays.files}, file)
        except (OSError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise InputError(f"no feed can be read: {error}", file=file) from error


def _plain(arrays: Mapping[str, Array], name: str, file: Path) -> Array:
    try:
        return arrays[name]
    except ValueError as error:
        if "pickle" not in str(error):
            raise
        raise InputError(
            f"no feed can be read: '{name}' is an array of Python objects",
            file=file,
            remedy="store plain arrays",
        ) from error
