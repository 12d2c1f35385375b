"""What no node asks for any more after a rewrite."""

from __future__ import annotations

from collections import Counter

from lwc.core.module import Module
from lwc.rewrite.editor import use_count

__all__ = ["remove_unused"]


def remove_unused(module: Module) -> Counter[str]:
    """Remove initializers nothing reads, and functions nothing calls.

    Returns:
        How many of each went.
    """
    gone: Counter[str] = Counter()
    for graph, value in list(module.initializers()):
        if use_count(value) or value.is_graph_output() or value.is_graph_input():
            continue
        assert value.name is not None
        del graph.initializers[value.name]
        gone["unused-initializers"] += 1
    functions = module.model.functions
    while functions:
        called = {node.op_identifier() for node in module.nodes()}
        unused = [key for key in functions if key not in called]
        if not unused:
            break
        for key in unused:
            del functions[key]
            gone["unused-functions"] += 1
    return gone
