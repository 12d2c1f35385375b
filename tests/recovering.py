"""What tests of `recover` train: models, texts, and how good a model of them is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from support import module_of, run_plain

import lwc
from lwc.core.module import Module
from lwc.evaluate.perplexity import token_losses
from lwc.frontend.onnx_writer import save

Array = np.ndarray[Any, Any]


__all__ = [
    "WHEN",
    "WIDTH",
    "WORDS",
    "judged",
    "language",
    "numbers",
    "recovered",
    "teacher_in",
    "texts",
    "weight",
]

WORDS, WIDTH = 11, 16
WHEN = ("before", "after")
_BODY = """x = Gather(table, ids) h = MatMul(x, up) t = Tanh(h) d = MatMul(t, down) r = Add(x, d)
    logits = MatMul(r, head)"""


def language(seed: int = 0, dead: bool = False) -> Module:
    """Make a model of the next token by the last one; `dead` neurons are zero."""
    drawn = np.random.default_rng(seed)
    shapes = {"table": (WORDS, WIDTH), "up": (WIDTH, WIDTH), "down": (WIDTH, WIDTH),
              "head": (WIDTH, WORDS)}  # fmt: skip
    declared = ", ".join(f"float{list(shape)} {name}" for name, shape in shapes.items())
    module = module_of(
        f"g (int64[b, s] ids, {declared}) => (float[b, s, {WORDS}] logits) {{ {_BODY} }}"
    )
    for value in list(module.graph.inputs)[1:]:
        module.graph.inputs.remove(value)
        name = value.name or ""
        content = drawn.normal(size=shapes[name]).astype(np.float32) / 2
        if dead and name == "up":
            content[:, ::2] = 0
        if dead and name == "down":
            content[::2] = 0
        value.const_value = ir.Tensor(content, name=name)
        module.graph.register_initializer(value)
    return module


def texts(count: int = 6) -> list[dict[str, Array]]:
    """Draw texts in which each word is mostly followed by the next one."""
    drawn = np.random.default_rng(5)
    start = drawn.integers(0, WORDS, (count, 4, 1))
    steps = drawn.choice([1, 3], (count, 4, 11), p=[0.9, 0.1])
    ids = np.concatenate([start, start + np.cumsum(steps, axis=2)], axis=2) % WORDS
    return [{"ids": each} for each in ids]


def weight(module: Module, name: str) -> Array:
    """Return a weight's numbers."""
    found = module.graph.initializers[name].const_value
    assert found is not None
    return np.array(found.numpy())


def recovered(module: Module, options: str, **given: Any) -> tuple[Module, dict[str, Any], str]:
    """Run `recover` alone; return the module, what was counted, and the remarks."""
    result = lwc.optimize(
        module, f"recover{{{options}}}", calibration=given.pop("data", texts()), threads=1, **given
    )
    (record,) = result.record.passes
    told = "\n".join(f"{each.kind}: {each.message}" for each in record.remarks)
    assert record.changed == (result.module.fingerprint() != module.fingerprint())
    return result.module, dict(record.statistics), told


def judged(module: Module, *feeds: dict[str, Array]) -> float:
    """Return the cross-entropy of a module's next tokens, over all tokens of some feeds."""
    losses = []
    for feed in feeds:
        logits = run_plain(module, feed)[0][:, :-1].reshape(-1, WORDS)
        losses.append(token_losses(logits, feed["ids"][:, 1:].ravel()))
    return float(np.concatenate(losses).mean())


def numbers() -> Module:
    """Make a model that takes and gives numbers."""
    body = "a = Tanh(x) y = MatMul(a, w)"
    text = f"g (float[n, 16] x, float[16, 16] w) => (float[n, 16] y) {{ {body} }}"
    module = module_of(text, 21, 10)
    value = module.graph.inputs.pop()
    drawn = np.random.default_rng(0)
    value.const_value = ir.Tensor(drawn.normal(size=(16, 16)).astype(np.float32), name="w")
    module.graph.register_initializer(value)
    return module


def teacher_in(folder: Path) -> Path:
    """Save the undamaged model for a teacher; return its file."""
    save(language(), folder / "teacher.onnx")
    return folder / "teacher.onnx"
