"""`--list-passes`: what passes there are."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from collections.abc import Sequence

from lwc.pipeline.registry import OptionInfo, PassInfo

__all__ = ["list_passes"]


def list_passes(infos: Sequence[PassInfo], form: str) -> str:
    """Describe passes and their options as text for people, or as JSON."""
    if form == "json":
        return json.dumps([dataclasses.asdict(info) for info in infos], indent=1)
    blocks = []
    for info in infos:
        contract = f" [{info.contract}]" if info.contract else ""
        lines = [f"{info.name}{contract}", f"    {info.summary}"]
        for option in info.options:
            lines.append(f"      {_usage(option)}")
            if option.help:
                lines.extend(f"          {line}" for line in textwrap.wrap(option.help, 86))
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


def _usage(option: OptionInfo) -> str:
    if option.name == "*":
        return f"NAME={option.type} (any number of them)"
    name = f"[{option.name}=]" if option.positional else f"{option.name}="
    if option.default is None:
        return f"{name}{option.type} (required)"
    return f"{name}{option.type}, by default {option.default or 'empty'}"
