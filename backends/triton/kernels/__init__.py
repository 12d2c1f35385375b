"""One kernel a file: the Triton code, its tilings, and what it moves and computes by them."""

from __future__ import annotations

__all__ = ["NAMES"]

NAMES = (
    *("activation_kernel", "combine_kernel", "decode_kernel", "flash_kernel", "norm_kernel"),
    *("quantize_rows_kernel", "rotary_kernel", "sum_parts_kernel", "tiled_bitmap_kernel"),
    *("tiled_csl_kernel", "w4a16_kernel", "w8a8_kernel"),
)
"""Of all that are launched, known without importing them."""
