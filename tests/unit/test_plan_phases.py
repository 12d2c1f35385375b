"""`--plan` of decoders: the prompt and one token behind it."""

from __future__ import annotations

from typing import Any, get_args

import onnx_ir as ir
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
from support import module_of
from tiny_llama import KV_HEADS, LAYERS, SIZE, Spelling, as_module, tiny_llama

from lwc.analysis.manager import AnalysisManager
from lwc.analysis.plan import plan_rows
from lwc.cli.plan_phases import phases_table
from lwc.core import text
from lwc.core.module import Module

PER_TOKEN = 2 * LAYERS * KV_HEADS * SIZE * 4
"""Keys and values of each layer in float32."""


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


def rows(module: Module, **bindings: int) -> list[list[str]]:
    table = phases_table(module, AnalysisManager(module), bindings, None)
    assert table is not None
    assert str(table.title).endswith(f"{text.size(PER_TOKEN)} per token of a sequence")
    return [list(row) for row in zip(*(column.cells for column in table.columns), strict=True)]


def dimension(module: Module, name: str, axis: int) -> str:
    (value,) = [each for each in module.graph.inputs if each.name == name]
    assert value.shape is not None
    return str(value.shape[axis])


@pytest.mark.parametrize("spelling", get_args(Spelling))
def test_a_token_costs_what_the_whole_plan_says_at_its_place(llama: Any, spelling: Any) -> None:
    module = as_module(llama, spelling)
    past = dimension(module, "past_key_values.0.key", 2)
    prompt, token = rows(module, **{past: 16})
    assert (prompt[0], token[0]) == ("prompt of 16 tokens", "one token behind 16")
    assert token[4] == text.size(17 * PER_TOKEN)
    assert prompt[4] == text.size(16 * PER_TOKEN)
    everything = dict.fromkeys(plan_rows(module, AnalysisManager(module), {}).missing, 1)
    total = dimension(module, "attention_mask", 1)
    plan = plan_rows(module, AnalysisManager(module), everything | {past: 16, total: 17})
    assert plan.total.flops is not None
    assert token[1] == f"{plan.total.flops:,}"
    # The products of a layer grow with the tokens, and those of attention besides.
    assert int(prompt[1].replace(",", "")) > 12 * plan.total.flops


def test_more_sequences_take_more_cache(llama: Any) -> None:
    module = as_module(llama, "gqa")
    batch = dimension(module, "input_ids", 0)
    prompt, _ = rows(module, **{batch: 3})
    assert prompt[0] == "prompt of 512 tokens"
    assert prompt[4] == text.size(3 * 512 * PER_TOKEN)


def test_no_phases_without_a_cache_of_any_length(llama: Any) -> None:
    plain = module_of("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
    assert phases_table(plain, AnalysisManager(plain), {}, None) is None
    fixed = as_module(llama, "gqa")
    for value in fixed.graph.inputs:
        if (value.name or "").startswith("past_key_values"):
            value.shape = ir.Shape([1, KV_HEADS, 8, SIZE])
    assert phases_table(fixed, AnalysisManager(fixed), {}, None) is None
