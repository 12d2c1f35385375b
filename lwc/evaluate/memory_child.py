"""The child process of `peak_memory`: a script, so that it imports nothing of lwc."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}")


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Open the model and run the feeds; see `PeakMemory` for what comes back."""
    import numpy as np
    import onnxruntime as ort

    levels = {
        "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
        "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
        "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    }
    options = ort.SessionOptions()
    options.graph_optimization_level = levels[request["optimize"]]
    options.intra_op_num_threads = request["threads"]
    options.enable_cpu_mem_arena = request["arena"]
    options.enable_mem_pattern = request["memory_pattern"]
    options.log_severity_level = 4
    if request["library"]:  # lwc's operators would run as functions, whose weights are floats
        options.register_custom_ops_library(request["library"])
    answer: dict[str, Any] = {"baseline": _resident("VmRSS")}
    _reset_peak()
    session = ort.InferenceSession(request["path"], options, providers=["CPUExecutionProvider"])
    answer["session_peak"] = _resident("VmHWM")
    answer["session"] = _resident("VmRSS")
    answer["runs"] = []
    for files in request["feeds"]:
        feed = {name: np.load(file, allow_pickle=False) for name, file in files.items()}
        _reset_peak()
        session.run(None, feed)
        peak = _resident("VmHWM")
        del feed
        gc.collect()
        answer["runs"].append({"resident": _resident("VmRSS"), "peak": peak})
    return answer


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
