"""The files that the contenders of `decode.py` run, all made from one GGUF file and kept.

Everything lies in a folder of the cache that is named after the content of the GGUF file; names
hold the versions of the libraries that made it. A draft is renamed when it is complete.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.decode_peers import place
from fetch_models import cache_folder

import lwc
from lwc.calibration.text import load_tokenizer, read_text
from lwc.frontend.huggingface import offline
from lwc.frontend.onnx_writer import save_folder

DECODER = (
    "canonicalize,fuse-norm,fuse-activation,fuse-rotary,fuse-attention,add-kv-cache,"
    "last-logits,canonicalize"
)
_PACK = "pack-projections{when=decode}"
LWC = {
    "f32": f"{DECODER},{_PACK}",
    "8bit": f"{DECODER},quantize-weights{{bits=8}},{_PACK}",
    "4bit": f"{DECODER},quantize-weights{{bits=4}},{_PACK}",
    "int4": f"{DECODER},quantize-weights{{bits=4 symmetric=true embeddings=4}},{_PACK}",
}
"""Pipelines of `lwc_model`. `4bit` is what quantize-weights does by itself: zero points, and a head
of 8 bits; `int4` stores weights as GenAI's model builder does."""

GENAI_BLOCKS = ("block_size=32", "accuracy_level=4")
GENAI_TUNED = (*GENAI_BLOCKS, "prune_lm_head=true", "fuse_mlp_gate_up=true")
"""What the model builder offers for this kind of model and leaves off: the head for the last token
only, and one product for gate and up."""

SECONDS = 3600
"""Limit for making one file."""


@dataclass(frozen=True)
class Source:
    """Where everything comes from.

    Attributes:
        gguf: The file.
        home: Folder of what is made from it.
    """

    gguf: Path
    home: Path

    def keep(self, name: str, make: Callable[[Path], None]) -> Path:
        """Return the file or folder `name`, which `make` writes to the path it is given."""
        target = self.home / name
        if not target.exists():
            self.home.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".draft-", dir=self.home) as folder:
                draft = Path(folder, name)
                print(f"making {name}", file=sys.stderr)
                with _quiet():
                    make(draft)
                try:
                    os.replace(draft, target)
                except OSError:  # another process was quicker with a folder
                    if not target.exists():
                        raise
        return target


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep progress bars and advice of the libraries off the terminal."""
    nowhere = io.StringIO()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        warnings.simplefilter("ignore")
        yield


def open_source(gguf: Path, layers: int | None = None) -> Source:
    """Return the source of a GGUF file, or of its first layers."""
    with gguf.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()[:12]
    source = Source(gguf, cache_folder() / "decode" / f"{gguf.stem}-{digest}")
    if layers is None:
        return source
    home = source.home / f"layers-{layers}"
    cut = Source(gguf, home).keep("source.gguf", lambda draft: _first_layers(gguf, draft, layers))
    return Source(cut, home)


def _first_layers(gguf: Path, target: Path, layers: int) -> None:
    from gguf import GGUFReader, GGUFValueType, GGUFWriter
    from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata

    reader = GGUFReader(gguf)
    reader.tensors = [
        tensor
        for tensor in reader.tensors
        if not tensor.name.startswith("blk.") or int(tensor.name.split(".")[1]) < layers
    ]
    kind = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(target, kind)
    blocks = {f"{kind}.block_count": MetadataDetails(GGUFValueType.UINT32, layers)}
    copy_with_new_metadata(reader, writer, blocks, [])


def prompt_tokens(source: Source, text: Path, count: int) -> list[int]:
    """Return the first tokens of a text."""
    ids = load_tokenizer(huggingface_folder(source))(read_text(text))
    if len(ids) < count:
        raise SystemExit(f"{text.name} has {len(ids)} tokens, a prompt was to have {count}")
    return list(ids[:count])


# Hugging Face


def huggingface_folder(source: Source) -> Path:
    """Return the model in float32 with its tokenizer, as transformers reads the file."""
    return source.keep(f"transformers-{version('transformers')}", lambda at: _decode(source, at))


def _decode(source: Source, folder: Path) -> None:
    # from_pretrained(gguf_file=...) does the same, but needs accelerate.
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    place: dict[str, Any] = {"gguf_file": source.gguf.name, "local_files_only": True}
    with offline():
        config = AutoConfig.from_pretrained(source.gguf.parent, **place)
        tokenizer = AutoTokenizer.from_pretrained(source.gguf.parent, **place)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        stored = load_gguf_checkpoint(str(source.gguf), return_tensors=True, model_to_load=model)
    missing, unknown = model.load_state_dict(stored["tensors"], strict=False)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    if set(missing) - tied or unknown:
        raise RuntimeError(
            f"transformers reads {source.gguf.name} only in part: {missing + unknown}"
        )
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ONNX


def cached_export(source: Source) -> Path:
    """Return a folder with PyTorch's own export of the decoder with its cache.

    `input_ids` and `attention_mask` `[batch, past + sequence]`, with `past_key_values.N.key` and
    `.value` `[batch, heads, past, size]` for each layer, to `logits` and `present.N.key`, `.value`.
    """
    name = f"export-torch-{version('torch')}-transformers-{version('transformers')}"
    return source.keep(name, lambda at: _export(huggingface_folder(source), at))


def _export(model_folder: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    with offline():
        model = AutoModelForCausalLM.from_pretrained(
            model_folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )

    class WithCache(torch.nn.Module):  # type: ignore[misc, unused-ignore]
        """Takes and returns the cache as a flat list of keys and values."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: Any, attention_mask: Any, *past: Any) -> tuple[Any, ...]:
            cache = DynamicCache(list(zip(past[::2], past[1::2], strict=True)))
            found = self.model(
                input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True
            )
            layers = found.past_key_values.layers
            return (
                found.logits,
                *(each for layer in layers for each in (layer.keys, layer.values)),
            )

    config = model.config
    names = [f"{i}.{part}" for i in range(config.num_hidden_layers) for part in ("key", "value")]
    batch, tokens, held = 2, 3, 5
    extents = (batch, config.num_key_value_heads, held, config.head_dim)
    examples = (
        torch.ones(batch, tokens, dtype=torch.int64),
        torch.ones(batch, held + tokens, dtype=torch.int64),
        *(torch.zeros(extents) for _ in names),
    )
    shapes = {
        "input_ids": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total"},
        "past": tuple({0: "batch", 2: "past"} for _ in names),
    }
    folder.mkdir()
    with torch.no_grad():
        program = torch.onnx.export(
            WithCache().eval(), examples, dynamo=True, dynamic_shapes=shapes, verbose=False,
            input_names=["input_ids", "attention_mask", *(f"past_key_values.{n}" for n in names)],
            output_names=["logits", *(f"present.{name}" for name in names)],
        )  # fmt: skip
        program.save(str(folder / "model.onnx"), external_data=True)


def fused_export(source: Source) -> Path:
    """Return a folder with the export after onnxruntime.transformers, by its recipe for llama."""
    return source.keep(
        f"fused-onnxruntime-{version('onnxruntime')}-torch-{version('torch')}",
        lambda at: _fuse(cached_export(source), huggingface_folder(source), at),
    )


def _fuse(export: Path, model_folder: Path, folder: Path) -> None:
    from onnxruntime.transformers.fusion_options import FusionOptions
    from onnxruntime.transformers.optimizer import optimize_model
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model_folder)
    kind = "gpt2"  # the model type that onnxruntime.transformers.models.llama asks for
    optimized = optimize_model(
        str(export / "model.onnx"),
        model_type=kind,
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=0,
        optimization_options=FusionOptions(kind),
        only_onnxruntime=False,
    )
    folder.mkdir()
    optimized.save_model_to_file(str(folder / "model.onnx"), use_external_data_format=True)


def lwc_model(source: Source, form: str) -> Path:
    """Return a folder with the model after lwc, made by each process: lwc may have changed."""
    module, scratch = _as_read(source)
    folder = Path(scratch.name, f"lwc-{form}")
    if not folder.exists():
        made = lwc.optimize(module, LWC[form], grant="all").module
        save_folder(made, folder)
    return folder


@functools.cache
def _as_read(source: Source) -> tuple[lwc.Module, tempfile.TemporaryDirectory[str]]:
    """Read a model, and make a folder that lasts as long as this process."""
    source.home.mkdir(parents=True, exist_ok=True)
    scratch = tempfile.TemporaryDirectory(prefix=".lwc-", dir=source.home)
    return lwc.load(source.gguf), scratch


# Peers' own formats


def genai_folder(source: Source, precision: str, options: Sequence[str] = ()) -> Path:
    """Return a folder of ONNX Runtime GenAI's model builder.

    Args:
        source: Where the weights come from.
        precision: `fp32` or `int4`.
        options: Extra options of the builder.
    """
    genai = place("onnxruntime_genai")
    builder = genai.folder / "models" / "builder.py"
    name = "-".join(["genai", genai.version, precision, *options]).replace("=", "_")
    words = [sys.executable, str(builder), "-i", str(huggingface_folder(source)), "-e", "cpu"]
    words += ["-p", precision, "-c", str(source.home / "genai-cache")]
    words += ["--extra_options", "hf_token=false", *options]
    return source.keep(name, lambda at: run([*words, "-o", str(at)]))


def gguf_file(source: Source, kind: str) -> Path:
    """Return the file in another block format, converted by llama.cpp from float32.

    Args:
        source: Where the weights come from.
        kind: `f32` or a name of llama.cpp's, such as `q4_k_m`.
    """
    llama = place("llama_cpp")
    name = f"llama-{llama.version}-{kind}.gguf"
    start = source.gguf if kind == "f32" else gguf_file(source, "f32")
    script = str(Path(__file__).with_name("decode_convert.py"))
    return source.keep(name, lambda at: run([str(llama.python), script, str(start), str(at), kind]))


def run(command: Sequence[str]) -> None:
    """Run a command, without a network.

    Raises:
        RuntimeError: It failed; the message is the last line it wrote.
    """
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(f"{Path(command[1]).name}: {lines[-1]}")
