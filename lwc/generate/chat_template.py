"""Chat templates: Jinja, with what Hugging Face's templates expect to be there."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lwc.core.errors import LwcError

__all__ = ["render"]


class _Generation(Extension):
    """`{% generation %}` marks what a model wrote, for training; here it stands for its content."""

    tags = {"generation"}  # noqa: RUF012  (a set in the base class)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the content of the block."""
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


def render(
    template: str,
    messages: Sequence[Mapping[str, str]],
    specials: Mapping[str, str],
    file: str | None = None,
) -> str:
    """Write a chat as its template says, up to where the model's answer begins.

    Args:
        template: The template; it runs in a sandbox.
        messages: The turns.
        specials: Special tokens by role.
        file: Where it came from, for errors.

    Raises:
        LwcError: The template fails, or refuses the messages.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    try:
        return environment.from_string(template).render(
            messages=[dict(each) for each in messages], add_generation_prompt=True, **specials
        )
    except (jinja2.TemplateError, TypeError, ValueError) as error:
        raise LwcError(
            f"the chat template fails: {error}", file=file, remedy="see what roles it takes"
        ) from error


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
