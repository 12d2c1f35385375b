"""What a lowered module is called with: refused where it is not what the graph declares."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from support import module_of
from torch._dynamo.testing import CompileCounter
from torch.fx.experimental.proxy_tensor import make_fx

import lwc
from lwc.core.errors import LwcError
from lwc.core.module import Module

EMBEDDED = """g (int64[batch, seq] ids, float[batch, seq, 2] bias, bool[batch, "past + seq"] mask,
                float[batch, past, 2] cache, float[2] extra) => (float[batch, m, 2] y)
    <float[3, 2] table = {1, 2, 3, 4, 5, 6}, float[2] extra = {7, 8}>
    {
        rows = Gather(table, ids)  moved = Add(rows, bias)
        all = Concat<axis = 1>(cache, moved)  shifted = Add(all, extra)
        axis = Constant<value_ints = [2]>()
        open = Unsqueeze(mask, axis)  zero = Sub(shifted, shifted)
        y = Where(open, shifted, zero)
    }"""


def embedded() -> Module:
    return module_of(EMBEDDED)


def fitting(batch: int = 2, seq: int = 3, past: int = 1) -> dict[str, Any]:
    return {
        "ids": torch.ones((batch, seq), dtype=torch.int64),
        "bias": torch.zeros(batch, seq, 2),
        "mask": torch.ones((batch, past + seq), dtype=torch.bool),
        "cache": torch.zeros(batch, past, 2),
    }


MISFITS: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "ids that are floats": (
        "ids", lambda x: x.float(),
        r"^input 'ids' was fed a tensor of type float32 \(feed int64 \[batch, seq\]\)$",
    ),
    "narrow ids": ("ids", lambda x: x.int(), "'ids' was fed a tensor of type int32"),
    "truths": ("bias", lambda x: x.bool(), "'bias' was fed a tensor of type bool"),
    "floats for a mask": ("mask", lambda x: x.float(), "'mask' was fed a tensor of type float32"),
    "a rank": ("ids", lambda x: x[0], r"'ids' was fed a tensor of shape \[3\] \(feed int64"),
    "a fixed extent": ("extra", lambda _: torch.ones(3), r"'extra' .* of shape \[3\] .* \[2\]"),
    "a named extent": (
        "bias", lambda x: x[:, :2],
        r"^Add -> 'moved': RuntimeError: .* \(input 'bias' was fed a tensor of shape \[2, 2, 2\], "
        r"where seq is 3 in 'ids'; it is to be float32 \[batch, seq, 2\]\)$",
    ),
    "a named extent that is more": (
        "bias", lambda x: x.repeat(1, 2, 1), r"\[2, 6, 2\], where seq is 3 in 'ids'",
    ),
    "a sum of extents": (
        "mask", lambda x: x[:, :3],
        r"'mask' was fed a tensor with 3 in axis 1, where past \+ seq is 4: past is 1, seq is 3;",
    ),
    "a sum that is more": (
        "mask", lambda x: x.repeat(1, 2), "with 8 in axis 1, where past . seq is 4:",
    ),
    "an array": ("ids", lambda x: x.numpy(), "an array of numpy's, .* torch.from_numpy"),
    "a list": ("ids", lambda x: x.tolist(), "'ids' was fed a list, not a tensor"),
    "nothing": ("ids", lambda _: None, "'ids' was fed a NoneType, not a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
@pytest.mark.parametrize("named", [False, True])
def test_what_does_not_fit_is_told_by_its_name(case: str, named: bool) -> None:
    name, change, told = MISFITS[case]
    lowered, given = lwc.to_fx(embedded()), fitting()
    lowered(*given.values())
    given[name] = change(given.get(name))
    with pytest.raises(LwcError, match=told):
        lowered(**given) if named else lowered(*given.values())


def test_kernels_are_asked_no_less() -> None:
    pytest.importorskip("triton")
    lowered, given = lwc.to_triton(embedded()), fitting()
    given["ids"] = given["ids"].float()
    with pytest.raises(LwcError, match="'ids' was fed a tensor of type float32"):
        lowered(*given.values())


def test_dims_that_say_little_are_not_asked_for() -> None:
    """`?` twice need not be one number, and exporters write `past + 1` for any number of tokens."""
    text = """g (float["?", "?"] x, float[past] c, float["past + 1"] m)
        => (float[a, b] y, float[p] z) { y = Neg(x)  z = Concat<axis = 0>(c, m) }"""
    lowered = lwc.to_fx(module_of(text))
    y, z = lowered(torch.ones(2, 3), torch.ones(4), torch.ones(7))
    assert (y.shape, z.shape) == ((2, 3), (11,))


def test_a_sum_of_what_no_input_tells_is_no_suspect() -> None:
    text = """g (float["a + b"] x, float[c] y) => (float[c] z) { z = Add(x, y) }"""
    with pytest.raises(LwcError, match="Add -> 'z': RuntimeError") as caught:
        lwc.to_fx(module_of(text))(torch.ones(2), torch.ones(3))
    assert caught.value.remedy is None


def test_inputs_with_a_default_may_be_none() -> None:
    lowered, given = lwc.to_fx(embedded()), fitting()
    assert torch.equal(lowered(*given.values(), None), lowered(*given.values()))


def test_what_broadcasts_is_let_through() -> None:
    """As ONNX Runtime does: merged decoders are fed a past that they do not use."""
    lowered, given = lwc.to_fx(embedded()), fitting(batch=2)
    given["bias"] = given["bias"][:1]
    assert lowered(*given.values()).shape == (2, 4, 2)


def test_floats_of_another_type_are_let_through_and_told_where_they_fail() -> None:
    text = """g (float[n, 2] x) => (float[n, 2] y) <float[2, 2] w = {1, 2, 3, 4}>
        { y = MatMul(x, w) }"""
    lowered = lwc.to_fx(module_of(text))
    x = torch.ones(3, 2, dtype=torch.float64)
    told = (
        r"MatMul -> 'y': .*input 'x' was fed a tensor of type float64; it is to be float32 \[n, 2\]"
    )
    with pytest.raises(LwcError, match=told):
        lowered(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert lowered(x.bfloat16()).dtype == torch.bfloat16
    handle = lowered.register_forward_pre_hook(lambda _, args: (args[0].float(),))
    assert lowered(x.int()).dtype == torch.float32
    handle.remove()
    assert lowered.double()(x).dtype == torch.float64
    weightless = lwc.to_fx(module_of("g (float[n] x) => (float[n] y) { y = Neg(x) }"))
    assert weightless.half()(torch.ones(2).half()).dtype == torch.float16


# Ways on


def test_nothing_of_the_check_is_in_a_trace() -> None:
    text = "g (float[n, 2] x, float[n, m] z) => (float[n, k] y) { y = Concat<axis = 1>(x, z) }"
    lowered = lwc.to_fx(module_of(text))
    assert [node.op for node in lowered.graph.nodes].count("call_function") == 1

    class Outer(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner = lowered

        def forward(self, x: Any, z: Any) -> Any:
            return self.inner(x, z)

    example = (torch.ones(4, 2), torch.ones(4, 3))
    symbolic = make_fx(lowered, tracing_mode="symbolic")(*example)
    for traced in (torch.fx.symbolic_trace(Outer()), symbolic, copy.deepcopy(lowered)):
        names = [node.op for node in traced.graph.nodes]
        assert names.count("call_function") - str(traced.code).count("sym_size") == 1
        assert traced(torch.ones(7, 2), torch.ones(7, 5)).shape == (7, 7)
    with pytest.raises(LwcError, match="where n is 7"):
        copy.deepcopy(lowered)(torch.ones(7, 2), torch.ones(6, 5))


def test_extents_stay_free_in_exports_and_compiled_code() -> None:
    lowered, given, other = lwc.to_fx(embedded()), fitting(4, 3, 5), fitting(6, 7, 9)
    free = torch.export.Dim.AUTO
    shapes = tuple({0: free, 1: free} for _ in given)
    exported = torch.export.export(lowered, tuple(given.values()), dynamic_shapes=shapes)
    assert torch.equal(exported.module()(*other.values()), lowered(*other.values()))
    count = CompileCounter()
    compiled = torch.compile(lowered, backend=count, fullgraph=True, dynamic=True)
    for each in (given, other):
        compiled(*each.values())
    assert count.frame_count == 1


def test_it_is_saved_differentiated_and_mapped() -> None:
    lowered, given = lwc.to_fx(embedded()), fitting()
    file = io.BytesIO()
    torch.save(lowered, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(*given.values()), lowered(*given.values()))

    bias = given["bias"].requires_grad_()
    (gradient,) = torch.autograd.grad(lowered(*given.values()).sum(), bias)
    assert torch.equal(gradient, torch.ones_like(bias))

    stacked = [torch.stack([each.detach()] * 4) for each in given.values()]
    found = torch.func.vmap(lowered)(*stacked)
    assert torch.equal(found[2], lowered(*given.values()))


def test_a_changed_graph_is_asked_for_what_it_has() -> None:
    lowered = lwc.to_fx(module_of("g (float[n] a, int64[n] b) => (int64[n] y) { y = Neg(b) }"))
    (first, _) = [node for node in lowered.graph.nodes if node.op == "placeholder"]
    lowered.graph.erase_node(first)
    lowered.recompile()
    assert lowered(torch.tensor([3])).tolist() == [-3]
    with pytest.raises(LwcError, match="'b' was fed a tensor of type float32"):
        lowered(torch.tensor([3.0]))


def test_arrays_of_strings_and_lists_are_left_alone() -> None:
    lowered = lwc.to_fx(module_of("g (seq(float[2]) s) => (int64 y) { y = SequenceLength(s) }"))
    assert int(lowered([torch.ones(2), np.ones(2)])) == 2
