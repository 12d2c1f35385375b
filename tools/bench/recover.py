#!/usr/bin/env python3
"""Damage SmolLM2-135M and let `recover` train it: how much of the lost perplexity comes back.

A fifth of the neurons of each MLP is set to zero, drawn by a seed: the same columns of the gate and
up projection and rows of the down projection. `recover` trains adapters on the first lines of a
news text in windows of 512 tokens, with the undamaged model as teacher; the other lines judge.
Each perplexity is that of the float32 model on the same tokens. What comes back is the share of
the difference of logarithms that is gone afterwards. The model is trained once with adapters
beside the weights, which are merged then, so that both can be compared.

    python tools/bench/recover.py [--share 0.2] [--steps 150] [--rank 8] [--threads 2]
        [--tokens 16384] [--samples 64] [--layers N] [--max-memory SIZE] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.quantize_subjects import WINDOW, Subject, open_subject

import lwc
from lwc.calibration.data import CalibrationFile
from lwc.core.module import Module
from lwc.core.text import parse_size
from lwc.core.weights import reading
from lwc.evaluate.agreement import agreement
from lwc.evaluate.perplexity import Perplexity, perplexity
