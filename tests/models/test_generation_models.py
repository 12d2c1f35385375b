"""SmolLM2 speaks: as transformers does, in a chat, and from a fifth of its cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from bench.decode_models import Source, cached_export, huggingface_folder, open_source  # noqa: E402
from run_page import Page, PageError  # noqa: E402
from support import once_a_run  # noqa: E402

from lwc.core.module import Module  # noqa: E402
from lwc.frontend.load import load  # noqa: E402
from lwc.generate.generator import TextGenerator  # noqa: E402
from lwc.generate.perplexity import perplexity_with_cache  # noqa: E402
from lwc.generate.policies import CachePolicy, HeavyHitters, WindowCache  # noqa: E402
from lwc.generate.result import Settings  # noqa: E402
from lwc.generate.tokenizer import TextTokenizer, load_text_tokenizer, tokenizer_of  # noqa: E402

pytestmark = [pytest.mark.models, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "generation.md"
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time, 小さな 🐱")
NO_END: frozenset[int] = frozenset()


@pytest.fixture(scope="module")
def gguf(model_file: Callable[[str], Path]) -> Path:
    return model_file("smollm2")


@pytest.fixture(scope="module")
def page(gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder in which the page of the documentation was run, and where the page is wrong."""

    def run(folder: Path) -> None:
        folder.mkdir()
        (folder / "smollm2.gguf").symlink_to(gguf)
        wrong = ""
        try:
            Page(PAGE, folder.resolve(), {"PYTHONPATH": str(ROOT)}).run()
        except PageError as error:
            wrong = str(error)
        (folder / "wrong.txt").write_text(wrong, encoding="utf-8")

    folder = once_a_run("generation", run, tmp_path_factory)
    return folder, (folder / "wrong.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cached(page: tuple[Path, str]) -> Module:
    """The model that the page makes: with a cache that GroupQueryAttention writes in place."""
    return load(page[0] / "smollm2")


@pytest.fixture(scope="module")
def tokenizer(cached: Module) -> TextTokenizer:
    return tokenizer_of(cached)


@pytest.fixture(scope="module")
def expected(gguf: Path, tokenizer: TextTokenizer) -> list[list[int]]:
    return transformers_says(open_source(gguf), tokenizer)


def transformers_says(source: Source, tokenizer: TextTokenizer) -> list[list[int]]:
    """Continue the prompts greedily."""
    model = transformers.AutoModelForCausalLM.from_pretrained(huggingface_folder(source)).eval()
    found = []
    for prompt in PROMPTS:
        ids = torch.tensor([tokenizer.encode(prompt, True)])
        with torch.no_grad():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
                eos_token_id=None,
            )  # fmt: skip
        found.append([int(each) for each in made[0, ids.shape[1] :]])
    return found


def said(model: Any, tokenizer: TextTokenizer, **options: Any) -> tuple[list[list[int]], set[str]]:
    """Return the tokens after each prompt, and how the cache was kept."""
    with TextGenerator(model, tokenizer, **options) as generator:
        found = [generator.generate(prompt, Settings(24, stop_tokens=NO_END)) for prompt in PROMPTS]
    return [list(each.tokens) for each in found], {each.cache_mode for each in found}


def test_the_page_runs_and_shows_what_is_printed(page: tuple[Path, str]) -> None:
    assert page[1] == ""


def test_it_says_what_transformers_says(
    cached: Module, tokenizer: TextTokenizer, expected: Sequence[Sequence[int]]
) -> None:
    assert said(cached, tokenizer) == (expected, {"in place"})


def test_an_export_with_a_cache_says_it_too(gguf: Path, tokenizer: TextTokenizer) -> None:
    source = open_source(gguf, layers=2)
    expected = transformers_says(source, tokenizer)
    assert said(cached_export(source), tokenizer) == (expected, {"ping-pong"})


def test_it_answers_in_a_chat(cached: Module) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with TextGenerator(cached) as generator:
        pieces: list[str] = []
        answer = generator.generate(
            generator.tokenizer.chat(question), Settings(40), on_text=pieces.append
        )
        cut = generator.generate(generator.tokenizer.chat(question), Settings(40, stop=(" is",)))
    assert answer.text == "".join(pieces) == "The capital of France is Paris."
    assert answer.stopped == "stop token"
    assert (cut.text, cut.stopped) == ("The capital of France", "stop string")


def test_the_file_itself_has_a_tokenizer(gguf: Path, tokenizer: TextTokenizer) -> None:
    alone = load_text_tokenizer(gguf)
    question = [{"role": "user", "content": "naïve 中文 🐱"}]
    assert alone.chat(question) == tokenizer.chat(question)
    assert alone.stop_tokens == tokenizer.stop_tokens
    assert alone.decode(alone.encode("naïve 中文 🐱", True)) == "naïve 中文 🐱"


def test_several_prompts_at_once(
    cached: Module, tokenizer: TextTokenizer, expected: Sequence[Sequence[int]]
) -> None:
    with TextGenerator(cached, tokenizer) as generator:
        found = generator.generate_batch(PROMPTS, Settings(24, stop_tokens=NO_END))
    assert [list(each.tokens) for each in found] == expected


def test_heavy_hitters_lose_less_than_a_window(
    cached: Module, tokenizer: TextTokenizer, model_file: Callable[[str], Path]
) -> None:
    """From a fifth of the cache: far less than the last tokens, and less than with sinks."""
    text = model_file("lee").read_text(encoding="utf-8")
    tokens = tokenizer.encode(text[:6000], False)[:1024]
    assert len(tokens) == 1024
    budget = len(tokens) // 5
    policies: dict[str, CachePolicy] = {
        "recent": WindowCache(budget, sink=0),
        "sinks": WindowCache(budget, sink=4),
        "heavy": HeavyHitters(budget // 2, budget - budget // 2),
    }
    found = {
        name: perplexity_with_cache(cached, tokens, policy, chunk=32)
        for name, policy in policies.items()
    }
    assert found["recent"].value > 1.5 * found["sinks"].value
    assert found["heavy"].value < found["sinks"].value
