"""The command line of lwc-opt."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from lwc.cli.guard import EXIT_CODES
from lwc.cli.parser import Parser, Version
from lwc.core.errors import UsageError
from lwc.core.text import parse_size
from lwc.pipeline.options import did_you_mean

__all__ = [
    "MODEL_SUFFIXES",
    "PROGRAM",
    "REPORT_SUFFIXES",
    "parse_arguments",
    "parse_counts",
    "parse_matches",
    "parse_shapes",
    "parse_size",
    "split_words",
]

PROGRAM = "lwc-opt"
MODEL_SUFFIXES = (".onnx", ".onnxtxt")
REPORT_SUFFIXES = (".json", ".md", ".html")

_MAX_DIGITS = 18
"""Digits that always fit into 64 bits."""

_EPILOG = f"""\
A pipeline is text: 'canonicalize,quantize-weights{{bits=4 exclude=lm_head}}'. Options are
separated by spaces, the elements of a list by commas. The same as YAML goes into --config.

The module's text and results go to stdout, everything else to stderr. Without -o, and where
nothing else that prints or writes is asked for, the text of the resulting module is printed.

{EXIT_CODES}"""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        UsageError: An option is unknown or has a wrong value.
        SystemExit: `--help` or `--version` was asked for and printed.
    """
    parser = _build_parser()
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [name for action in parser._actions for name in action.option_strings]
        word = unknown[0].partition("=")[0]
        raise UsageError(
            f"unknown option '{word}'" if word.startswith("-") else f"one input only, not '{word}'",
            remedy=did_you_mean(word, known) or f"{PROGRAM} --help lists the options",
        )
    return options


def parse_counts(texts: Sequence[str], option: str) -> dict[str, int]:
    """Read `NAME=N`, several joined by commas, as often as given.

    Raises:
        UsageError: A text is something else, a number is negative or a name comes twice.
    """
    counts: dict[str, int] = {}
    for text in (part for given in texts for part in given.split(",")):
        name, equals, number = text.rpartition("=")
        if not equals or not name or not number.isdecimal():
            raise UsageError(f"{option} takes NAME=N, not '{text}'")
        if name in counts:
            raise UsageError(f"{option} gives '{name}' twice")
        counts[name] = _count(number, option)
    return counts


def parse_matches(texts: Sequence[str]) -> int | Mapping[str, int] | None:
    """Read `N` or `PASS:N` as often as given.

    Raises:
        UsageError: A text is something else, or `N` and `PASS:N` are mixed.
    """
    if not texts:
        return None
    if len(texts) == 1 and texts[0].isdecimal():
        return _count(texts[0], "--require-match")
    counts = {}
    for text in texts:
        name, colon, number = text.rpartition(":")
        if not colon or not name or not number.isdecimal():
            raise UsageError(f"--require-match takes one N, or PASS:N, not '{text}'")
        counts[name] = _count(number, "--require-match")
    return counts


def _count(digits: str, option: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise UsageError(f"{option}: a number of {len(digits)} digits is too big")
    return int(digits)


def parse_shapes(texts: Sequence[str], option: str = "--measure") -> list[dict[str, int]]:
    """Read `NAME=N,NAME=N` as often as given; `default` is the empty binding.

    Raises:
        UsageError: A text is something else.
    """
    shapes = [{} if text == "default" else parse_counts(text.split(","), option) for text in texts]
    for shape in shapes:
        for name, extent in shape.items():
            if extent < (option == "--measure"):
                raise UsageError(f"{option}: dimension '{name}' cannot be {extent}")
    return shapes


def split_words(texts: Sequence[str], option: str) -> list[str]:
    """Read words joined by commas, as often as given.

    Raises:
        UsageError: There is nothing before, after or between commas.
    """
    for text in texts:
        if not all(text.split(",")):
            raise UsageError(f"{option} takes names joined by commas, not '{text}'")
    return [word for text in texts for word in text.split(",")]


def _build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Run ordered, verified passes over a transformer model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "input", nargs="?", help=".onnx, .onnxtxt or .gguf file, or a Hugging Face folder"
    )
    parser.add_argument(
        "-o",
        "--output",
        metavar="FILE",
        help="write the model: FILE.onnx, FILE.onnxtxt, FOLDER/ (with the tokenizer and "
        "configuration that came with the input), or - for the module's text on stdout",
    )
    _add_pipeline_options(parser.add_argument_group("pipeline"))
    _add_action_options(parser.add_argument_group("actions"))
    _add_backend_options(parser.add_argument_group("backend"))
    _add_watching_options(parser.add_argument_group("watching"))
    _add_general_options(parser.add_argument_group("general"))
    return parser


def _add_pipeline_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-p", "--pass-pipeline", metavar="PIPELINE", help="the passes, in order")
    group.add_argument("--config", metavar="FILE", help="passes and settings as YAML")
    group.add_argument(
        "--bind",
        metavar="NAME=N",
        action="append",
        default=[],
        help="give a symbolic dimension a number, before the first pass (repeatable)",
    )
    group.add_argument(
        "--verify",
        choices=("none", "structural", "numeric"),
        help="check after each pass: nothing, the structure (default), or the outputs too",
    )
    group.add_argument(
        "--require-match",
        metavar="N|PASS:N",
        action="append",
        default=[],
        help="end with code 3 and write nothing if a pass did fewer rewrites (repeatable)",
    )
    group.add_argument(
        "--grant",
        metavar="WORDS",
        action="append",
        default=[],
        help="vouch for an assumption that begins with these words, or 'all' (repeatable)",
    )
    group.add_argument("--max-memory", metavar="SIZE", help="bound on what one step may hold: 2GB")
    group.add_argument(
        "--calibrate",
        metavar="PATH",
        help="data for passes that must see activations: .npz or a folder of them, .jsonl with "
        "token ids in each line, or a text (with --tokenizer)",
    )
    group.add_argument(
        "--calibrate-samples", type=int, metavar="N", help="feeds of it to use (all)"
    )
    group.add_argument(
        "--calibrate-window", type=int, metavar="N", help="tokens of a text in one feed (512)"
    )
    group.add_argument(
        "--resume",
        metavar="DIR",
        help="keep what is computed on the calibration data in this folder; after a run that "
        "was killed, the same command takes it from there",
    )
    group.add_argument("--seed", type=int, metavar="N", help="seed of everything random (0)")
    group.add_argument("--threads", type=int, metavar="N", help="threads when the model is run")
    group.add_argument(
        "--load-pass-plugin",
        metavar="MODULE",
        action="append",
        default=[],
        help="import a module, or a .py file, that defines passes, operators in PyTorch or kernels "
        "(repeatable)",
    )


def _add_action_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--list-passes",
        nargs="?",
        const="text",
        choices=("text", "json"),
        help="list the passes and their options; --list-passes=json for programs",
    )
    group.add_argument(
        "--plan", action="store_true", help="print what the input costs; run and write nothing"
    )
    group.add_argument(
        "--explain",
        metavar="PASS[@NODE]",
        help="run up to this pass and print what it did, what it did not and why; write nothing",
    )
    group.add_argument(
        "--bisect",
        action="store_true",
        help="find the first pass, and the first of its rewrites, after which outputs differ or "
        "verification fails; write nothing",
    )
    group.add_argument(
        "--reduce",
        metavar="FILE.onnxtxt",
        help="make a model and pipeline that fail as small as possible; write the model",
    )
    group.add_argument(
        "--check-contract",
        action="store_true",
        help="hold each pass to its whole contract on this model, run again and again; "
        "write nothing",
    )
    group.add_argument(
        "--feeds",
        metavar="FILE.json",
        help="for --check-contract, what the inputs may be, as beside a counterexample",
    )
    group.add_argument(
        "--sensitivity",
        nargs="?",
        const="",
        metavar="OPTIONS",
        help="print what rounding each layer alone to 3, 4 and 8 bits costs on the data of "
        "--calibrate, most sensitive first; with options of mixed-precision other bits, formats "
        "and samples: --sensitivity='bits=2,4 samples=8'",
    )
    group.add_argument(
        "--report",
        metavar="FILE",
        action="append",
        default=[],
        help="write a report: .json, .md or .html (repeatable)",
    )
    group.add_argument(
        "--measure",
        metavar="NAME=N,…",
        action="append",
        default=[],
        help="for the report, time both models at these dimensions, compare their outputs and "
        "predict; 'default' chooses dimensions (repeatable)",
    )
    group.add_argument(
        "--text", metavar="FILE", help="for the report, measure perplexity on this text"
    )
    group.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="the tokenizer of --text and --calibrate; by default the input's",
    )


def _add_backend_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--backend",
        choices=("onnxruntime", "fx", "triton"),
        help="what runs the model where passes ask for its activations: onnxruntime (default), fx "
        "(PyTorch) or triton (kernels for GPUs). With --emit, what code is written for; passes ask "
        "ONNX Runtime then",
    )
    group.add_argument(
        "--emit",
        metavar="DIR",
        help="for --backend=triton, write the model as Python that calls kernels, its weights, and "
        "the kernels compiled ahead of time; needs no GPU",
    )
    group.add_argument(
        "--arch",
        metavar="sm_XX,…",
        action="append",
        default=[],
        help="for --emit, the GPUs to compile for: sm_80, sm_90, sm_100 or A100, H100, B200 (all)",
    )
    group.add_argument(
        "--shapes",
        metavar="NAME=N,…",
        action="append",
        default=[],
        help="for --emit, the dimensions to compile kernels for (repeatable); by default a prompt "
        "of 512 tokens and, with a cache, one token behind it",
    )


def _add_watching_options(group: argparse._ArgumentGroup) -> None:
    for when in ("before", "after"):
        group.add_argument(
            f"--print-ir-{when}",
            metavar="PASS",
            action="append",
            default=[],
            help=f"print the module {when} this pass (repeatable)",
        )
    group.add_argument(
        "--print-ir-after-all", action="store_true", help="print the module after every pass"
    )
    group.add_argument(
        "--print-ir-after-change",
        action="store_true",
        help="print the module after every pass that changed it",
    )
    group.add_argument("--timing", action="store_true", help="print the time of each pass")
    group.add_argument(
        "--pass-statistics", action="store_true", help="print what each pass counted"
    )
    group.add_argument(
        "--pass-pipeline-crash-reproducer",
        metavar="FILE.onnx",
        help="where a pass fails, write the model before it, and FILE.yaml to replay it",
    )
    group.add_argument(
        "--remarks",
        choices=("none", "missed", "all"),
        default="none",
        help="print what passes report: only warnings (default), also what they missed, or all",
    )


def _add_general_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--follow-symlinks",
        action="store_true",
        help="allow external data that symbolic links place outside the model's folder",
    )
    group.add_argument(
        "--keep-gguf-blocks",
        action="store_true",
        help="keep the quantized blocks of a .gguf file instead of decoding them",
    )
    group.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    group.add_argument("-q", "--quiet", action="store_true", help="print errors only")
    group.add_argument("--debug", action="store_true", help="print the traceback of an error")
    group.add_argument("--version", action=Version)
