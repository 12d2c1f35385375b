"""The table of kernels: which operators of a lowered module they compute, and when.

To have a kernel compute an operator, write a function in the file of its family and decorate it:

    @kernel("RMSNormalization", runs="norm_kernel")
    def rms_norm(site: Site) -> Results:
        site.need_one_type("x", "scale")
        site.need(site.given("axis") in (-1, site.rank("x") - 1), "it spans several axes")
        return {0: site.call(launch.rms_norm, site.given("x"), site.given("scale"))}

It is given the call that the fx backend made of the node. It checks that the kernel computes the
same for every feed (`Site.need` refuses, with the reason that the user reads), and adds the calls
that take its place. It returns what stands for each output, or None where the node is none of the
kernel's business.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import onnx_ir as ir
import torch

from lwc.backends.fx.weights import free_attribute
from lwc.backends.triton.kernels import NAMES
from lwc.backends.triton.kernels.flash_attention import LARGEST
from lwc.core.extensions import is_again, note_extension
from lwc.pipeline.options import did_you_mean

__all__ = ["KERNELS", "Kernel", "Refused", "Results", "Site", "kernel"]

Results: TypeAlias = "Mapping[int, torch.fx.Node] | None"

_COMPUTED = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT)


class Refused(Exception):
    """A kernel does not compute a node; the text says why."""


@dataclass(frozen=True)
class Kernel:
    """An entry of the table.

    Attributes:
        substitute: Adds the calls that take the place of a node, or refuses.
        runs: Names of the kernels that then run.
        note: What the user is told besides.
    """

    substitute: Callable[[Site], Results]
    runs: tuple[str, ...]
    note: str


KERNELS: dict[str, Kernel] = {}
"""By operator, `Op` or `domain::Op`."""


def kernel(
    names: str, *, runs: str, note: str = ""
) -> Callable[[Callable[[Site], Results]], Callable[[Site], Results]]:
    """Register what has kernels compute the operators named, with spaces between them.

    Args:
        names: `Op` or `domain::Op`.
        runs: Names of the kernels, likewise: of lwc's, or as they are known where the function is
            defined.
        note: What the user is told besides, such as when which of them runs.

    Raises:
        ValueError: There is no kernel of that name, or another function has kernels compute one of
            the operators.
    """

    def register(substitute: Callable[[Site], Results]) -> Callable[[Site], Results]:
        note_extension(substitute)
        if not runs.split():
            raise ValueError(f"no kernel is said to compute '{names}'")
        for run in runs.split():
            if run not in NAMES and run not in substitute.__globals__:
                hint = did_you_mean(run, NAMES) or "import yours where its lowering is defined"
                raise ValueError(f"there is no kernel '{run}' ({hint})")
        for name in names.split():
            if name in KERNELS and not is_again(KERNELS[name].substitute, substitute):
                raise ValueError(f"operator '{name}' has two kernels")
            KERNELS[name] = Kernel(substitute, tuple(runs.split()), note)
        return substitute

    return register


class Site:
    """A call of a lowered module, and the graph under construction that is to do without it.

    Args:
        node: The call.
        root: Holds the weights, and takes the packed ones.
        graph: Where new calls go.
        made: What stands for the nodes before in the new graph.
        entry: What the table has for it.

    Attributes:
        calls: Names of the calls that were added.
        runs: Names of the kernels that take its place; a function may say it more closely.
        note: What the user is told besides, likewise.
    """

    def __init__(
        self,
        node: torch.fx.Node,
        root: torch.nn.Module,
        graph: torch.fx.Graph,
        made: Mapping[torch.fx.Node, torch.fx.Node],
        entry: Kernel,
    ) -> None:
        self.node = node
        self.runs = entry.runs
        self.note = entry.note
        self.calls: list[str] = []
        self._root = root
        self._graph = graph
        self._made = made

    # What the call is

    @cached_property
    def _given(self) -> dict[str, Any]:
        bound = inspect.signature(self.node.target).bind(*self.node.args, **self.node.kwargs)
        bound.apply_defaults()
        found: dict[str, Any] = bound.arguments
        return found

    def given(self, name: str) -> Any:
        """Return what a parameter of the call is given: a node, a literal, or None."""
        return self._given[name]

    def dtype(self, given: Any) -> ir.DataType | None:
        """Return the element type of a node, None where it is not known."""
        fact = given.meta.get("fact") if isinstance(given, torch.fx.Node) else None
        return None if fact is None else fact.dtype

    def shape(self, given: Any) -> Any:
        """Return the shape of a node in integers and symbols, None where it is not known."""
        fact = given.meta.get("fact") if isinstance(given, torch.fx.Node) else None
        return None if fact is None else fact.shape

    def extent(self, given: Any, axis: int) -> int | None:
        """Return an extent of a node where it is the same for every feed."""
        shape = self.shape(given)
        found = None if shape is None else shape[axis]
        return found if isinstance(found, int) else None

    def weight(self, name: str) -> torch.Tensor:
        """Return the weight that a parameter is given; see `constant`."""
        return self.constant(self.given(name), name)

    def constant(self, given: Any, name: str) -> torch.Tensor:
        """Return the weight that a node stands for.

        Args:
            given: The node.
            name: What a refusal calls it.

        Raises:
            Refused: It is no weight.
        """
        if not isinstance(given, torch.fx.Node) or given.op != "get_attr":
            raise Refused(f"{name} is not constant")
        owner: Any = self._root
        for part in str(given.target).split("."):
            owner = getattr(owner, part)
        found: torch.Tensor = owner.detach()
        return found

    @property
    def used(self) -> frozenset[int]:
        """Positions of the outputs that something reads."""
        return frozenset(
            user.args[1] if user.target is operator.getitem else 0 for user in self.node.users
        )

    # What refuses

    def need(self, condition: bool, otherwise: str) -> None:
        """Refuse unless a condition holds.

        Raises:
            Refused: It does not.
        """
        if not condition:
            raise Refused(otherwise)

    def need_floats(self, *names: str) -> None:
        """Refuse operands that kernels do not compute with; absent ones are left out."""
        for name in names:
            given = self.given(name)
            if given is None:
                continue
            dtype = self.dtype(given)
            if dtype is None:
                raise Refused(f"the type of {name} is not known")
            if dtype not in _COMPUTED:
                raise Refused(f"{name} is {dtype.name.lower()}, not float16, bfloat16 or float32")

    def need_one_type(self, first: str, *others: str) -> None:
        """Refuse operands that kernels do not compute with, or that are of several types.

        Absent ones are left out.
        """
        self.need_floats(first, *others)
        dtype = self.dtype(self.given(first))
        for name in others:
            given = self.given(name)
            if given is not None and self.dtype(given) != dtype:
                raise Refused(f"{name} has another type than {first}")

    def need_rank(self, name: str) -> int:
        """Return the rank of an operand; refuse one that is not known."""
        shape = self.shape(self.given(name))
        self.need(shape is not None, f"the rank of {name} is not known")
        return len(shape)

    def need_absent(self, *names: str) -> None:
        """Refuse inputs and attributes that kernels know nothing of."""
        for name in names:
            if self.given(name):
                raise Refused(f"it has {name}")

    def need_outputs(self, *served: int) -> None:
        """Refuse where outputs are read that kernels do not make."""
        beyond = sorted(self.used - set(served))
        if beyond:
            raise Refused(f"its output {beyond[0]} is read")

    def need_size(self, size: int | None) -> None:
        """Refuse heads of a size that is not known, or too large."""
        if size is None:
            raise Refused("the size of heads is not known")
        if size > LARGEST:
            raise Refused(f"heads of {size} elements are larger than {LARGEST}")

    # What takes its place

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> torch.fx.Node:
        """Add a call; arguments may be nodes of either graph."""
        return self._add("call_function", target, args, kwargs)

    def call_module(self, path: str, module: torch.nn.Module, *args: Any) -> torch.fx.Node:
        """Add a call of a module, which is registered at a path that is free."""
        owner, _, name = path.rpartition(".")
        parent = self._root.get_submodule(owner)
        target = ".".join(filter(None, [owner, free_attribute(parent, name)]))
        parent.add_module(target.rpartition(".")[2], module)
        return self._add("call_module", target, args, {})

    def item(self, results: torch.fx.Node, index: int) -> torch.fx.Node:
        """Add what takes one of several results."""
        return self.call(operator.getitem, results, index)

    def same(self, target: Callable[..., Any], *, checked: Sequence[str] = ()) -> Results:
        """Have another function called in the same way.

        Args:
            target: The function; what it does not take is refused where it is given.
            checked: Keywords that it does not take, and need not: their values ask for nothing.
        """
        kwargs = {name: x for name, x in self.node.kwargs.items() if name not in checked}
        taken = inspect.signature(target).parameters
        for name in kwargs:
            self.need(name in taken, f"no kernel takes {name}")
        results = self._add("call_function", target, self.node.args, kwargs)
        if "outputs" not in self.node.kwargs:
            return {0: results}
        return {index: self.item(results, index) for index in sorted(self.used)}

    def _add(self, kind: str, target: Any, args: Any, kwargs: Mapping[str, Any]) -> torch.fx.Node:
        def moved(given: torch.fx.Node) -> torch.fx.Node:
            return self._made.get(given, given)

        made = self._graph.create_node(
            kind,
            target,
            torch.fx.map_arg(args, moved),
            torch.fx.map_arg(kwargs, moved),
            name=self.node.name,
        )
        made.meta["onnx"] = self.node.meta["onnx"]
        self.calls.append(made.name)
        return made
