"""Norms of rows, and the sum with a residual stream before them."""

from __future__ import annotations

import torch

from lwc.backends.triton import launch
from lwc.backends.triton.kernels.norm import LONGEST
from lwc.backends.triton.lowerings.registry import Refused, Results, Site, kernel

_NORMS = "RMSNormalization SimplifiedLayerNormalization com.microsoft::SimplifiedLayerNormalization"


@kernel(_NORMS, runs="norm_kernel")
def rms_norm(site: Site) -> Results:
    """The norm of each row."""
    _is_by_row(site)
    x, scale = site.given("x"), site.given("scale")
    return {0: site.call(launch.rms_norm, x, scale, eps=site.given("epsilon"))}


@kernel("LayerNormalization", runs="norm_kernel")
def layer_norm(site: Site) -> Results:
    """The norm of each row."""
    _is_by_row(site, "bias")
    x, scale, bias = (site.given(name) for name in ("x", "scale", "bias"))
    return {0: site.call(launch.layer_norm, x, scale, bias, eps=site.given("epsilon"))}


@kernel("com.microsoft::SkipSimplifiedLayerNormalization", runs="norm_kernel")
def skip_rms_norm(site: Site) -> Results:
    """The norm of a sum, and the sum."""
    x = _with_bias(site)
    residual, eps = site.given("skip"), site.given("epsilon")
    both = site.call(launch.rms_norm, x, site.given("gamma"), residual=residual, eps=eps)
    return {index: site.item(both, index // 3) for index in sorted(site.used)}


@kernel("com.microsoft::SkipLayerNormalization", runs="norm_kernel")
def skip_layer_norm(site: Site) -> Results:
    """The norm of a sum, and the sum."""
    x = _with_bias(site, "beta")
    gamma, beta, residual = (site.given(name) for name in ("gamma", "beta", "skip"))
    eps = site.given("epsilon")
    both = site.call(launch.layer_norm, x, gamma, beta, residual=residual, eps=eps)
    return {index: site.item(both, index // 3) for index in sorted(site.used)}


def _is_by_row(site: Site, *more: str) -> None:
    site.need_one_type("x", "scale", *more)
    site.need_outputs(0)
    site.need(site.given("stash_type") == 1, "its statistics are not taken in float32")
    axis = site.given("axis")
    site.need(axis == -1 or axis == site.need_rank("x") - 1, "it spans several axes")
    for name in ("scale", *more):
        _is_vector(site, name)


def _with_bias(site: Site, *more: str) -> object:
    """Check a norm of a sum; return its input, with the bias added."""
    site.need_one_type("x", "skip", "gamma", "bias", *more)
    site.need_outputs(0, 3)
    x, skip = site.given("x"), site.given("skip")
    shape = site.shape(x)
    same = shape is not None and shape == site.shape(skip)
    site.need(same, "x and skip are not known to have one shape")
    for name in ("gamma", *more):
        _is_vector(site, name)
    bias = site.given("bias")
    return x if bias is None else site.call(torch.add, x, bias)


def _is_vector(site: Site, name: str) -> None:
    given = site.given(name)
    if given is None:
        return
    site.need(site.need_rank(name) == 1, f"{name} is no vector")
    columns, length = site.extent(site.given("x"), -1), site.extent(given, 0)
    if columns is None:
        # A single number may stand for a row of any length; no other vector is broadcast.
        site.need(length != 1, f"the length of rows is not known, and {name} is a single number")
        columns = length
    if columns is None:
        raise Refused("the length of rows is not known")
    site.need(length is not None, f"the length of {name} is not known")
    site.need(columns == length, f"{name} is not as long as a row")
    site.need(columns <= LONGEST, f"rows are longer than {LONGEST}")
