"""Per-node times out of ONNX Runtime's profiling file."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lwc.backends.base import NodeTime

if TYPE_CHECKING:
    import onnxruntime as ort

__all__ = ["node_times", "profiled"]

_SUFFIX = "_kernel_time"
_WARM_UP = 2


def profiled(
    open_session: Callable[[ort.SessionOptions], ort.InferenceSession],
    options: Callable[[], ort.SessionOptions],
    feed: Mapping[str, Any],
    runs: int,
) -> list[NodeTime]:
    """Open a session with profiling on, run `feed`, and return the times of the last `runs`."""
    with tempfile.TemporaryDirectory(prefix="lwc-profile-") as folder:
        profiling = options()
        profiling.enable_profiling = True
        profiling.profile_file_prefix = str(Path(folder, "ort"))
        session = open_session(profiling)
        for _ in range(_WARM_UP + runs):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
    return node_times(events, runs)


def node_times(events: list[dict[str, Any]], runs: int) -> list[NodeTime]:
    """Sum the kernel events of each node within each of the last `runs` runs.

    Args:
        events: ONNX Runtime's trace events; times are in microseconds.
        runs: How many runs at the end to count; earlier ones are warm-up.
    """
    ends = sorted(
        event["ts"] + event["dur"] for event in events if event.get("name") == "model_run"
    )
    first = ends[-runs - 1] if len(ends) > runs else float("-inf")
    counted = ends[-runs:]
    per_run: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    calls: Counter[tuple[str, str]] = Counter()
    run = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        if event.get("cat") != "Node" or not event["name"].endswith(_SUFFIX):
            continue
        if event["ts"] < first:
            continue
        while run < len(counted) - 1 and event["ts"] > counted[run]:
            run += 1
        key = (event["name"].removesuffix(_SUFFIX), event["args"]["op_name"])
        per_run[key][run] += event["dur"]
        calls[key] += 1
    return [
        NodeTime(
            node,
            op,
            statistics.median(times[index] for index in range(len(counted))) * 1e-6,
            max(1, round(calls[node, op] / len(counted))),
        )
        for (node, op), times in per_run.items()
    ]
