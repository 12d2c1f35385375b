"""A tiny random llama of transformers, written as ONNX with a cache in several spellings."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from lwc.core.module import Module

HEADS, KV_HEADS, SIZE, LAYERS, WORDS = 4, 2, 16, 2, 67
WIDTH = HEADS * SIZE
POSITIONS = 128

Spelling: TypeAlias = Literal["gqa", "gqa-rotary", "plain", "standard"]
"""GroupQueryAttention; the same turning queries and keys itself, by positions that it counts;
MatMul and Softmax; the Attention of opset 23."""


def tiny_llama(seed: int = 0) -> Any:
    """Make the model; its attention is far from uniform."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        intermediate_size=48,
        max_position_embeddings=POSITIONS,
        initializer_range=0.3,
        tie_word_embeddings=False,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


class _Writer:
    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        self._count = 0

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        self._count += 1
        names = [f"{kind.lower()}_{self._count}_{n}" for n in range(outputs)]
        self.write(kind, inputs, names, **attributes)
        return names[0] if outputs == 1 else names

    def write(self, kind: str, inputs: Any, outputs: Any, **attributes: Any) -> None:
        domain = attributes.pop("domain", "")
        self.nodes.append(
            helper.make_node(kind, inputs, outputs, outputs[0], domain=domain, **attributes)
        )

    def constant(self, value: Any, dtype: Any = np.int64) -> str:
        array = np.array(value, dtype)
        name = f"c_{dtype.__name__}_{array.tolist()}"
        return self.weight(name, array)

    def weight(self, name: str, array: Any) -> str:
        self.weights[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name


def as_module(model: Any, spelling: Spelling, *, cache: bool = True) -> Module:
    """Write the model: `input_ids`, `attention_mask`, `position_ids` and the cache to `logits`.

    Args:
        model: What `tiny_llama` made.
        spelling: How attention is written.
        cache: With past and present; only plain attention can do without.
    """
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    w = _Writer()
    frequencies = 10000.0 ** (-np.arange(0, SIZE, 2) / SIZE)
    angles = np.arange(POSITIONS)[:, None] * frequencies
    tables = [w.weight(f.__name__, f(angles).astype(np.float32)) for f in (np.cos, np.sin)]

    def linear(x: str, name: str) -> str:
        return str(w.op("MatMul", x, w.weight(name, state[f"{name}.weight"].T)))

    def norm(x: str, name: str) -> str:
        mean = w.op("ReduceMean", w.op("Mul", x, x), w.constant([-1]))
        root = w.op("Sqrt", w.op("Add", mean, w.constant(1e-6, np.float32)))
        return str(w.op("Mul", w.op("Div", x, root), w.weight(name, state[f"{name}.weight"])))

    def heads(x: str, count: int) -> str:
        return str(w.op("Transpose", w.op("Reshape", x, w.constant([0, 0, count, SIZE])),
                        perm=[0, 2, 1, 3]))  # fmt: skip

    def flat(x: str) -> str:
        turned = w.op("Transpose", x, perm=[0, 2, 1, 3])
        return str(w.op("Reshape", turned, w.constant([0, 0, -1])))

    def turned(x: str) -> str:
        return str(w.op("RotaryEmbedding", x, "position_ids", *tables, domain="com.microsoft"))

    new = w.op("Shape", "input_ids", start=1, end=2)
    total = w.op("Shape", "attention_mask", start=1, end=2)
    past = w.op("Sub", total, new)
    count = w.op("Cast", total, to=TensorProto.INT32)
    seen = w.op("ReduceSum", w.op("Cast", "attention_mask", to=TensorProto.INT32),
                w.constant([1]), keepdims=0)  # fmt: skip
    last = w.op("Sub", seen, w.constant([1], np.int32))
    zero, one = w.constant(0), w.constant(1)
    queries = w.op("Range", w.op("Squeeze", past), w.op("Squeeze", total), one)
    entries = w.op("Range", zero, w.op("Squeeze", total), one)
    earlier = w.op("LessOrEqual", entries, w.op("Unsqueeze", queries, w.constant([1])))
    shown = w.op("Unsqueeze", w.op("Cast", "attention_mask", to=TensorProto.BOOL),
                 w.constant([1, 2]))  # fmt: skip
    mask = w.op("Where", w.op("And", earlier, shown), w.constant(0, np.float32),
                w.constant(-1e30, np.float32))  # fmt: skip

    def plain(q: str, key: str, value: str) -> str:
        def repeated(x: str) -> str:
            wide = w.op("Expand", w.op("Unsqueeze", x, w.constant([2])),
                        w.constant([1, 1, HEADS // KV_HEADS, 1, 1]))  # fmt: skip
            return str(w.op("Reshape", wide, w.constant([0, HEADS, -1, SIZE])))

        keys = w.op("Transpose", repeated(key), perm=[0, 1, 3, 2])
        scores = w.op("Mul", w.op("MatMul", q, keys), w.constant(SIZE**-0.5, np.float32))
        shares = w.op("Softmax", w.op("Add", scores, mask), axis=-1)
        return flat(w.op("MatMul", shares, repeated(value)))

    def attention(x: str, layer: int) -> str:
        name = f"model.layers.{layer}.self_attn"
        q, k, v = (linear(x, f"{name}.{part}_proj") for part in "qkv")
        pasts = [f"past_key_values.{layer}.{part}" for part in ("key", "value")]
        presents = [f"present.{layer}.{part}" for part in ("key", "value")]
        made = f"attended_{layer}"
        if spelling != "gqa-rotary":
            q, k = turned(heads(q, HEADS)), turned(heads(k, KV_HEADS))
        if spelling == "plain":
            both = k, heads(v, KV_HEADS)
            if cache:
                for old, fresh, present in zip(pasts, both, presents, strict=True):
                    w.write("Concat", [old, fresh], [present], axis=2)
                both = presents[0], presents[1]
            return plain(q, *both)
        if spelling == "standard":
            w.write("Attention", [q, k, heads(v, KV_HEADS), "", *pasts], [made, *presents],
                    is_causal=1)  # fmt: skip
            return flat(made)
        inputs, sizes = [q, k, v, *pasts, last, count], {}
        if spelling == "gqa":
            inputs[:2] = flat(q), flat(k)
        else:
            inputs += tables
            sizes["do_rotary"] = 1
        w.write("GroupQueryAttention", inputs, [made, *presents], domain="com.microsoft",
                num_heads=HEADS, kv_num_heads=KV_HEADS, **sizes)  # fmt: skip
        return made

    table = w.weight("model.embed_tokens", state["model.embed_tokens.weight"])
    hidden = w.op("Gather", table, "input_ids")
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        attended = attention(norm(hidden, f"{name}.input_layernorm"), layer)
        hidden = w.op("Add", hidden, linear(attended, f"{name}.self_attn.o_proj"))
        x = norm(hidden, f"{name}.post_attention_layernorm")
        gate = linear(x, f"{name}.mlp.gate_proj")
        gate = w.op(
            "Mul", w.op("Mul", gate, w.op("Sigmoid", gate)), linear(x, f"{name}.mlp.up_proj")
        )
        hidden = w.op("Add", hidden, linear(gate, f"{name}.mlp.down_proj"))
    w.write("MatMul", [norm(hidden, "model.norm"), w.weight("head", state["lm_head.weight"].T)],
            ["logits"])  # fmt: skip
    return Module(ir.from_proto(_model(w, spelling, cache)))


def _model(w: _Writer, spelling: Spelling, cache: bool) -> onnx.ModelProto:
    def value(name: str, kind: int, *shape: Any) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    tokens = ["batch", "sequence"]
    inputs = [
        value("input_ids", TensorProto.INT64, *tokens),
        value("attention_mask", TensorProto.INT64, "batch", "total"),
    ]
    if spelling != "gqa-rotary":
        inputs.append(value("position_ids", TensorProto.INT64, *tokens))
    outputs = [value("logits", TensorProto.FLOAT, *tokens, WORDS)]
    for layer in range(LAYERS if cache else 0):
        for part in ("key", "value"):
            shape = ("batch", KV_HEADS, "past", SIZE), ("batch", KV_HEADS, "total", SIZE)
            inputs.append(value(f"past_key_values.{layer}.{part}", TensorProto.FLOAT, *shape[0]))
            outputs.append(value(f"present.{layer}.{part}", TensorProto.FLOAT, *shape[1]))
    used = {name for node in w.nodes for name in node.input}
    return helper.make_model(
        helper.make_graph(
            w.nodes, "llama", inputs, outputs, [t for name, t in w.weights.items() if name in used]
        ),
        opset_imports=[
            helper.make_opsetid("", 23 if spelling == "standard" else 18),
            helper.make_opsetid("com.microsoft", 1),
        ],
        ir_version=10,
    )
