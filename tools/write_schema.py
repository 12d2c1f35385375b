#!/usr/bin/env python3
"""Writes docs/report.schema.json from the report's classes."""

import json
from pathlib import Path

from lwc.report import json_schema

target = Path(__file__).parents[1] / "docs" / "report.schema.json"
target.write_text(json.dumps(json_schema(), indent=1) + "\n")
print(f"wrote {target.name}")
