"""One kernel a file: the Triton code, its tilings, and what it moves and computes by them."""
