"""The benchmark of quantizers: its rows, what is kept, and a quantizer that fails is told."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench import quantize, quantize_judge
from bench.quantize_peers import QUANTIZERS
from bench.quantize_results import Results, Unmade, stored_bytes
from bench.quantize_settings import REFERENCE, SETTINGS, choose
from bench.quantize_subjects import open_subject

from lwc.evaluate.perplexity import token_losses


def test_names_tell_rows_apart() -> None:
    assert next(iter(SETTINGS)) == REFERENCE
    assert all(setting.name == name for name, setting in SETTINGS.items())
    kinds = {setting.quantizer for setting in SETTINGS.values()}
    assert kinds <= {None, "lwc", "gguf", "genai", *QUANTIZERS}


def test_rows_are_chosen_by_form_and_maker() -> None:
    chosen = [setting.name for setting in choose(["4-g128"], ["ort"])]
    assert chosen == [REFERENCE, "ort/4-g128/rotate+rtn", "ort/4-g128/rotate+hqq"]
    assert [setting.name for setting in choose(["lwc/8/rtn"], None)] == [REFERENCE, "lwc/8/rtn"]
    assert len(choose(None, None)) == len(SETTINGS)
    with pytest.raises(SystemExit, match="'4-g77' has no row"):
        choose(["4-g77"], None)


def test_the_losses_of_a_process_without_lwc_are_those_of_lwc() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 20, (5, 30)).astype(np.float32)
    targets = rng.integers(0, 30, 5)
    found = quantize_judge._losses(logits, targets)
    np.testing.assert_allclose(found, token_losses(logits, targets), rtol=1e-12)


@pytest.mark.models
@pytest.mark.slow
def test_a_result_is_kept_and_a_failure_is_told(tmp_path: Path) -> None:
    subject = open_subject(layers=2, samples=1, tokens=32)
    base = subject.base("plain")
    results = Results(replace(subject, source=replace(subject.source, home=tmp_path)), 1, 300)
    setting = SETTINGS["lwc/4-g32/rtn"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(subject), "base", lambda self, name: base)
        made = results.make(setting)
        assert made["seconds"] > 0
        assert not [each for each in made["model"].parent.iterdir() if each.is_dir()]
        assert made["peak"] > 1e8
        assert stored_bytes(made["model"]) < stored_bytes(base)
        written = made["model"].stat().st_mtime_ns
        assert results.make(setting)["model"].stat().st_mtime_ns == written
        wrong = replace(setting, options={"passes": "no-such-pass"})
        with pytest.raises(Unmade, match="unknown pass 'no-such-pass'"):
            results.make(wrong)
        row = quantize.quality_row(results, wrong, None)
    assert row["error"].startswith("UsageError")
    assert json.dumps(row)
