"""The rows of `quantize.py`: who quantizes what, from which form of the model, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Base = Literal["float32", "plain", "rotated"]


@dataclass(frozen=True)
class Setting:
    """One row.

    Attributes:
        maker: Whose quantizer: the first part of the row's name.
        form: What it makes, such as `4-g128`: 4 bits in groups of 128.
        method: How.
        base: What it starts from (see `quantize_subjects.Subject.base`).
        quantizer: `lwc`, a key of `quantize_peers.QUANTIZERS`, `gguf` for llama.cpp, `genai` for
            the model builder, or None for the base itself.
        options: What the quantizer takes.
        module: What its process imports; decides about the interpreter.
        calibrated: It looks at the calibration data.
    """

    maker: str
    form: str
    method: str
    base: Base = "plain"
    quantizer: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    module: str = "onnxruntime"
    calibrated: bool = False

    @property
    def name(self) -> str:
        """Return the row's name."""
        return "/".join(part for part in (self.maker, self.form, self.method) if part)


def _lwc(
    form: str, method: str, passes: str, base: Base = "plain", calibrated: bool = False
) -> Setting:
    return Setting("lwc", form, method, base, "lwc", {"passes": passes}, "lwc", calibrated)


def _ort(form: str, method: str, options: Mapping[str, Any], base: Base = "plain") -> Setting:
    calibrated = options["method"] == "gptq"
    return Setting("ort", form, method, base, "ort-nbits", options, "onnxruntime", calibrated)


def _block(bits: int, size: int, method: str) -> str:
    return f"quantize-weights{{bits={bits} block-size={size} method={method}}}"


def _own(size: int, method: str, table: int = 8, bits: int = 4) -> str:
    """Everything in lwc's operator, embedding and head too."""
    options = f"bits={bits} format=lwc block-size={size} method={method} embeddings={table}"
    return f"quantize-weights{{{options}}},fuse-epilogue"


def _mixed(budget: float) -> str:
    """As `_own` with GPTQ in blocks of 128, some layers in 3, 4 and 8 bits each."""
    options = "bits=3,4,8 format=lwc block-size=128 method=gptq"
    return f"mixed-precision{{{budget} {options}}},fuse-epilogue"


_BASES = [
    Setting("float32", "", "", "float32"),
    Setting("tables-8bit", "", "", "plain"),
    Setting("tables-8bit", "rotate", "", "rotated"),
]

_WEIGHTS = [
    _lwc("8", "rtn", "quantize-weights{bits=8}"),
    _lwc("4-g32", "rtn", "quantize-weights"),
    *[
        _lwc(
            f"4-g{size}", f"{method}-{name}", _own(size, method, table), "float32", method != "rtn"
        )
        for size, method, name, table in (
            (32, "rtn", "own", 8),
            (32, "rtn", "own-head-4", 4),
            (64, "gptq", "own", 8),
            (128, "gptq", "own", 8),
        )
    ],
    *[
        _lwc(f"{bits}-g128", "gptq-own", _own(128, "gptq", bits=bits), "float32", True)
        for bits in (3, 8)
    ],
    *[
        _lwc(f"mixed-{budget}", "gptq-own", _mixed(budget), "float32", True)
        for budget in (3.7, 4.2, 5.0)
    ],
    _lwc("4-g32", "rtn-range", "quantize-weights{search=none}"),
    _lwc("4-g32", "rtn-symmetric", "quantize-weights{symmetric=true}"),
    *[
        _lwc(f"4-g{size}", f"rotate+{method}", _block(4, size, method), "rotated", method != "rtn")
        for size in (32, 128)
        for method in ("rtn", "gptq", "awq")
    ],
    *[
        _lwc(
            f"3-g{size}",
            f"rotate+{method}",
            f"quantize-weights{{bits=3 format=lwc block-size={size} method={method}}}",
            "rotated",
            method != "rtn",
        )
        for size in (32, 64)
        for method in ("rtn", "gptq")
    ],
]
"""Weight-only. The weights of SmolLM2 lie on a grid of 4 bits with a float minimum in blocks of 32,
which flatters some formats: `rotate` takes them off it without changing the function."""

_PLACES: tuple[tuple[Base, str], ...] = (("plain", ""), ("rotated", "rotate+"))

_W8A8 = [
    _lwc("w8a8", f"{prefix}{name}", f"smooth-quantize{{{options}}}", base, data)
    for base, prefix in _PLACES
    for name, options, data in (
        ("plain", "alpha=none", False),
        *((f"smooth-{alpha}", f"alpha={alpha}", True) for alpha in ("0.5", "0.65", "0.75", "0.85")),
        ("smooth-auto", "alpha=auto", True),
        ("static", "alpha=0.75 activations=static", True),
    )
] + [_lwc("w8a8", "own", "smooth-quantize{alpha=none},fuse-epilogue", "float32")]
"""Weights and activations of 8 bits."""

_ORT = [
    _ort("8", "rtn", {"method": "rtn", "bits": 8, "block_size": 32}),
    _ort("4-g32", "rtn", {"method": "rtn", "block_size": 32}),
    *[
        _ort("4-g32", f"rotate+{method}", {"method": method, "block_size": 32}, "rotated")
        for method in ("rtn", "hqq", "k-quant", "gptq")
    ],
    *[
        _ort("4-g128", f"rotate+{method}", {"method": method, "block_size": 128}, "rotated")
        for method in ("rtn", "hqq")  # the others fail where 128 does not divide the inputs
    ],
    *[
        Setting("ort", "w8a8", f"{prefix}{name}", base, kind, options, "onnxruntime", static)
        for base, prefix in _PLACES
        for name, kind, options, static in (
            ("dynamic", "ort-dynamic", {"per_channel": True}, False),
            ("static", "ort-static", {"method": "MinMax"}, True),
        )
    ],
]

_ONNXSIM = [
    *[
        Setting(
            "onnxsim", "4-g32", f"rotate+{method}", "rotated", "onnxsim", {"method": method},
            "onnxsim", data,
        )
        for method, data in (("rtn", False), ("gptq", True), ("awq", True))
    ],
    *[
        Setting(
            "onnxsim", "w8a8", method, "plain", "onnxsim", {"method": method}, "onnxsim", data
        )
        for method, data in (("dynamic", False), ("smoothquant", True))
    ],
]  # fmt: skip

_INC = [
    *[
        Setting(
            "inc", "4-g32", f"rotate+{method}", "rotated", "inc-weights", {"method": method},
            "onnx_neural_compressor", method != "rtn",
        )
        for method in ("rtn", "gptq", "awq")
    ],
    Setting(
        "inc", "w8a8", "smoothquant-0.75", "plain", "inc-smoothquant", {"alpha": 0.75},
        "onnx_neural_compressor", True,
    ),
]  # fmt: skip

_RUNTIMES = [
    *[
        Setting("llama.cpp", kind, "", "float32", "gguf", {"kind": kind}, "llama_cpp")
        for kind in ("f32", "q8_0", "q4_0", "q4_k_m", "q3_k_m")
    ],
    Setting("genai", "int4-g32", "", "float32", "genai", {}, "onnxruntime_genai"),
]

SETTINGS = {
    setting.name: setting
    for setting in (*_BASES, *_WEIGHTS, *_W8A8, *_ORT, *_ONNXSIM, *_INC, *_RUNTIMES)
}
"""By name, in the order of the table."""

REFERENCE = "float32"


def choose(forms: list[str] | None, makers: list[str] | None) -> list[Setting]:
    """Return the rows of some forms (`4-g128`) or whole names and makers, and the reference.

    Raises:
        SystemExit: A form or a maker has no row.
    """
    known = {word for setting in SETTINGS.values() for word in (setting.form, setting.name)}
    for word, among in (
        *((form, known) for form in forms or []),
        *((maker, {setting.maker for setting in SETTINGS.values()}) for maker in makers or []),
    ):
        if word not in among:
            raise SystemExit(f"'{word}' has no row; there are {', '.join(sorted(among - {''}))}")
    return [
        setting
        for setting in SETTINGS.values()
        if setting.name == REFERENCE
        or (
            (forms is None or setting.form in forms or setting.name in forms)
            and (makers is None or setting.maker in makers)
        )
    ]
