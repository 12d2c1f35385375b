"""The rewrite limit: a pass does the first n rewrites of its unlimited run, and stops."""

from __future__ import annotations

import numpy as np
import pytest
from support import module_of, run_plain

from lwc.analysis.manager import AnalysisManager
from lwc.core.module import Module
from lwc.passes.cleanup.canonicalize import Canonicalize
from lwc.passes.cleanup.fold_linear import FoldLinear
from lwc.passes.quantization.convert_dtype import ConvertDtype
from lwc.passes.quantization.quantize_weights import QuantizeWeights
from lwc.pipeline.passes import Pass, PassContext, PassResult
from lwc.rewrite import RewriteLimit, Step
from lwc.verify.structure.well_formed import verify_structure

WIDTH = 32


def decoder(layers: int) -> Module:
    """Make layers as exporters write them: shape arithmetic, heads, constants, duplicates."""
    lines, weights = [], []
    for i in range(layers):
        weights += [
            f"float[{WIDTH}, {WIDTH}] w{i} = {{{', '.join(numbers(i, WIDTH * WIDTH))}}}",
            f"float[{WIDTH}] b{i} = {{{', '.join(numbers(i + 50, WIDTH))}}}",
            f"float[1] half{i} = {{0.5}}",
            f"float[1] third{i} = {{0.3}}",
        ]
        lines += [
            f"[shape{i}] s{i} = Shape(h{i})",
            f"[batch{i}] n{i} = Gather <axis = 0> (s{i}, zero)",
            f"[length{i}] l{i} = Gather <axis = 0> (s{i}, one)",
            f"[n_axis{i}] un{i} = Unsqueeze(n{i}, first)",
            f"[l_axis{i}] ul{i} = Unsqueeze(l{i}, first)",
            f"[split{i}] heads{i} = Concat <axis = 0> (un{i}, ul{i}, four, rest)",
            f"[joined{i}] whole{i} = Concat <axis = 0> (un{i}, ul{i}, width)",
            f"[to_heads{i}] r{i} = Reshape(h{i}, heads{i})",
            f"[turn{i}] t{i} = Transpose <perm = [0, 2, 1, 3]> (r{i})",
            f"[turn_back{i}] v{i} = Transpose <perm = [0, 2, 1, 3]> (t{i})",
            f"[from_heads{i}] f{i} = Reshape(v{i}, whole{i})",
            f"[linear{i}] m{i} = MatMul(f{i}, w{i})",
            f"[bias{i}] a{i} = Add(m{i}, b{i})",
            f"[factor{i}] k{i} = Mul(half{i}, third{i})",
            f"[scale{i}] q{i} = Mul(a{i}, k{i})",
            f"[left{i}] x{i} = Tanh(q{i})",
            f"[right{i}] y{i} = Tanh(q{i})",
            f"[both{i}] z{i} = Add(x{i}, y{i})",
            f"[same{i}] o{i} = Identity(z{i})",
            f"[residual{i}] h{i + 1} = Add(o{i}, h{i})",
        ]
    lines += [
        f"""e = If (yes) <then_branch = t () => (float[n, l, {WIDTH}] d) {{ d = Neg(h{layers}) }},
            else_branch = f () => (float[n, l, {WIDTH}] c) {{ c = Abs(h{layers}) }}>""",
        "unread = Exp(e)",
        "y = Identity(e)",
    ]
    weights += [
        "int64 zero = {0}", "int64 one = {1}", "int64[1] first = {0}", "int64[1] four = {4}",
        "int64[1] rest = {-1}", f"int64[1] width = {{{WIDTH}}}", "bool yes = {1}",
    ]  # fmt: skip
    body = "\n".join(lines)
    interface = f"(float[n, l, {WIDTH}] h0) => (float[n, l, {WIDTH}] y)"
    return module_of(f"g {interface} <{', '.join(weights)}> {{\n{body}\n}}")


def numbers(seed: int, count: int) -> list[str]:
    drawn = np.random.default_rng(seed).standard_normal(count) / np.sqrt(WIDTH)
    return [f"{number:.4f}" for number in drawn]


def run(chosen: Pass, module: Module, limit: RewriteLimit) -> PassResult:
    context = PassContext(AnalysisManager(module), source=chosen.name, limit=limit)
    before = module.fingerprint()
    result = chosen.run(module, context)
    assert result.changed == (module.fingerprint() != before)
    return result


@pytest.fixture(scope="module")
def original() -> Module:
    return decoder(2)


@pytest.mark.parametrize(
    ("chosen", "least"),
    [
        (Canonicalize(), 15),
        (FoldLinear(), 2),
        (QuantizeWeights(block_size=16), 2),
        (ConvertDtype(), 20),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_limited_run_is_the_beginning_of_the_unlimited_one(
    original: Module, chosen: Pass, least: int
) -> None:
    if isinstance(chosen, FoldLinear):
        original = original.clone()
        run(Canonicalize(), original, RewriteLimit())
    feed = {"h0": np.random.default_rng(0).standard_normal((2, 3, WIDTH)).astype(np.float32)}
    wanted = run_plain(original, feed)[0]
    whole = RewriteLimit(record=True)
    run(chosen, original.clone(), whole)
    assert whole.count == len(whole.steps) >= least
    exact = isinstance(chosen, Canonicalize | FoldLinear)
    for allowed in range(whole.count + 1):
        module, limit = original.clone(), RewriteLimit(allowed, record=True)
        run(chosen, module, limit)
        assert limit.steps == whole.steps[:allowed]
        verify_structure(module)
        if exact:
            # Two layers of sums of 32 products of order one: a few roundings of 1e-7 each.
            np.testing.assert_allclose(run_plain(module, feed)[0], wanted, rtol=1e-5, atol=1e-5)


def test_no_rewrite_at_all_only_tidies_up(original: Module) -> None:
    module = original.clone()
    before = [node.outputs[0].name for node in module.graph]
    run(Canonicalize(), module, RewriteLimit(0))
    assert [node.outputs[0].name for node in module.graph] == [v for v in before if v != "unread"]


def test_the_step_at_the_limit_is_kept_without_a_record(original: Module) -> None:
    whole = RewriteLimit(record=True)
    run(Canonicalize(), original.clone(), whole)
    limit = RewriteLimit(5)
    run(Canonicalize(), original.clone(), limit)
    assert limit.exhausted
    assert limit.steps == [limit.last] == [whole.steps[4]]
    unlimited = RewriteLimit()
    run(Canonicalize(), original.clone(), unlimited)
    assert (unlimited.count, unlimited.last, unlimited.exhausted) == (whole.count, None, False)


def test_shared_constants_and_duplicates_count_one_by_one() -> None:
    module = module_of(
        "g (float[2] x) => (float[2] y) <float[1] a = {2}, float[1] b = {2}, float[1] c = {2}>"
        "{ [p] p = Mul(x, a)\n [q] q = Mul(x, b)\n [r] r = Mul(x, c)\n y = Sum(p, q, r) }"
    )
    limit = RewriteLimit(record=True)
    result = run(Canonicalize(), module, limit)
    assert limit.steps == [
        Step("shared-constants", None),
        Step("shared-constants", None),
        Step("common-subexpression", "Mul 'q'"),
        Step("common-subexpression", "Mul 'r'"),
    ]
    assert result.rewrites["shared-constants"] == 2
