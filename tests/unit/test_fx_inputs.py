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
from fx_agreement import parsed
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
    "wide floats": ("bias", lambda x: x.double(), "'bias' .* of type float64 .*feed float32"),
    "a rank": ("ids", lambda x: x[0], r"'ids' was fed a tensor of shape \[3\] \(feed int64"),
    "a fixed extent": ("extra", lambda _: torch.ones(3), r"'extra' .* of shape \[3\] .* \[2\]"),
    "a named extent": (
        "bias", lambda x: x[:, :2],
        r"'bias' was fed a tensor of shape \[2, 2, 2\], where seq is 3 in 'ids' \(feed",
    ),
    "a sum of extents": (
        "mask", lambda x: x[:, :3],
        r"'mask' was fed a tensor with 3 in axis 1, where past \+ seq is 4: past is 1, seq is 3 ",
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


def test_weights_packed_for_kernels_are_not_converted_ones() -> None:
    """A product's float32 scales are packed away; what is left is of another type."""
    pytest.importorskip("triton")
    codes, scales = (", ".join(["1"] * count) for count in (8 * 16, 8))
    module = parsed(
        f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[n, 32] x, float16[4] z) => (float[n, 8] y, float16[4] s)
        <uint8[8, 1, 16] w = {{{codes}}}, float[8] c = {{{scales}}}, float16[4] h = {{1, 2, 3, 4}}>
        {{ y = com.microsoft.MatMulNBits<K = 32, N = 8, bits = 4, block_size = 32>(x, w, c)
           s = Add(z, h) }}"""
    )
    lowered = lwc.to_triton(module)
    assert {each.dtype for each in lowered.parameters()} == {torch.float16}
    with pytest.raises(LwcError, match="'x' was fed a tensor of type float16"):
        lowered(torch.ones(2, 32).half(), torch.ones(4).half())


def test_dims_that_say_little_are_not_asked_for() -> None:
    """`?` twice need not be one number, and exporters write `past + 1` for any number of tokens."""
    text = """g (float["?", "?"] x, float[past] c, float["past + 1"] m)
        => (float[a, b] y, float[p] z) { y = Neg(x)  z = Concat<axis = 0>(c, m) }"""
    lowered = lwc.to_fx(module_of(text))
    y, z = lowered(torch.ones(2, 3), torch.ones(4), torch.ones(7))
    assert (y.shape, z.shape) == ((2, 3), (11,))


def test_inputs_with_a_default_may_be_none() -> None:
    lowered, given = lwc.to_fx(embedded()), fitting()
    assert torch.equal(lowered(*given.values(), None), lowered(*given.values()))


def test_converted_weights_take_their_own_floats() -> None:
    """A graph without casts runs in another type once its weights are of that type."""
    text = """g (float[n, 2] x) => (float[n, 2] y) <float[2, 2] w = {1, 2, 3, 4}>
        { y = MatMul(x, w) }"""
    lowered = lwc.to_fx(module_of(text))
    x = torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(LwcError, match="float64"):
        lowered(x)
    lowered.double()
    assert lowered(x).dtype == torch.float64
    with pytest.raises(LwcError, match="bfloat16"):
        lowered(x.bfloat16())


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
