"""Numeric verification: what it catches, what it lets pass, what it says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest

from lwc.core.errors import LwcError, VerificationError
from lwc.core.module import Module
from lwc.pipeline.passes import Approximate, Exact, Lossy
from lwc.verify.numeric import running
from lwc.verify.numeric.comparer import Comparer, compare, depth, exact_rtol
from lwc.verify.numeric.running import Running

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'


def parse(text: str) -> Module:
    return Module(ir.from_onnx_text(HEADER + text))


def linear(scale: float = 1.0) -> Module:
    module = parse("g (float[batch, 32] x) => (float[batch, 16] y) { y = MatMul(x, x) }")
    weight = np.random.default_rng(0).standard_normal((32, 16)).astype(np.float32)
    weight[3, 5] *= scale
    module.graph[0].replace_input_with(1, module.add_initializer("w", weight))
    return module


def test_equal_modules_agree_exactly_at_three_shapes_and_three_edges() -> None:
    report = compare(linear(), linear())
    assert report.feeds == 6
    assert report.float64
    assert report.worst is not None
    assert report.worst.max_error == 0
    batches = {error.shapes["x"][0] for error in report.errors}
    assert batches == {1, 3, 4}


def test_rounding_of_another_order_passes() -> None:
    before = parse(
        "g (float[n, 64] x) => (float[n] y) <int64[1] last = {1}>\n"
        "{ y = ReduceSum<keepdims = 0>(x, last) }"
    )
    after = parse(
        "g (float[n, 64] x) => (float[n] y) <int64[1] last = {1}, int64[2] halves = {31, 33}>\n"
        "{ a, b = Split<axis = 1>(x, halves) s = ReduceSum<keepdims = 0>(b, last)"
        " t = ReduceSum<keepdims = 0>(a, last) y = Add(s, t) }"
    )
    report = compare(before, after)
    assert report.worst is not None
    assert 0 < report.worst.excess <= 1


@pytest.mark.parametrize("scale", [1.001, 1.5, math.nan])
def test_a_changed_weight_is_found_with_its_place(scale: float) -> None:
    with pytest.raises(VerificationError) as caught:
        compare(linear(), linear(scale))
    text = str(caught.value)
    assert re.search(r"output 'y' is \S+ at \[\d, 5\] after the pass and was ", text)
    assert re.search(r"with x \[\d, 32\]$", text)
    assert "\n" not in text


def test_a_fold_that_holds_at_one_batch_only_is_found() -> None:
    before = parse("g (float[n, 4] x) => (float[m] y) <int64[1] s = {-1}> { y = Reshape(x, s) }")
    after = parse(
        "g (float[n, 4] x) => (float[m] y) <int64[1] s = {-1}, int64[1] zero = {0}, int64[1] "
        "eight = {8}> { z = Reshape(x, s) y = Slice(z, zero, eight) }"
    )
    compare(before, after, bindings=[{"n": 1}, {"n": 2}])
    with pytest.raises(VerificationError, match=r"had shape \[12\] .* has \[8\] .*x \[3, 4\]"):
        compare(before, after, bindings=[{"n": 2}, {"n": 3}])


def test_after_must_run() -> None:
    after = parse(
        "g (float[batch, 32] x) => (float[m] y) <int64[1] s = {7}> { [bad] y = Reshape(x, s) }"
    )
    with pytest.raises(VerificationError, match=r"'bad'.*does not run after"):
        compare(linear(), after)


def test_before_that_does_not_run_is_no_verification_error() -> None:
    broken = parse(
        "g (float[batch, 32] x) => (float[m] y) <int64[1] s = {7}> { y = Reshape(x, s) }"
    )
    with pytest.raises(LwcError) as caught:
        compare(broken, broken)
    assert not isinstance(caught.value, VerificationError)


def test_missing_output() -> None:
    after = linear()
    after.graph.outputs[0].name = "z"
    with pytest.raises(VerificationError, match="output 'y' is gone"):
        compare(linear(), after)


def test_approximate_adds_its_bounds() -> None:
    after = linear(1.01)
    with pytest.raises(VerificationError):
        compare(linear(), after, contract=Approximate(rtol=1e-5, atol=0.0))
    report = compare(linear(), after, contract=Approximate(rtol=0.05, atol=0.01))
    assert report.worst is not None
    assert 0.01 < report.worst.excess <= 1
    assert report.rtol == pytest.approx(0.05 + exact_rtol(after))


def test_lossy_only_reports() -> None:
    report = compare(linear(), linear(2.0), contract=Lossy())
    assert report.worst is not None
    assert report.worst.excess > 1
    assert report.worst.max_error > 0.1


def test_given_tolerances_replace_the_bounds() -> None:
    compare(linear(), linear(1.01), rtol=0.1, atol=0.1)
    with pytest.raises(VerificationError):
        compare(linear(), linear(1.0001), rtol=0.0, atol=0.0)


def integers(text: str) -> Module:
    return parse(f"g (int64[n] x) => (int64[n] y) <int64 one = {{1}}> {{ {text} }}")


def test_integers_must_be_equal() -> None:
    before = integers("y = Identity(x)")
    compare(before, integers("a = Add(x, one) y = Sub(a, one)"))
    with pytest.raises(VerificationError, match="times its bound"):
        compare(before, integers("y = Add(x, one)"))


def special(text: str) -> Module:
    return parse(
        f"g (float[n] x) => (float[n] y) <float zero = {{0}}, float one = {{1}}> {{ {text} }}"
    )


@pytest.mark.parametrize(
    ("before", "after", "same"),
    [
        ("y = Div(x, zero)", "y = Div(x, zero)", True),
        ("a = Sub(x, x) y = Div(a, zero)", "a = Sub(x, x) y = Div(a, zero)", True),
        ("y = Div(x, zero)", "a = Neg(x) y = Div(a, zero)", False),
        ("a = Sub(x, x) y = Div(a, zero)", "y = Sub(x, x)", False),
        ("y = Sub(x, x)", "a = Sub(x, x) y = Div(a, zero)", False),
        ("y = Identity(x)", "y = Div(x, zero)", False),
        ("y = Div(x, zero)", "y = Identity(x)", False),
    ],
)
def test_nan_and_infinity_must_stay_where_they_are(before: str, after: str, same: bool) -> None:
    if same:
        report = compare(special(before), special(after))
        assert report.worst is not None
        assert report.worst.max_error == 0
    else:
        with pytest.raises(VerificationError):
            compare(special(before), special(after))


@pytest.mark.parametrize("off", [0, 1])
def test_large_integers_must_be_equal_too(off: int) -> None:
    modules = [
        parse(
            f"""g (int64[3] x) => (int64[3] y) <int64 big = {{{2**60 + each}}}, int64 none = {{0}}>
            {{ zeros = Mul(x, none) y = Add(zeros, big) }}"""
        )
        for each in (0, off)
    ]
    if not off:
        assert compare(*modules).worst is not None
        return
    with pytest.raises(VerificationError, match="times its bound"):
        compare(*modules)


def test_dropout_in_training_is_skipped() -> None:
    module = parse(
        """g (float[9] x) => (float[9] y) <float half = {0.5}, bool training = {1}>
        { y = Dropout(x, half, training) }"""
    )
    assert compare(module, module).skipped is not None


def test_strings() -> None:
    def module(text: str) -> Module:
        return parse(f"g (string[n] x) => (string[n] y) {{ {text} }}")

    compare(module("y = Identity(x)"), module("y = Identity(x)"))
    with pytest.raises(VerificationError):
        compare(module("y = Identity(x)"), module("y = StringConcat(x, x)"))


def test_dimensions_a_pass_fixed_are_fixed_in_the_feeds() -> None:
    after = linear()
    after.graph.inputs[0].shape = ir.Shape([7, 32])
    report = compare(linear(), after)
    assert {error.shapes["x"] for error in report.errors} == {(7, 32)}


def test_anonymous_dimension_fixed_by_a_pass() -> None:
    before, after = linear(), linear()
    before.graph.inputs[0].shape = ir.Shape([None, 32])
    after.graph.inputs[0].shape = ir.Shape([5, 32])
    assert {error.shapes["x"] for error in compare(before, after).errors} == {(5, 32)}


def test_input_types_a_pass_changed_are_fed_as_it_wants_them() -> None:
    before = parse("g (float[n] x) => (float[n] y) { y = Add(x, x) }")
    after = parse("g (float16[n] x) => (float16[n] y) { y = Add(x, x) }")
    report = compare(before, after, contract=Approximate(rtol=2e-3, atol=1e-3))
    assert report.worst is not None
    assert report.worst.max_error > 0


def test_random_operators_are_skipped_and_said() -> None:
    module = parse("g (float[n] x) => (float[n] y) { r = RandomNormalLike(x) y = Add(x, r) }")
    report = compare(module, module)
    assert report.skipped is not None
    assert "RandomNormalLike" in report.skipped
    assert report.errors == ()


def test_empty_outputs_agree() -> None:
    module = parse("g (float[n, 0] x) => (float[n, 0] y) { y = Identity(x) }")
    assert compare(module, module, contract=Exact()).feeds == 6


def test_scalar_outputs() -> None:
    def sum_of(text: str) -> Module:
        return parse(f"g (float[n] x) => (float y) <float one = {{1}}> {{ {text} }}")

    before = sum_of("y = ReduceSum<keepdims = 0>(x)")
    report = compare(before, before)
    assert {error.index for error in report.errors} == {()}
    with pytest.raises(VerificationError, match="times its bound"):
        compare(before, sum_of("a = ReduceSum<keepdims = 0>(x) y = Add(a, one)"))


def test_scalar_integer_outputs() -> None:
    def length(text: str) -> Module:
        return parse(f"g (float[n] x) => (int64 y) <int64 one = {{1}}> {{ {text} }}")

    before = length("y = Size(x)")
    assert compare(before, before).feeds == 6
    with pytest.raises(VerificationError, match="times its bound"):
        compare(before, length("a = Size(x) y = Add(a, one)"))


def test_depth_and_rounding_bound() -> None:
    chain = parse(
        "g (float[2] x) => (float[2] y) { a = Abs(x) b = Abs(a) c = Abs(x) y = Add(b, c) }"
    )
    assert depth(chain) == 3
    assert exact_rtol(chain) == pytest.approx(16 * 2**-23 * math.sqrt(3))
    nested = parse(
        "g (float[2] x, bool p) => (float[2] y) { y = If (p) <then_branch = t () => (float[2] b)"
        " { a = Abs(x) b = Abs(a) }, else_branch = e () => (float[2] c) { c = Abs(x) }> }"
    )
    assert depth(nested) == 3
    half = parse("g (float16[2] x) => (float16[2] y) { y = Abs(x) }")
    assert exact_rtol(half) == pytest.approx(2 * 2**-10)
    inside = parse(
        "g (float[2] x) => (float[2] y) { a = Cast<to = 10>(x) b = Abs(a) y = Cast<to = 1>(b) }"
    )
    assert exact_rtol(inside) == pytest.approx(2 * 2**-10 * math.sqrt(3))


@pytest.mark.parametrize("make", [linear])
def test_results_do_not_depend_on_anything_but_the_seed(make: Callable[[], Module]) -> None:
    first, again, other = (compare(make(), make(), seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert [e.expected for e in first.errors] != [e.expected for e in other.errors]


def test_a_difference_that_only_shows_where_numbers_are_tiny() -> None:
    """An epsilon that is dropped: 2.5e-6 of a variance of 1, everything of one of 1e-6."""

    def norm(epsilon: str) -> Module:
        return parse(
            f"""g (float[n, 64] x) => (float[n, 64] y) <int64[1] last = {{1}},
            float two = {{2}}, float epsilon = {{{epsilon}}}>
            {{ square = Pow(x, two) mean = ReduceMean(square, last) sum = Add(mean, epsilon)
               root = Sqrt(sum) y = Div(x, root) }}"""
        )

    with pytest.raises(VerificationError, match="times its bound"):
        compare(norm("0.00001"), norm("0.0"))


def test_float64_sees_what_cancellation_hides() -> None:
    """x + 1e4 - 1e4 has an error of 1e-3 in float32; a change of 1e-4 drowns in it."""

    def detour(offset: str) -> Module:
        return parse(
            f"""g (float[n] x) => (float[n] y) <float big = {{10000}}, float off = {{{offset}}}>
            {{ far = Add(x, big) moved = Add(far, off) y = Sub(moved, big) }}"""
        )

    assert compare(detour("0"), detour("0")).float64
    with pytest.raises(VerificationError, match="in float64"):
        compare(detour("0"), detour("0.0001"))


def test_rounding_that_flips_a_comparison_is_no_difference() -> None:
    """Two orders of one sum, and the sign of their difference from it: rounding decides."""

    def sign(order: str) -> Module:
        return parse(
            f"""g (float[n] x) => (float[n] y) <float a = {{0.1}}, float b = {{0.7}},
            float c = {{0.3}}> {{ {order} p = Mul(x, a) q = Mul(p, b) r = Mul(q, c)
            rest = Sub(s, r) y = Sign(rest) }}"""
        )

    one = sign("u = Mul(x, a) v = Mul(u, b) s = Mul(v, c)")
    other = sign("u = Mul(x, c) v = Mul(u, b) s = Mul(v, a)")
    compare(one, other)


def test_masked_rows_are_an_edge() -> None:
    """Softmax over a row of -inf is NaN; a pass that makes it 0 is seen."""

    def softmax(tail: str) -> Module:
        return parse(
            f"""g (float[n, s] x, bool[n, s] mask) => (float[n, s] y)
            <float low = {{-inf}}, float zero = {{0}}>
            {{ kept = Where(mask, x, low) y0 = Softmax<axis = 1>(kept) {tail} }}"""
        )

    plain = softmax("y = Identity(y0)")
    assert compare(plain, plain).worst is not None
    with pytest.raises(VerificationError, match="some rows masked as a whole"):
        compare(plain, softmax("bad = IsNaN(y0) y = Where(bad, zero, y0)"))


def test_outputs_of_the_last_module_are_the_reference_of_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from lwc.verify.numeric import comparer as numeric

    compiled: list[Module] = []
    original = numeric.compiled

    def counted(module: Module, threads: int | None = 1, *, limit: float = 60.0) -> Running:
        compiled.append(module)
        return original(module, threads, limit=limit)

    monkeypatch.setattr(numeric, "compiled", counted)
    comparer = Comparer()
    first, second, third = linear(), linear(), linear()
    comparer(first, second)
    comparer(second.clone(), third)
    assert compiled == [first, second, third]
    comparer(first, second)
    assert len(compiled) == 5


def test_the_float64_reference_is_not_asked_where_it_is_wrong() -> None:
    """onnx's evaluator is wrong about grouped convolutions with a bias."""

    def convolution(tail: str) -> Module:
        weights = ", ".join(str(each / 8) for each in range(16))
        return parse(
            f"""g (float[n, 4, 2, 2] x) => (float[n, 4, 3, 3] y)
            <float[4, 1, 2, 2] w = {{{weights}}}, float[4] b = {{1, 2, 3, 4}},
             float[4, 1, 1] c = {{1, 2, 3, 4}}> {{ {tail} }}"""
        )

    report = compare(
        convolution("z = ConvTranspose<group = 4>(x, w) y = Add(z, c)"),
        convolution("y = ConvTranspose<group = 4>(x, w, b)"),
    )
    assert not report.float64
    assert report.feeds == 6


def test_the_root_mean_square_of_huge_elements_is_finite() -> None:
    """Their squares overflow; an infinite bound would let everything pass."""

    def scaled(factor: str) -> Module:
        return parse(
            f"""g (double[3] x) => (double[3] y) <double[3] huge = {{1e200, 1e200, 1e200}},
            double f = {{{factor}}}> {{ y0 = Mul(huge, f) y = Add(y0, x) }}"""
        )

    compare(scaled("2"), scaled("2"))
    with pytest.raises(VerificationError, match="times its bound"):
        compare(scaled("2"), scaled("3"))


def test_float16_rounds_as_coarsely_as_it_does() -> None:
    """Two factors in a row and their product: right up to a rounding of 2**-10 each."""

    def half(text: str) -> Module:
        return parse(
            f"""g (float16[n, 4] x) => (float16[n, 4] y) <float a = {{0.3}}, float b = {{0.7}},
            float c = {{0.21}}, float d = {{0.22}}>
            {{ ha = Cast<to = 10>(a) hb = Cast<to = 10>(b) hc = Cast<to = 10>(c)
               hd = Cast<to = 10>(d) {text} }}"""
        )

    before = half("z = Mul(x, ha) y = Mul(z, hb)")
    assert not compare(before, half("y = Mul(x, hc)")).float64
    with pytest.raises(VerificationError, match="times its bound"):
        compare(before, half("y = Mul(x, hd)"))


@pytest.mark.parametrize("kind", ["10", "16"])
def test_a_detour_through_a_coarser_type_is_seen(kind: str) -> None:
    """What a pass made of a float32 model may not round to 16 bits on the way."""
    graph = "g (float[n, 4] x) => (float[n, 4] y) {{ {} y = Relu(z) }}"
    detour = f"h = Cast<to = {kind}>(x) z = Cast<to = 1>(h)"
    with pytest.raises(VerificationError, match="times its bound"):
        compare(parse(graph.format("z = Identity(x)")), parse(graph.format(detour)))


def test_double_is_held_to_double() -> None:
    graph = "g (double[n, 4] x) => (double[n, 4] y) {{ {} y = Relu(z) }}"
    detour = "h = Cast<to = 1>(x) z = Cast<to = 11>(h)"
    with pytest.raises(VerificationError, match="times its bound"):
        compare(parse(graph.format("z = Identity(x)")), parse(graph.format(detour)))


def test_ties_of_a_comparison_excuse_nothing_else() -> None:
    """A causal mask made of whole numbers, reversed; and one beside another fault."""

    def masked(compare_by: str, scale: str) -> Module:
        return parse(
            f"""g (float[s, s] x) => (float[s, s] y) <int64 zero = {{0}}, int64 one = {{1}},
            int64[1] first = {{0}}, int64[1] second = {{1}}, float f = {{1.0}},
            float low = {{-1e4}}, float k = {{{scale}}}>
            {{ shape = Shape(x) n0 = Gather(shape, zero) r = Range(zero, n0, one)
               rf0 = Cast<to = 1>(r) rf = Mul(rf0, f) row = Unsqueeze(rf, second)
               column = Unsqueeze(rf, first) keep = {compare_by}(column, row)
               scores = Mul(x, k) kept = Where(keep, scores, low) y = Softmax<axis = 1>(kept) }}"""
        )

    before = masked("LessOrEqual", "0.3")
    compare(before, masked("LessOrEqual", "0.3"))
    for wrong in (masked("Greater", "0.3"), masked("Less", "0.3"), masked("LessOrEqual", "0.1")):
        with pytest.raises(VerificationError, match="times its bound"):
            compare(before, wrong)


def test_the_lowest_number_hides_no_other() -> None:
    def scores(op: str) -> Module:
        return parse(
            f"""g (float[n, s] x, bool[n, s] mask) => (float[n, s] y)
            <float low = {{-3.4028235e38}}, float k = {{0.5}}>
            {{ z = {op}(x, k) y = Where(mask, z, low) }}"""
        )

    with pytest.raises(VerificationError, match="times its bound"):
        compare(scores("Mul"), scores("Add"))


@pytest.mark.parametrize("low", ["-1e9", "-1e5", "1e9"])
@pytest.mark.parametrize("rows", ["LessOrEqual", "Equal"])
def test_the_numbers_of_a_mask_hide_no_other(low: str, rows: str) -> None:
    """Causal, and of the diagonal only: most of a row may be masked."""

    def scores(scale: str) -> Module:
        return parse(
            f"""g (float[6, 6] x) => (float[6, 6] y)
            <int64 zero = {{0}}, int64 one = {{1}}, int64[1] first = {{0}}, int64[1] second = {{1}},
             float low = {{{low}}}, float none = {{0}}, float k = {{{scale}}}>
            {{ shape = Shape(x) n = Gather(shape, zero) r = Range(zero, n, one)
               row = Unsqueeze(r, second) column = Unsqueeze(r, first) keep = {rows}(column, row)
               mask = Where(keep, none, low) z = Mul(x, k) y = Add(z, mask) }}"""
        )

    compare(scores("0.35"), scores("0.35"))
    with pytest.raises(VerificationError, match="times its bound"):
        compare(scores("0.35"), scores("0.36"))


def test_the_type_of_an_output_stays() -> None:
    before = parse("g (int64[n] x) => (int64[n] y) { y = Identity(x) }")
    after = parse("g (int64[n] x) => (float[n] y) { y = Cast<to = 1>(x) }")
    complaint = "output 'y' was int64 before the pass and is float32 after it"
    with pytest.raises(VerificationError, match=complaint):
        compare(before, after)
    compare(before, after, contract=Lossy())


def sequence(elements: str, name: str = "y") -> Module:
    return parse(
        f"""g (float[n, 4] x) => (seq(float[m, 4]) {name}) <float two = {{2}}>
        {{ a = Relu(x) b = Concat<axis = 0>(a, x) c = Mul(x, two)
           {name} = SequenceConstruct({elements}) }}"""
    )


def test_sequences_are_compared_element_by_element() -> None:
    report = compare(sequence("a, b"), sequence("a, b"))
    assert {error.output for error in report.errors} == {"y[0]", "y[1]", "the length of y"}
    for elements, complaint in (
        ("a, c", r"output 'y\[1\]' had shape"),
        ("c, b", r"output 'y\[0\]' is .* times its bound"),
        ("a", r"output 'the length of y' is 1 .* was 2"),
        ("a, b, c", r"output 'the length of y' is 3 .* was 2"),
    ):
        with pytest.raises(VerificationError, match=complaint):
            compare(sequence("a, b"), sequence(elements))
    with pytest.raises(VerificationError, match="output 'the length of y' is gone"):
        compare(sequence("a"), sequence("a", "z"))


def turns(count: str, tail: str = "go = Identity(c)") -> Module:
    return parse(
        f"""g (float[n] x) => (float[n] y) <int64 count = {{{count}}}, bool yes = {{1}}>
        {{ y = Loop(count, yes, x) <body = b (int64 i, bool c, float[n] v) => (bool go, float[n] w)
           {{ {tail} w = Neg(v) }}> }}"""
    )


def test_a_long_loop_is_no_reason_not_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module before has all the time of a large one; that after it twenty times its own."""
    monkeypatch.setattr(running, "LEAST_SECONDS", 0.05)
    long = turns("100000")
    with running.compiled(long) as runner:
        assert runner.limit == running.LOOP_SECONDS
        runner.run({"x": np.ones(3, np.float32)})
    assert runner.longest > 0.05
    assert compare(turns("100000"), long).feeds


def test_a_loop_that_does_not_end_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "LEAST_SECONDS", 0.2)
    with pytest.raises(VerificationError, match=r"runs for more than the 0\.\d+ s that it is"):
        compare(turns("2"), turns(str(2**62)))


def test_tiny_outputs_have_no_refuge() -> None:
    def scaled(factor: str) -> Module:
        return parse(f"g (float[n] x) => (float[n] y) <float f = {{{factor}}}> {{ y = Mul(x, f) }}")

    with pytest.raises(VerificationError, match="times its bound"):
        compare(scaled("1e-12"), scaled("0"))


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        ("int64", "y = Mul(x, x)", "y = Identity(x)"),
        ("int32", "y = Abs(x)", "y = Identity(x)"),
        ("uint8", "y = Identity(x)", "a = Cast<to = 3>(x) b = Relu(a) y = Cast<to = 2>(b)"),
    ],
)
def test_integer_inputs_take_many_values(kind: str, right: str, wrong: str) -> None:
    graph = f"g ({kind}[n, 4] x) => ({kind}[n, 4] y) {{{{ {{}} }}}}"
    with pytest.raises(VerificationError, match="times its bound"):
        compare(parse(graph.format(right)), parse(graph.format(wrong)))


def test_float64_is_claimed_only_where_it_was_compared() -> None:
    module = parse("g (float[n, 4, 8] x) => (float[n, 4, 1] y) { y = GlobalLpPool(x) }")
    assert not compare(module, module).float64
