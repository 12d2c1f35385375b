"""The process of one contender of `decode.py`: loads a model once, generates when it is told to.

    decode_worker.py RUNNER MODEL OPTIONS

It may run in another environment than lwc's, so it imports nothing of lwc, and of the runtimes only
the one it drives. OPTIONS is JSON: `threads`, `context` (most tokens of a prompt with its
continuation), and what the runner takes besides. When the model is loaded it prints
`{"version", "peak"}`; then it answers each line `{"prompt", "tokens"}` of its input with
`{"tokens", "seconds", "peak"}`: the greedy continuation, when each token of it was known after the
prompt was given, and the most bytes that were ever resident. It ends with its input.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class Runner(Protocol):
    """A loaded model.

    Attributes:
        version: The runtime and its version.
    """

    version: str

    def start(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        """Empty the cache, make room for `count` tokens more, and return what generates them.

        Nothing of the prompt is computed before the first token is asked for.
        """


class OnnxRuntime:
    """A decoder with cache as ONNX: what is bound as `present` goes in as `past` where it lies.

    The interface is that of Hugging Face's exports and of ONNX Runtime GenAI: `input_ids`,
    `attention_mask`, `past_key_values.N.key` and `.value` `[batch, heads, past, size]` to `logits`
    and `present.N.key` and `.value`.
    """

    def __init__(self, model: Path, threads: int, context: int) -> None:
        import onnxruntime as ort

        self.version = f"onnxruntime {ort.__version__}"
        self._value = ort.OrtValue.ortvalue_from_numpy
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        file = str(model / "model.onnx")
        self._session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        self._outputs = [each.name for each in self._session.get_outputs()]
        self._present = {
            each.name: (each.name.replace("past_key_values", "present"), each.shape)
            for each in self._session.get_inputs()
            if each.name.startswith("past_key_values.")
        }
        self._mask = np.ones((1, context), np.int64)

    def start(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        past = {
            name: self._value(np.zeros((1, shape[1], 0, shape[3]), np.float32))
            for name, (_, shape) in self._present.items()
        }
        return self._steps(list(prompt), past)

    def _steps(self, ids: list[int], past: dict[str, Any]) -> Iterator[int]:
        binding = self._session.io_binding()
        length = 0
        while True:
            length += len(ids)
            inputs = {
                "input_ids": np.array([ids], np.int64),
                "attention_mask": self._mask[:, :length],
            }
            for name, array in inputs.items():
                binding.bind_ortvalue_input(name, self._value(array))
            for name, held in past.items():
                binding.bind_ortvalue_input(name, held)
            binding.clear_binding_outputs()
            for name in self._outputs:
                binding.bind_output(name, "cpu")
            self._session.run_with_iobinding(binding)
            found = dict(zip(self._outputs, binding.get_outputs(), strict=True))
            past = {name: found[present] for name, (present, _) in self._present.items()}
            logits = found["logits"]
            rows, width = logits.shape()[1:]
            ids = [_best(logits.data_ptr() + 4 * (rows - 1) * width, width)]
            yield ids[0]


class Lwc:
    """What lwc made of the model, as `lwc-generate` runs it: one cache, bound once."""

    def __init__(self, model: Path, threads: int, context: int) -> None:
        import onnxruntime as ort

        import lwc
        from lwc.generate.feeding import CHUNK, Feeder
        from lwc.generate.policies import FullCache

        self.version = f"onnxruntime {ort.__version__}"
        self._chunk = CHUNK
        self._feeder = Feeder(lwc.load(model / "model.onnx"), FullCache(), threads)
        self._feeder.start(context)

    def start(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        self._feeder.start(len(prompt) + count)
        return self._steps(list(prompt))

    def _steps(self, ids: list[int]) -> Iterator[int]:
        while True:
            for at in range(0, len(ids), self._chunk):
                logits = self._feeder.feed(ids[at : at + self._chunk])
            ids = [int(logits.argmax())]
            yield ids[0]


class Forward:
    """A model without a cache, run over the prompt alone: logits of every token, then the best."""

    def __init__(self, model: Path, threads: int, context: int) -> None:
        import onnxruntime as ort

        import lwc
        from lwc.backends.onnxruntime.session import OnnxRuntimeBackend

        self.version = f"onnxruntime {ort.__version__}"
        module = lwc.load(model)
        self._names = [value.name for value in module.graph.inputs]
        self._run = OnnxRuntimeBackend().compile(module, threads=threads).run

    def start(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        ids = np.array([prompt], np.int64)
        places = np.arange(len(prompt))[None]
        known = {"attention_mask": np.ones_like(ids), "position_ids": places}
        return self._steps({name: known.get(name, ids) for name in self._names})

    def _steps(self, feed: dict[str, Any]) -> Iterator[int]:
        yield int(self._run(feed, ["logits"])["logits"][0, -1].argmax())


class GenAI:
    """A folder of ONNX Runtime GenAI's model builder."""

    def __init__(self, model: Path, threads: int, context: int) -> None:
        import onnxruntime
        import onnxruntime_genai

        self.version = (
            f"onnxruntime-genai {onnxruntime_genai.__version__} "
            f"on onnxruntime {onnxruntime.__version__}"
        )
        self._genai = onnxruntime_genai
        config = onnxruntime_genai.Config(str(model))
        session = {"intra_op_num_threads": threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self._model = onnxruntime_genai.Model(config)

    def start(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        options = self._genai.GeneratorParams(self._model)
        options.set_search_options(max_length=len(prompt) + count, do_sample=False)
        return self._steps(self._genai.Generator(self._model, options), prompt)

    @staticmethod
    def _steps(generator: Any, prompt: Sequence[int]) -> Iterator[int]:
        generator.append_tokens(np.array([prompt], np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])


class LlamaCpp:
    """A GGUF file; `cache` is the element type of the cache, llama.cpp's own choice by default."""

    def __init__(self, model: Path, threads: int, context: int, cache: str = "f16") -> None:
        import llama_cpp

        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        self._llama = llama_cpp
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = context
        options.n_threads = options.n_threads_batch = threads
        options.type_k = options.type_v = {"f32": 0, "f16": 1}[cache]
        loaded = llama_cpp.llama_model_load_from_file(
            str(model).encode(), llama_cpp.llama_model_default_params()
        )
        if not loaded:
            raise SystemExit(f"llama.cpp cannot load {model.name}")
        self._batch = int(options.n_batch)
        self._width = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(loaded))
        self._context = llama_cpp.llama_init_from_model(loaded, options)
        if not self._context:
            raise SystemExit(f"llama.cpp cannot make a context for {model.name}")

    def start(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), True)
        return self._steps(list(prompt))

    def _steps(self, ids: list[int]) -> Iterator[int]:
        while True:
            for begin in range(0, len(ids), self._batch):
                part = ids[begin : begin + self._batch]
                tokens = (self._llama.llama_token * len(part))(*part)
                batch = self._llama.llama_batch_get_one(tokens, len(part))
                if failed := self._llama.llama_decode(self._context, batch):
                    raise SystemExit(f"llama_decode returned {failed}")
            logits = self._llama.llama_get_logits_ith(self._context, -1)
            ids = [_best(ctypes.cast(logits, ctypes.c_void_p).value or 0, self._width)]
            yield ids[0]


class PyTorch:
    """A Hugging Face folder run by transformers."""

    def __init__(self, model: Path, threads: int, context: int) -> None:
        import torch
        import transformers

        self.version = f"torch {torch.__version__}, transformers {transformers.__version__}"
        self._torch, self._cache = torch, transformers.DynamicCache
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        ).eval()

    def start(self, prompt: Sequence[int], count: int) -> Iterator[int]:
        return self._steps(list(prompt), self._cache(config=self._model.config))

    def _steps(self, ids: list[int], cache: Any) -> Iterator[int]:
        while True:
            with self._torch.inference_mode():
                found = self._model(
                    self._torch.tensor([ids]),
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                )
                ids = [int(found.logits[0, -1].argmax())]
            yield ids[0]


RUNNERS: dict[str, type[Runner]] = {
    "onnxruntime": OnnxRuntime,
    "lwc": Lwc,
    "forward": Forward,
    "genai": GenAI,
    "llama.cpp": LlamaCpp,
    "pytorch": PyTorch,
}


def _best(address: int, width: int) -> int:
    """Return the index of the largest of `width` numbers in float32, read where they lie."""
    row = np.ctypeslib.as_array((ctypes.c_float * width).from_address(address))
    return int(row.argmax())


def _peak() -> int:
    """Return the most bytes that were ever resident, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("/proc/self/status has no VmHWM")


def generate(runner: Runner, prompt: Sequence[int], count: int) -> dict[str, Any]:
    """Generate `count` tokens, fewer where the runtime ends by itself."""
    stream = runner.start(prompt, count)
    tokens, seconds = [], []
    begun = time.perf_counter()
    for token in islice(stream, count):
        seconds.append(time.perf_counter() - begun)
        tokens.append(token)
    return {"tokens": tokens, "seconds": seconds, "peak": _peak()}


def main() -> None:
    name, model, options = sys.argv[1:]
    # What runtimes print must not get between the answers.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    runner = RUNNERS[name](Path(model), **json.loads(options))  # type: ignore[call-arg]
    print(json.dumps({"version": runner.version, "peak": _peak()}), file=answers)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(generate(runner, request["prompt"], request["tokens"])), file=answers)


if __name__ == "__main__":
    main()
