"""The spill file: parallel writes, and its second life as the data file of the saved model."""

from __future__ import annotations

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import lwc
from lwc.core import weights
from lwc.core.errors import LwcError
from lwc.core.weights import DataFile, FileTensor, WeightStore, reading_once
from lwc.frontend import onnx_writer
from lwc.frontend.onnx_reader import from_proto
from lwc.frontend.onnx_writer import save

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n,64] x) => (float[n,64] y) { y = Relu(x) }"""

needs_names = pytest.mark.skipif(
    not hasattr(os, "O_TMPFILE") or not os.path.isdir("/proc/self/fd"),
    reason="the system cannot name an open file",
)


@pytest.fixture(autouse=True)
def adopt_small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_writer, "_ADOPTED", 1)


def spilled_module(folder: Path, seed: int, dead: int = 0) -> lwc.Module:
    """Two spilled weights and one in memory; `dead` results in the store that nothing uses."""
    module = from_proto(onnx.parser.parse_model(TEXT))
    module.spill_directory = str(folder)
    rng = np.random.default_rng(seed)
    for _ in range(dead):
        module.store.put(rng.random((128, 1024)))
    for name in ("a", "b"):
        module.add_initializer(name, module.store.put(rng.random((256, 1024), np.float32)))
    module.add_initializer("c", rng.random((30, 100), np.float32))
    return module


def contents(module: lwc.Module) -> dict[str, bytes]:
    tensors = {value.name: value.const_value for _, value in module.initializers()}
    return {str(name): tensor.tobytes() for name, tensor in tensors.items() if tensor is not None}


def data_file(folder: Path) -> Path:
    (path,) = folder.glob("*.data")
    return path


def test_threads_write_side_by_side() -> None:
    store = WeightStore()
    arrays = [np.full(100_000 + 7 * i, i, np.int32) for i in range(40)]
    with ThreadPoolExecutor(4) as pool:
        tensors = list(pool.map(store.put, arrays))
    for array, tensor in zip(arrays, tensors, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)


@needs_names
def test_spill_file_becomes_the_data_file(tmp_path: Path) -> None:
    module = spilled_module(tmp_path, 1)
    before = contents(module)
    inode = os.fstat(module.store.fileno()).st_ino
    result = save(module, tmp_path / "m.onnx", external_threshold=0)
    assert data_file(tmp_path).stat().st_ino == inode
    mask = os.umask(0)
    os.umask(mask)
    assert data_file(tmp_path).stat().st_mode & 0o777 == 0o666 & ~mask
    assert result.nbytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert contents(lwc.load(tmp_path / "m.onnx")) == before == contents(module)


@needs_names
def test_later_results_leave_the_saved_model_alone(tmp_path: Path) -> None:
    module = spilled_module(tmp_path, 1)
    save(module, tmp_path / "m.onnx", external_threshold=0)
    saved = data_file(tmp_path).read_bytes()
    module.add_initializer("d", module.store.put(np.ones((256, 1024))))
    assert data_file(tmp_path).read_bytes() == saved
    other = tmp_path / "other"
    other.mkdir()
    save(module, other / "m.onnx", external_threshold=0)
    assert data_file(tmp_path).read_bytes() == saved
    assert contents(lwc.load(other / "m.onnx")) == contents(module)


def test_store_of_dead_results_is_copied_from(tmp_path: Path) -> None:
    module = spilled_module(tmp_path, 1, dead=1)
    save(module, tmp_path / "m.onnx", external_threshold=0)
    wanted = sum(len(content) for content in contents(module).values())
    assert wanted <= data_file(tmp_path).stat().st_size <= 1.01 * wanted
    assert contents(lwc.load(tmp_path / "m.onnx")) == contents(module)


@needs_names
def test_same_results_make_the_same_files(tmp_path: Path) -> None:
    found = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        save(spilled_module(folder, 3), folder / "m.onnx", external_threshold=0)
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[0] == found[1]


@needs_names
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", ["pread", "fsync", "fchmod", "link", "replace", "pwrite"])
def test_failure_leaves_the_old_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, after: bool
) -> None:
    save(spilled_module(tmp_path, 1), tmp_path / "m.onnx", external_threshold=0)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    module = spilled_module(tmp_path, 2)
    real = getattr(os, call)

    def fail(*args: Any, **kwargs: Any) -> Any:
        if after:
            real(*args, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(LwcError, match="No space left"):
            save(module, tmp_path / "m.onnx", external_threshold=0)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old
    save(module, tmp_path / "m.onnx", external_threshold=0)
    assert contents(lwc.load(tmp_path / "m.onnx")) == contents(module)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("offset", [0, 64, 4096, 5000])
def test_direct_reads_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offset: int
) -> None:
    """At any alignment, up to the last byte of the file, in pieces, and after a bigger tensor."""
    monkeypatch.setattr(weights, "_DIRECT_CHUNK", 8192)
    content = np.random.default_rng(offset).integers(0, 256, (1 << 20) + 9000 + offset, np.uint8)
    (tmp_path / "w").write_bytes(content.tobytes())
    file = DataFile(tmp_path / "w")
    for size in (len(content) - offset, 1 << 20, 1000):
        tensor: Any = FileTensor(file, offset, ir.DataType.UINT8, [size], "w")
        with reading_once(tensor) as array:
            np.testing.assert_array_equal(array, content[offset : offset + size])
    beyond: Any = FileTensor(file, offset, ir.DataType.UINT8, [len(content)], "w")
    if offset:
        with pytest.raises((OSError, ValueError)), reading_once(beyond):
            pass
