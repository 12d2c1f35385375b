"""Bits for each layer: what layers cost, the best choice within a budget, and its refusals."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import module_of, run_plain

from lwc.analysis.manager import AnalysisManager
from lwc.backends.onnxruntime.session import make_runner
from lwc.calibration.divergence import kl_divergence, probabilities
from lwc.cli.opt import main
from lwc.core.errors import InputError, PassError, UsageError
from lwc.core.module import Module
from lwc.frontend.onnx_writer import save
from lwc.passes.quantization.bit_budget import Option, choose
from lwc.passes.quantization.gptq import gptq, round_to_nearest
from lwc.passes.quantization.mixed_precision import MixedPrecision
from lwc.passes.quantization.quantize_weights import QuantizeWeights
from lwc.passes.quantization.rounding import Grid
from lwc.passes.quantization.sensitivity import Sensitivity, find_candidates, measure
from lwc.pipeline.passes import PassContext, PassResult
from lwc.verify.structure.well_formed import verify_structure

Array = np.ndarray[Any, Any]

WORDS, WIDTH, LAYERS = 53, 64, 4
FRAGILE = "w2"
"""The layer with one large weight in each block. They are read with an input that is always zero,
so that only the grids of their blocks suffer."""


def language_model() -> Module:
    """A stack of residual layers between an embedding and a head."""
    nodes = ["x0 = Gather (table, ids)"]
    for i in range(LAYERS):
        nodes += [
            f"p{i} = MatMul (x{i}, w{i})",
            f"r{i} = Tanh (p{i})",
            f"x{i + 1} = Add (x{i}, r{i})",
        ]
    nodes += [f"y = MatMul (x{LAYERS}, head)"]
    text = f"""g (int64[batch, sequence] ids) => (float[batch, sequence, {WORDS}] y)
        <float[1] table = {{0}}, float[1] head = {{0}}, {
        ", ".join(f"float[1] w{i} = {{0}}" for i in range(LAYERS))
    }> {{ {" ".join(nodes)} }}"""
    module: Module = module_of(text)
    random = np.random.default_rng(3)

    def put(name: str, content: Array) -> None:
        value = module.graph.initializers[name]
        module.replace_initializer(value, ir.Tensor(content.astype(np.float32)))

    def spread(*shape: int) -> Array:
        made: Array = random.standard_normal(shape) / np.sqrt(shape[0])
        return made

    dead = [0, 32]
    table, head = random.standard_normal((WORDS, WIDTH)), 2 * spread(WIDTH, WORDS)
    table[:, dead] = 0
    put("table", table)
    put("head", head)
    for i in range(LAYERS):
        weight = spread(WIDTH, WIDTH)
        weight[:, dead] = 0
        if f"w{i}" == FRAGILE:
            weight[dead] = 20
        put(f"w{i}", weight)
    return module


def feeds(count: int = 3, length: int = 20) -> list[dict[str, Array]]:
    random = np.random.default_rng(5)
    return [{"ids": random.integers(0, WORDS, (1, length))} for _ in range(count)]


def context(module: Module, max_memory: int | None = None) -> PassContext:
    return PassContext(
        AnalysisManager(module), source="mixed-precision", make_runner=make_runner,
        calibration=lambda module: feeds(), max_memory=max_memory,
    )  # fmt: skip


def measured(module: Module, samples: int = 3, window: int = 20, **options: Any) -> Sensitivity:
    ctx = context(module, options.pop("max_memory", None))
    quantizer = QuantizeWeights(embeddings=None, **options)
    candidates = find_candidates(module, ctx, quantizer, [2, 4, 8])
    return measure(module, candidates, ctx, quantizer.how, samples=samples, window=window)


def by_name(found: Sensitivity) -> dict[str, dict[int, float]]:
    return {
        value.name or "": {int(bits): cost for bits, cost in costs.items()}
        for value, costs in found.costs.items()
    }


def mixed(module: Module, **options: Any) -> PassResult:
    result = MixedPrecision(**{"embeddings": None, "format": "lwc", **options}).run(
        module, context(module)
    )
    verify_structure(module)
    return result


def inputs_of(name: str) -> Array:
    """What a weight of the language model is multiplied with, on all feeds, by row."""
    model = language_model()
    (use,) = model.graph.initializers[name].uses()
    read = use.node.inputs[0]
    assert read is not None
    with make_runner(model, [read.name or ""]) as runner:
        rows = [runner.run(feed, [read.name or ""])[read.name or ""] for feed in feeds()]
    return np.concatenate([each.reshape(-1, each.shape[-1]) for each in rows]).astype(np.float64)


def direct_cost(name: str, bits: Any, method: str = "rtn") -> float:
    """The cost by its definition: the whole model with the rounded weight, in float64."""
    module, total = language_model(), []
    before = [run_plain(module, feed)[0] for feed in feeds()]
    value = module.graph.initializers[name]
    assert value.const_value is not None
    grid, weight = Grid(bits, False, "mse"), value.const_value.numpy()
    if method == "gptq":
        rows = inputs_of(name)
        made = gptq(weight, rows.T @ rows, grid, 32, damping=0.01, by_activation=True)
    else:
        made = round_to_nearest(weight, grid, 32)
    module.replace_initializer(value, ir.Tensor(made.values(grid, 32)))
    for feed, logits in zip(feeds(), before, strict=True):
        p, q = (np.exp(each.astype(np.float64)) for each in (logits, run_plain(module, feed)[0]))
        p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
        total.append((p * np.log(p / q)).sum(-1).ravel())
    return float(np.concatenate(total).mean())


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_costs_are_those_of_the_whole_model(method: Any) -> None:
    """Logits of float32 are known to about 1e-6; those costs are above 1e-5."""
    found = by_name(measured(language_model(), method=method))
    assert list(found) == [*(f"w{i}" for i in range(LAYERS)), "head"]
    for name, costs in found.items():
        for bits in (2, 4):
            assert costs[bits] == pytest.approx(direct_cost(name, bits, method), rel=1e-2)
        # Not run, but scaled by the squared error of the weight, or of the layer's outputs: too
        # little where 4 bits lose so much that the divergence grows less than with the square.
        assert costs[8] == pytest.approx(direct_cost(name, 8, method), rel=0.6)


def test_a_fragile_layer_ranks_first() -> None:
    found = by_name(measured(language_model()))
    assert max(found, key=lambda name: found[name][4]) == FRAGILE


def test_it_is_the_same_again_and_where_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lwc.calibration.stages._SPILLED", 1)
    first = measured(language_model())
    assert by_name(measured(language_model())) == by_name(first)
    assert by_name(measured(language_model(), max_memory=1)) == by_name(first)
    assert first.measure.startswith("KL divergence")


def test_the_sample_is_some_feeds_and_some_tokens() -> None:
    module = language_model()
    less = measured(module, samples=2, window=7)
    assert less.feeds == 2
    assert by_name(less) != by_name(measured(module, samples=2))


def test_without_logits_outputs_count() -> None:
    module = module_of(
        """g (float[rows, 64] x) => (float[rows, 64] y)
           <float[1] a = {0}, float[1] b = {0}>
           { p = MatMul (x, a) r = Relu (p) y = MatMul (r, b) }"""
    )
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        content = random.standard_normal((64, 64)).astype(np.float32)
        module.replace_initializer(module.graph.initializers[name], ir.Tensor(content))
    data = [{"x": random.standard_normal((50, 64)).astype(np.float32)}]
    ctx = PassContext(
        AnalysisManager(module), make_runner=make_runner, calibration=lambda module: data
    )
    quantizer = QuantizeWeights()
    candidates = find_candidates(module, ctx, quantizer, [4])
    found = measure(module, candidates, ctx, quantizer.how, samples=4, window=9)
    assert found.measure.startswith("relative squared error")
    # 4 bits lose about a twelfth of a step of a fifteenth of the range: some 10 % of the spread.
    assert all(0.001 < cost < 0.05 for costs in found.costs.values() for cost in costs.values())


@given(st.integers(0, 99), st.sampled_from([1e-4, 1e-2, 1.0, 300.0]))
def test_divergence_is_that_of_float64(seed: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    logits = (5 * random.standard_normal((7, 40))).astype(np.float32)
    others = (logits + spread * random.standard_normal((7, 40))).astype(np.float32)
    a, b = (each.astype(np.float64) for each in (logits, others))
    a, b = (each - np.log(np.exp(each - each.max(1, keepdims=True)).sum(1, keepdims=True))
            - each.max(1, keepdims=True) for each in (a, b))  # fmt: skip
    wanted = (np.exp(a) * (a - b)).sum(1)
    # Differences of 1e-4, spread over 40 classes, are sums in float32: 1e-3 of their squares.
    np.testing.assert_allclose(
        kl_divergence(logits, probabilities(logits), others), wanted, rtol=1e-2, atol=1e-12
    )


OPTIONS = st.lists(
    st.lists(st.builds(Option, st.integers(1, 40), st.floats(0, 1, allow_subnormal=False)),
             min_size=1, max_size=4),
    min_size=1, max_size=6,
)  # fmt: skip


@given(OPTIONS, st.integers(1, 200))
def test_the_choice_is_the_best_of_all(things: list[list[Option]], limit: int) -> None:
    costs = {
        indices: sum(things[i][k].cost for i, k in enumerate(indices))
        for indices in itertools.product(*(range(len(options)) for options in things))
        if sum(things[i][k].size for i, k in enumerate(indices)) <= limit
    }
    found = choose(things, limit)
    if not costs:
        assert found is None
    else:
        assert found is not None
        assert costs[tuple(found)] == pytest.approx(min(costs.values()), rel=1e-8, abs=1e-12)


def test_many_things_of_any_size_are_chosen_at_once() -> None:
    """A thousand layers, no two of a size: cheap, and near the bound of the relaxation."""
    random = np.random.default_rng(0)
    things = []
    for _ in range(1000):
        weights, scale = int(random.integers(10**5, 10**7)), float(np.exp(random.normal()))
        things.append([Option(weights * bits // 8, scale / 4**bits) for bits in (3, 4, 8)])
    limit = int(4.5 / 4 * sum(options[1].size for options in things))
    found = choose(things, limit)
    assert found is not None
    taken = [options[k] for options, k in zip(things, found, strict=True)]
    assert 0.9999 * limit < sum(option.size for option in taken) <= limit


def test_more_budget_never_costs_more() -> None:
    costs, bits = [], []
    for budget in (3.0, 3.5, 4.5, 6.0, 9.5):
        statistics = mixed(language_model(), budget=budget, bits=(2, 3, 4, 8)).statistics
        costs.append(float(statistics["expected cost"]))
        bits.append(float(statistics["achieved"]))
        assert bits[-1] <= budget
        assert bits[-1] == pytest.approx(float(statistics["bits per weight"]))
    assert costs == sorted(costs, reverse=True)
    assert bits == sorted(bits)


def test_the_fragile_layer_gets_most_bits() -> None:
    module = language_model()
    mixed(module, budget=5.8, bits=(4, 8))
    bits = {}
    for node in module.graph:
        if node.op_type == "DynamicQuantMatMul":
            codes = node.inputs[1]
            assert codes is not None
            bits[codes.name or ""] = node.attributes["bits"].as_int()
    assert max(bits, key=lambda name: (bits[name], name.startswith(FRAGILE))).startswith(FRAGILE)


def test_a_budget_that_is_too_large_is_said() -> None:
    for budget, said in ((20.0, True), (5.0, False)):
        module = language_model()
        achieved = mixed(module, budget=budget, bits=(4, 8)).statistics["achieved"]
        assert isinstance(achieved, float)
        assert achieved <= budget
        found = any("has its most bits" in remark.message for remark in module.remarks)
        assert found == said


@pytest.mark.parametrize("embeddings", [None, 8])
@pytest.mark.parametrize("budget", ["23kB", "0.03MB"])
def test_a_size_is_that_of_all_weights(budget: str, embeddings: Any) -> None:
    module = language_model()
    statistics = mixed(module, budget=budget, bits=(2, 3, 4, 8), embeddings=embeddings).statistics
    size = sum(value.const_value.nbytes for _, value in module.initializers() if value.const_value)
    assert size == statistics["achieved"]
    assert size <= {"23kB": 23_000, "0.03MB": 30_000}[budget]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 3.0, "bits": (4, 8)}, "budget=3.0 is too small: the least possible is 4.9"),
        ({"budget": "19kB", "bits": (4, 8)}, "budget=19kB is too small: the least possible is 25."),
    ],
)
def test_budgets_that_cannot_be_met(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PassError, match=message):
        mixed(language_model(), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 0.0},
        {"budget": 80.0},
        {"budget": "80 apples"},
        {"budget": 4.5, "bits": ()},
        {"budget": 4.5, "bits": (4, 4)},
        {"budget": 4.5, "bits": (3, 4)},
        {"budget": 4.5, "samples": 0},
        {"budget": 4.5, "format": "lwc", "accuracy_level": 1},
    ],
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        MixedPrecision(**options)


def test_a_weight_that_is_not_finite_is_an_error() -> None:
    module = language_model()
    weight = np.full((WIDTH, WIDTH), np.nan, np.float32)
    module.replace_initializer(module.graph.initializers["w1"], ir.Tensor(weight))
    with pytest.raises(PassError, match="'w1' holds infinities or NaN"):
        mixed(module, budget=9.0)
    with pytest.raises(InputError, match="'y' is not finite on feed 1"):
        mixed(module, budget=9.0, exclude=("w1",))


def test_a_weight_of_a_constant_node_is_not_measured() -> None:
    module = language_model()
    value = module.graph.initializers.pop("w1")
    assert value.const_value is not None
    node = ir.node("Constant", [], {"value": value.const_value})
    module.graph.insert_before(module.graph[0], node)
    node.outputs[0].name = "constant"
    ir.convenience.replace_all_uses_with(value, node.outputs[0])
    assert mixed(module, budget=9.0).statistics["weights quantized"] == LAYERS + 1
    (said,) = [remark.message for remark in module.remarks if "measured" in remark.message]
    assert said.startswith("'constant' gets 8 bits without being measured")


def test_what_multiplies_a_constant_is_not_measured() -> None:
    """The data does not run it, so it would seem to cost nothing."""
    module = language_model()
    queries = np.random.default_rng(1).standard_normal((1, WIDTH)).astype(np.float32)
    (use,) = module.graph.initializers["w1"].uses()
    use.node.replace_input_with(0, module.add_initializer("queries", ir.Tensor(queries)))
    mixed(module, budget=9.0)
    (said,) = [remark.message for remark in module.remarks if "measured" in remark.message]
    assert said.startswith("'w1' gets 8 bits without being measured")


def test_it_needs_data() -> None:
    module = language_model()
    ctx = PassContext(AnalysisManager(module), make_runner=make_runner)
    with pytest.raises(UsageError, match="there is no calibration data"):
        MixedPrecision(9.0).run(module, ctx)


def test_a_second_run_finds_nothing() -> None:
    module = language_model()
    mixed(module, budget=5.5)
    assert not mixed(module, budget=5.5).changed


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_from_the_command_line(method: str, tmp_path: Path, capsys: Any) -> None:
    save(language_model(), str(tmp_path / "m.onnx"))
    lines = [json.dumps(feed["ids"][0].tolist()) for feed in feeds()]
    (tmp_path / "ids.jsonl").write_text("\n".join(lines))
    pipeline = f"mixed-precision{{5.2 bits=3,4,8 format=lwc embeddings=none method={method}}}"
    code = main(
        [str(tmp_path / "m.onnx"), "-o", str(tmp_path / "small.onnx"), "-p", pipeline,
         "--calibrate", str(tmp_path / "ids.jsonl"), "--pass-statistics",
         "--report", str(tmp_path / "report.json"), "--sensitivity"]
    )  # fmt: skip
    assert code == 0
    printed = capsys.readouterr()
    assert "achieved" in printed.err
    rows = [line for line in printed.out.splitlines() if "MatMul" in line]
    assert FRAGILE in rows[0]
    assert len(rows) == LAYERS + 1
    report = json.loads((tmp_path / "report.json").read_text())
    entries = report["sensitivity"]
    assert len(entries) == 3 * (LAYERS + 1)
    assert entries[0]["weight"] == FRAGILE
    assert {entry["bits"] for entry in entries} == {3, 4, 8}
    assert (tmp_path / "small.onnx").exists()


def test_the_ranking_alone_writes_nothing(tmp_path: Path, capsys: Any) -> None:
    save(language_model(), str(tmp_path / "m.onnx"))
    lines = [json.dumps(feed["ids"][0].tolist()) for feed in feeds()]
    (tmp_path / "ids.jsonl").write_text("\n".join(lines))
    data = ["--calibrate", str(tmp_path / "ids.jsonl")]
    assert main([str(tmp_path / "m.onnx"), "--sensitivity=bits=2,4 block-size=64", *data]) == 0
    said = capsys.readouterr()
    assert "2 bits" in said.out
    assert "opset" not in said.out
    assert "used the data" not in said.err
    assert main([str(tmp_path / "m.onnx"), "--sensitivity"]) != 0


@pytest.mark.parametrize(
    ("options", "message", "caret"),
    [
        ("bits=5", "option 'bits': expected list of 2|3|4|8, got '5'", 5),
        ("samples=2 bots=4", "pass 'mixed-precision' has no option 'bots'", 10),
        ("bits=2,2", "pass 'mixed-precision': bits lists what a layer may have", 0),
        ("bits=4 samples=2 }", "'}' closes nothing", 17),
        ("bits=4},canonicalize{", "'}' closes nothing", 6),
        ("8", "takes options of mixed-precision as name=value, and no budget", 0),
        ("bits=4 budget=5", "takes options of mixed-precision as name=value, and no budget", 7),
        ("bits='4", "the quoted string is never closed", 5),
    ],
)
def test_wrong_options_of_the_ranking_are_shown_as_they_were_written(
    options: str, message: str, caret: int, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "ids.jsonl").touch()
    given = [str(tmp_path / "m.onnx"), "--calibrate", str(tmp_path / "ids.jsonl")]
    assert main([*given, f"--sensitivity={options}"]) == 2
    first, shown, place = capsys.readouterr().err.splitlines()
    assert first.startswith(f"lwc-opt: error: --sensitivity: {message}")
    assert (shown, place) == (f"  {options}", f"  {' ' * caret}^")
