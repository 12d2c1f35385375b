"""Language models in: random ones of several families, and the real SmolLM2 and MiniLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
import onnxruntime  # noqa: E402
from bench.decode_models import open_source  # noqa: E402

from lwc.core.errors import InputError  # noqa: E402
from lwc.core.module import Module  # noqa: E402
from lwc.frontend.gguf_reader import read_gguf  # noqa: E402
from lwc.frontend.huggingface import read_huggingface  # noqa: E402
from lwc.frontend.load import load  # noqa: E402
from lwc.frontend.onnx_writer import save  # noqa: E402

_SMALL = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {**_SMALL, "num_key_value_heads": 2},
    "Qwen2ForCausalLM": {**_SMALL, "num_key_value_heads": 2},
    "GPT2LMHeadModel": {"vocab_size": 61, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "BertModel": _SMALL,
    "BertForSequenceClassification": {**_SMALL, "num_labels": 3},
    "DistilBertModel": {"vocab_size": 61, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
}


def session(module: Module, folder: Path) -> Any:
    path = folder / "model.onnx"
    save(module, path)
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def padded_feed(names: set[str], batch: int, length: int, *, vocabulary: int = 61) -> Any:
    """Give token feeds whose last row is padded on the right to half its length."""
    rng = np.random.default_rng(batch * 100 + length)
    ids = rng.integers(0, vocabulary, (batch, length))
    mask = np.ones_like(ids)
    if batch > 1:
        mask[-1, (length + 1) // 2 :] = 0
    feed = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": np.tile(np.arange(length), (batch, 1)),
        "token_type_ids": np.zeros_like(ids),
    }
    return {name: feed[name].astype(np.int64) for name in names}, mask.astype(bool)


@pytest.mark.parametrize("name", _FAMILIES)
def test_random_models_agree_with_transformers(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**_FAMILIES[name])).eval()
    model.save_pretrained(tmp_path)
    module = read_huggingface(tmp_path)
    runner = session(module, tmp_path)
    names = {value.name for value in runner.get_inputs()}
    causal = name.endswith(("CausalLM", "LMHeadModel"))
    assert ("position_ids" in names) == causal
    for batch, length in [(1, 1), (1, 7), (3, 6)]:
        feed, mask = padded_feed(names, batch, length)
        with torch.no_grad():
            wanted = model(**{key: torch.from_numpy(array) for key, array in feed.items()})
        outputs = dict(
            zip((o.name for o in runner.get_outputs()), runner.run(None, feed), strict=True)
        )
        for key, got in outputs.items():
            # What padded positions hold is nobody's business.
            valid = mask if got.ndim == 3 else slice(None)
            want = wanted[key].numpy()[valid]
            np.testing.assert_allclose(got[valid], want, rtol=1e-4, atol=1e-4, err_msg=key)


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        read_huggingface(tmp_path)
    kind = transformers.BertModel
    model = kind(kind.config_class(**_SMALL))
    model.config.architectures = ["BertModel"]
    model.config.save_pretrained(tmp_path)
    with pytest.raises(InputError) as caught:
        read_huggingface(tmp_path)
    assert "\n" not in str(caught.value)
    state = {key: value for key, value in model.state_dict().items() if "layer.1" not in key}
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(InputError, match=r"lack 'encoder\.layer\.1"):
        read_huggingface(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot load"):
        read_huggingface(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["NoSuchModel"]}', encoding="utf-8")
    with pytest.raises(InputError, match="NoSuchModel"):
        read_huggingface(tmp_path)
    (tmp_path / "config.json").write_text("[", encoding="utf-8")
    with pytest.raises(InputError, match="configuration"):
        read_huggingface(tmp_path)


def test_encoder_decoders_are_refused(tmp_path: Path) -> None:
    kind = transformers.T5ForConditionalGeneration
    config = kind.config_class(
        vocab_size=61, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4
    )
    kind(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="no text decoder or encoder"):
        read_huggingface(tmp_path)


@pytest.mark.models
def test_minilm_agrees_with_transformers(model_file: Callable[[str], Path], tmp_path: Path) -> None:
    folder = model_file("minilm")
    module = read_huggingface(folder)
    assert {"config.json", "tokenizer.json", "vocab.txt"} <= set(module.source.companions)
    runner = session(module, tmp_path)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    names = {value.name for value in runner.get_inputs()}
    assert names == {"input_ids", "attention_mask", "token_type_ids"}
    for batch, length in [(1, 5), (3, 12)]:
        feed, mask = padded_feed(names, batch, length, vocabulary=30000)
        with torch.no_grad():
            want = model(**{key: torch.from_numpy(array) for key, array in feed.items()})
        hidden, pooled = runner.run(["last_hidden_state", "pooler_output"], feed)
        np.testing.assert_allclose(hidden[mask], want[0].numpy()[mask], rtol=0, atol=1e-5)
        np.testing.assert_allclose(pooled, want[1].numpy(), rtol=0, atol=1e-5)


def logits(runner: Any, ids: list[int]) -> np.ndarray[Any, Any]:
    tokens = np.asarray([ids], np.int64)
    feed = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.arange(len(ids))[None],
    }
    return runner.run(["logits"], feed)[0][0].astype(np.float64)  # type: ignore[no-any-return]


def perplexity(runner: Any, ids: list[int], window: int) -> float:
    """Mean over windows without overlap; each token but the first of all is predicted once."""
    total = 0.0
    for start in range(0, len(ids) - 1, window):
        scores = logits(runner, ids[start : start + window])
        targets = ids[start + 1 : start + window + 1]
        scores -= scores.max(axis=-1, keepdims=True)
        likely = scores - np.log(np.exp(scores).sum(axis=-1, keepdims=True))
        total -= likely[np.arange(len(targets)), targets].sum()
    return float(np.exp(total / (len(ids) - 1)))


def greedy(runner: Any, ids: list[int], count: int) -> list[int]:
    found: list[int] = []
    for _ in range(count):
        found.append(int(logits(runner, [*ids, *found])[-1].argmax()))
    return found


@pytest.mark.models
@pytest.mark.slow
def test_smollm2_speaks_and_has_the_reference_perplexity(
    smollm2: Path, model_file: Callable[[str], Path]
) -> None:
    module = load(smollm2)
    matrices = [v for v in module.graph.initializers.values() if len(v.shape or ()) == 2]
    assert len(matrices) == 211  # the embedding and the head are one
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.tokenize("in 1234") == ["in", "Ġ", "1", "2", "3", "4"]
    assert "<|im_start|>user" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    runner = onnxruntime.InferenceSession(str(smollm2 / "model.onnx"))
    prompt = tokenizer("The capital of France is")["input_ids"]
    assert tokenizer.decode(greedy(runner, prompt, 2)) == " Paris."
    text = model_file("lee").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"][:1025]
    # What transformers gives for these tokens in float32.
    assert perplexity(runner, ids, 512) == pytest.approx(31.72, abs=0.01)


@pytest.mark.models
@pytest.mark.slow
def test_smollm2_in_its_own_blocks_is_the_same_model(
    model_file: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its first two layers, with embedding and head: blocks of every kind it has."""
    path = open_source(model_file("smollm2"), layers=2).gguf
    runner = session(read_gguf(path, keep_blocks=True, accuracy_level=0), tmp_path)
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert written < 1.08 * path.stat().st_size
    folder = tmp_path / "plain"
    folder.mkdir()
    reference = session(read_gguf(path), folder)
    ids = list(range(100, 164))
    got, want = logits(runner, ids), logits(reference, ids)
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-3)
