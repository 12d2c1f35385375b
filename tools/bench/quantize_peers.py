"""How the peers of `quantize.py` quantize an ONNX file.

Each function takes the file, the file to write, the calibration feeds (`.npz` files, an array for
every input) and options. It may run in another environment than lwc's, so nothing of lwc is
imported, and of the peers only the one that is asked for.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Quantizer = Callable[..., None]


class Reader:
    """Feeds as ONNX Runtime's tools and neural-compressor want them."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = list(files)
        self._at = 0

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """Return the next feed, None after the last one."""
        if self._at == len(self._files):
            return None
        self._at += 1
        return read_feed(self._files[self._at - 1])

    def rewind(self) -> None:
        """Start again."""
        self._at = 0

    def __iter__(self) -> Iterator[dict[str, np.ndarray[Any, Any]]]:
        self.rewind()
        return self

    def __next__(self) -> dict[str, np.ndarray[Any, Any]]:
        found = self.get_next()
        if found is None:
            raise StopIteration
        return found


def read_feed(file: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays of a feed by name."""
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _load(base: Path) -> Any:
    import onnx

    return onnx.load(base)


def _save(model: Any, target: Path) -> None:
    """Write a model without the weights that it has replaced: some quantizers leave them."""
    import onnx

    graph = model.graph
    read = {name for node in graph.node for name in node.input}
    read |= {value.name for value in graph.output}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    onnx.save_model(model, str(target), save_as_external_data=True, location=f"{target.name}.data")


# ONNX Runtime


def ort_dynamic(base: Path, target: Path, feeds: Sequence[Path], per_channel: bool) -> None:
    """Quantize activations per tensor as they come, weights to int8."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(
        base,
        target,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=per_channel,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
    )


def ort_static(base: Path, target: Path, feeds: Sequence[Path], method: str) -> None:
    """Quantize activations by ranges from calibration, weights per channel."""
    from onnxruntime.quantization import (
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    quantize_static(
        base,
        target,
        Reader(feeds),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=["MatMul", "Gemm"],
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        calibrate_method=CalibrationMethod[method],
    )


def ort_nbits(
    base: Path,
    target: Path,
    feeds: Sequence[Path],
    *,
    method: str,
    bits: int = 4,
    block_size: int = 128,
    symmetric: bool = False,
) -> None:
    """Quantize the weights of MatMul in blocks, to MatMulNBits at accuracy level 4."""
    from onnxruntime.quantization import matmul_nbits_quantizer as nbits

    logging.disable(logging.INFO)  # it logs a line for each node
    shape = {"block_size": block_size, "op_types_to_quantize": ("MatMul",)}
    configs: dict[str, Callable[[], Any]] = {
        "rtn": lambda: nbits.DefaultWeightOnlyQuantConfig(
            is_symmetric=symmetric, accuracy_level=4, bits=bits, **shape
        ),
        "hqq": lambda: nbits.HQQWeightOnlyQuantConfig(bits=bits, **shape),
        "k-quant": lambda: nbits.KQuantWeightOnlyQuantConfig(op_types_to_quantize=("MatMul",)),
        "gptq": lambda: nbits.GPTQWeightOnlyQuantConfig(
            Reader(feeds), actorder=True, op_types_to_quantize=("MatMul",)
        ),
    }
    quantizer = nbits.MatMulNBitsQuantizer(
        _load(base),
        bits=bits,
        block_size=block_size,
        is_symmetric=symmetric,
        accuracy_level=4,
        algo_config=configs[method](),
    )
    quantizer.process()
    _save(quantizer.model.model, target)


# onnxsim


def onnxsim(base: Path, target: Path, feeds: Sequence[Path], method: str) -> None:
    """Quantize with one of onnxsim's entry points; its blocks are of 32."""
    import onnxsim as sim

    model = _load(base)
    data = [read_feed(file) for file in feeds]
    made = {
        "rtn": lambda: sim.quantize_weight_only_matmul_nbits(model),
        "qdq": lambda: sim.quantize_weight_only_int4(model),
        "gptq": lambda: sim.apply_gptq(
            model, sim.quantize_weight_only_int4(model), calibration_data=data
        ),
        "awq": lambda: sim.apply_awq(
            model, sim.quantize_weight_only_int4(model), calibration_data=data
        ),
        "dynamic": lambda: sim.quantize_dynamic(model),
        "smoothquant": lambda: sim.quantize_dynamic(
            sim.apply_smoothquant(model, calibration_data=data)
        ),
    }[method]()
    if made.SerializeToString(deterministic=True) == model.SerializeToString(deterministic=True):
        raise RuntimeError("onnxsim changed nothing")
    _save(made, target)


# neural-compressor


def inc_weights(
    base: Path, target: Path, feeds: Sequence[Path], method: str, block_size: int = 32
) -> None:
    """Quantize the weights to 4 bits with neural-compressor for ONNX."""
    from onnx_neural_compressor.quantization import algorithm_entry, config

    classes = {"rtn": config.RTNConfig, "gptq": config.GPTQConfig, "awq": config.AWQConfig}
    options: dict[str, Any] = {"actorder": True} if method == "gptq" else {}
    chosen = classes[method](
        weight_bits=4,
        weight_group_size=block_size,
        weight_sym=False,
        accuracy_level=4,
        white_list=["MatMul"],
        **options,
    )
    entry = getattr(algorithm_entry, f"{method}_quantize_entry")
    data: list[Any] = [] if method == "rtn" else [_inc_reader(feeds)]
    _save(getattr(made := entry(str(base), chosen, *data), "model", made), target)


def inc_smoothquant(base: Path, target: Path, feeds: Sequence[Path], alpha: float) -> None:
    """Smooth, then quantize statically with neural-compressor for ONNX."""
    from onnx_neural_compressor.quantization import QuantType, algorithm_entry, config

    reader = _inc_reader(feeds)
    chosen = config.SmoothQuantConfig(
        alpha=alpha,
        op_types=["MatMul"],
        white_list=["MatMul"],
        calib_iter=len(feeds),
        calibration_data_reader=reader,
        calibrate_method="MinMax",
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        use_external_data_format=True,
    )
    with tempfile.TemporaryDirectory() as folder:  # it writes beside what it is given
        made = algorithm_entry.smooth_quant_entry(
            str(base), chosen, reader, model_output=str(Path(folder, "model.onnx"))
        )
        _save(_load(Path(made)) if isinstance(made, str | Path) else made, target)


def _inc_reader(feeds: Sequence[Path]) -> Any:
    from onnx_neural_compressor.data_reader import CalibrationDataReader

    return type("Feeds", (Reader, CalibrationDataReader), {})(feeds)


QUANTIZERS: dict[str, Quantizer] = {
    "ort-dynamic": ort_dynamic,
    "ort-static": ort_static,
    "ort-nbits": ort_nbits,
    "onnxsim": onnxsim,
    "inc-weights": inc_weights,
    "inc-smoothquant": inc_smoothquant,
}
