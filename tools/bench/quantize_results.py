"""Models that `quantize.py` had made and judged, each by a process of its own, and kept.

A result lies in a folder that is named after the row and a hash of all it depends on, so that a
run that was stopped goes on where it was, and a row is made anew where its quantizer has changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench import decode_models as models
from bench.decode_peers import place
from bench.quantize_settings import Setting
from bench.quantize_subjects import Subject, lwc_digest

HERE = Path(__file__).parent


class Unmade(Exception):
    """A quantizer or its model failed; the message is one line."""


@dataclass
class Results:
    """What there is for a subject.

    Attributes:
        subject: The model and the text.
        threads: Threads of every process.
        limit: Seconds for one process.
        versions: What made the rows, by module; filled as they are made.
    """

    subject: Subject
    threads: int
    limit: float
    versions: dict[str, str] = field(default_factory=dict)

    def make(self, setting: Setting) -> dict[str, Any]:
        """Return `{"model", "seconds", "peak"}` of a row's model, which is made if it is not there.

        Raises:
            Unmade: The quantizer is not installed, failed or took too long.
        """
        try:
            return self._make(setting)
        except (RuntimeError, OSError) as error:
            raise Unmade(_line(str(error))) from error

    def _make(self, setting: Setting) -> dict[str, Any]:
        source = self.subject.source
        nothing = {"seconds": None, "peak": None}
        if setting.quantizer is None:
            return {"model": self.subject.base(setting.base), **nothing}
        self.versions[setting.module] = version = self._version(setting)
        if setting.quantizer == "gguf":
            return {"model": models.gguf_file(source, setting.options["kind"]), **nothing}
        if setting.quantizer == "genai":
            folder = models.genai_folder(source, "int4", models.GENAI_BLOCKS)
            return {"model": folder / "model.onnx", **nothing}
        base = self.subject.base(setting.base)
        feeds = self.subject.feeds() if setting.calibrated else None
        depends = [setting.quantizer, dict(setting.options), version, _digest(base)]
        depends += [_digest(each) for each in sorted(feeds.iterdir())] if feeds else []
        if setting.quantizer != "lwc":
            depends.append(_digest(HERE / "quantize_peers.py"))
        home = self._folder(setting, depends)
        kept = home / "made.json"
        if not kept.exists():
            shutil.rmtree(home, ignore_errors=True)
            home.mkdir(parents=True)
            own = _copied(base, home / "base")
            request = {
                "quantizer": setting.quantizer,
                "base": str(own),
                "target": str(home / "model.onnx"),
                "feeds": str(feeds or home),
                "options": dict(setting.options),
            }
            made = self._child(setting.module, "quantize_worker.py", json.dumps(request))
            shutil.rmtree(own.parent)
            kept.write_text(made)
        return {"model": home / "model.onnx", **json.loads(kept.read_text())}

    def _version(self, setting: Setting) -> str:
        return lwc_digest() if setting.module == "lwc" else place(setting.module).version

    def _folder(self, setting: Setting, depends: Sequence[Any]) -> Path:
        """Return a row's folder, without those it had before."""
        home = self.subject.source.home / "quantize"
        name = setting.name.replace("/", "-")
        key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()[:12]
        for old in home.glob(f"{name}={'?' * len(key)}"):
            if old.name != f"{name}={key}":
                shutil.rmtree(old)
        return home / f"{name}={key}"

    def judge(self, setting: Setting, model: Path) -> np.ndarray[Any, Any]:
        """Return the loss of each token of the evaluation's half, `[tokens]`.

        Raises:
            Unmade: The model does not run.
        """
        ids = np.array(self.subject.ids(calibration=False), np.int64)
        key = hashlib.sha256(f"{_digest(model)} {self._runtime(setting)}".encode() + ids.tobytes())
        kept = self.subject.source.home / "quantize" / f"losses-{key.hexdigest()[:16]}.npy"
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            draft, text = kept.with_suffix(".draft.npy"), kept.with_suffix(".ids.npy")
            np.save(text, ids)
            kind = {"gguf": "llama.cpp", "genai": "genai"}.get(setting.quantizer or "", "onnx")
            module = "llama_cpp" if setting.quantizer == "gguf" else "lwc"
            words = [kind, str(model), str(text), str(draft), str(self.threads)]
            try:
                self._child(module, "quantize_judge.py", *words)
                os.replace(draft, kept)
            except (RuntimeError, OSError) as error:
                raise Unmade(f"does not run: {_line(str(error))}") from error
            finally:
                text.unlink()
        found: np.ndarray[Any, Any] = np.load(kept)
        return found

    @staticmethod
    def _runtime(setting: Setting) -> str:
        return place("llama_cpp" if setting.quantizer == "gguf" else "onnxruntime").version

    def _child(self, module: str, script: str, *words: str) -> str:
        """Run a script where a module is installed, and return what it prints.

        Raises:
            RuntimeError: It failed or took too long; the message is the last line it wrote.
        """
        try:
            done = subprocess.run(
                [str(place(module).python), str(HERE / script), *words],
                capture_output=True,
                text=True,
                timeout=self.limit,
                check=False,
                env={
                    **os.environ,
                    "OMP_NUM_THREADS": str(self.threads),
                    "HF_HUB_OFFLINE": "1",
                    "PYTHONPATH": str(HERE.parents[1]),
                },
            )
        except subprocess.TimeoutExpired as error:
            raise RuntimeError(f"took more than {self.limit:.0f} s") from error
        if done.returncode != 0:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise RuntimeError(lines[-1])
        return done.stdout


def stored_bytes(model: Path) -> int:
    """Return the bytes of a model: a file, and the data beside it that it names."""
    if model.suffix == ".gguf":
        return model.stat().st_size
    import onnx

    proto = onnx.load(model, load_external_data=False)
    named = {
        entry.value
        for tensor in proto.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return sum(file.stat().st_size for file in (model, *(model.parent / name for name in named)))


def _copied(model: Path, folder: Path) -> Path:
    """Return a model in a folder of its own: quantizers that are stopped leave files beside it.

    Its files are no links: onnx refuses data that has another name too.
    """
    return shutil.copytree(model.parent, folder) / model.name


def _digest(file: Path) -> str:
    """Return a hash of a file, and of the data beside it by its name and size."""
    made = hashlib.sha256()
    with file.open("rb") as content:
        made.update(hashlib.file_digest(content, "sha256").digest())
    for data in sorted(file.parent.glob("*.data*")) if file.suffix == ".onnx" else ():
        made.update(f"{data.name} {data.stat().st_size}".encode())
    return made.hexdigest()


def _line(message: str) -> str:
    lines = message.strip().splitlines()
    return lines[-1][:300] if lines else "no message"
