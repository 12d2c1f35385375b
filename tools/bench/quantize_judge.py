"""The process that judges one model of `quantize.py`: the loss of every token of a text.

    quantize_judge.py KIND MODEL IDS LOSSES THREADS

KIND is `onnx`, `genai` (an ONNX file with its `genai_config.json`) or `llama.cpp`. IDS is an `.npy`
file of tokens; windows of 512 of them are fed without overlap and each predicts the token after it,
as `lwc.evaluate.perplexity` does, which does it for ONNX. LOSSES is the `.npy` file to write:
negative log-likelihoods in nats, `[tokens - 1]`. Where it fails, the last line it writes says why.
"""

from __future__ import annotations

import ctypes
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

WINDOW = 512

Array = np.ndarray[Any, Any]


def _onnx(model: Path, ids: Array, threads: int, bind: dict[str, int] | None = None) -> Array:
    import lwc
    from lwc.evaluate.perplexity import perplexity

    module = lwc.optimize(model, (), bind=bind).module
    tokens = [int(token) for token in ids]
    found = perplexity(
        module,
        lambda _: tokens,
        "",
        window=WINDOW,
        stride=WINDOW,
        max_tokens=None,
        threads=threads,
    )
    return found.nll_per_token


def _genai(model: Path, ids: Array, threads: int) -> Array:
    config = json.loads(model.with_name("genai_config.json").read_text())
    # The size of a head is a name in the file, like an extent that may be anything.
    return _onnx(model, ids, threads, {"kv_cache_dim": config["model"]["decoder"]["head_size"]})


def _llama(model: Path, ids: Array, threads: int) -> Array:
    import llama_cpp

    llama_cpp.llama_backend_init()
    options = llama_cpp.llama_context_default_params()
    options.n_ctx = options.n_batch = options.n_ubatch = WINDOW
    options.n_threads = options.n_threads_batch = threads
    if model.stem.endswith("f32"):
        options.type_k = options.type_v = 0
    loaded = llama_cpp.llama_model_load_from_file(
        str(model).encode(), llama_cpp.llama_model_default_params()
    )
    if not loaded:
        raise SystemExit(f"llama.cpp cannot load {model.name}")
    context = llama_cpp.llama_init_from_model(loaded, options)
    width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
    batch = llama_cpp.llama_batch_init(WINDOW, 0, 1)
    losses = []
    for begin, end in _windows(len(ids) - 1):
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = end - begin
        for place, token in enumerate(ids[begin:end]):
            batch.token[place], batch.pos[place] = int(token), place
            batch.n_seq_id[place], batch.seq_id[place][0], batch.logits[place] = 1, 0, 1
        if failed := llama_cpp.llama_decode(context, batch):
            raise SystemExit(f"llama_decode returned {failed}")
        address = ctypes.cast(llama_cpp.llama_get_logits(context), ctypes.c_void_p).value or 0
        kind = ctypes.c_float * (width * (end - begin))
        logits = np.ctypeslib.as_array(kind.from_address(address)).reshape(end - begin, width)
        losses.append(_losses(logits, ids[begin + 1 : end + 1]))
    return np.concatenate(losses)


def _windows(count: int) -> Iterator[tuple[int, int]]:
    return ((begin, min(begin + WINDOW, count)) for begin in range(0, count, WINDOW))


def _losses(logits: Array, targets: Array) -> Array:
    """Return what `lwc.evaluate.perplexity.token_losses` does, which this process cannot import."""
    rows = np.empty(len(targets))
    for place, (row, target) in enumerate(zip(logits, targets, strict=True)):
        wide = row.astype(np.float64)
        rows[place] = wide.max() + np.log(np.exp(wide - wide.max()).sum()) - wide[target]
    return rows


def one_line(error: Exception) -> str:
    """Return what happened, for a parent that reads the last line."""
    said = f"{error}".strip().splitlines()
    return f"{type(error).__name__}: {said[0] if said else ''}"


def main() -> None:
    kind, model, ids, losses, threads = sys.argv[1:]
    judge = {"onnx": _onnx, "genai": _genai, "llama.cpp": _llama}[kind]
    try:
        np.save(losses, judge(Path(model), np.load(ids), int(threads)))
    except Exception as error:  # whatever it is, the parent wants one line of it
        raise SystemExit("\n" + one_line(error)) from error


if __name__ == "__main__":
    main()
