"""`--list-passes`: what passes there are."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

from lwc.pipeline.registry import PassInfo

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
            written = "NAME" if option.name == "*" else option.name
            default = "" if option.default is None or option.name == "*" else f" = {option.default}"
            needed = " (required)" if option.default is None else ""
            lines.append(f"      {written}: {option.type}{default}{needed}")
        blocks.append("\n".join(lines))
    return "\n".join(blocks)
