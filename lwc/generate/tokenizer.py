"""Tokenizers that speak: text to tokens and back, where text ends, and the template of a chat."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from lwc.core.errors import InputError, LwcError
from lwc.core.module import Module
from lwc.frontend.tokenizer_files import (
    TOKENIZER_FILE,
    OpenTokenizer,
    open_tokenizer,
    read_tokenizer_file,
)
from lwc.generate.detokenize import Decode

__all__ = ["Message", "TextTokenizer", "load_text_tokenizer", "tokenizer_of"]

Message: TypeAlias = Mapping[str, str]
"""One turn of a chat: its `role` (`system`, `user`, `assistant`) and its `content`."""


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer, and what comes with it.

    Attributes:
        encode: Turns a text into tokens; with True, with the special tokens that begin one.
        decode: Turns tokens into text, without special tokens.
        stop_tokens: Tokens that end a text, as the model's configuration says.
        chat_template: Jinja source that writes a chat; None if there is none.
        specials: Special tokens by role, such as `bos_token`, for the template.
        file: Where it came from.
    """

    encode: Callable[[str, bool], list[int]]
    decode: Decode
    stop_tokens: frozenset[int] = frozenset()
    chat_template: str | None = None
    specials: Mapping[str, str] = field(default_factory=dict)
    file: str | None = None

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a chat up to where the model's answer begins.

        Raises:
            LwcError: There is no template, or it refuses the messages.
        """
        return self.encode(self.chat_text(messages), False)

    def chat_text(self, messages: Sequence[Message]) -> str:
        """Return the text of a chat up to where the model's answer begins; see `chat`."""
        if self.chat_template is None:
            raise LwcError(
                "the tokenizer has no chat template",
                file=self.file,
                remedy="put a chat_template.jinja beside it, or give a plain prompt",
            )
        from lwc.generate.chat_template import render

        return render(self.chat_template, messages, self.specials, self.file)


def tokenizer_of(module: Module) -> TextTokenizer:
    """Read the tokenizer that came with a model.

    Raises:
        InputError: None did, or it cannot be read.
    """
    companions = module.source.companions
    if TOKENIZER_FILE in companions:
        return _with_files(read_tokenizer_file(companions[TOKENIZER_FILE]), companions)
    if module.source.path is None:
        raise InputError("the model came without a tokenizer", remedy="give one")
    return load_text_tokenizer(module.source.path)


def load_text_tokenizer(path: str | Path) -> TextTokenizer:
    """Read a tokenizer with its configuration, which is what lies beside it.

    Args:
        path: See `lwc.frontend.tokenizer_files.open_tokenizer`.

    Raises:
        InputError: There is no tokenizer at `path`, or it cannot be read.
        MissingExtraError: The library that reads it is not installed.
    """
    opened = open_tokenizer(path)
    folder = opened.file if opened.file.is_dir() else opened.file.parent
    beside = {file.name: str(file) for file in folder.iterdir() if file.is_file()}
    if opened.library == "tokenizers":
        return _with_files(opened, beside)
    return _with_what_transformers_knows(opened, beside)


def _with_files(opened: OpenTokenizer, files: Mapping[str, str]) -> TextTokenizer:
    config = _json(files, "tokenizer_config.json")
    specials = {
        name: text
        for name, value in config.items()
        if name.endswith("_token") and (text := _special_text(value)) is not None
    }
    ends = _end_tokens(files)
    end = opened.reader.token_to_id(specials["eos_token"]) if "eos_token" in specials else None
    return TextTokenizer(
        encode=opened.encode,
        decode=opened.decode,
        stop_tokens=frozenset(ends if end is None else (*ends, end)),
        chat_template=_template(files, config),
        specials=specials,
        file=str(opened.file),
    )


def _with_what_transformers_knows(opened: OpenTokenizer, files: Mapping[str, str]) -> TextTokenizer:
    ends = () if opened.file.suffix == ".gguf" else _end_tokens(files)
    end = opened.reader.eos_token_id
    template = opened.reader.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    return TextTokenizer(
        encode=opened.encode,
        decode=opened.decode,
        stop_tokens=frozenset(ends if end is None else (*ends, end)),
        chat_template=template,
        specials={name: str(value) for name, value in opened.reader.special_tokens_map.items()},
        file=str(opened.file),
    )


def _json(files: Mapping[str, str], name: str) -> dict[str, Any]:
    """Return what a JSON file holds, nothing where there is none.

    Raises:
        InputError: It is damaged.
    """
    if name not in files:
        return {}
    try:
        found = json.loads(Path(files[name]).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", file=files[name]) from error
    if not isinstance(found, dict):
        raise InputError("is no JSON object", file=files[name])
    return found


def _end_tokens(files: Mapping[str, str]) -> tuple[int, ...]:
    """Return the tokens that end a text as the model's configuration says."""
    name = "generation_config.json" if "generation_config.json" in files else "config.json"
    found = _json(files, name).get("eos_token_id")
    return tuple(found) if isinstance(found, list) else () if found is None else (int(found),)


def _special_text(value: Any) -> str | None:
    """Return a special token's text: it is a string, or an object with one."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template(files: Mapping[str, str], config: Mapping[str, Any]) -> str | None:
    """Return the chat template: a file of its own, or a part of the configuration."""
    if "chat_template.jinja" in files:
        return Path(files["chat_template.jinja"]).read_text(encoding="utf-8")
    found = _json(files, "chat_template.json").get("chat_template", config.get("chat_template"))
    if isinstance(found, list):  # several, by name
        named = {each.get("name"): each.get("template") for each in found}
        found = named.get("default")
    return found if isinstance(found, str) else None
