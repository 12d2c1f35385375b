"""A lowered module as a Python file that people can read."""

from __future__ import annotations

import ast
import builtins
import importlib
import keyword
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from types import ModuleType
from typing import Any

import torch

from lwc.backends.fx.module import described
from lwc.backends.triton.packed_linear import PackedLinear
from lwc.core.errors import LwcError
from lwc.pipeline.pass_class import FILE_PLUGIN

__all__ = ["WEIGHTS", "python_source", "state_of"]

WEIGHTS = "weights.safetensors"

_TEMPLATE = '''\
"""{title}

Made by lwc {version}. It needs lwc with its extra triton, whose operators and kernels it calls. On
a GPU, where Triton compiles kernels on first use:

    from model import load

    model = load()
    outputs = model(*inputs)

With TRITON_INTERPRET=1 set before Python starts, `load(device="cpu")` runs slowly on the CPU.
"""

from __future__ import annotations

{imports}

FOLDER = Path(__file__).parent


class {name}(torch.nn.Module):
    """{interface}
    """

    def __init__(self) -> None:
        super().__init__()
{weights}

    @on_its_device
{forward}


def load(folder: str | Path = FOLDER, device: str = "cuda") -> {name}:
    """Return the model with its weights on a device.

    Args:
        folder: Where `{file}` lies: that of this file by default.
        device: `cuda`, or `cpu` in Triton's interpreter.
    """
    return loaded({name}, Path(folder) / "{file}", device)
'''


def python_source(
    graph_module: torch.fx.GraphModule, title: str, interface: Mapping[str, Mapping[str, str]]
) -> str:
    """Return a module with a class of the lowered module, and `load`, which fills it.

    Args:
        graph_module: What `lwc.to_triton` made.
        title: A line about the model.
        interface: Types and shapes, for people, by `inputs` and `outputs` and their names.

    Raises:
        LwcError: The code calls what cannot be written as Python.
    """
    try:
        source = _source(graph_module, _quoted(title), interface)
        compile(source, "model.py", "exec")
    except SyntaxError as error:
        raise LwcError(
            f"its code cannot be written as Python: {error}",
            file=graph_module.meta["lwc"]["file"],
            remedy="run the model by backend='triton' instead",
        ) from error
    return source


def _source(
    graph_module: torch.fx.GraphModule, title: str, interface: Mapping[str, Mapping[str, str]]
) -> str:
    from lwc import __version__

    code = graph_module.graph.python_code("self")
    names = {node.name for node in graph_module.graph.nodes}
    names |= {str(node.target) for node in graph_module.graph.nodes if node.op == "placeholder"}
    body, imports = _with_modules(code.src.strip(), code.globals, names)
    lines = [
        f"{kind.capitalize()}:\n"
        + "\n".join(f"    {_quoted(name)}: {_quoted(told)}" for name, told in told.items())
        for kind, told in interface.items()
    ]
    return _TEMPLATE.format(
        title=title,
        version=__version__,
        imports="\n".join(imports),
        name=_class_name(type(graph_module).__name__, [*imports, body]),
        interface=_indented("\n\n".join([title, *lines]), 4).strip(),
        weights="\n".join(
            f"        attach(self, {path!r}, {_constructor(made)})"
            for path, made in _attributes(graph_module)
        ),
        forward=_indented(body, 4),
        file=WEIGHTS,
    )


def _quoted(text: str) -> str:
    """Return text as it is written within the quotes of a docstring."""
    shown = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)
    return shown.replace("\\", "\\\\").replace('"', '\\"')


def _class_name(name: str, taken: Iterable[str]) -> str:
    """Return a name for the class of a model that no other part of the code has."""
    words = {word for text in (_TEMPLATE, *taken) for word in re.findall(r"\w+", text)}
    found = "".join(map(str.title, re.findall("[A-Za-z0-9]+", name)))
    while not found.isidentifier() or keyword.iskeyword(found) or found in words:
        found = f"Model{found}"
    return found


def state_of(graph_module: torch.fx.GraphModule) -> dict[str, torch.Tensor]:
    """Return the tensors of a lowered module by name, each once.

    Calls that read one tensor under several names are changed to read it under the first.

    Raises:
        LwcError: It has nested graphs or constants that are no tensors.
    """
    first: dict[int, str] = {}
    for node in graph_module.graph.nodes:
        if node.op != "get_attr":
            continue
        value = _fetched(graph_module, node.target)
        if not isinstance(value, torch.Tensor):
            nested = isinstance(value, torch.nn.Module)
            what = "a nested graph" if nested else f"'{node.target}', which is no tensor"
            raise LwcError(
                f"it reads {what}: that cannot be emitted",
                node=next((described(user) for user in node.users), None),
                file=graph_module.meta["lwc"]["file"],
                remedy="run the model by backend='triton' instead",
            )
        node.target = first.setdefault(id(value), node.target)
    graph_module.recompile()
    state: dict[str, torch.Tensor] = {}
    for path, made in _attributes(graph_module):
        if isinstance(made, PackedLinear):
            state |= {f"{path}.{name}": tensor for name, tensor in made.named_buffers()}
        else:
            state[path] = made
    return {name: tensor.detach().contiguous() for name, tensor in state.items()}


def _attributes(graph_module: torch.fx.GraphModule) -> Iterator[tuple[str, Any]]:
    """Yield the tensors and modules that a graph reads, by path, in the order of the graph."""
    seen = set()
    for node in graph_module.graph.nodes:
        if node.op in ("get_attr", "call_module") and node.target not in seen:
            seen.add(node.target)
            yield node.target, _fetched(graph_module, node.target)


def _fetched(root: Any, path: str) -> Any:
    for part in path.split("."):
        root = getattr(root, part)
    return root


def _constructor(made: Any) -> str:
    if isinstance(made, PackedLinear):
        return made.constructor()
    return f"torch.empty({tuple(made.shape)}, dtype={made.dtype})"


def _with_modules(source: str, names: Mapping[str, Any], taken: Set[str]) -> tuple[str, list[str]]:
    """Write functions as those of their modules, `fx_layout.reshape`; return the imports too.

    Args:
        source: A function.
        names: What the names stand for that it has from outside.
        taken: Names that no module may have.
    """
    imports = {
        "import torch": None,
        "from pathlib import Path": None,
        "from lwc.backends.triton.emitted import attach, loaded, on_its_device": None,
        "from lwc.backends.triton.packed_linear import PackedLinear": None,
        "from lwc.backends.triton.weights import W4Weights, W8Weights": None,
    }
    places = _outer_names(source)
    written: dict[str, str] = {}
    for name in places:
        if name not in names or name == "torch":
            continue
        value = names[name]
        if name in ("inf", "nan"):
            imports[f"from math import {name}"] = None
        elif isinstance(value, ModuleType):
            imports[f"import {value.__name__} as {name}"] = None
        elif getattr(builtins, name, None) is not value:
            package, _, module = value.__module__.rpartition(".")
            if module.startswith(FILE_PLUGIN):
                raise LwcError(
                    f"model.py cannot import {value.__name__}, which a file given as a plugin "
                    "defines",
                    remedy="put it into a package, and name its module as the plugin",
                )
            if getattr(importlib.import_module(value.__module__), value.__name__, None) != value:
                raise LwcError(f"a call of {value} cannot be written as Python")
            alias = f"{package.split('.')[2] if package.startswith('lwc.') else 'py'}_{module}"
            while alias in taken:
                alias += "_"
            written[name] = f"{alias}.{value.__name__}"
            start = f"from {package} import {module}" if package else f"import {module}"
            imports[f"{start} as {alias}"] = None
    return _replaced(source, places, written), sorted(imports, key=_import_order)


def _outer_names(source: str) -> dict[str, list[tuple[int, int]]]:
    """Return where a function reads names that it does not bind: lines, and bytes within them."""
    nodes = list(ast.walk(ast.parse(source)))
    bound = {node.arg for node in nodes if isinstance(node, ast.arg)}
    named = [node for node in nodes if isinstance(node, ast.Name)]
    bound |= {node.id for node in named if isinstance(node.ctx, ast.Store)}
    places: dict[str, list[tuple[int, int]]] = {}
    for node in named:
        if node.id not in bound:
            places.setdefault(node.id, []).append((node.lineno - 1, node.col_offset))
    return places


def _replaced(
    source: str, places: Mapping[str, Iterable[tuple[int, int]]], written: Mapping[str, str]
) -> str:
    """Write names otherwise where they stand; the rest of the text stays as it is."""
    lines = [line.encode() for line in source.split("\n")]
    found = [(*place, name) for name in written for place in places[name]]
    for line, start, name in sorted(found, reverse=True):
        text = lines[line]
        lines[line] = text[:start] + written[name].encode() + text[start + len(name.encode()) :]
    return b"\n".join(lines).decode()


def _import_order(line: str) -> tuple[bool, bool, str]:
    return "lwc" in line, "torch" in line, line


def _indented(text: str, spaces: int) -> str:
    return "\n".join(" " * spaces + line if line.strip() else "" for line in text.splitlines())
