"""lwc-generate: text from a language model, from the command line.

The text goes to stdout as it comes, everything else to stderr. Nothing heavy is imported before the
arguments are read.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lwc.cli.guard import EXIT_CODES, guarded
from lwc.cli.parser import Parser, Version
from lwc.core.errors import InputError, UsageError
from lwc.core.text import printable

if TYPE_CHECKING:
    from lwc.generate.generator import Generated, Settings, TextGenerator

__all__ = ["main"]

PROGRAM = "lwc-generate"

_EPILOG = f"""\
Cache policies:
  full                       every token
  window{{512 sink=4}}         the last 512 tokens, the first 4 among them always
  h2o{{heavy=256 recent=256}}  in each layer and head, the last 256 tokens and the 256 others
                             that got most attention

{EXIT_CODES}"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(PROGRAM, lambda: _run(words), debug="--debug" in words)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog=PROGRAM,
        description="Continue a prompt with a language model.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help=".onnx or .gguf file, or a folder with a model")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt")
    prompt.add_argument("--prompt-file", metavar="FILE", help="read the prompt; - is stdin")
    parser.add_argument(
        "--chat", action="store_true", help="the prompt is what a user says, in the chat template"
    )
    parser.add_argument("--system", metavar="TEXT", help="with --chat, what the system says first")
    parser.add_argument("--tokenizer", metavar="PATH", help="the tokenizer; by default the model's")
    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--temperature", type=float, metavar="T", default=0.0, help="0 (default) is greedy"
    )
    sampling.add_argument("--top-k", type=int, metavar="K", help="of the K most likely tokens")
    sampling.add_argument(
        "--top-p", type=float, metavar="P", help="of the fewest tokens with this probability"
    )
    sampling.add_argument("--seed", type=int, metavar="N", default=0, help="seed of the draws (0)")
    ending = parser.add_argument_group("ending")
    ending.add_argument(
        "--max-new-tokens", type=int, metavar="N", default=128, help="the most tokens (128)"
    )
    ending.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before it (repeatable)"
    )
    running = parser.add_argument_group("running")
    running.add_argument(
        "--cache", metavar="POLICY", default="full", help="what the cache keeps; see below (full)"
    )
    running.add_argument(
        "--threads", type=int, metavar="N", help="threads; one per core by default"
    )
    running.add_argument("--json", metavar="FILE", help="write the text and its figures as JSON")
    running.add_argument("-q", "--quiet", action="store_true", help="print no figures or remarks")
    running.add_argument("--debug", action="store_true", help="print the traceback of an error")
    running.add_argument("--version", action=Version)
    return parser


def _run(words: Sequence[str]) -> int:
    options = _parser().parse_args(words)
    if options.system is not None and not options.chat:
        raise UsageError("--system is a part of a chat", remedy="add --chat")
    if options.threads is not None and options.threads < 1:
        raise UsageError("--threads is at least 1")
    if options.json and not Path(options.json).resolve().parent.is_dir():
        raise UsageError(f"cannot write '{options.json}': there is no such folder")
    if options.json and Path(options.json).is_dir():
        raise UsageError(f"cannot write '{options.json}': it is a folder")
    settings = _settings(options)
    prompt = _prompt(options)

    from lwc.frontend.load import load
    from lwc.generate.generator import TextGenerator
    from lwc.generate.policy_text import parse_policy

    policy = parse_policy(options.cache)
    module = load(options.model)
    with TextGenerator(
        module, options.tokenizer, cache=policy, threads=options.threads
    ) as generator:
        if not options.quiet:
            for remark in generator.remarks:
                if remark.kind == "warning":
                    print(printable(str(remark)), file=sys.stderr)
        found = generator.generate(_tokens(generator, prompt, options), settings, _show)
    print(flush=True)
    if not options.quiet:
        for line in _figures(found):
            print(line, file=sys.stderr)
    if options.json:
        content = json.dumps(found.as_dict(), ensure_ascii=False, indent=2)
        Path(options.json).write_text(content + "\n", encoding="utf-8")
    return 0


def _settings(options: argparse.Namespace) -> Settings:
    from lwc.generate.generator import Settings
    from lwc.generate.sampling import Sampling

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    return Settings(options.max_new_tokens, sampling, tuple(options.stop))


def _prompt(options: argparse.Namespace) -> str:
    if options.prompt is not None:
        return str(options.prompt)
    if options.prompt_file != "-":
        from lwc.calibration.text import read_text

        return read_text(options.prompt_file)
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError("cannot be read: it is not UTF-8 text", file="stdin") from error


def _tokens(
    generator: TextGenerator, prompt: str, options: argparse.Namespace
) -> str | Sequence[int]:
    if not options.chat:
        return prompt
    system = [{"role": "system", "content": options.system}] if options.system is not None else []
    return generator.tokenizer.chat([*system, {"role": "user", "content": prompt}])


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _figures(found: Generated) -> Iterator[str]:
    from lwc.core.text import size

    yield (
        f"{found.prompt_tokens} tokens of prompt, the first new one after "
        f"{found.seconds_to_first:.3f} s: {found.prefill_per_second:.1f} tokens/s"
    )
    rate = "" if found.decode_per_second is None else f": {found.decode_per_second:.1f} tokens/s"
    yield f"{len(found.tokens)} new tokens, ended by {found.stopped}{rate}"
    if found.cache_tokens:
        yield (
            f"cache {found.cache_mode}: {found.cache_tokens} tokens kept, "
            f"buffers of {size(found.cache_bytes)}"
        )


if __name__ == "__main__":
    sys.exit(main())
