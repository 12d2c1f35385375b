"""Fourier transforms and windows."""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch

from lwc.backends.fx.ops.rounding import in_single, rounded_to
from lwc.backends.fx.registry import op

__all__: list[str] = []

Tensor: TypeAlias = torch.Tensor


def _number(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


@op("DFT", values=(1, 2))
def dft(
    x: Tensor,
    length: Any = None,
    axis: Any = -2,
    *,
    inverse: int = 0,
    onesided: int = 0,
) -> Tensor:
    """Transform along an axis; the last axis holds the real and the imaginary part."""
    count = _number(length)
    dim, kind, x = _number(axis) % x.dim(), x.dtype, in_single(x)
    if onesided and inverse:
        signal = torch.fft.irfft(torch.view_as_complex(x.contiguous()), n=count, dim=dim)
        return rounded_to(signal.unsqueeze(-1), kind)
    if x.shape[-1] == 1:
        signal = torch.complex(x[..., 0], torch.zeros_like(x[..., 0]))
    else:
        signal = torch.view_as_complex(x.contiguous())
    transform = torch.fft.ifft if inverse else torch.fft.fft
    spectrum = transform(signal, n=count, dim=dim)
    if onesided:
        spectrum = spectrum.narrow(dim, 0, spectrum.shape[dim] // 2 + 1)
    return rounded_to(torch.view_as_real(spectrum), kind)


@op("STFT", values=(1, 3))
def stft(
    x: Tensor,
    step: Any,
    window: Tensor | None = None,
    length: Any = None,
    *,
    onesided: int = 1,
) -> Tensor:
    """Transform frames of a signal `[batch, length, 1 or 2]`."""
    hop, size = _number(step), _number(length)
    if size is None:
        assert window is not None
        size = window.shape[0]
    frames = x.unfold(1, size, hop).transpose(2, 3)  # [batch, frames, size, parts]
    if window is not None:
        frames = frames * window.unsqueeze(-1)
    return dft(frames, axis=2, onesided=onesided)


def _window(size: Any, periodic: int, weights: list[float], dtype: torch.dtype) -> Tensor:
    count = _number(size)
    steps = torch.arange(count, dtype=torch.float64)
    angle = 2 * math.pi * steps / (count if periodic else max(count - 1, 1))
    total = sum(weight * torch.cos(angle * order) for order, weight in enumerate(weights))
    return torch.as_tensor(total).to(dtype)


@op("HannWindow", values=(0,), types="output_datatype")
def hann_window(
    size: Any, *, periodic: int = 1, output_datatype: torch.dtype = torch.float32
) -> Tensor:
    """Half a cosine, raised."""
    return _window(size, periodic, [0.5, -0.5], output_datatype)


@op("HammingWindow", values=(0,), types="output_datatype")
def hamming_window(
    size: Any, *, periodic: int = 1, output_datatype: torch.dtype = torch.float32
) -> Tensor:
    """A raised cosine that does not reach 0."""
    return _window(size, periodic, [25 / 46, -21 / 46], output_datatype)


@op("BlackmanWindow", values=(0,), types="output_datatype")
def blackman_window(
    size: Any, *, periodic: int = 1, output_datatype: torch.dtype = torch.float32
) -> Tensor:
    """Three cosines."""
    return _window(size, periodic, [0.42, -0.5, 0.08], output_datatype)
