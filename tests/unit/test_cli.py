"""lwc-opt: what it writes, what goes to which stream, what ends with which code."""

from __future__ import annotations

import errno
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import onnx.parser
import pytest
from support import module_of

import lwc.optimizer
import lwc.report.measure
from lwc.cli.arguments import parse_counts, parse_matches, parse_shapes, parse_size
from lwc.cli.opt import main
from lwc.cli.progress import ProgressDisplay
from lwc.core import text
from lwc.core.errors import UsageError
from lwc.frontend.load import load
from lwc.frontend.onnx_writer import save
from lwc.pipeline.registry import default_registry

MODEL = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[n, 2] x) => (float[n, 2] y)
<float[2, 2] w = {1, 2, 3, 4}>
{
  a = Identity(x)
  b = Relu(a)
  y = MatMul(b, w)
}
"""

PLUGIN = '''
import os
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from lwc.core.errors import PassError
from lwc.pipeline.passes import Exact, Pass, PassContext, PassResult


@dataclass(frozen=True)
class Act(Pass):
    """Do what the option says."""

    name: ClassVar[str] = "test-act"
    contract: ClassVar[Exact] = Exact()

    how: str = "nothing"

    def run(self, module, ctx):
        if self.how == "crash":
            raise RuntimeError("on purpose")
        if self.how == "refuse":
            raise PassError("not this one")
        if self.how == "memory":
            raise MemoryError
        if self.how == "interrupt":
            raise KeyboardInterrupt
        if self.how == "wait":
            import time
            print("waiting", flush=True)
            time.sleep(60)
        if self.how == "miss":
            for node in module.graph:
                ctx.missed("it is too small", node, rule="shrink")
            ctx.warn("look here")
        if self.how == "miss all":
            for node in (module.graph[0], None, module.graph[1], None):
                ctx.missed("it is too small" if node else "there is no data", node)
        if self.how == "note":
            ctx.note("it was read")
            ctx.note("it is small already")
        if self.how == "spoil":
            value = module.graph.initializers["w"]
            module.replace_initializer(value, ir.tensor(value.const_value.numpy() * np.float32(2)))
            return PassResult(True)
        return PassResult(False)
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "in.onnx")
    (tmp_path / "lwc_test_act.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    default_registry.cache_clear()
    yield tmp_path
    default_registry.cache_clear()


class Ran:
    """What a run returned and printed."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def run(folder: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    def call(*arguments: str) -> Ran:
        code = main(arguments)
        return Ran(code, *capfd.readouterr())

    return call


def act(how: str) -> list[str]:
    return ["--load-pass-plugin=lwc_test_act.py", "-p", f"test-act{{how={how}}}"]


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("nothing", "found nothing to do"),
        ("note", "it is small already"),
        ("miss", "missed at Identity -> 'a': it is too small (and 2 more)"),
        ("'miss all'", "missed: there is no data (and 3 more)"),  # of the model before its nodes
    ],
)
def test_the_summary_says_why_a_pass_changed_nothing(run: Any, how: str, why: str) -> None:
    ran = run("in.onnx", "-o", "out.onnx", *act(how))
    assert ran.code == 0
    (line,) = [each for each in ran.err.splitlines() if each.startswith(" 1 test-act")]
    assert line.startswith(f" 1 test-act  unchanged: {why}, ")


def ops(path: Path | str) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def files(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()} - {"__pycache__", "lwc_test_act.py", "in.onnx"}


def test_a_model_goes_in_and_comes_out(run: Any, folder: Path) -> None:
    ran = run("in.onnx", "-o", "out.onnx", "-p", "canonicalize")
    assert (ran.code, ran.out) == (0, "")
    assert ops("out.onnx") == ["Relu", "MatMul"]
    first, second, third = ran.err.splitlines()
    assert first == "in.onnx: 3 nodes, 16 B of weights"
    assert second.startswith(" 1 canonicalize  3 -> 2 nodes, 16 B, ")
    assert third.startswith("wrote out.onnx: ")


def test_quiet_prints_nothing(run: Any) -> None:
    ran = run("in.onnx", "-o", "out.onnx", "-p", "canonicalize", "-q")
    assert (ran.code, ran.out, ran.err) == (0, "", "")


def test_the_output_may_be_the_input(run: Any) -> None:
    assert run("in.onnx", "-o", "in.onnx", "--pass-pipeline=canonicalize").code == 0
    assert ops("in.onnx") == ["Relu", "MatMul"]


def test_a_folder_is_written(run: Any, folder: Path) -> None:
    assert run("in.onnx", "-o", "new/", "-p", "canonicalize").code == 0
    assert ops(folder / "new" / "model.onnx") == ["Relu", "MatMul"]
    assert run("new", "-o", "text.onnxtxt").code == 0
    assert [node.op_type for node in load("text.onnxtxt").graph] == ["Relu", "MatMul"]


@pytest.mark.parametrize("output", [[], ["-o", "-"]])
def test_without_an_output_the_text_is_printed(run: Any, output: list[str]) -> None:
    ran = run("in.onnx", "-p", "canonicalize", *output)
    assert ran.code == 0
    assert "MatMul" in ran.out
    assert "Identity" not in ran.out
    assert "canonicalize" in ran.err


def test_dimensions_are_bound(run: Any) -> None:
    assert run("in.onnx", "-o", "out.onnx", "--bind", "n=3").code == 0
    assert list(load("out.onnx").graph.inputs[0].shape or ()) == [3, 2]
    ran = run("in.onnx", "-o", "out2.onnx", "--bind", "m=3")
    assert ran.code == 2
    assert "m" in ran.err
    assert not Path("out2.onnx").exists()


def test_a_configuration_is_read_and_the_command_line_wins(run: Any) -> None:
    Path("p.yaml").write_text("passes: [canonicalize]\nbind: {n: 3}\nverify: none\n")
    assert run("in.onnx", "-o", "out.onnx", "--config", "p.yaml", "--bind", "n=4").code == 0
    assert list(load("out.onnx").graph.inputs[0].shape or ()) == [4, 2]
    ran = run("in.onnx", "--config", "p.yaml", "-p", "canonicalize")
    assert (ran.code, ran.err) == (
        2,
        "lwc-opt: error: both -p and p.yaml give passes (drop one)\n",
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "no input is given"),
        (["in.onnx", "other.onnx"], "one input only, not 'other.onnx'"),
        (["in.onnx", "--verfy=none"], "unknown option '--verfy' (did you mean '--verify'?)"),
        (["in.onnx", "--verify=some"], "invalid choice: 'some'"),
        (["in.onnx", "-p", "canonicalise"], "did you mean 'canonicalize'?"),
        (["in.onnx", "--bind", "n"], "--bind takes NAME=N, not 'n'"),
        (["in.onnx", "--bind", "n=1", "--bind", "n=2"], "--bind gives 'n' twice"),
        (["in.onnx", "--max-memory", "big"], "'big' is no size in bytes"),
        (["in.onnx", "--report", "r.txt"], "no report format for 'r.txt'"),
        (["in.onnx", "--measure", "n=1"], "--measure needs a report"),
        (["in.onnx", "--plan", "-o", "out.onnx"], "--plan writes nothing"),
        (["in.onnx", "--plan", "--bisect"], "do not go together"),
        (["in.onnx", "--bisect"], "--bisect needs passes"),
        (["in.onnx", "-p", "canonicalize", "--feeds=f.json"], "(add --check-contract)"),
        (["in.onnx", "--plan", "--bind", "n=0"], "dimension 'n' cannot be 0"),
        (["in.onnx", "--plan", "--bind", "m=1"], "no input has a dimension 'm'"),
        (["in.onnx", "--config", "none.yaml"], "none.yaml: cannot read the configuration"),
        (["in.onnx", "--print-ir-after=x", "-p", "canonicalize"], "pass 'x' is not in"),
        (["in.onnx", "--explain=fold-linear", "-p", "canonicalize"], "is not in the pipeline"),
        (["in.onnx", "--explain="], "--explain needs a pass"),
        (["in.onnx", "--explain=canonicalize@"], "PASS or PASS@NODE, not 'canonicalize@'"),
        (["in.onnx", "--explain=@node"], "PASS or PASS@NODE, not '@node'"),
        (["in.onnx", "--reduce=", "-p", "canonicalize"], "--reduce needs a file"),
        (["in.onnx", "--reduce=./in.onnx", "-p", "canonicalize"], "(name another file)"),
        (["in.onnx", "--pass-pipeline-crash-reproducer="], "needs a file"),
        (["in.onnx", "--pass-pipeline-crash-reproducer=in.onnx"], "(name another file)"),
        (["in.onnx", "--pass-pipeline-crash-reproducer=x.txt"], "is an .onnx file"),
        (["in.onnx", "--pass-pipeline-crash-reproducer=no/x.onnx"], "there is no folder"),
        (
            ["in.onnx", "--plan", "--pass-pipeline-crash-reproducer=x.onnx"],
            "--plan writes nothing and does not go with --pass-pipeline-crash-reproducer",
        ),
        (["in.onnx", "-p", "canonicalize", "--require-match=x"], "takes one N, or PASS:N"),
        (["in.onnx", "--load-pass-plugin=lwc_test_none"], "No module named 'lwc_test_none'"),
        (["none.onnx", "-p", "canonicalize"], "none.onnx"),
        (["in.onnx", "-o", "out.txt"], "out.txt"),
        (["in.onnx", "--bind", "n=0"], "dimension 'n' cannot be 0"),
        (["in.onnx", "--bind", f"n={'9' * 5000}"], "a number of 5000 digits is too big"),
        (["in.onnx", "--max-memory", "9" * 400], "is no size in bytes"),
        (["in.onnx", "--threads", "0"], "threads is an integer from 1 on, not 0"),
        (["in.onnx", "--seed", "-1"], "seed is an integer from 0 on, not -1"),
        (["in.onnx", "--tokenizer", "x"], "--tokenizer needs a text"),
        (["in.onnx", "--calibrate", "none.npz"], "none.npz: no such file or folder with calibr"),
        (["in.onnx", "--calibrate", "in.onnx"], "'in.onnx' is a model, not calibration data"),
        (["in.onnx", "-p", "recover"], "there is no calibration data (--calibrate PATH"),
        (["a" * 5000 + ".onnx"], "cannot be read: File name too long"),
        (["a" * 5000], "does not exist"),
        ([""], "does not exist"),
    ],
)
def test_bad_usage_is_one_line_and_code_2(
    run: Any, folder: Path, arguments: list[str], message: str
) -> None:
    ran = run(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    (line,) = [each for each in ran.err.splitlines() if each.startswith("lwc-opt: error: ")]
    assert message in line
    assert "Traceback" not in ran.err
    assert files(folder) == set()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out.txt"], "its suffix names no format"),
        (["-o", "none/out.onnx"], "there is no folder"),
        (["-o", "/proc/out.onnx"], "no file can be made in '/proc': "),
        (["-o", "/proc/none/out/"], "no file can be made in '/proc': "),
        (["-o", "out.onnx/"], "no file can be made in "),
        (["-o", f"{'a' * 250}.onnx"], "File name too long (name another place)"),
        (["-o", "out.onnx", "--report", "/proc/r.md"], "cannot write '/proc/r.md': no file can be"),
        (["-o", "out.onnx", "--report", "none/r.md"], "there is no folder"),
        (["-o", "out.onnx", "--report", "in.md"], "it is a folder"),
        (["-o", "out.onnx", "--report", "r.md", "--measure", "m=3"], "no input has a dimension"),
        (["-o", "out.onnx", "--report", "r.md", "--measure", "n=0"], "'n' cannot be 0"),
        (["-o", "out.onnx", "--report", "r.md", "--measure", "n"], "--measure takes NAME=N"),
        (["-o", "out.onnx", "--report", "r.md", "--text", "none.txt"], "none.txt: cannot be read"),
        (["-o", "out.onnx", "--report", "r.md", "--text", "in.onnx"], "it is not UTF-8 text"),
        (["-o", "out.onnx", "--require-match=1", "--require-match=2"], "takes one N, or PASS:N"),
        (["-o", "out.onnx", "--require-match=fold-linear:1"], "it is not in the pipeline"),
    ],
)
def test_bad_usage_is_found_before_any_work(
    run: Any, folder: Path, arguments: list[str], message: str
) -> None:
    if any("/proc" in each for each in arguments) and not Path("/proc").is_dir():
        pytest.skip("there is no folder in which nobody can write")
    Path("out.onnx").write_bytes(b"old")
    Path("in.md").mkdir()
    ran = run("in.onnx", "-p", "canonicalize", *arguments)
    assert (ran.code, ran.out) == (2, "")
    (line,) = ran.err.splitlines()
    assert message in line
    assert Path("out.onnx").read_bytes() == b"old"
    assert files(folder) == {"out.onnx", "in.md"}


def test_text_is_for_language_models_only(run: Any) -> None:
    Path("a.txt").write_text("text")
    ran = run("in.onnx", "-o", "out.onnx", "--report", "r.md", "--text", "a.txt")
    assert ran.code == 1
    assert "the model takes no token ids" in ran.err
    assert not Path("out.onnx").exists()


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_do_not_matter(folder: Path, closed: str) -> None:
    script = f"{sys.executable} -m lwc.cli.opt in.onnx -o out.onnx {closed}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
    assert "rror" not in done.stderr
    assert ops("out.onnx") == ops("in.onnx")


@pytest.mark.parametrize(
    ("arguments", "extent"),
    [
        (["--measure", "default"], 1),
        (["--measure", "n=3"], 3),
        (["--measure", "default", "--bind", "n=2"], 2),
        (["--measure", "n=2", "--bind", "n=2"], 2),
        (["--measure", "default", "-p", "bind-dims{n=2}"], 2),
    ],
)
def test_both_models_are_measured_at_the_same_shape(
    run: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], extent: int
) -> None:
    monkeypatch.setattr(lwc.report.measure, "predictor", lambda threads: lambda *_: 1.0)
    ran = run("in.onnx", "-o", "out.onnx", "--report", "r.json", *arguments)
    assert ran.code == 0, ran.err
    report = json.loads(Path("r.json").read_text())
    assert [entry["bindings"] for entry in report["latency"]] == [{"n": extent}]
    assert report["output"]["peak_rss_bytes"] > 0
    assert {q["metric"]: q["after"] for q in report["quality"]}["max abs error"] == 0


def test_the_report_of_an_overwritten_input_has_its_old_size(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lwc.report.measure, "predictor", lambda threads: lambda *_: 1.0)
    before = Path("in.onnx").stat().st_size
    arguments = ["-p", "canonicalize", "--report", "r.json", "--measure", "default"]
    assert run("in.onnx", "-o", "in.onnx", *arguments).code == 0
    report = json.loads(Path("r.json").read_text())
    assert report["input"]["file_bytes"] == before
    assert report["input"]["peak_rss_bytes"] is None
    assert report["output"]["file_bytes"] == Path("in.onnx").stat().st_size != before
    assert report["output"]["peak_rss_bytes"] > 0


def test_the_report_of_a_model_that_is_not_written_has_no_size(run: Any) -> None:
    assert run("in.onnx", "-p", "canonicalize", "--report", "r.json").code == 0
    report = json.loads(Path("r.json").read_text())
    assert report["input"]["file_bytes"] == Path("in.onnx").stat().st_size
    assert (report["output"]["path"], report["output"]["file_bytes"]) == (None, None)


@pytest.mark.parametrize(
    ("how", "code", "line"),
    [
        ("crash", 1, "lwc-opt: error: pass 'test-act': RuntimeError: on purpose"),
        ("memory", 1, "lwc-opt: error: out of memory"),
        ("interrupt", 130, "lwc-opt: interrupted"),
    ],
)
def test_a_failing_pass_leaves_the_old_output(
    run: Any, folder: Path, how: str, code: int, line: str
) -> None:
    Path("out.onnx").write_bytes(b"old")
    ran = run("in.onnx", "-o", "out.onnx", *act(how))
    assert ran.code == code
    assert ran.err == f"{line}\n"
    assert Path("out.onnx").read_bytes() == b"old"
    assert files(folder) == {"out.onnx"}


def test_debug_shows_the_traceback(run: Any) -> None:
    ran = run("in.onnx", *act("crash"), "--debug")
    assert ran.code == 1
    assert ran.err.startswith("Traceback")
    assert "RuntimeError: on purpose" in ran.err


def test_numeric_verification_finds_a_miscompile(run: Any) -> None:
    ran = run("in.onnx", "-o", "out.onnx", *act("spoil"), "--verify=numeric")
    assert ran.code == 1
    assert "lwc-opt: error: " in ran.err
    assert "pass 'test-act'" in ran.err
    assert not Path("out.onnx").exists()
    assert run("in.onnx", "-o", "out.onnx", *act("spoil")).code == 0


def test_bisection_names_the_pass(run: Any) -> None:
    pipeline = "canonicalize,infer-shapes,test-act{how=spoil},fold-linear"
    ran = run("in.onnx", "--load-pass-plugin=lwc_test_act.py", "-p", pipeline, "--bisect")
    assert ran.code == 1
    assert ran.out.startswith("pass 3, test-act{how=spoil}, is the first to differ")
    ran = run("in.onnx", "-p", "canonicalize,infer-shapes", "--bisect")
    assert (ran.code, ran.out) == (0, "the outputs agree after every pass\n")


NOISY = MODEL.replace("=> (float[n, 2] y)", "=> (float[n, 2] y, float[n, 2] z)").replace(
    "  y = MatMul(b, w)\n", "  y = MatMul(b, w)\n  z = RandomNormalLike(x)\n"
)


def test_bisection_says_what_was_not_compared(run: Any) -> None:
    onnx.save(onnx.parser.parse_model(NOISY), "noisy.onnx")
    ran = run("noisy.onnx", "-p", "canonicalize", "--bisect")
    assert ran.code == 0
    assert "agree" not in ran.out
    assert ran.out == "outputs not compared: RandomNormalLike -> 'z' draws random numbers\n"


def test_the_contract_check_says_what_was_not_compared(run: Any) -> None:
    onnx.save(onnx.parser.parse_model(NOISY), "noisy.onnx")
    ran = run("noisy.onnx", "-p", "canonicalize", "--check-contract")
    assert ran.code == 0
    assert ran.out == (
        " 1 canonicalize: keeps the rest of its contract; "
        "outputs not compared: RandomNormalLike -> 'z' draws random numbers\n"
    )


def test_passes_behind_one_that_refuses_are_checked_too(run: Any) -> None:
    pipeline = "test-act{how=refuse},canonicalize,test-act{how=spoil},canonicalize"
    ran = run("in.onnx", "--load-pass-plugin=lwc_test_act.py", "-p", pipeline, "--check-contract")
    first, second, third = ran.out.splitlines()
    assert first.startswith(" 1 test-act{how=refuse}: refuses, and leaves the module as it was: ")
    assert second.startswith(" 2 canonicalize: keeps its contract; outputs compared on ")
    assert third.startswith(" 3 test-act{how=spoil}: BROKEN, outputs: ")
    assert ran.code == 1


def test_a_required_match_that_is_missed_ends_with_3(run: Any) -> None:
    ran = run("in.onnx", "-o", "out.onnx", *act("miss"), "--require-match=1")
    assert ran.code == 3
    assert "missed: test-act/shrink at " in ran.err
    assert "pass 'test-act' applied 0 rewrites, but 1 are required" in ran.err
    assert not Path("out.onnx").exists()
    assert run("in.onnx", "-q", "-p", "canonicalize", "--require-match=canonicalize:1").code == 0


def test_required_matches_are_those_of_the_pipeline(run: Any) -> None:
    ran = run("in.onnx", "--bind", "n=2", "-p", "canonicalize", "--require-match", "1", "-q")
    assert ran.code == 0, ran.err


def test_remarks_are_printed_as_asked(run: Any) -> None:
    for shown, count in (("none", 1), ("missed", 4), ("all", 4)):
        ran = run("in.onnx", "-o", "out.onnx", *act("miss"), f"--remarks={shown}")
        lines = [line for line in ran.err.splitlines() if ": test-act" in line]
        assert len(lines) == count
        assert "warning: test-act: look here" in lines


def test_explain_groups_reasons(run: Any, folder: Path) -> None:
    plugin = "--load-pass-plugin=lwc_test_act.py"
    ran = run("in.onnx", plugin, "-p", "test-act{how=miss},canonicalize", "--explain=test-act")
    assert ran.code == 0
    lines = ran.out.splitlines()
    assert lines[0] == "test-act{how=miss}: changed nothing, 0 rewrites, 3 missed"
    assert lines[1:3] == ["missed:", "  shrink: it is too small"]
    assert sum(line.startswith("    at ") for line in lines) == 3
    ran = run("in.onnx", plugin, "-p", "test-act{how=miss}", "--explain=test-act@MatMul")
    assert [line for line in ran.out.splitlines() if line.startswith("    at ")] == [
        line for line in lines if line.startswith("    at MatMul")
    ]
    assert run("in.onnx", "--explain=canonicalize").out.startswith("canonicalize: changed the")
    assert files(folder) == set()


LIKE_NAMES = """
<ir_version: 9, opset_import: ["" : 17]>
g (float[n] x) => (float[n] n1, float[n] n10, float[n] last)
{
  n1 = Identity(x)
  n10 = Neg(x)
  twice = Identity(n10)
  last = Neg(twice)
}
"""


def test_explain_takes_a_name_exactly_before_it_takes_it_as_a_part(run: Any) -> None:
    onnx.save(onnx.parser.parse_model(LIKE_NAMES), "like.onnx")
    ran = run("like.onnx", "-p", "canonicalize", "--explain=canonicalize@n1")
    assert ran.code == 0
    assert "Identity -> 'n1'" in ran.out
    assert "n10" not in ran.out
    ran = run("like.onnx", "-p", "canonicalize", "--explain=canonicalize@n")
    assert "  no node is called 'n': shown are those that have it in their names" in ran.out
    assert "Identity -> 'n1'" in ran.out
    assert "Neg -> 'n10'" in ran.out
    ran = run("like.onnx", "-p", "canonicalize", "--explain=canonicalize@Neg")
    assert "Neg -> 'n10'" in ran.out
    assert "no node is called" not in ran.out
    ran = run("like.onnx", "-p", "canonicalize,infer-shapes", "--explain=infer-shapes@twice")
    assert (ran.code, ran.out) == (2, "")
    assert "no node 'twice' is left where infer-shapes runs (pass 1, canonicalize, re" in ran.err


def test_formulas_of_a_plan_have_the_numbers_that_are_bound(run: Any, folder: Path) -> None:
    save(module_of("g (float[a, b] x) => (float[a, b] y) { y = Relu(x) }"), folder / "two.onnx")
    assert "bytes read and written: 8*a*b" in run("two.onnx", "--plan").out
    assert "bytes read and written: 16*b" in run("two.onnx", "--plan", "--bind", "a=2").out


def test_the_plan_is_a_table_of_costs(
    run: Any,
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LWC_CACHE", str(tmp_path_factory.mktemp("unmeasured")))
    ran = run("in.onnx", "--plan", "--bind", "n=5")
    assert (ran.code, ran.err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in ran.out.splitlines()]
    assert ["MatMul", "1", "40", "4", "16 B", "96 B", "40 B"] in rows
    assert next(row for row in rows if row and row[0] == "total")[1] == "3"
    assert "largest sum of live activations: 80 B" in ran.out
    assert "8*n" in run("in.onnx", "--plan").out
    ran = run("in.onnx", "--plan", "--bind", "m=5")
    assert (ran.code, ran.err) == (
        2,
        "lwc-opt: error: no input has a dimension 'm' (the dimensions are n)\n",
    )
    assert files(folder) == set()


def test_names_do_not_steer_the_terminal(run: Any) -> None:
    model = onnx.load("in.onnx")
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "n[/bold]"
    onnx.save(model, "odd.onnx")
    assert "--bind n[/bold]=N" in run("odd.onnx", "--plan").out
    model.graph.node[0].name = "a\x1b[31m"
    model.graph.node[0].op_type = "Made[/up]\x07"
    model.graph.node[0].domain = "some"
    model.opset_import.add(domain="some", version=1)
    onnx.save(model, "odd.onnx")
    for arguments in (["--plan"], ["-o", "-"], ["--explain=canonicalize"], ["--remarks=all"]):
        ran = run("odd.onnx", *arguments)
        assert ran.code == 0, ran.err
        assert not set(ran.out + ran.err) & set("\x1b\x07")
    model.graph.node[0].domain = ""
    onnx.save(model, "odd.onnx")
    ran = run("odd.onnx")
    assert (ran.code, "Made[/up]\\x07" in ran.err, "\x07" in ran.err) == (2, True, False)


def test_ir_goes_to_stdout(run: Any) -> None:
    ran = run("in.onnx", "-p", "canonicalize,infer-shapes", "--print-ir-before=canonicalize")
    assert ran.out.startswith("// module before canonicalize\n")
    assert ran.out.count("// module ") == 1
    ran = run("in.onnx", "-p", "canonicalize,canonicalize", "--print-ir-after-change")
    assert ran.out.count("// module after canonicalize, which changed it") == 1
    ran = run("in.onnx", "-p", "canonicalize,canonicalize", "--print-ir-after-all")
    assert ran.out.count("// module after canonicalize") == 2


def test_timing_and_statistics_go_to_stderr(run: Any) -> None:
    ran = run("in.onnx", "-o", "o.onnx", "-p", "canonicalize", "--timing", "--pass-statistics")
    assert ran.out == ""
    assert "verify s" in ran.err
    assert "rewrites " in ran.err


def test_a_crash_can_be_replayed(run: Any) -> None:
    ran = run("in.onnx", *act("crash"), "--pass-pipeline-crash-reproducer=crash.onnx")
    assert ran.code == 1
    (line,) = [each for each in ran.err.splitlines() if each.startswith("reproduce with: ")]
    words = shlex.split(line.removeprefix("reproduce with: "))
    assert words[:4] == ["lwc-opt", "crash.onnx", "--config", "crash.yaml"]
    default_registry.cache_clear()
    again = run(*words[1:])
    assert again.code == 1
    assert again.err.splitlines()[-1] == ran.err.splitlines()[-1]


def test_a_crash_reproducer_spares_what_the_user_has(run: Any, folder: Path) -> None:
    text = "passes: ['test-act{how=crash}']\n"
    Path("run.yaml").write_text(text)
    Path("model").mkdir()
    shutil.copy("in.onnx", "model/model.onnx")
    plugin, option = "--load-pass-plugin=lwc_test_act.py", "--pass-pipeline-crash-reproducer"
    for source, config, path, message in (
        ("in.onnx", ["--config=run.yaml"], "run.onnx", "'run.yaml' is the configuration itself"),
        ("in.onnx", act("crash"), "run.onnx", "'run.yaml' exists and is no crash reproducer"),
        ("in.onnx", [*act("crash"), "-o", "x.onnx"], "./x.onnx", "is the output itself"),
        ("model", act("crash"), "model/model.onnx", "is a part of the input"),
    ):
        ran = run(source, plugin, *config, f"{option}={path}")
        assert ran.code == 2, ran.err
        assert message in ran.err
    assert Path("run.yaml").read_text() == text
    assert Path("model/model.onnx").read_bytes() == Path("in.onnx").read_bytes()
    assert files(folder) == {"run.yaml", "model"}
    for _ in range(2):  # what a reproducer wrote, the next one may replace
        default_registry.cache_clear()
        ran = run("in.onnx", *act("crash"), f"{option}=crash.onnx")
        assert (ran.code, "reproduce with: " in ran.err) == (1, True)
    assert files(folder) == {"run.yaml", "model", "crash.onnx", "crash.yaml"}


def test_a_crash_reproducer_is_whole_or_absent(
    run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    option = "--pass-pipeline-crash-reproducer=crash.onnx"
    assert run("in.onnx", *act("crash"), option).code == 1
    old = Path("crash.yaml").read_bytes()

    replace = os.replace

    def refuse(source: str, target: str) -> None:
        if str(target).endswith(".yaml"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr("lwc.frontend.atomic.os.replace", refuse)
    default_registry.cache_clear()
    ran = run("in.onnx", *act("crash"), "--seed=3", option)
    assert ran.code == 1
    assert "the crash reproducer cannot be written: " in ran.err
    assert Path("crash.yaml").read_bytes() == old
    assert files(folder) == {"crash.onnx", "crash.yaml"}


def test_reports_are_written(run: Any) -> None:
    reports = ["--report", "r.json", "--report", "r.md", "--report", "r.html"]
    ran = run("in.onnx", "-p", "canonicalize", *reports)
    assert (ran.code, ran.out) == (0, "")
    report = json.loads(Path("r.json").read_text())
    assert report["pipeline"] == "canonicalize"
    assert (report["before"]["nodes"], report["after"]["nodes"]) == (3, 2)
    assert "canonicalize" in Path("r.md").read_text()
    assert "<html" in Path("r.html").read_text()


def test_passes_are_listed(run: Any) -> None:
    ran = run("--list-passes=json", "--load-pass-plugin=lwc_test_act.py")
    assert {"canonicalize", "test-act"} <= {entry["name"] for entry in json.loads(ran.out)}
    assert "canonicalize [exact]" in run("--list-passes").out


def test_help_and_version() -> None:
    for option, start in (
        ("--help", "usage: lwc-opt"),
        ("--version", f"lwc-opt {lwc.__version__}"),
    ):
        command = [sys.executable, "-m", "lwc.cli.opt", option]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith(start)


def test_a_full_disk_is_code_1(run: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(module: object, path: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    monkeypatch.setattr(lwc.optimizer, "save_module", fail)
    ran = run("in.onnx", "-o", "out.onnx", "-q", "-p", "canonicalize")
    assert ran.code == 1
    assert ran.err == (
        "lwc-opt: error: out.onnx: No space left on device (the old output, if any, is untouched)\n"
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_stdout_is_code_1(folder: Path) -> None:
    command = [sys.executable, "-m", "lwc.cli.opt", "in.onnx", "-q"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("lwc-opt: error: No space left on device")
    assert len(done.stderr.splitlines()) == 1


def test_a_reader_that_goes_away_is_no_error_message(folder: Path) -> None:
    script = f"{sys.executable} -m lwc.cli.opt in.onnx -q | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
    assert done.returncode in (0, 1)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_end_it_cleanly(folder: Path, number: signal.Signals, code: int) -> None:
    Path("out.onnx").write_bytes(b"old")
    command = [sys.executable, "-m", "lwc.cli.opt", "in.onnx", "-o", "out.onnx", *act("wait")]
    # A test run in the background ignores the interrupt, and its children would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "waiting\n"
    time.sleep(0.1)
    child.send_signal(number)
    _, err = child.communicate(timeout=30)
    assert child.returncode == code
    assert "Traceback" not in err
    assert Path("out.onnx").read_bytes() == b"old"
    assert files(folder) == {"out.onnx"}


def test_progress_appears_late_and_disappears(capsys: pytest.CaptureFixture[str]) -> None:
    silent = ProgressDisplay(enabled=True, delay=30.0)
    with silent.phase("quick"):
        assert list(silent.track([1, 2], "loop")) == [1, 2]
    off = ProgressDisplay(enabled=False, delay=0.0)
    with off.phase("hidden"):
        time.sleep(0.05)
    assert capsys.readouterr().err == ""
    shown = ProgressDisplay(enabled=True, delay=0.0)
    with shown.phase("slow"):
        deadline = time.monotonic() + 10
        while shown._bars is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert shown._bars is not None
        seen = []
        for item in shown.track(range(3), "loop"):
            seen.append(item)
            if item == 1:
                tasks = shown._bars.tasks
                assert [(task.description, task.completed) for task in tasks][-1] == ("loop", 1)
        assert seen == [0, 1, 2]
        assert [task.description for task in shown._bars.tasks] == ["slow"]
    assert shown._bars is None


def test_small_parsers() -> None:
    assert [parse_size(text) for text in ("12", "2GB", "1.5GiB", "3k")] == [
        12,
        2 * 10**9,
        3 * 2**29,
        3000,
    ]
    assert parse_counts(["a=1", "b=c=2"], "--bind") == {"a": 1, "b=c": 2}
    assert parse_shapes(["a=1,b=2", "default"]) == [{"a": 1, "b": 2}, {}]
    assert parse_counts(["a=1,b=2", "c=3"], "--bind") == {"a": 1, "b": 2, "c": 3}
    assert parse_matches([]) is None
    assert parse_matches(["3"]) == 3
    assert parse_matches(["a:1", "b:2"]) == {"a": 1, "b": 2}
    for bad in (["1", "2"], ["a"], ["a:-1"]):
        with pytest.raises(UsageError):
            parse_matches(bad)
    assert [text.size(n) for n in (0, 999, 1234, 90_900_000, 2e12)] == [
        "0 B",
        "999 B",
        "1.23 kB",
        "90.9 MB",
        "2 TB",
    ]
