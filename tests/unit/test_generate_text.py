"""Text generation: tokenizers and chats, streams, batches, the program."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quantized

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")
from tiny_llama import WORDS, as_module, tiny_llama  # noqa: E402

from lwc.cli.generate import main  # noqa: E402
from lwc.core.errors import InputError, LwcError, UsageError  # noqa: E402
from lwc.frontend.onnx_writer import save  # noqa: E402
from lwc.generate.chat_template import render  # noqa: E402
from lwc.generate.generator import TextGenerator  # noqa: E402
from lwc.generate.policies import HeavyHitters, WindowCache  # noqa: E402
from lwc.generate.result import Generated, Settings  # noqa: E402
from lwc.generate.sampling import Sampling  # noqa: E402
from lwc.generate.tokenizer import TextTokenizer, load_text_tokenizer, tokenizer_of  # noqa: E402

# Tokenizers and chats


def write_tokenizer(folder: Path, **config: Any) -> Path:
    """Write a tokenizer of letters, the tiny llama's vocabulary long, with an end of text."""
    letters = ["<s>", "</s>", *(chr(33 + n) for n in range(WORDS - 3)), " "]
    vocabulary = {letter: number for number, letter in enumerate(letters)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    made.decoder = tokenizers.decoders.Fuse()
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]"
    "{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
    "{% if add_generation_prompt %}[>]{% endif %}"
)


def test_a_tokenizer_comes_with_its_configuration(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path, chat_template=TEMPLATE)
    (folder / "generation_config.json").write_text('{"eos_token_id": [4, 5]}')
    found = load_text_tokenizer(folder)
    assert found.stop_tokens == {1, 4, 5}
    assert found.encode("A", True) == [0, *found.encode("A", False)]
    assert found.decode(found.encode("A B", True)) == "A B"
    messages = [{"role": "user", "content": "HI"}]
    assert found.chat_text(messages) == "<s>[user]HI[>]"
    assert found.chat(messages)[0] == 0
    (folder / "chat_template.jinja").write_text("{{ messages | tojson }}")
    assert load_text_tokenizer(folder / "tokenizer.json").chat_text(messages) == (
        '[{"role": "user", "content": "HI"}]'
    )


def test_named_templates_have_a_default(tmp_path: Path) -> None:
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    assert load_text_tokenizer(write_tokenizer(tmp_path, chat_template=named)).chat_text([]) == (
        "yes"
    )


def test_what_a_tokenizer_lacks_is_said(tmp_path: Path) -> None:
    plain = load_text_tokenizer(write_tokenizer(tmp_path / "plain"))
    with pytest.raises(LwcError, match="has no chat template"):
        plain.chat([{"role": "user", "content": "x"}])
    with pytest.raises(InputError, match="no such file"):
        load_text_tokenizer(tmp_path / "none")
    (tmp_path / "model.onnx").touch()
    with pytest.raises(InputError, match=r"no tokenizer\.json beside it"):
        load_text_tokenizer(tmp_path / "model.onnx")
    (tmp_path / "plain" / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json: cannot be read"):
        load_text_tokenizer(tmp_path / "plain")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{% for %}", "chat template fails"),
        ("{{ ''.__class__.__mro__ }}", "chat template fails"),
    ],
)
def test_a_template_that_fails_is_one_line(template: str, reason: str) -> None:
    with pytest.raises(LwcError, match=reason):
        render(template, [], {})


# Generation


@pytest.fixture(scope="module")
def llama() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return load_text_tokenizer(write_tokenizer(tmp_path_factory.mktemp("words")))


def expected_tokens(llama: Any, prompt: Sequence[int], count: int) -> list[int]:
    ids = torch.tensor([list(prompt)])
    made = llama.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False
    )
    return [int(each) for each in made[0, len(prompt) :]]


NO_END: frozenset[int] = frozenset()


@pytest.mark.parametrize("ahead", [True, False])
@pytest.mark.parametrize("spelling", ["gqa", "gqa-rotary", "plain", "standard", "no cache"])
def test_greedy_tokens_are_those_of_transformers(
    spelling: Any, ahead: bool, llama: Any, words: TextTokenizer
) -> None:
    cache = spelling != "no cache"
    module = as_module(llama, spelling if cache else "plain", cache=cache)
    with TextGenerator(module, words, threads=1, ahead=ahead) as generator:
        for prompt in ([7], [3, 9, 20, 31, 4], list(range(2, 60))):
            found = generator.generate(prompt, Settings(20, stop_tokens=NO_END, chunk=16))
            assert list(found.tokens) == expected_tokens(llama, prompt, 20)
            assert (found.stopped, found.prompt_tokens) == ("length", len(prompt))
            assert found.text == words.decode(found.tokens)
            fed = len(prompt) + 19 if cache else 0
            assert found.cache_tokens == fed
            assert found.cache_bytes >= fed * 2 * 2 * 2 * 16 * 4


def test_text_comes_in_pieces_and_the_figures_in_the_end(llama: Any, words: TextTokenizer) -> None:
    with TextGenerator(as_module(llama, "gqa"), words, threads=1) as generator:
        stream = generator.stream("AB", Settings(12, stop_tokens=NO_END))
        with pytest.raises(RuntimeError, match="has not ended"):
            _ = stream.result
        pieces = list(stream)
        assert len(pieces) > 3
        found = stream.result
        assert "".join(pieces) == found.text
        assert found.prompt_tokens == 3  # the first one begins the text
        assert found.seconds_to_first > 0
        assert found.decode_per_second is not None
        assert json.loads(json.dumps(found.as_dict()))["tokens"] == list(found.tokens)


def test_a_stream_that_is_left_ends(llama: Any, words: TextTokenizer) -> None:
    with TextGenerator(as_module(llama, "gqa"), words, threads=1) as generator:
        left = generator.stream("AB", Settings(50, stop_tokens=NO_END))
        next(left)
        again = generator.generate("AB", Settings(5, stop_tokens=NO_END))
        assert len(again.tokens) == 5
        assert list(left) == []


@pytest.mark.parametrize("ahead", [True, False])
def test_stop_tokens_and_strings_end_a_text(ahead: bool, llama: Any, words: TextTokenizer) -> None:
    with TextGenerator(as_module(llama, "gqa"), words, threads=1, ahead=ahead) as generator:
        whole = generator.generate("AB", Settings(20, stop_tokens=NO_END))
        end = next(n for n in range(3, 20) if whole.tokens[n] not in whole.tokens[:n])
        found = generator.generate("AB", Settings(20, stop_tokens=frozenset({whole.tokens[end]})))
        assert (found.stopped, found.tokens) == ("stop token", whole.tokens[: end + 1])
        assert found.text == words.decode(whole.tokens[:end])
        stop = whole.text[2:4]
        found = generator.generate("AB", Settings(20, stop=(stop,), stop_tokens=NO_END))
        assert (found.stopped, found.text) == ("stop string", whole.text.partition(stop)[0])
        assert words.decode(found.tokens).endswith(stop)


def test_draws_are_repeated_by_their_seed(llama: Any, words: TextTokenizer) -> None:
    with TextGenerator(as_module(llama, "gqa"), words, threads=1) as generator:

        def tokens(seed: int) -> tuple[int, ...]:
            sampling = Sampling(2.0, top_k=30, seed=seed)
            return generator.generate("AB", Settings(12, sampling, stop_tokens=NO_END)).tokens

        assert tokens(1) == tokens(1) != tokens(2)


@pytest.mark.parametrize("policy", [WindowCache(200), HeavyHitters(100, 100)])
def test_a_large_budget_gives_the_same_text(policy: Any, llama: Any, words: TextTokenizer) -> None:
    module, options = as_module(llama, "gqa"), Settings(30, stop_tokens=NO_END)
    with (
        TextGenerator(module, words, threads=1) as full,
        TextGenerator(module, words, cache=policy, threads=1) as kept,
    ):
        one, two = full.generate("HELLO", options), kept.generate("HELLO", options)
    assert (one.tokens, one.cache_bytes) == (two.tokens, two.cache_bytes)


@pytest.mark.parametrize("policy", [WindowCache(12, 2), HeavyHitters(6, 6)])
def test_a_small_budget_bounds_the_cache(policy: Any, llama: Any, words: TextTokenizer) -> None:
    with TextGenerator(as_module(llama, "gqa"), words, cache=policy, threads=1) as generator:
        found = generator.generate("HELLO", Settings(90, stop_tokens=NO_END))
    assert (len(found.tokens), found.cache_tokens) == (90, 12)
    assert found.cache_bytes == (12 + 6) * 2 * 2 * 2 * 16 * 4  # and room for the prompt


def test_an_empty_prompt_is_refused(llama: Any, words: TextTokenizer) -> None:
    with (
        TextGenerator(as_module(llama, "gqa"), words, threads=1) as generator,
        pytest.raises(InputError, match="no tokens"),
    ):
        generator.generate([])


def test_a_model_without_a_tokenizer_needs_one(llama: Any) -> None:
    with pytest.raises(InputError, match="came without a tokenizer"):
        tokenizer_of(as_module(llama, "gqa"))


# Batches

RAGGED = [[5, 6, 7], [9], [20, 21, 22, 23, 24, 25, 26]]


def one_by_one(generator: TextGenerator, prompts: Any, options: Settings) -> list[Any]:
    return [
        (f.tokens, f.text, f.stopped) for f in (generator.generate(p, options) for p in prompts)
    ]


def told(found: Sequence[Generated]) -> list[Any]:
    return [(each.tokens, each.text, each.stopped) for each in found]


@pytest.mark.parametrize("spelling", ["gqa", "gqa-rotary"])
def test_prompts_of_any_lengths_run_together_in_place(
    spelling: Any, llama: Any, words: TextTokenizer
) -> None:
    with TextGenerator(as_module(llama, spelling), words, threads=1) as generator:
        options = Settings(15, stop=("A",), stop_tokens=frozenset({30, 31}), chunk=4)
        found = generator.generate_batch(RAGGED, options)
        assert told(found) == one_by_one(generator, RAGGED, options)


@pytest.mark.parametrize("spelling", ["gqa", "plain", "standard", "no cache"])
def test_prompts_of_one_length_run_together_always(
    spelling: Any, llama: Any, words: TextTokenizer
) -> None:
    cache = spelling != "no cache"
    module = as_module(llama, spelling if cache else "plain", cache=cache)
    prompts, options = ["AB", "CD", "EF"], Settings(10, stop_tokens=NO_END)
    with TextGenerator(module, words, threads=1) as generator:
        found = generator.generate_batch(prompts, options)
        assert told(found) == one_by_one(generator, prompts, options)


def test_what_cannot_run_together_is_said(llama: Any, words: TextTokenizer) -> None:
    with TextGenerator(as_module(llama, "plain"), words, threads=1) as generator:
        with pytest.raises(LwcError, match="prompts of 1 and 7 tokens cannot run together"):
            generator.generate_batch(RAGGED)
        with pytest.raises(UsageError, match="at least one prompt"):
            generator.generate_batch([])
    with (
        TextGenerator(as_module(llama, "gqa"), words, cache=WindowCache(8)) as generator,
        pytest.raises(LwcError, match="holds one sequence"),
    ):
        generator.generate_batch([[1], [2]])


# The program


@pytest.fixture(scope="module")
def folder(llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_tokenizer(tmp_path_factory.mktemp("model"), chat_template=TEMPLATE)
    save(as_module(llama, "gqa"), made / "model.onnx")
    save(as_module(llama, "plain", cache=False), made / "bare.onnx")
    return made


def test_the_program_writes_text_figures_and_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "out.json"
    words = [str(folder), "--prompt", "AB", "--max-new-tokens", "9", "--threads", "1"]
    assert main([*words, "--json", str(report), "--cache", "window{6 sink=1}"]) == 0
    shown = capsys.readouterr()
    content = json.loads(report.read_text())
    assert shown.out == content["text"] + "\n"
    assert "3 tokens of prompt" in shown.err
    assert "cache in place: 6 tokens kept" in shown.err
    assert set(content) == set(Generated.__dataclass_fields__)


def test_a_model_without_a_cache_runs_with_a_remark(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(folder / "bare.onnx"), "--prompt", "AB", "--max-new-tokens", "4", "--chat"]
    assert main(words) == 0
    shown = capsys.readouterr()
    assert "the model has no cache" in shown.err
    assert "add-kv-cache" in shown.err
    assert main([*words, "-q", "--system", "X"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--prompt", "A", "--cache", "window{3"], "never closed"),
        (["--prompt", "A", "--system", "x"], "--system is a part of a chat"),
        (["--prompt", "A", "--top-p", "2"], "top-p lies above 0"),
        (["--prompt", "A", "--max-new-tokens", "0"], "max-new-tokens is at least 1"),
        (["--prompt", "A", "--threads", "0"], "--threads is at least 1"),
        (["--prompt", "A", "--json", "/no/such/folder/x.json"], "no such folder"),
        (["--prompt", "A", "--json", "/tmp"], "cannot write '/tmp': it is a folder"),
        (["--prompt", "A", "--stop", ""], "stop takes texts of at least one character"),
        (["--prompt", "A", "--prompt-file", "x"], "not allowed with"),
        ([], "--prompt --prompt-file is required"),
        (["--prompt-file", "/no/such/file"], "cannot be read"),
    ],
)
def test_wrong_usage_is_one_line(
    words: list[str], reason: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(folder), *words]) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize("cache", [True, False])
def test_the_end_of_a_table_of_positions_is_named(
    cache: bool, llama: Any, words: TextTokenizer
) -> None:
    with TextGenerator(as_module(llama, "plain", cache=cache), words) as generator:
        assert (
            len(
                generator.generate(
                    list(range(2, 60)) * 2, Settings(12, stop_tokens=frozenset())
                ).tokens
            )
            == 12
        )
        reason = "a table of positions ends after 128 tokens, and there are 129"
        with pytest.raises(LwcError, match=reason):
            generator.generate(list(range(2, 60)) * 2, Settings(14, stop_tokens=frozenset()))
        with pytest.raises(LwcError, match="a table of positions ends after 128 tokens"):
            generator.generate(list(range(2, 62)) * 3)
        with pytest.raises(LwcError, match=reason):
            generator.generate_batch(
                [list(range(2, 60)) * 2], Settings(14, stop_tokens=frozenset())
            )
        with pytest.raises(LwcError) as caught:
            generator.generate([WORDS + 5])
        assert "positions" not in str(caught.value)


ENCODER = """<ir_version: 10, opset_import: ["" : 21]>
encoder (int64[batch,seq] input_ids) => (float[batch,seq,67] logits) <float[67,67] table> {
    x = Gather (table, input_ids)
    turned = Transpose <perm = [0, 2, 1]> (x)
    scores = MatMul (x, turned)
    shares = Softmax (scores)
    logits = MatMul (shares, x)
}"""


def test_an_encoder_is_refused(words: TextTokenizer) -> None:
    table = np.random.default_rng(0).standard_normal((WORDS, WORDS)) * 0.1
    module = quantized.module_of(ENCODER, table=table.astype(np.float32))
    with (
        TextGenerator(module, words) as generator,
        pytest.raises(LwcError, match="depends on tokens behind it: it is an encoder"),
    ):
        generator.generate("AB")


@pytest.mark.parametrize("option", ["--help", "--version", "--no-such-option"])
def test_the_program_starts_without_heavy_imports(option: str) -> None:
    code = (
        "import json, sys\nfrom lwc.cli.generate import main\n"
        f"try:\n    main(['m', {option!r}])\nexcept SystemExit:\n    pass\n"
        "print('@' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout.rpartition("@")[2]))
    assert loaded.isdisjoint({"numpy", "onnx_ir", "onnxruntime", "sympy", "tokenizers", "torch"})
