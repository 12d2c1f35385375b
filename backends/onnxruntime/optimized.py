"""The graph that ONNX Runtime really runs: what its optimizer makes of a module."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnxruntime as ort

from lwc.backends.onnxruntime.packing import pack
from lwc.core.module import Module
from lwc.frontend.onnx_reader import read_onnx

__all__ = ["optimized_module"]


def optimized_module(module: Module, *, threads: int = 1) -> Module:
    """Return `module` as ONNX Runtime rewrites it when it creates a session.

    Predict time and memory on this one. Its nodes are in the order of execution. The shapes
    on its values are those that ONNX Runtime itself knows.

    Args:
        module: The module; it is not changed.
        threads: Threads of one operator; some fusions depend on it.
    """
    packed = pack(module)
    with tempfile.TemporaryDirectory(prefix="lwc-optimized-") as folder:
        file = Path(folder, "model.onnx")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4
        options.optimized_model_filepath = str(file)
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "weights"
        )
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", "1024"
        )
        buffers = packed.attach(options)
        ort.InferenceSession(
            packed.graph,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(packed.disabled_optimizers) or None,
        )
        del buffers
        return read_onnx(file)
