"""The GraphModule that lwc makes: where it fails, it names the ONNX node."""

from __future__ import annotations

import math
import traceback
from typing import Any

import torch

from lwc.backends.fx.inputs import check_call, suspect
from lwc.core.diagnostics import describe_origin
from lwc.core.errors import LwcError

__all__ = ["LoweredTracer", "OnnxGraphModule", "described"]


class LoweredTracer(torch.fx.Tracer):  # type: ignore[misc]
    """Traces generated code anew without looking into operators: how a saved graph is read."""

    def __init__(self, *_: Any) -> None:
        from lwc.backends.fx import ops

        families = [getattr(ops, name) for name in ops.__all__]
        super().__init__(autowrap_modules=(math, *families))


class OnnxGraphModule(torch.fx.GraphModule):  # type: ignore[misc]
    """A `torch.fx.GraphModule` whose nodes come from an ONNX graph.

    `meta["lwc"]` is a dictionary: `inputs` and `outputs` are the names in the ONNX graph,
    `weights` maps a parameter or buffer to the places it came from, and `file` is where the
    module was read from.
    """

    def recompile(self) -> Any:
        """Generate the code anew, and see what its arguments are to be."""
        places = [node for node in self.graph.nodes if node.op == "placeholder"]
        self._declared = {node.target: node.meta.get("declared") for node in places}
        return super().recompile()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Check the arguments, and run.

        Raises:
            LwcError: An argument cannot be what the graph declares (see `check_call`), or an
                operator raised something, of which it names the node.
        """
        if torch.compiler.is_compiling():
            return super().__call__(*args, **kwargs)
        known = not self._forward_pre_hooks  # which may change what comes
        if known:
            check_call(self, self._declared, args, kwargs)
        try:
            return super().__call__(*args, **kwargs)
        except LwcError as error:
            node = self._failed(error)
            if error.node is None and node is not None:
                error.node = described(node)
                error.file = error.file or self.meta.get("lwc", {}).get("file")
            raise
        except Exception as error:
            node = self._failed(error)
            if node is None:
                raise
            text = " ".join(str(error).split()) or type(error).__name__
            raise LwcError(
                f"{type(error).__name__}: {text}",
                file=self.meta.get("lwc", {}).get("file"),
                node=described(node),
                remedy=suspect(self._declared, args, kwargs) if known else None,
            ) from error

    def _failed(self, error: BaseException) -> torch.fx.Node | None:
        """Find the node whose line of the generated code raised."""
        code = getattr(type(self).forward, "__code__", None)
        for frame, line in traceback.walk_tb(error.__traceback__):
            if frame.f_code is code:
                index = self._lineno_map.get(line - self._prologue_start)
                nodes = list(self.graph.nodes)
                found = nodes[index] if index is not None else None
                return found if found is not None and "onnx" in found.meta else None
        return None


def described(node: torch.fx.Node) -> str:
    """Name a lowered node as its ONNX node is named in messages."""
    return describe_origin(node.meta["onnx"])
