"""quantize-kv-cache: the cache in integers, what is refused, and generation with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from support import run_plain
from tiny_llama import KV_HEADS, LAYERS, SIZE, WORDS, Spelling, as_module, tiny_llama

import lwc
from lwc.core.errors import UsageError
from lwc.core.module import Module
from lwc.generate.feeding import Feeder
from lwc.generate.interface import find_interface
from lwc.generate.perplexity import perplexity_with_cache
from lwc.generate.policies import FullCache, HeavyHitters, WindowCache
from lwc.optimizer import OptimizeResult
from lwc.passes.quantization.cache_layers import Magnitudes, Rounding, scales

TOKENS = np.random.default_rng(1).integers(0, WORDS, 48).tolist()
SPELLINGS: list[Spelling] = ["gqa", "gqa-rotary"]


@pytest.fixture(scope="module")
def written() -> dict[str, Module]:
    llama = tiny_llama()
    return {spelling: as_module(llama, spelling) for spelling in SPELLINGS}


def feed(module: Module, batch: int = 1) -> dict[str, Any]:
    """Return the tokens as a feed with an empty past."""
    whole = {
        "input_ids": np.tile(TOKENS, (batch, 1)),
        "attention_mask": np.ones((batch, len(TOKENS)), np.int64),
        "position_ids": np.tile(np.arange(len(TOKENS)), (batch, 1)),
    }
    for tensor in find_interface(module).tensors:
        whole[tensor.past] = np.zeros((batch, tensor.heads, 0, tensor.size), tensor.dtype)
    names = {value.name for value in module.graph.inputs}
    return {name: array for name, array in whole.items() if name in names}


def quantized(module: Module, options: str = "8") -> OptimizeResult:
    return lwc.optimize(
        module.clone(), f"quantize-kv-cache{{{options}}}", calibration=[feed(module)]
    )


def presents(module: Module, batch: int = 1) -> list[Any]:
    """Return keys and values after the tokens, layer by layer."""
    found = run_plain(module, feed(module, batch))
    by_name = dict(zip([value.name for value in module.graph.outputs], found, strict=True))
    return [by_name[tensor.present] for tensor in find_interface(module).tensors]


def fed(module: Module) -> Any:
    """Return the logits of every token, of a prompt of 32 and then one by one."""
    with Feeder(module, FullCache(), threads=1) as feeder:
        feeder.start(len(TOKENS))
        rows = [feeder.feed(TOKENS[:32], every=True)]
        assert feeder.decoder.cache_mode == "in place"
        rows += [feeder.feed([token], every=True) for token in TOKENS[32:]]
    return np.concatenate(rows)


def missed(result: OptimizeResult) -> str:
    return " ".join(each.message for each in result.module.remarks if each.kind == "missed")


def codes(present: Any, bits: int) -> Any:
    """Return what integers a present of 8 bits, or of 4 bits in pairs, holds."""
    if bits == 8:
        return present.astype(np.int32)
    pairs = np.stack([present & 15, present >> 4], -1)
    return pairs.reshape(*present.shape[:3], -1).astype(np.int32) - 8


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("options", ["8", "4", "8 scales=tensor", "4 scales=tensor"])
def test_the_cache_holds_rounded_keys_and_values(
    spelling: str, options: str, written: dict[str, Module]
) -> None:
    """Of the first layer: what later ones get is rounded already."""
    bits: Any = int(options[0])
    plain = written[spelling]
    wanted = presents(plain, batch=2)
    found = presents(quantized(plain, options).module, batch=2)
    assert [present.dtype for present in found] == [np.int8 if bits == 8 else np.uint8] * 4
    for present, exact in zip(found[:2], wanted[:2], strict=True):
        magnitudes = np.abs(exact).max(axis=(0, 2))
        scale = scales(magnitudes, bits, single="tensor" in options)
        # A half may fall to either side, where a number differs in its last bits.
        assert np.abs(codes(present, bits) - exact / scale).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(("bits", "most"), [(8, 0.05), (4, 0.7)])
def test_generation_is_close_to_that_with_floats(
    spelling: str, bits: int, most: float, written: dict[str, Module]
) -> None:
    """Relative to the logits' norm.

    Numbers are off by 0.5 % and 10 %; the attention of random weights is far from uniform, which
    makes that three to five times as much in the logits of two layers.
    """
    logits = fed(written[spelling])
    found = fed(quantized(written[spelling], f"{bits}").module)
    assert 0 < np.linalg.norm(found - logits) <= most * np.linalg.norm(logits)


def test_the_interface_states_what_it_keeps(written: dict[str, Module]) -> None:
    for bits, dtype in ((8, np.int8), (4, np.uint8)):
        interface = find_interface(quantized(written["gqa"], f"{bits}").module)
        assert {tensor.dtype for tensor in interface.tensors} == {np.dtype(dtype)}
        taken = sum(tensor.bytes_per_token for tensor in interface.tensors)
        assert taken == LAYERS * 2 * KV_HEADS * SIZE * bits // 8
        assert interface.in_place


def test_statistics_say_what_is_saved_and_lost(written: dict[str, Module]) -> None:
    (four,) = quantized(written["gqa"], "4").record.passes
    numbers = LAYERS * 2 * KV_HEADS * SIZE
    assert four.statistics["cache bytes per token before"] == 4 * numbers
    assert four.statistics["cache bytes per token after"] == numbers // 2
    # A step of max/7, uniform: max/(7 sqrt 12); the largest of 48 is 2 to 3 standard deviations.
    assert 0.05 < float(four.statistics["mean relative error"]) < 0.15
    (eight,) = quantized(written["gqa"], "8").record.passes
    ratio = float(four.statistics["mean relative error"])
    ratio /= float(eight.statistics["mean relative error"])
    assert ratio == pytest.approx(127 / 7, rel=0.2)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("policy", [WindowCache(16, 2), HeavyHitters(8, 8)])
def test_a_cache_of_integers_can_be_cut(bits: int, policy: Any, written: dict[str, Module]) -> None:
    plain = written["gqa"]
    wanted = perplexity_with_cache(plain, TOKENS, policy, threads=1).nll_per_token
    made = quantized(plain, f"{bits}").module
    found = perplexity_with_cache(made, TOKENS, policy, threads=1).nll_per_token
    # Which entries are kept may differ after a while: the mean, not each token.
    assert abs(found.mean() - wanted.mean()) < (0.1 if bits == 8 else 0.5)


def test_a_cache_of_codes_beside_half_precision(written: dict[str, Module]) -> None:
    """The scales stay float32."""
    made = quantized(written["gqa"]).module
    half = lwc.optimize(made, "convert-dtype{float16 keep-io=true}").module
    logits, found = fed(written["gqa"]), fed(half)
    assert np.linalg.norm(found - logits) <= 0.05 * np.linalg.norm(logits)


def test_outputs_are_not_compared_where_the_cache_cannot_be_fed_alike(
    written: dict[str, Module],
) -> None:
    plain = written["gqa"]
    for options in ("quantize-kv-cache{8}", "quantize-kv-cache{4}"):
        made = lwc.optimize(plain.clone(), options, calibration=[feed(plain)], verify="numeric")
        assert "takes codes in place of numbers" in str(made.record.passes[0].verification)


def test_a_second_run_changes_nothing(written: dict[str, Module]) -> None:
    once = quantized(written["gqa"]).module
    again = quantized(once)
    assert not again.record.passes[0].changed
    assert "its cache is quantized already" in missed(again)


def test_without_a_cache_or_data_it_says_so(written: dict[str, Module]) -> None:
    with pytest.raises(UsageError, match="there is no calibration data"):
        lwc.optimize(written["gqa"].clone(), "quantize-kv-cache")
    plain = lwc.optimize(as_module(tiny_llama(), "plain"), "quantize-kv-cache", calibration=[{}])
    assert not plain.record.passes[0].changed
    assert any("fuse-attention and add-kv-cache" in each.message for each in plain.module.remarks)


def test_a_cache_that_something_else_reads_stays(written: dict[str, Module]) -> None:
    module = written["gqa"].clone()
    key = next(value for value in module.graph.outputs if value.name == "present.0.key")
    doubled = ir.node("Add", [key, key])
    doubled.outputs[0].name = "doubled"
    doubled.outputs[0].type, doubled.outputs[0].shape = key.type, key.shape
    module.graph.append(doubled)
    module.graph.outputs.append(doubled.outputs[0])
    result = quantized(module)
    assert "something else reads its cache, too" in missed(result)
    assert result.record.passes[0].statistics["layers"] == LAYERS - 1


def test_statistics_of_batches_are_those_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    batch = rng.standard_normal((3, 2, 5, 4)).astype(np.float32)
    largest = Magnitudes()
    for part in (batch[:1], batch[1:], batch[:, :, :0]):
        largest.update(part)
    np.testing.assert_array_equal(largest.value, np.abs(batch).max(axis=(0, 2)))
    scale = scales(largest.value, 8, single=False)
    error = Rounding(scale, 8)
    error.update(batch[:1])
    error.update(batch[1:])
    rounded = np.rint(batch / scale) * scale
    wanted = np.linalg.norm(rounded - batch) / np.linalg.norm(batch)
    assert error.value == pytest.approx(wanted, rel=1e-5)
