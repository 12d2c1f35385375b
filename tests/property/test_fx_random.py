"""Random modules in PyTorch agree with ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from fx_agreement import run_fx
from hypothesis import HealthCheck, given, note, reject, settings

import lwc
from lwc.backends.onnxruntime.session import OnnxRuntimeBackend
from lwc.calibration.trials import working_feeds
from lwc.core.errors import LwcError
from lwc.core.module import Module
from lwc.verify import GRAMMAR, MOTIFS, sketches
from lwc.verify.generate.motifs import quantized


@settings(
    max_examples=250,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(sketches([*GRAMMAR, *MOTIFS], steps=(1, 4), evenly=True))
def test_random_modules_agree(module: Module) -> None:
    try:
        with OnnxRuntimeBackend().compile(module, optimize="none", threads=1) as executable:
            (feed,) = working_feeds(module, executable, 1)
            wanted = executable.run(feed)
    except LwcError:
        reject()  # it is ill-typed, or runs on nothing
    note(str(module))
    for found, (name, array) in zip(run_fx(module, feed), wanted.items(), strict=True):
        note(name)
        if not isinstance(array, np.ndarray) or array.dtype.kind in "OUS":
            continue
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        if array.dtype.kind != "f":
            # A rounding may fall to the other side: a code more or less.
            assert np.mean(found != array) <= 0.05
            continue
        loose = 2e-2 if array.dtype == np.float16 else 1e-3
        with np.errstate(all="ignore"):
            size = np.abs(array[np.isfinite(array)]).max(initial=1e-3)
            same = np.isclose(found, array, loose, loose * size, equal_nan=True)
        assert same.all(), (name, np.abs(found - array)[~same].max())


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(sketches([*GRAMMAR, *quantized.MOTIFS], steps=(1, 4), evenly=True))
def test_straight_through_changes_no_result(module: Module) -> None:
    try:
        with OnnxRuntimeBackend().compile(module, optimize="none", threads=1) as executable:
            (feed,) = working_feeds(module, executable, 1)
    except LwcError:
        reject()
    note(str(module))
    results = []
    for chosen in (False, True):
        lowered = lwc.to_fx(module, straight_through=chosen)
        given = [torch.from_numpy(feed[name]) for name in lowered.meta["lwc"]["inputs"]]
        found = lowered(*given)
        results.append(found if isinstance(found, tuple) else (found,))
    for through, plain in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(through, plain, equal_nan=True)
