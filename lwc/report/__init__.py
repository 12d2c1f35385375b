"""What a run did, as data, Markdown and HTML."""

from lwc.report.build import build_report, model_entry
from lwc.report.data import Report, from_dict, json_schema
from lwc.report.write import render, write_report

__all__ = [
    "Report",
    "build_report",
    "from_dict",
    "json_schema",
    "model_entry",
    "render",
    "write_report",
]
