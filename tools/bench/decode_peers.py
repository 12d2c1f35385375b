"""Where the peers of `decode.py` and `quantize.py` are installed, and their processes."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fetch_models import cache_folder

PEERS = {
    "onnxruntime_genai": ["onnxruntime-genai"],
    "llama_cpp": ["--no-binary", "llama-cpp-python", "llama-cpp-python"],
    # It imports the last two and does not say so.
    "onnx_neural_compressor": ["onnx-neural-compressor", "prettytable", "scipy"],
}
"""What pip installs for a module that is not part of lwc's own environment."""

APART = {"onnx_neural_compressor": "inc-venv"}
"""Peers with an environment of their own: they would take other peers' libraries back."""

WORKER = Path(__file__).with_name("decode_worker.py")
SECONDS = 900
"""Limit for loading a model, and for one run."""


class Absent(Exception):
    """A peer is not installed."""


def _venv_python(name: str) -> Path:
    folder = "Scripts" if sys.platform == "win32" else "bin"
    return cache_folder() / name / folder / "python"


def install_peers() -> None:
    """Put the peers that are not importable here into environments of their own.

    llama-cpp-python is compiled, for this processor; that takes a C++ compiler and some minutes.
    """
    missing: dict[str, list[str]] = {}
    for name in PEERS:
        if importlib.util.find_spec(name) is None:
            missing.setdefault(APART.get(name, "peers-venv"), []).append(name)
    for home, names in missing.items():
        python = _venv_python(home)
        if not python.exists():
            subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
        # The same ONNX Runtime as the other contenders have.
        same = f"onnxruntime=={version('onnxruntime')}"
        subprocess.run([*pip, same, *(word for name in names for word in PEERS[name])], check=True)


@dataclass(frozen=True)
class Place:
    """Where a module is installed.

    Attributes:
        python: The interpreter that has it.
        folder: The module's folder.
        version: Of the package that brought it.
    """

    python: Path
    folder: Path
    version: str


_ASK = """
import importlib.metadata as metadata, importlib.util as util, sys
module = sys.argv[1]
print(util.find_spec(module).origin)
print(metadata.version(metadata.packages_distributions()[module][0]))
"""


@functools.cache
def place(module: str) -> Place:
    """Return where a module is installed: with lwc, or among the peers.

    Raises:
        Absent: Nowhere.
    """
    for python in (Path(sys.executable), _venv_python(APART.get(module, "peers-venv"))):
        if python.exists():
            command = [str(python), "-c", _ASK, module]
            found = subprocess.run(command, capture_output=True, text=True, check=False)
            if found.returncode == 0:
                origin, release = found.stdout.splitlines()
                return Place(python, Path(origin).parent, release)
    raise Absent(f"{module} is not installed: run with --install-peers")


class Player:
    """A contender's process, kept alive: it loads one model and generates when it is told to.

    Args:
        module: What the runner imports; decides about the interpreter.
        runner: A key of `decode_worker.RUNNERS`.
        model: What it loads.
        options: `threads`, `context`, and what the runner takes besides.

    Raises:
        RuntimeError: The model does not load; the message is the last line the process wrote.
    """

    def __init__(self, module: str, runner: str, model: Path, options: dict[str, Any]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the process
        threads = str(options["threads"])
        self._process = subprocess.Popen(
            [str(place(module).python), str(WORKER), runner, str(model), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"},
        )
        try:
            self.version = str(self._answer()["version"])
        except RuntimeError:
            self.close()
            raise

    def generate(self, prompt: list[int], tokens: int) -> dict[str, Any]:
        """Return the continuation, the seconds of each token and the peak of memory.

        Raises:
            RuntimeError: The process failed, or took too long.
        """
        assert self._process.stdin is not None
        # A broken pipe means that it ended: reading its answer tells why.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps({"prompt": prompt, "tokens": tokens}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.communicate()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Timer(SECONDS, self._process.kill)
        late.start()
        begun = time.monotonic()
        line = self._process.stdout.readline()
        late.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            return answer
        code = self._process.wait()
        if time.monotonic() - begun >= SECONDS:
            raise RuntimeError(f"no answer in {SECONDS} s")
        self._log.seek(0)
        lines = self._log.read().strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"ended with code {code}")
