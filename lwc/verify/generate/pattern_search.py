"""Finding graphs that a pattern matches: a seeded search for what its variables stand for."""

from __future__ import annotations

import dataclasses
import random
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeAlias, TypeVar, cast

import numpy as np
import onnx_ir as ir

from lwc.analysis.shapes import Shapes
from lwc.core.errors import LwcError
from lwc.core.module import Module
from lwc.core.schemas import STANDARD_DOMAINS, FormalType, find_schema, operator_types
from lwc.rewrite.driver import rewrite
from lwc.rewrite.editor import Editor
from lwc.rewrite.patterns import PatternRule, pattern_rule
from lwc.rewrite.rules import RuleSet
from lwc.verify.generate.leaves import Hint, Leaf, attribute_options
from lwc.verify.generate.sketch import Sketch
from lwc.verify.generate.validity import is_valid
from lwc.verify.structure.types import check_types

if TYPE_CHECKING:
    from hypothesis.strategies import DrawFn

__all__ = ["PatternGraph", "Plan", "Searcher", "plainly"]

ItemT = TypeVar("ItemT")

Plan: TypeAlias = "dict[str, Any]"
"""What was decided: by variable, attribute or place in the pattern, the option taken."""

Decide: TypeAlias = "Callable[[str, Callable[[random.Random], Any]], Any]"

_NUMBERS = {"N": 3, "S": 5}
_WANTED = 8
"""Plans that the rule rewrites."""
_ENOUGH, _MOST = 800, 4000
"""Graphs built at most where some plan was found, and where none was."""
_COMPLETED = 600
"""Graphs that fit held against the rule."""
_RETRIES = 128
"""How often what was drawn for a node is drawn anew before more is."""

_FLOAT_FIRST = ("float", "int64", "float16", "double", "int32", "bool", "int8", "uint8")


class _NoWay(Exception):
    """The pattern asks for something that no graph can be made for."""


class _NoFit(Exception):
    """What was drawn does not fit together."""


class _Place(NamedTuple):
    """Where in a pattern a value stands, and what it may be there."""

    key: str
    allowed: frozenset[str] | None = None
    hint: Hint | None = None
    position: int = 0

    def draw(self, rng: random.Random) -> Leaf | None:
        """Draw what stands there."""
        hint = self.hint or Hint("")
        return hint.draw(rng, self.position, self.allowed)


class PatternGraph:
    """Builds the graph that a pattern describes in a sketch.

    Args:
        sketch: Gets the nodes.
        decide: Gives the option for a key, drawing it by the function where it is new.
        place: Adds a graph input or a constant.
        done: Told of every node that was added.
    """

    def __init__(
        self,
        sketch: Sketch,
        decide: Decide,
        place: Callable[[Sketch, Leaf], ir.Value],
        done: Callable[[ir.Node], None] = lambda node: None,
    ) -> None:
        self._sketch = sketch
        self._decide = decide
        self._place = place
        self._done = done
        self._made: dict[int, list[ir.Value]] = {}
        self._leaves: dict[str, ir.Value | None] = {}
        self._count = 0

    def outputs(self, pattern: Any) -> list[ir.Value]:
        """Add the nodes of a pattern and return its outputs."""
        return [value for each in pattern.outputs if (value := self._value(each, _Place("result")))]

    def _value(self, pattern: Any, place: _Place) -> ir.Value | None:
        from onnxscript.rewriter import _pattern_ir as language

        if pattern is None:
            return None
        if isinstance(pattern, language.NodeOutputPattern):
            return self._node(pattern.producer())[pattern.output_index]
        if isinstance(pattern, language.OpIdDispatchOr | language.BacktrackingOr):
            if isinstance(pattern, language.OpIdDispatchOr):
                choices = [choice for _, choice in pattern._op_to_pattern.values()]
            else:
                choices = list(pattern._values)
            taken = self._decide(f"{place.key} or", lambda rng: rng.randrange(len(choices)))
            return self._value(choices[taken], place._replace(key=f"{place.key}.{taken}"))
        if isinstance(pattern, language.Constant):
            return self._constant(pattern.value, place)
        name = f"value {pattern.name}" if pattern.name else place.key
        if name not in self._leaves:
            optional = pattern.can_match_none

            def draw(rng: random.Random) -> Leaf | None:
                return None if optional and rng.random() < 0.3 else place.draw(rng)

            leaf = self._decide(name, draw)
            if leaf is None and not optional:
                raise _NoWay(f"none of the types {sorted(place.allowed or ())} is known here")
            self._leaves[name] = None if leaf is None else self._place(self._sketch, leaf)
        return self._leaves[name]

    def _constant(self, content: Any, place: _Place) -> ir.Value:
        whole = all(
            isinstance(x, int) for x in (content if isinstance(content, list) else [content])
        )

        def fitting(rng: random.Random) -> ir.DataType:
            kinds = [
                kind
                for name in _FLOAT_FIRST
                if (kind := ir.DataType[name.upper()]) is not None
                and (place.allowed is None or f"tensor({name})" in place.allowed)
                and (whole or kind.is_floating_point())
            ]
            if not kinds:
                raise _NoWay(f"no type of a constant {content} fits")
            return rng.choices(kinds, [0.3**place for place in range(len(kinds))])[0]

        dtype = self._decide(f"{place.key} type", fitting)
        array = np.array(content).astype(dtype.numpy())
        return self._place(self._sketch, Leaf(dtype, array.shape, array))

    def _node(self, pattern: Any) -> list[ir.Value]:
        if id(pattern) in self._made:
            return self._made[id(pattern)]
        identifier = pattern.op_identifier()
        if identifier is None:
            raise _NoWay(f"'{pattern.op}' in domain '{pattern.domain}' stands for many operators")
        domain, op, _ = identifier
        self._count += 1
        key = f"node {self._count}"
        version = self._sketch.opset if domain == "" else 1
        types = operator_types(domain, op, version)
        formals = types.inputs if types is not None else ()
        hint = Hint(op)
        inputs = [
            self._value(each, _Place(f"{key} input {index}", _allowed(formals, index), hint, index))
            for index, each in enumerate(pattern.inputs)
        ]
        while inputs and inputs[-1] is None:
            inputs.pop()
        made = self._sketch.emit_all(
            op,
            *inputs,
            domain=domain,
            outputs=len(pattern.outputs),
            **self._attributes(pattern, find_schema(domain, op, version), key),
        )
        self._made[id(pattern)] = made
        node = made[0].producer()
        assert node is not None
        self._done(node)
        return made

    def _attributes(self, pattern: Any, schema: Any, key: str) -> dict[str, Any]:
        from onnxscript.rewriter import _pattern_ir as language

        wanted = dict(pattern.attributes)
        if schema is not None:
            required = (k for k, formal in schema.attributes.items() if formal.required)
            others = schema.attributes if pattern.allow_other_attributes else ()
            for name in (*required, *others):
                wanted.setdefault(name, None)
        attributes: dict[str, Any] = {}
        for name, given in wanted.items():
            kind, options = attribute_options(schema, name)
            if isinstance(given, language.AttrConstantPattern):
                value = given._value
            else:
                may_lack = given is None or given.can_match_none
                if schema is not None and name in schema.attributes:
                    may_lack = may_lack and not schema.attributes[name].required
                named = None if given is None else given.name
                draw = _option(options, may_lack, 0.9 if given is None else 0.3)
                place = f"attribute {named}" if named else f"{key} {name}"
                value = self._decide(place, draw)
            if value is not None:
                attributes[name] = ir.convenience.convert_attribute(name, value, kind)
        return attributes


def _option(options: list[Any], may_lack: bool, lacks: float) -> Callable[[random.Random], Any]:
    def draw(rng: random.Random) -> Any:
        if may_lack and (not options or rng.random() < lacks):
            return None
        if not options:
            raise _NoWay("an attribute has a type that no value is known for")
        return rng.choice(options)

    return draw


def _allowed(formals: tuple[FormalType, ...], index: int) -> frozenset[str] | None:
    return formals[min(index, len(formals) - 1)].allowed if formals else None


class _Trial(Sketch):
    """A sketch whose every choice is the simplest one."""

    def __init__(self, opset: int) -> None:
        super().__init__(cast("DrawFn", _no_draw), opset)

    def drop(self) -> NoReturn:
        raise _NoFit

    def choose(self, *options: ItemT) -> ItemT:
        return options[0]

    def integer(self, low: int, high: int) -> int:
        return low

    def flip(self) -> bool:
        return False

    def rarely(self) -> bool:
        return False

    def permutation(self, count: int) -> list[int]:
        return list(range(count))


def _no_draw(*arguments: Any, **options: Any) -> Any:
    raise AssertionError("a trial draws nothing")


def plainly(sketch: Sketch, leaf: Leaf) -> ir.Value:
    """Add a leaf as a new graph input or a new constant."""
    if leaf.content is not None:
        return sketch.constant(leaf.content, leaf.dtype)
    return sketch.input(leaf.shape, leaf.dtype)


def _numbered(sketch: Sketch, leaf: Leaf) -> ir.Value:
    """Add a leaf with numbers for names, so that extents that differ are seen to."""
    extents = tuple(_NUMBERS.get(e, 0) if isinstance(e, str) else e for e in leaf.shape)
    return plainly(sketch, dataclasses.replace(leaf, shape=extents))


class Searcher:
    """Finds plans by which the graph of a rule's pattern is valid and matched.

    The search goes node by node. Where what was drawn for a node does not fit it, that is drawn
    anew; where that does not help, some of all that was drawn.

    Args:
        rule: The rule.
        opset: Version of the standard operator set.
    """

    def __init__(self, rule: PatternRule, opset: int) -> None:
        from onnxscript.rewriter import pattern as language

        self.rule = rule
        self.opset = opset
        self._rules = RuleSet([pattern_rule(rule)])
        compiled = language.RewriteRule(rule.pattern, lambda op, **_: None, name=rule.name)
        self.variants = [each._target_pattern for each in compiled.commute()]
        self._compiled = compiled
        self._rng = random.Random(zlib.crc32(rule.name.encode()))
        self.builds = 0

    def find(self, known: Iterable[Plan] = ()) -> tuple[list[Plan], list[Plan]]:
        """Return plans that the rule rewrites, and others that its pattern matches.

        Args:
            known: Plans that hold at another opset; they are tried first.
        """
        legal: dict[str, Plan] = {}
        others: dict[str, Plan] = {}
        if self._impossible():
            return [], []
        for plan in known:
            self._sort(plan, legal, others)
        searching = not legal and not others
        plan, completed = {}, 0
        while searching and len(legal) < _WANTED and completed < _COMPLETED:
            fits = self._complete(plan, _ENOUGH if legal else _MOST)
            if fits is None:
                break
            completed += 1
            taken = self._sort(fits, legal, others)
            if self._rng.random() < 0.6:
                # Near a plan that fits are others that do.
                plan = self._thinned(self._rng.choice([fits, *legal.values()]), 0.75)
            else:
                plan = {} if taken else self._thinned(fits)
        return list(legal.values()), list(others.values())

    def _impossible(self) -> bool:
        """Tell whether an operator of the pattern has another signature at this opset."""
        from onnxscript.rewriter import _pattern_ir as language

        pending: list[Any] = list(self.variants[0].outputs)
        seen: set[int] = set()
        while pending:
            value = pending.pop()
            if not isinstance(value, language.NodeOutputPattern) or id(value.producer()) in seen:
                continue
            node = value.producer()
            seen.add(id(node))
            pending += node.inputs
            domain, op, _ = node.op_identifier() or ("?", "?", "")
            if domain not in STANDARD_DOMAINS:
                continue
            schema = find_schema(domain, op, self.opset)
            given = [each is not None and not each.can_match_none for each in node.inputs]
            fixed = [name for name, each in node.attributes.items() if not each.can_match_none]
            if (
                schema is None
                or any(given[schema.max_input :])
                or any(name not in schema.attributes for name in fixed)
            ):
                return True
        return False

    def _sort(self, plan: Plan, legal: dict[str, Plan], others: dict[str, Plan]) -> bool:
        """File a plan with those the rule rewrites or with the others; tell whether it was."""
        name = repr(sorted(plan.items(), key=lambda item: item[0]))
        if name in legal or name in others:
            return True
        sketch = _Trial(self.opset)
        try:
            for value in self.build(plan, sketch, plainly):
                sketch.keep(value)
            module = sketch.finish()
        except (_NoFit, _NoWay, KeyError):
            return False  # A plan of another opset, or a rank that is known only for numbers.
        if not module.graph.inputs or not self._matches(module):
            return False
        found = legal if self._rewrites(module) else others
        if (found is others and len(others) >= _WANTED) or not is_valid(module):
            return False
        found[name] = dict(plan)
        return True

    def build(self, plan: Mapping[str, Any], sketch: Sketch, place: Any) -> list[ir.Value]:
        """Add the graph of a plan to a sketch and return the pattern's outputs."""
        graph = PatternGraph(sketch, lambda key, _: plan[key], place)
        return graph.outputs(self.variants[plan["variant"]])

    def _complete(self, plan: Plan, most: int) -> Plan | None:
        """Draw what a plan lacks until every node fits, within so many graphs in all."""
        tries = 0
        while self.builds < most:
            self.builds += 1
            plan.setdefault("variant", self._rng.randrange(len(self.variants)))
            recent: list[str] = []
            try:
                self._attempt(plan, recent)
            except (_NoFit, _NoWay):
                tries += 1
                if recent and tries % _RETRIES:
                    for key in recent:
                        del plan[key]
                else:
                    plan = self._thinned(plan)
                continue
            return plan
        return None

    def _attempt(self, plan: Plan, recent: list[str]) -> None:
        """Build a graph, drawing what the plan lacks; `recent` lists what the last node drew."""
        sketch = _Trial(self.opset)

        def decide(key: str, draw: Callable[[random.Random], Any]) -> Any:
            if key not in plan:
                plan[key] = self._copied(plan, draw(self._rng))
                recent.append(key)
            return plan[key]

        def done(node: ir.Node) -> None:
            if check_types(sketch.module, sketch.shapes).clashes:
                raise _NoFit
            recent.clear()

        graph = PatternGraph(sketch, decide, _numbered, done)
        graph.outputs(self.variants[plan["variant"]])

    def _copied(self, plan: Plan, option: Any) -> Any:
        """Return a leaf drawn before in place of a new one, now and then: like goes with like."""
        if not isinstance(option, Leaf) or self._rng.random() < 0.7:
            return option
        alike = [each for each in plan.values()
                 if isinstance(each, Leaf) and each.dtype == option.dtype]  # fmt: skip
        return self._rng.choice(alike[-2:]) if alike else option

    def _thinned(self, plan: Plan, share: float | None = None) -> Plan:
        """Keep about this share of a plan; by default half of it, or now and then nothing."""
        if share is None and self._rng.random() < 0.3:
            return {}
        kept = {k: v for k, v in plan.items() if self._rng.random() < (share or 0.5)}
        return {**kept, "variant": plan["variant"]} if plan else {}

    def _matches(self, module: Module) -> bool:
        from lwc.rewrite.matching import Matcher

        for graph in self.variants:
            matcher = Matcher(graph)
            for node in module.graph:
                if matcher.match(module.model, module.graph, node, remove_nodes=False):
                    return True
        return False

    def _rewrites(self, module: Module) -> bool:
        twin = module.clone()
        editor = Editor(twin, Shapes.build(twin), self.rule.name)
        try:
            return bool(rewrite(editor, self._rules).hits)
        except LwcError:
            return True  # The rule fails on this graph: one to show.
