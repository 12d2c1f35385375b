"""The report: its data, its schema, and how it reads."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import os
from pathlib import Path

import jsonschema
import numpy as np
import onnx_ir as ir
import pytest

import lwc
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.core.errors import InputError, UsageError
from lwc.evaluate.latency import Spread
from lwc.report import Report, from_dict, json_schema, render, write_report
from lwc.report.data import LatencyComparison, Quality
from lwc.report.measure import MeasureSettings, measure, settle_shape

ROOT = Path(__file__).parents[2]

MODEL = """
<ir_version: 10, opset_import: ["" : 18]>
two_layers (float[batch, 8] x) => (float[batch, 4] y)
<float[8, 4] w = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
                  16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31}>
{
    same = Identity (x)
    product = MatMul (same, w)
    y = Relu (product)
}
"""


@pytest.fixture(scope="module")
def report() -> Report:
    module = lwc.Module(ir.from_onnx_text(MODEL))
    return lwc.optimize(module, "canonicalize,fold-linear").report


def test_figures_are_those_of_the_graph(report: Report) -> None:
    assert report.before.nodes_by_op == {"Identity": 1, "MatMul": 1, "Relu": 1}
    assert report.after.nodes_by_op == {"MatMul": 1, "Relu": 1}
    assert report.before.parameters == 32
    assert report.before.parameter_bytes == 128
    assert report.before.flops_formula is not None
    assert "batch" in report.before.flops_formula
    assert report.before.flops is None, "batch has no binding"


def test_bound_dimensions_give_numbers() -> None:
    module = lwc.Module(ir.from_onnx_text(MODEL))
    report = lwc.optimize(module, "canonicalize", bind={"batch": 3}).report
    # 2 * 3 * 8 * 4 for the product and one for each of the 12 elements of the Relu.
    assert report.after.flops == 2 * 3 * 8 * 4 + 12
    assert report.bindings == {"batch": 3}


def test_pass_entries_tell_hits_and_misses(report: Report) -> None:
    first, second = report.passes
    assert first.changed
    assert sum(first.applied.values()) >= 1
    assert (first.before.nodes, first.after.nodes) == (3, 2)
    assert not second.changed
    assert second.missed or second.notes, "a pass that did nothing says so"


def test_json_round_trips_and_fits_the_schema(report: Report) -> None:
    data = json.loads(render(report, ".json"))
    jsonschema.validate(data, json_schema())
    assert from_dict(data) == report
    with pytest.raises(ValueError, match="schema version"):
        from_dict({**data, "schema_version": 99})


def test_committed_schema_is_the_generated_one() -> None:
    committed = json.loads((ROOT / "docs/report.schema.json").read_text())
    assert committed == json_schema(), "run: python tools/write_schema.py"


def test_every_field_is_described() -> None:
    text = (ROOT / "docs/report.md").read_text()
    missing = [
        f"{definition}.{name}"
        for definition, fields in _fields(json_schema()).items()
        for name in fields
        if f"`{name}`" not in text
    ]
    assert not missing


def test_markdown_and_html_show_the_measurements(report: Report) -> None:
    measured = dataclasses.replace(
        report,
        latency=[
            LatencyComparison(
                bindings={"batch": 1},
                threads=2,
                rounds=7,
                before=Spread(0.010, 0.009, 0.012),
                after=Spread(0.005, 0.004, 0.006),
                ratio=Spread(0.5, 0.45, 0.55),
                predicted_before=0.011,
                predicted_after=0.0049,
            )
        ],
        quality=[Quality("perplexity", 33.03, 33.10, "news.txt, 4096 tokens")],
    )
    for suffix in (".md", ".html"):
        text = render(measured, suffix)
        for shown in ("10 ms", "5 ms", "11 ms", "4.9 ms", "0.5×", "33.03", "33.1", "batch=1"):
            assert shown in text, (suffix, shown)


def test_html_is_one_escaped_page(report: Report) -> None:
    hostile = dataclasses.replace(
        report,
        notes=["<script>alert(1)</script>"],
        input=dataclasses.replace(report.input, path='"><img src=x>.onnx'),
    )
    text = render(hostile, ".html")
    assert "<script" not in text
    assert "<img" not in text
    assert "http://" not in text
    assert "https://" not in text

    open_tags: list[str] = []

    class Checker(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "rect"):
                open_tags.append(tag)

        def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            pass

        def handle_endtag(self, tag: str) -> None:
            assert open_tags.pop() == tag

    Checker().feed(text)
    assert not open_tags


def test_markdown_tables_survive_hostile_names(report: Report) -> None:
    hostile = dataclasses.replace(report, quality=[Quality("a|b", None, 1.0, "line\nbreak | bar")])
    row = next(line for line in render(hostile, ".md").splitlines() if "line break" in line)
    assert row.replace("\\|", "").count("|") == 5


def test_a_report_is_written_whole_or_not_at_all(report: Report, tmp_path: Path) -> None:
    target = tmp_path / "report.html"
    target.write_text("old")
    with pytest.raises(UsageError, match="no report format"):
        write_report(report, tmp_path / "report.pdf")
    write_report(report, target)
    assert target.read_text().startswith("<!doctype html>")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html"]


def test_weights_without_values_do_not_disturb(tmp_path: Path) -> None:
    model = ir.from_onnx_text(MODEL)
    tensor = ir.Tensor(np.ones((8, 4), np.float32), name="w")
    model.graph.initializers["w"].const_value = tensor
    result = lwc.optimize(lwc.Module(model), "canonicalize")
    assert result.report.input.path is None
    assert result.report.input.dense_bytes == 128


def _fields(schema: dict[str, object]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}

    def visit(part: object) -> None:
        if isinstance(part, dict):
            if "properties" in part:
                found[str(part.get("description"))] = list(part["properties"])
            for child in part.values():
                visit(child)

    visit(schema)
    return found


def test_a_report_of_constant_cost_and_free_dimensions() -> None:
    module = lwc.Module(
        ir.from_onnx_text(
            '<ir_version: 10, opset_import: ["" : 18]>\n'
            "g (float[batch, 8] x) => (float[batch, 8] y) { y = Identity(x) }"
        )
    )
    report = lwc.optimize(module, "canonicalize").report
    assert report.after.flops == 0
    assert report.after.peak_activation_bytes is None


def test_json_has_no_nan(report: Report) -> None:
    odd = dataclasses.replace(report, quality=[Quality("perplexity", math.nan, math.inf, "text")])

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads(render(odd, ".json"), parse_constant=refuse)
    jsonschema.validate(data, json_schema())
    assert (data["quality"][0]["before"], data["quality"][0]["after"]) == (None, None)
    for suffix in (".md", ".html"):
        assert "nan" in render(odd, suffix)
        render(from_dict(data), suffix)


def test_a_name_that_is_not_utf8_is_reported(report: Report, tmp_path: Path) -> None:
    name = os.fsdecode(b"\xff.onnx")
    odd = dataclasses.replace(report, input=dataclasses.replace(report.input, path=name))
    for suffix in (".json", ".md", ".html"):
        write_report(odd, tmp_path / f"r{suffix}")
        assert "\\udcff.onnx" in (tmp_path / f"r{suffix}").read_text()


def test_shapes_are_settled_by_both_models() -> None:
    before, after = lwc.Module(ir.from_onnx_text(MODEL)), lwc.Module(ir.from_onnx_text(MODEL))
    assert settle_shape(before, after, {}) == {"batch": 1}
    assert settle_shape(before, after, {"batch": 5}) == {"batch": 5}
    after.graph.inputs[0].shape = ir.Shape([3, 8])
    assert settle_shape(before, after, {}) == {"batch": 3}
    assert settle_shape(before, after, {"batch": 3}) == {"batch": 3}
    with pytest.raises(InputError, match="'batch' is 3 after the passes"):
        settle_shape(before, after, {"batch": 4})
    with pytest.raises(InputError, match=r"no input has a dimension 'seq'.*\(the dimensions are b"):
        settle_shape(before, after, {"seq": 4})


def test_a_model_that_gives_nan_shows_it() -> None:
    before = lwc.Module(ir.from_onnx_text(MODEL))
    result = lwc.optimize(before, "canonicalize", bind={"batch": 2})
    weight = result.module.graph.initializers["w"]
    result.module.replace_initializer(weight, ir.tensor(np.full((8, 4), np.nan, np.float32)))
    shape = settle_shape(before, result.module, {})
    settings = MeasureSettings(shapes=[shape], rounds=1)
    measured = measure(result.report, before, result.module, settings, backend=OnnxRuntimeBackend())
    values = {entry.metric: entry.after for entry in measured.quality}
    assert values["cosine"] == 0
    assert values["top-1 agreement"] == 0
    assert values["differing NaN, infinite or text elements"] == 8
    assert measured.latency[0].bindings == {"batch": 2}
