"""Motifs: pieces of real models in the spellings that exporters write."""

from __future__ import annotations

from lwc.verify.generate.motifs import (
    activations,
    attention,
    control,
    convolution,
    embeddings,
    linear,
    norms,
    quantized,
    rotary,
    sharing,
    spelled_attention,
)
from lwc.verify.generate.sketch import Motif

__all__ = ["MOTIFS"]

MOTIFS: tuple[Motif, ...] = (
    *linear.MOTIFS,
    *norms.MOTIFS,
    *activations.MOTIFS,
    *attention.MOTIFS,
    *spelled_attention.MOTIFS,
    *embeddings.MOTIFS,
    *convolution.MOTIFS,
    *sharing.MOTIFS,
    *quantized.MOTIFS,
    *control.MOTIFS,
    *rotary.MOTIFS,
)
"""Every motif; draw from them with `sketches(MOTIFS)`."""
