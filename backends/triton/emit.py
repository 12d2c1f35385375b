"""A folder with all that a lowered module needs on a machine with a GPU."""

from __future__ import annotations

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from lwc.analysis.shapes import Shapes
from lwc.backends.triton.ahead import Compiled, compile_ahead, specialised
from lwc.backends.triton.architectures import Architecture
from lwc.backends.triton.convert import to_triton
from lwc.backends.triton.dry_run import dry_run
from lwc.backends.triton.folder import FORMAT, MANIFEST, check_folder, files_in
from lwc.backends.triton.lower import Placement, placements
from lwc.backends.triton.operation import Launch
from lwc.backends.triton.source import WEIGHTS, python_source, state_of
from lwc.calibration.feeds import make_feed
from lwc.core.errors import LwcError, MissingExtraError
from lwc.core.module import Module
from lwc.core.torch_types import tensor_of_array
from lwc.frontend.atomic import staged_folder, writing

__all__ = ["Emitted", "emit"]


@dataclass(frozen=True)
class Emitted:
    """What was written.

    Attributes:
        kernels: Number of kernels by architecture, each compiled for one set of constants.
        spilling: Kernels that find no registers for all they hold, which is slow.
        placements: Where each node runs.
    """

    kernels: Mapping[str, int]
    spilling: tuple[str, ...]
    placements: tuple[Placement, ...]


@dataclass
class _Variant:
    """A kernel as it is compiled once, and where it is launched."""

    launch: Launch
    launches: list[dict[str, Any]] = field(default_factory=list)


def emit(
    module: Module,
    folder: str | os.PathLike[str],
    *,
    architectures: Sequence[Architecture],
    shapes: Sequence[Mapping[str, int]] = ({},),
    progress: Callable[[str], None] = lambda text: None,
) -> Emitted:
    """Write a module as Python, its weights, and its kernels compiled ahead of time.

    The folder appears whole or not at all, and replaces one that was emitted before. It has:

    - `model.py`: the lowered module as a class, and `load`, which returns it with its weights;
    - `weights.safetensors`: packed as kernels read them;
    - `kernels/sm_XX/`: a `.cubin` for each kernel and what it is specialised to, and a `.json` that
      says what a program needs to launch it, what it takes of a multiprocessor, and where in the
      model it is launched with which grid;
    - `manifest.json`: versions, files, inputs and outputs, the shapes that kernels were compiled
      for, and for each node the kernels that compute it, or why none does.

    `model.py` has Triton compile kernels where it runs; the cubins are for programs that launch
    kernels by themselves.

    Args:
        module: The module; it is not changed but for its remarks.
        folder: Where to write.
        architectures: What kernels are compiled for.
        shapes: Numbers for symbolic dimensions; kernels are compiled for each of them. Dimensions
            that are not named get usual ones (see `lwc.calibration.feeds.make_feed`).
        progress: Told what is being done.

    Raises:
        LwcError: The module cannot be lowered or written as Python, a kernel does not compile, or
            the folder cannot be written.
        UsageError: The folder has files that were not emitted.
        MissingExtraError: PyTorch, Triton or safetensors is not installed.
    """
    check_folder(folder)
    progress("lowering")
    graph_module = to_triton(module)
    try:
        from safetensors.torch import save_file
    except ModuleNotFoundError as error:
        raise MissingExtraError("writing weights", "triton") from error
    state = state_of(graph_module)
    interface = _interface(module)
    title = f"{module.graph.name or 'A model'}, lowered to PyTorch and Triton."
    source = python_source(graph_module, title, interface)
    target = os.fspath(folder)
    with writing(target), staged_folder(target) as draft:
        Path(draft, "model.py").write_text(source, encoding="utf-8")
        save_file(state, Path(draft, WEIGHTS))
        counts: dict[str, int] = {}
        spilling: list[str] = []
        used: dict[str, set[str]] = defaultdict(set)
        for gpu in architectures:
            variants = _variants(module, graph_module, shapes, gpu)
            for index, variant in enumerate(variants.values()):
                progress(f"compiling for {gpu.target}: {index + 1} of {len(variants)} kernels")
                kernel = compile_ahead(variant.launch, gpu)
                _write_kernel(Path(draft, "kernels", gpu.target), kernel, variant)
                if kernel.spills:
                    spilling.append(f"{kernel.name} for {gpu.target}")
                for launched in variant.launches:
                    used[launched["call"]].add(kernel.name)
            counts[gpu.target] = len(variants)
        manifest = _manifest(graph_module, interface, architectures, shapes, used)
        manifest["files"] = sorted(files_in(Path(draft)))
        Path(draft, MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        check_folder(target)  # again: compiling takes its time
    return Emitted(counts, tuple(spilling), placements(graph_module))


def _variants(
    module: Module, graph_module: Any, shapes: Sequence[Mapping[str, int]], gpu: Architecture
) -> dict[str, _Variant]:
    """Return the kernels that a module launches, by what they are specialised to."""
    found: dict[str, _Variant] = {}
    for index, shape in enumerate(shapes):
        named = ", ".join(f"{name}={extent}" for name, extent in shape.items())
        try:
            feed = make_feed(module, shape)
        except MemoryError as error:
            raise LwcError(
                f"the inputs do not fit into memory where {named}",
                file=module.source.path,
                remedy="give smaller numbers for the dimensions",
            ) from error
        inputs = [
            tensor_of_array(feed[name], ir.tensor(feed[name]).dtype) if name in feed else None
            for name in graph_module.meta["lwc"]["inputs"]
        ]
        launched = dry_run(graph_module, inputs, gpu)
        if not any(launched.values()) and any(each.kernels for each in placements(graph_module)):
            raise LwcError(
                f"no kernel is launched where {named}, as nothing is computed there",
                file=module.source.path,
                remedy="give numbers above 0 for the dimensions",
            )
        for call, launches in launched.items():
            for launch in launches:
                key = f"{launch.name} {specialised(launch)} {launch.options}"
                variant = found.setdefault(key, _Variant(launch))
                variant.launches.append(
                    {"call": call, "shape": index, "grid": [*launch.grid, 1, 1][:3]}
                )
    return found


def _write_kernel(folder: Path, kernel: Compiled, variant: _Variant) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{kernel.name}-{hashlib.sha256(kernel.cubin).hexdigest()[:12]}"
    (folder / f"{name}.cubin").write_bytes(kernel.cubin)
    described = json.dumps(_described(kernel, variant), indent=1)
    (folder / f"{name}.json").write_text(described, encoding="utf-8")


def _described(kernel: Compiled, variant: _Variant) -> dict[str, Any]:
    _, _, attributes = specialised(variant.launch)
    names = list(kernel.signature)
    return {
        "name": kernel.name,
        "entry": kernel.entry,
        "architecture": kernel.architecture.target,
        "signature": dict(kernel.signature),
        "constants": dict(kernel.constants),
        "divisible_by_16": [names[position] for (position,) in attributes],
        "options": variant.launch.options,
        "threads": 32 * kernel.warps,
        "registers": kernel.registers,
        "shared_bytes": kernel.shared,
        "spilled_bytes": kernel.spills,
        "launches": variant.launches,
    }


def _manifest(
    graph_module: Any,
    interface: Mapping[str, Mapping[str, str]],
    architectures: Sequence[Architecture],
    shapes: Sequence[Mapping[str, int]],
    used: Mapping[str, set[str]],
) -> dict[str, Any]:
    import torch
    import triton

    from lwc import __version__

    nodes: list[dict[str, Any]] = []
    for placement in placements(graph_module):
        entry: dict[str, Any] = {"node": placement.node, "op": placement.op}
        if not placement.kernels:
            entry["torch"] = placement.reason or f"no kernel computes {placement.op}"
        else:
            launched = {kernel for call in placement.calls for kernel in used.get(call, ())}
            entry["kernels"] = sorted(launched) or list(placement.kernels)
        nodes.append(entry)
    return {
        "format": FORMAT,
        "lwc": __version__,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "architectures": [gpu.target for gpu in architectures],
        **interface,
        "shapes": [dict(shape) for shape in shapes],
        "nodes": nodes,
    }


def _interface(module: Module) -> dict[str, dict[str, str]]:
    shapes = Shapes.build(module)

    def told(value: ir.Value) -> str:
        fact = shapes.fact(value)
        if fact.dtype is None or fact.shape is None:  # behind an operator without a shape rule
            fact = shapes.hint(value)
        if fact.dtype is None or fact.shape is None:
            raise LwcError(
                f"the type or rank of '{value.name}' is not known",
                file=module.source.path,
                remedy="declare them in the model",
            )
        extents = ", ".join(map(str, fact.shape))
        return f"{ir.DataType(fact.dtype).name.lower()} [{extents}]"

    return {
        "inputs": {value.name or "": told(value) for value in module.graph.inputs},
        "outputs": {value.name or "": told(value) for value in module.graph.outputs},
    }
