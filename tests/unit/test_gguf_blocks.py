"""GGUF files: block layouts against the gguf package, whole models, damaged files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")
pytest.importorskip("transformers")
import onnx_ir as ir  # noqa: E402
import onnxruntime  # noqa: E402

from lwc.core.errors import InputError  # noqa: E402
from lwc.core.module import Module  # noqa: E402
from lwc.frontend.gguf_blocks import BLOCK_SIZE, repack  # noqa: E402
from lwc.frontend.gguf_file import GgufFile  # noqa: E402
from lwc.frontend.gguf_reader import read_gguf  # noqa: E402
from lwc.frontend.onnx_writer import save  # noqa: E402

Kind = gguf.GGMLQuantizationType
VOCABULARY, WIDTH, HEADS, KV_HEADS, INNER = 96, 64, 4, 2, 96


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LWC_CACHE", str(tmp_path / "cache"))


def write_llama(
    path: Path, linear: str, table: str, *, head: str | None = None, rope: bool = False
) -> Path:
    """Write a one-layer llama with random weights; without `head` it is tied to the table."""
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_rope_dimension_count(WIDTH // HEADS)

    def add(name: str, shape: tuple[int, ...], kind: str) -> None:
        content = rng.normal(0, 0.3, shape).astype(np.float32)
        writer.add_tensor(name, gguf.quantize(content, Kind[kind]), raw_dtype=Kind[kind])

    kv = KV_HEADS * WIDTH // HEADS
    add("token_embd.weight", (VOCABULARY, WIDTH), table)
    add("blk.0.attn_q.weight", (WIDTH, WIDTH), linear)
    add("blk.0.attn_k.weight", (kv, WIDTH), linear)
    add("blk.0.attn_v.weight", (kv, WIDTH), linear)
    add("blk.0.attn_output.weight", (WIDTH, WIDTH), linear)
    add("blk.0.ffn_gate.weight", (INNER, WIDTH), linear)
    add("blk.0.ffn_up.weight", (INNER, WIDTH), linear)
    add("blk.0.ffn_down.weight", (WIDTH, INNER), linear)
    for norm in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        add(f"{norm}.weight", (WIDTH,), "F32")
    if head:
        add("output.weight", (VOCABULARY, WIDTH), head)
    if rope:
        factors = np.array([1, 2, 4, 8, 1, 2, 4, 8], np.float32)
        writer.add_tensor("rope_freqs.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def logits(module: Module, path: Path) -> np.ndarray[Any, Any]:
    save(module, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {
        "input_ids": np.array([[1, 2, 3, 4, 5], [7, 8, 9, 1, 1]], np.int64),
        "attention_mask": np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], np.int64),
        "position_ids": np.array([[0, 1, 2, 3, 4], [0, 0, 0, 1, 2]], np.int64),
    }
    return session.run(None, feed)[0]  # type: ignore[no-any-return]


def operators(module: Module) -> set[str]:
    return {node.op_type for node in module.graph}


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_repacked_blocks_hold_the_weights_gguf_decodes(kind: str) -> None:
    rng = np.random.default_rng(1)
    blocks = gguf.quantize(rng.normal(size=(6, 96)).astype(np.float32), Kind[kind])
    packed = repack(blocks, kind)
    if packed.bits == 4:
        low, high = packed.values & 15, packed.values >> 4
        elements = np.stack([low, high], axis=-1).reshape(6, 3, BLOCK_SIZE)
    else:
        elements = packed.values
    centre = 2 ** (packed.bits - 1)
    values = (elements.astype(np.float32) - centre) * packed.scales[..., None].astype(np.float32)
    if packed.offsets is not None:
        values += packed.offsets[..., None]
    want = gguf.dequantize(blocks, Kind[kind])
    np.testing.assert_allclose(values.reshape(6, 96), want, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("linear", "table", "head"),
    [
        ("Q4_0", "Q4_0", None),
        ("Q8_0", "Q8_0", None),
        ("Q4_1", "Q8_0", None),
        ("Q4_1", "F16", "Q8_0"),
    ],
)
def test_kept_blocks_compute_what_decoded_weights_do(
    linear: str, table: str, head: str | None, tmp_path: Path
) -> None:
    path = write_llama(tmp_path / "tiny.gguf", linear, table, head=head)
    decoded = read_gguf(path)
    kept = read_gguf(path, keep_blocks=True, accuracy_level=0)
    assert "MatMulNBits" not in operators(decoded)
    assert "MatMulNBits" in operators(kept)
    assert ("GatherBlockQuantized" in operators(kept)) == (table != "F16")
    want = logits(decoded, tmp_path / "decoded.onnx")
    got = logits(kept, tmp_path / "kept.onnx")
    assert np.abs(want).max() > 0.1
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    names = [value.name for value in kept.graph.initializers.values()]
    expected = 8 if head is None or table == "F16" else 9
    assert sum(name.endswith(".blocks") for name in names if name) == expected
    floats = [v for v in kept.graph.initializers.values() if v.dtype == ir.DataType.FLOAT]
    assert (VOCABULARY, WIDTH) not in [v.shape for v in floats] or table == "F16"


def test_decoded_model_is_the_one_transformers_makes_of_the_weights(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path = write_llama(tmp_path / "tiny.gguf", "F32", "F32")
    stored = GgufFile(path)

    def unpermuted(name: str, heads: int) -> Any:
        rows = stored.decode(stored.tensors[name])
        paired = rows.reshape(heads, -1, 2, WIDTH).swapaxes(1, 2)
        return paired.reshape(rows.shape)

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=1,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, rms_norm_eps=1e-5,
        rope_theta=10000.0, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    layer = "model.layers.0."
    content = {
        "model.embed_tokens.weight": "token_embd",
        layer + "self_attn.v_proj.weight": "blk.0.attn_v",
        layer + "self_attn.o_proj.weight": "blk.0.attn_output",
        layer + "mlp.gate_proj.weight": "blk.0.ffn_gate",
        layer + "mlp.up_proj.weight": "blk.0.ffn_up",
        layer + "mlp.down_proj.weight": "blk.0.ffn_down",
        layer + "input_layernorm.weight": "blk.0.attn_norm",
        layer + "post_attention_layernorm.weight": "blk.0.ffn_norm",
        "model.norm.weight": "output_norm",
    }
    state = {
        ours: torch.from_numpy(stored.decode(stored.tensors[f"{theirs}.weight"]).copy())
        for ours, theirs in content.items()
    }
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    for name, heads in (("q", HEADS), ("k", KV_HEADS)):
        rows = unpermuted(f"blk.0.attn_{name}.weight", heads)
        state[f"{layer}self_attn.{name}_proj.weight"] = torch.from_numpy(rows)
    model.load_state_dict(state)
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with torch.no_grad():
        want = model(ids).logits[0].numpy()
    np.testing.assert_allclose(
        logits(read_gguf(path), tmp_path / "m.onnx")[0], want, rtol=1e-4, atol=1e-5
    )


def test_rope_factors_of_the_file_are_used(tmp_path: Path) -> None:
    plain = read_gguf(write_llama(tmp_path / "plain.gguf", "F32", "F32"))
    scaled = read_gguf(write_llama(tmp_path / "scaled.gguf", "F32", "F32", rope=True))
    name = "model.rotary_emb.inv_freq"
    ratio = (
        plain.graph.initializers[name].const_value.numpy()  # type: ignore[union-attr]
        / scaled.graph.initializers[name].const_value.numpy()  # type: ignore[union-attr]
    )
    np.testing.assert_allclose(ratio, [1, 2, 4, 8, 1, 2, 4, 8], rtol=1e-6)


def test_formats_without_an_operator_are_decoded_with_a_remark(tmp_path: Path) -> None:
    path = write_llama(tmp_path / "tiny.gguf", "Q5_0", "Q4_1")
    kept = read_gguf(path, keep_blocks=True)
    assert not {"MatMulNBits", "GatherBlockQuantized"} & operators(kept)
    missed = [str(remark) for remark in kept.remarks if remark.kind == "missed"]
    assert any("7 matrices" in text and "Q5_0" in text for text in missed)
    assert any("1 matrices" in text and "Q4_1" in text for text in missed)


def test_damaged_files_are_refused_in_one_line(tmp_path: Path) -> None:
    whole = write_llama(tmp_path / "whole.gguf", "Q4_0", "Q8_0").read_bytes()
    path = tmp_path / "bad.gguf"
    rng = np.random.default_rng(2)
    damaged = [b"", b"GGUF", b"not a model at all", rng.bytes(4096), b"GGUF" + rng.bytes(4096)]
    damaged += [whole[:cut] for cut in (20, 100, 400, len(whole) // 2, len(whole) - 40)]
    damaged.append(whole[:8] + struct.pack("<QQ", 1 << 60, 1 << 60) + whole[24:])
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_gguf(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    with pytest.raises(InputError, match="No such file"):
        read_gguf(tmp_path / "absent.gguf")


def test_an_array_count_that_lies_does_not_hang(tmp_path: Path) -> None:
    pair = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 4, 1 << 60)
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + pair + bytes(64))
    with pytest.raises(InputError, match="do not fit"):
        GgufFile(path)


def test_unknown_architectures_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    writer = gguf.GGUFWriter(path, "no-such-architecture")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match="no-such-architecture"):
        read_gguf(path)
