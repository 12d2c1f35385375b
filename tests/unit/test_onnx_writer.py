"""Writing: round trips, external data, and a whole model on the disk whatever happens."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

import lwc
from lwc.core.errors import LwcError, UsageError
from lwc.frontend.onnx_reader import from_proto
from lwc.frontend.onnx_writer import save, save_folder


def make_module(seed: int = 0, rows: int = 64) -> lwc.Module:
    """A model of one MatMul with `rows` x 64 weights, which are `seed` everywhere."""
    weight = numpy_helper.from_array(np.full((rows, 64), seed, np.float32), "w")
    bias = numpy_helper.from_array(np.ones(64, np.float32), "b")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["t"]), helper.make_node("Add", ["t", "b"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", rows])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [weight, bias],
    )
    return from_proto(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    )


def seed_of(path: Path) -> float:
    """Read a saved `make_module` back, in full, and return its seed."""
    module = lwc.load(path)
    tensor = module.graph.initializers["w"].const_value
    assert tensor is not None
    array = tensor.numpy()
    assert (array == array.flat[0]).all()
    return float(array.flat[0])


def signature(module: lwc.Module) -> list[Any]:
    """Everything a file must keep, tensors by content."""

    def value(v: ir.Value | None) -> Any:
        return None if v is None else (v.name, str(v.type), str(v.shape))

    nodes = [
        (
            node.domain,
            node.op_type,
            node.overload,
            node.name,
            [value(v) for v in node.inputs],
            [value(v) for v in node.outputs],
            [
                (k, a.value.tobytes() if a.type == ir.AttributeType.TENSOR else str(a.value))
                for k, a in node.attributes.items()
                if a.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            ],
        )
        for node in module.nodes()
    ]
    weights = [
        (v.name, v.const_value.dtype, tuple(v.const_value.shape), v.const_value.tobytes())
        for _, v in module.initializers()
        if v.const_value is not None
    ]
    ends = [value(v) for v in (*module.graph.inputs, *module.graph.outputs)]
    return [nodes, weights, ends, dict(module.model.opset_imports), module.model.ir_version]


@pytest.mark.parametrize("threshold", [0, 1 << 30])
def test_round_trip(tmp_path: Path, threshold: int) -> None:
    module = make_module(3)
    result = save(module, tmp_path / "m.onnx", external_threshold=threshold)
    assert signature(lwc.load(tmp_path / "m.onnx")) == signature(module)
    assert (result.data_path is None) == (threshold > 0)
    assert result.nbytes == sum(f.stat().st_size for f in tmp_path.iterdir())
    session = ort.InferenceSession(tmp_path / "m.onnx")
    (y,) = session.run(None, {"x": np.ones((2, 64), np.float32)})
    np.testing.assert_allclose(y, np.full((2, 64), 193.0))


def test_external_model_holds_no_weights(tmp_path: Path) -> None:
    result = save(make_module(1, rows=2000), tmp_path / "m.onnx", external_threshold=0)
    assert (tmp_path / "m.onnx").stat().st_size < 2000
    assert result.data_path is not None
    assert os.path.getsize(result.data_path) >= 2000 * 64 * 4
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        ["m.onnx", os.path.basename(result.data_path)]
    )
    onnx.checker.check_model(tmp_path / "m.onnx", full_check=True)


def test_save_changes_nothing_in_the_module(tmp_path: Path) -> None:
    module = make_module(2)
    before = module.fingerprint()
    save(module, tmp_path / "m.onnx", external_threshold=0)
    assert module.fingerprint() == before


def test_shared_tensors_are_written_once(tmp_path: Path) -> None:
    module = make_module(5, rows=256)
    tensor = module.graph.initializers["w"].const_value
    assert tensor is not None
    twin = module.add_initializer("w2", ir.Tensor(tensor.numpy()))
    module.graph.node(0).replace_input_with(1, twin)
    twin.const_value = tensor
    result = save(module, tmp_path / "m.onnx", external_threshold=0)
    assert result.nbytes < 1.2 * tensor.nbytes
    again = lwc.load(tmp_path / "m.onnx")
    for name in ("w", "w2"):
        value = again.graph.initializers[name].const_value
        assert value is not None
        assert value.name == name
        np.testing.assert_array_equal(value.numpy(), tensor.numpy())


def test_spilled_and_packed_tensors(tmp_path: Path) -> None:
    import ml_dtypes

    module = make_module()
    generator = np.random.default_rng(0)
    arrays = {
        "f": generator.random((300, 100), np.float32),
        "q": generator.integers(-8, 8, (301, 101)).astype(ml_dtypes.int4),
        "h": generator.random((50, 50)).astype(ml_dtypes.bfloat16),
    }
    for name, array in arrays.items():
        module.add_initializer(name, module.store.put(array, name))
    save(module, tmp_path / "m.onnx", external_threshold=0)
    again = lwc.load(tmp_path / "m.onnx")
    assert again.model.ir_version >= 10  # int4
    for name, array in arrays.items():
        tensor = again.graph.initializers[name].const_value
        assert tensor is not None
        np.testing.assert_array_equal(tensor.numpy(), array)


def test_used_domains_are_declared(tmp_path: Path) -> None:
    module = make_module()
    module.graph.node(1).domain = "my.ops"
    save(module, tmp_path / "m.onnx")
    proto = onnx.load(tmp_path / "m.onnx")
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 17, "my.ops": 1}


def test_overloaded_functions_raise_the_ir_version(tmp_path: Path) -> None:
    module = from_proto(
        onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17, "d" : 1]>
    g (float[n] x) => (float[n] y) { y = d.f (x) }
    <domain: "d", opset_import: ["" : 17]> f (a) => (b) { b = Relu(a) }""")
    )
    save(module, tmp_path / "m.onnx")
    assert onnx.load(tmp_path / "m.onnx").ir_version == 8
    (function,) = module.model.functions.values()
    function.overload = "v2"
    module.graph.node(0).overload = "v2"
    save(module, tmp_path / "m.onnx")
    assert onnx.load(tmp_path / "m.onnx").ir_version == 10


def test_text(tmp_path: Path) -> None:
    module = make_module(4)
    save(module, tmp_path / "m.onnxtxt")
    again = lwc.load(tmp_path / "m.onnxtxt")
    assert [node.op_type for node in again.graph] == ["MatMul", "Add"]
    tensor = again.graph.initializers["w"].const_value
    assert tensor is not None
    np.testing.assert_array_equal(tensor.numpy(), np.full((64, 64), 4, np.float32))
    with pytest.raises(LwcError, match="too much for text"):
        save(make_module(1, rows=70_000), tmp_path / "big.onnxtxt")
    assert not (tmp_path / "big.onnxtxt").exists()
    odd = make_module(1)
    odd.graph[0].domain = "a b"
    with pytest.raises(LwcError, match=r"cannot express this model: line \d+, column \d+: E"):
        save(odd, tmp_path / "odd.onnxtxt")


def test_bad_targets(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="suffix"):
        save(make_module(), tmp_path / "m.txt")
    with pytest.raises(LwcError, match="No such file"):
        save(make_module(), tmp_path / "no" / "m.onnx")
    (tmp_path / "d.onnx").mkdir()
    with pytest.raises(UsageError, match="folder"):
        save(make_module(), tmp_path / "d.onnx")


def test_folder_with_companions(tmp_path: Path) -> None:
    source = tmp_path / "in"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "tokenizer.json").write_text("[1]")
    save(make_module(7), source / "model.onnx", external_threshold=0)
    module = lwc.load(source)
    assert set(module.source.companions) == {"config.json", "tokenizer.json"}
    save_folder(module, tmp_path / "out" / "deep")
    assert (tmp_path / "out" / "deep" / "tokenizer.json").read_text() == "[1]"
    assert seed_of(tmp_path / "out" / "deep" / "model.onnx") == 7
    save_folder(module, source)
    assert (source / "config.json").read_text() == "{}"
    assert seed_of(source / "model.onnx") == 7


# Safety


def test_output_onto_the_input(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    save(make_module(1, rows=1024), path, external_threshold=0)
    module = lwc.load(path)
    save(module, path, external_threshold=0)
    assert seed_of(path) == 1
    module.add_initializer("extra", np.zeros(1000, np.float32))
    save(module, path, external_threshold=0)
    assert seed_of(path) == 1
    assert len(list(tmp_path.iterdir())) == 2
    save(module, path, external_threshold=1 << 40)
    assert seed_of(path) == 1
    # The module still reads the data file that is gone by now.
    tensor = module.graph.initializers["w"].const_value
    assert tensor is not None
    assert (tensor.numpy() == 1).all()
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_foreign_data_files_are_left_alone(tmp_path: Path) -> None:
    save(make_module(1), tmp_path / "m.onnx", external_threshold=0)
    foreign = [tmp_path / "m.onnx.data", tmp_path / f"m.{'0' * 16}.data"]
    for file in foreign:
        file.write_bytes(b"mine")
    save(make_module(2), tmp_path / "m.onnx", external_threshold=0)
    assert all(file.read_bytes() == b"mine" for file in foreign)
    assert len(list(tmp_path.iterdir())) == 4


def test_data_that_a_copied_model_uses_stays(tmp_path: Path) -> None:
    saved = save(make_module(1), tmp_path / "m.onnx", external_threshold=0)
    assert saved.data_path is not None
    shutil.copy(tmp_path / "m.onnx", tmp_path / "backup.onnx")
    save(make_module(2), tmp_path / "m.onnx", external_threshold=0)
    assert seed_of(tmp_path / "backup.onnx") == 1
    assert seed_of(tmp_path / "m.onnx") == 2
    (tmp_path / "backup.onnx").unlink()
    save(make_module(3), tmp_path / "m.onnx", external_threshold=0)
    assert {file.name for file in tmp_path.iterdir()} >= {Path(saved.data_path).name, "m.onnx"}
    assert len(list(tmp_path.iterdir())) == 3


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xffm.onnx")
    for seed in (1, 2):
        save(make_module(seed), path, external_threshold=0)
        assert seed_of(path) == seed
        assert len(list(tmp_path.iterdir())) == 2


def test_same_content_gets_the_same_name(tmp_path: Path) -> None:
    names = {
        save(make_module(s), tmp_path / f"{d}.onnx", external_threshold=0).data_path.split(".")[-2]  # type: ignore[union-attr]
        for d, s in (("a", 1), ("b", 1), ("c", 2))
    }
    assert len(names) == 2


def _fail_at(
    monkeypatch: pytest.MonkeyPatch,
    count: int,
    make_error: Callable[[], BaseException],
    *,
    after: bool,
) -> Callable[[], int]:
    """Make the `count`-th call that changes the disk raise, once it is done with `after`.

    Returns:
        A function that tells how many such calls there were.
    """
    calls = 0

    def wrap(real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == count and not after:
                raise make_error()
            result = real(*args, **kwargs)
            if calls == count:
                raise make_error()
            return result

        return wrapped

    for name in ("replace", "fsync", "chmod", "pread", "copy_file_range", "fdopen"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    if not after:  # Between mkstemp's return and its caller nothing could know the file.
        monkeypatch.setattr(tempfile, "mkstemp", wrap(tempfile.mkstemp))
    monkeypatch.setattr(ir.serde, "serialize_model", wrap(ir.serde.serialize_model))
    return lambda: calls


@pytest.mark.parametrize(
    ("make_error", "after"),
    [
        (lambda: OSError(errno.ENOSPC, "No space left on device"), False),
        (KeyboardInterrupt, False),
        (KeyboardInterrupt, True),
    ],
    ids=["disk-full", "ctrl-c-before", "ctrl-c-after"],
)
def test_failure_at_every_call_leaves_a_whole_model(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make_error: Callable[[], BaseException],
    after: bool,
) -> None:
    path = tmp_path / "m.onnx"
    failures = 0
    for count in range(1, 40):
        for file in tmp_path.iterdir():
            file.unlink()
        save(make_module(1, rows=512), path, external_threshold=0)
        module = make_module(2, rows=512)
        spilled = module.store.put(np.full((512, 64), 2, np.float32), "w")
        module.replace_initializer(module.graph.initializers["w"], spilled)
        with monkeypatch.context() as patch:
            calls = _fail_at(patch, count, make_error, after=after)
            try:
                save(module, path, external_threshold=0)
            except (LwcError, KeyboardInterrupt) as error:
                failures += 1
                caught: BaseException | None = error
            else:
                caught = None
            happened = calls()
        if happened < count:
            break
        assert caught is not None or seed_of(path) == 2
        assert seed_of(path) in (1, 2)
        names = sorted(p.name for p in tmp_path.iterdir())
        assert not [name for name in names if name.endswith(".tmp")], names
        # The old data may stay only where the new model is in place but not yet known to last.
        assert len(names) == 2 or (len(names) == 3 and seed_of(path) == 2)
        if isinstance(caught, LwcError):
            assert "No space left" in str(caught)
            assert caught.exit_code == 1
    else:
        pytest.fail("save makes more calls than expected")
    assert failures >= 8
    assert seed_of(path) == 2


def test_write_beyond_the_file_size_limit(tmp_path: Path) -> None:
    """A real failing write: the kernel refuses to let the file grow."""
    path = tmp_path / "m.onnx"
    save(make_module(1), path, external_threshold=0)
    before = sorted(p.name for p in tmp_path.iterdir())
    code = f"""
import resource, signal, sys
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from test_onnx_writer import make_module
from lwc.core.errors import LwcError
from lwc.frontend.onnx_writer import save
module = make_module(2, rows=4096)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(module, {str(path)!r}, external_threshold=0)
except LwcError as error:
    print(error)
    sys.exit(error.exit_code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "cannot be written: File too large" in done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    assert seed_of(path) == 1


def test_killed_at_every_call(tmp_path: Path) -> None:
    """SIGKILL just before and just after each call that changes the disk."""
    path = tmp_path / "m.onnx"
    code = f"""
import os, signal, sys, tempfile
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
from test_onnx_writer import make_module
from lwc.frontend.onnx_writer import save
path = {str(path)!r}
def killing(real, count, after):
    def wrapped(*args, **kwargs):
        state[0] += 1
        if state[0] == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = real(*args, **kwargs)
        if state[0] == count and after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped
modules = {{seed: make_module(seed, rows=512) for seed in (1, 2)}}
names = ("replace", "fsync", "chmod", "unlink", "pread")
for count in range(1, 14):
    for after in (False, True):
        save(modules[1], path, external_threshold=0)
        pid = os.fork()
        if pid == 0:
            state = [0]
            for name in names:
                setattr(os, name, killing(getattr(os, name), count, after))
            save(modules[2], path, external_threshold=0)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        from test_onnx_writer import seed_of
        from pathlib import Path
        print(int(os.WIFSIGNALED(status)), int(seed_of(Path(path))))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    outcomes = [line.split() for line in done.stdout.splitlines()]
    assert len(outcomes) == 26
    killed = [seed for was_killed, seed in outcomes if was_killed == "1"]
    assert set(killed) == {"1", "2"}
    assert {seed for was_killed, seed in outcomes if was_killed == "0"} == {"2"}


MODELS = [
    "paraphrase-MiniLM-L3-v2",
    "tagger",
    "magika",
    "320n",
    "silero_vad",
    "silero_vad_half",
    "ch_ppocr_mobile_v2.0_cls_infer",
]


@pytest.mark.models
@pytest.mark.parametrize("name", MODELS)
def test_real_models_round_trip(
    model_file: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    module = lwc.load(model_file(name))
    save(module, tmp_path / "m.onnx", external_threshold=0)
    again = lwc.load(tmp_path / "m.onnx")
    assert signature(again) == signature(module)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    ort.InferenceSession(tmp_path / "m.onnx", options)
