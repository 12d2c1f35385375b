"""The kernels as functions: torch tensors in, torch tensors out."""

from __future__ import annotations

from math import inf, prod
from typing import Any

from lwc.backends.triton.availability import require_runnable, require_triton
from lwc.core.errors import UsageError

__all__ = [
    "attention",
    "attention_packed",
    "decode_attention",
    "gated_activation",
    "layer_norm",
    "rms_norm",
    "rotary",
]


_FARTHEST = 2**30


def rms_norm(x: Any, weight: Any | None, *, residual: Any | None = None, eps: float = 1e-6) -> Any:
    """Return x / sqrt(mean(x²) + eps) * weight over the last axis, rounded once.

    Args:
        x: Any shape, [..., columns]; float16, bfloat16 or float32.
        weight: Factors, [columns], or None.
        residual: Shaped as `x`: added first.
        eps: Added to the mean square.

    Returns:
        The norm; with a residual, the norm and the sum.

    Raises:
        UsageError: Shapes or types do not fit.
        LwcError: No kernel runs where the tensors are.
    """
    return _norm(x, weight, None, residual, eps=eps, centred=False)


def layer_norm(
    x: Any,
    weight: Any | None,
    bias: Any | None = None,
    *,
    residual: Any | None = None,
    eps: float = 1e-5,
) -> Any:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias over the last axis, rounded once.

    Arguments, results and errors are those of `rms_norm`; `bias` is as `weight`.
    """
    return _norm(x, weight, bias, residual, eps=eps, centred=True)


def _norm(
    x: Any, weight: Any | None, bias: Any | None, residual: Any | None, *, eps: float, centred: bool
) -> Any:
    require_triton()
    from lwc.backends.triton.kernels import norm
    from lwc.backends.triton.run import architecture_of, computable, run

    columns = x.shape[-1]
    _check_float(x)
    for name, tensor in (("weight", weight), ("bias", bias)):
        _check_shape(name, tensor, (columns,))
    _check_shape("residual", residual, tuple(x.shape))
    if columns > norm.LONGEST:
        raise UsageError(f"rows of {columns} elements are longer than {norm.LONGEST}")
    require_runnable(x, weight, bias, residual)
    rows, residual_rows = (None if t is None else _rows(computable(t)) for t in (x, residual))
    factors, shifts = (None if t is None else computable(t).contiguous() for t in (weight, bias))
    operation = norm.norm_operation(
        rows, factors, shifts, residual_rows, architecture_of(x), eps=eps, centred=centred
    )
    results = tuple(result.view(x.shape).to(x.dtype) for result in run(operation))
    return results[0] if residual is None else results


def rotary(
    x: Any, cos: Any, sin: Any, positions: Any | None = None, *, interleaved: bool = False
) -> Any:
    """Return `x` with its heads turned by the angles of their positions, as ONNX's RotaryEmbedding.

    Args:
        x: [batch, length, heads, size]. Views of a packed product are read in place.
        cos: Cosines by row and pair, [rows, half] with half at most size / 2: further elements of
            a head are copied. Without `positions`, row i is token i; or [batch, length, half].
        sin: As `cos`.
        positions: Rows of `cos`, [batch, length]. On a GPU, which the host does not wait for, a
            token whose position is no row becomes NaN.
        interleaved: Pairs are neighbours; otherwise element i belongs to i + half.

    Raises:
        UsageError: Shapes or types do not fit.
        LwcError: A position on the CPU is no row, or no kernel runs where the tensors are.
    """
    require_triton()
    from lwc.backends.fx.ops.rotary import check_places
    from lwc.backends.triton.kernels.rotary import rotary_operation
    from lwc.backends.triton.run import architecture_of, computable, run

    _check_float(x, cos, sin)
    batch, length, _, size = _shape_of("x", x, 4)
    half = cos.shape[-1]
    if cos.ndim == 3:
        _check_shape("cos", cos, (batch, length, half))
    elif positions is None and cos.shape[0] < length:
        raise UsageError(f"cos has {cos.shape[0]} rows for {length} tokens")
    if cos.ndim not in {2, 3} or (cos.ndim == 3 and positions is not None) or 2 * half > size:
        raise UsageError(f"cos has shape {list(cos.shape)}, which does not fit {list(x.shape)}")
    _check_shape("sin", sin, tuple(cos.shape))
    _check_shape("positions", positions, (batch, length))
    _check_integers("positions", positions)
    require_runnable(x, cos, sin, positions)
    if positions is not None and positions.device.type == "cpu":
        check_places(positions, cos.shape[0])
    heads = computable(x)
    operation = rotary_operation(
        heads if heads.stride(-1) == 1 else heads.contiguous(),
        computable(cos).contiguous(),
        computable(sin).contiguous(),
        None if positions is None else positions.contiguous(),
        architecture_of(x),
        interleaved=interleaved,
    )
    return run(operation)[0].to(x.dtype)


def gated_activation(gate: Any, up: Any, function: str = "silu") -> Any:
    """Return activation(gate) * up, rounded once.

    Args:
        gate: [..., columns].
        up: As `gate`; both may be halves of one packed product.
        function: `silu`, `gelu`, `gelu-tanh` or `relu`.

    Raises:
        UsageError: Shapes or types do not fit, or there is no such function.
        LwcError: No kernel runs where the tensors are.
    """
    require_triton()
    from lwc.backends.triton.kernels.activation import ACTIVATIONS, activation_operation
    from lwc.backends.triton.run import computable, run

    if function not in ACTIVATIONS:
        raise UsageError(f"no activation is called '{function}': {', '.join(ACTIVATIONS)}")
    _check_float(gate, up)
    _check_shape("up", up, tuple(gate.shape))
    require_runnable(gate, up)
    operation = activation_operation(_rows(computable(gate)), _rows(computable(up)), function)
    return run(operation)[0].view(gate.shape).to(gate.dtype)


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    offset: int | None = None,
    mask: Any | None = None,
    key_lengths: Any | None = None,
    scale: float | None = None,
    cap: float = 0.0,
) -> Any:
    """Return softmax(q kᵀ scale + mask) v for each head; queries that attend to nothing give 0.

    Args:
        q: [batch, heads, queries, size].
        k: [batch, groups, keys, size]; `groups` divides `heads`.
        v: [batch, groups, keys, value size].
        causal: Keys after the query's position are left out.
        window: How many keys before and after a query's position it attends to; None is all.
        offset: Position of the first query among the keys, at most 2^29 from 0; by default the last
            query is at the last key that counts.
        mask: Added to the scores, or of type bool with False where a key is left out; of a shape
            that broadcasts to [batch, heads, queries, keys].
        key_lengths: Keys of each sequence that count, int32 or int64 [batch]. Those below 0 count
            as 0, those beyond the keys as all.
        scale: Factor of the scores; 1 / sqrt(size) by default.
        cap: Scores s become cap * tanh(s / cap); 0 leaves them.

    Returns:
        [batch, heads, queries, value size], tokens outside heads in memory.

    Raises:
        UsageError: Shapes, types or numbers do not fit.
        LwcError: No kernel runs where the tensors are.
    """
    require_triton()
    batch, heads, queries, _ = _check_batch(q, k, v, key_lengths, cap)
    require_runnable(q, k, v, mask, key_lengths)
    return _attend(
        q, k, v, causal=causal, window=window, offset=offset, scale=scale, cap=cap,
        mask=_mask_for(mask, (batch, heads, queries, k.shape[2])),
        key_lengths=None if key_lengths is None else key_lengths.contiguous(),
    )  # fmt: skip


def attention_packed(
    q: Any,
    k: Any,
    v: Any,
    query_starts: Any,
    key_starts: Any,
    *,
    longest: tuple[int, int],
    causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    scale: float | None = None,
    cap: float = 0.0,
) -> Any:
    """Return attention within sequences that lie one after the other, without padding.

    Args:
        q: [tokens, heads, size].
        k: [key tokens, groups, size].
        v: [key tokens, groups, value size].
        query_starts: Where each sequence begins in `q`, from 0 on, and where the last ends, int32
            or int64 [sequences + 1]. Tokens behind the last sequence give 0.
        key_starts: Likewise for `k` and `v`.
        longest: Queries and keys of the longest sequence, or more.
        causal: As in `attention`, as are `window`, `scale` and `cap`; the last query of a
            sequence is at its last key.
        window: See `causal`.
        scale: See `causal`.
        cap: See `causal`.

    Where starts lie on a GPU, the host does not wait to look at them: nothing outside of the
    tensors is read or written, starts beyond the tokens count as their end, and queries of a
    sequence beyond `longest` may become NaN.

    Returns:
        [tokens, heads, value size].

    Raises:
        UsageError: Shapes, types or numbers do not fit; or starts on the CPU do not begin at 0,
            fall, end beyond the tokens, or have a sequence that is longer than `longest`.
        LwcError: No kernel runs where the tensors are.
    """
    require_triton()
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _shape_of(name, tensor, 3)
    q, k, v = (tensor.transpose(0, 1).unsqueeze(0) for tensor in (q, k, v))
    _check_heads(q, k, v, cap)
    _check_shape("key_starts", key_starts, tuple(query_starts.shape))
    _check_starts("query_starts", query_starts, q.shape[2], longest[0])
    _check_starts("key_starts", key_starts, k.shape[2], longest[1])
    require_runnable(q, k, v, query_starts, key_starts)
    found = _attend(
        q, k, v, causal=causal, window=window, offset=None, scale=scale, cap=cap,
        query_starts=query_starts.contiguous(), key_starts=key_starts.contiguous(),
        longest=(max(min(longest[0], q.shape[2]), 1), longest[1]),
    )  # fmt: skip
    return found.squeeze(0).transpose(0, 1)


def decode_attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    key_lengths: Any | None = None,
    left: int | None = None,
    mask: Any | None = None,
    scale: float | None = None,
    cap: float = 0.0,
) -> Any:
    """Return causal attention of the newest tokens over a cache that has their keys already.

    Args:
        q: [batch, heads, queries, size]: the last tokens of each sequence.
        k: The cache, [batch, groups, keys, size]; `groups` divides `heads`.
        v: [batch, groups, keys, value size].
        key_lengths: As in `attention`; the new tokens' keys are among them. All when None.
        left: How many keys before a token's own position it attends to; None is all.
        mask: As in `attention`.
        scale: As in `attention`.
        cap: As in `attention`.

    Returns:
        [batch, heads, queries, value size], tokens outside heads in memory.

    Raises:
        UsageError: Shapes, types or numbers do not fit, or there are more new tokens than one tile
            holds.
        LwcError: No kernel runs where the tensors are.
    """
    require_triton()
    from lwc.backends.triton.kernels.decode_attention import MOST_ROWS, decode_operation
    from lwc.backends.triton.run import architecture_of, run

    batch, heads, queries, _ = _check_batch(q, k, v, key_lengths, cap)
    rows = heads // k.shape[1] * queries
    if rows > MOST_ROWS:
        raise UsageError(
            f"{queries} tokens of {heads // k.shape[1]} heads a group are {rows} rows, more than "
            f"{MOST_ROWS}",
            remedy="use `attention`",
        )
    require_runnable(q, k, v, mask, key_lengths)
    operation = decode_operation(
        _lined_up(q), _lined_up(k), _lined_up(v),
        architecture_of(q),
        mask=_mask_for(mask, (batch, heads, queries, k.shape[2])),
        key_lengths=None if key_lengths is None else key_lengths.contiguous(),
        left=_width(left), scale=scale, cap=cap,
    )  # fmt: skip
    return run(operation)[0].to(q.dtype)


def _attend(
    q: Any, k: Any, v: Any, *, causal: bool, window: tuple[int | None, int | None],
    offset: int | None, **rest: Any,
) -> Any:  # fmt: skip
    from lwc.backends.triton.kernels.flash_attention import Attended, flash_operation
    from lwc.backends.triton.run import architecture_of, run

    left, right = (_width(width) for width in window)
    if causal:
        right = 0 if right is None else min(right, 0)
    if abs(offset or 0) > _FARTHEST // 2:
        raise UsageError(f"offset {offset} is more than {_FARTHEST // 2} from 0")
    attended = Attended(left, right, offset)
    operation = flash_operation(
        _lined_up(q), _lined_up(k), _lined_up(v), attended, architecture_of(q), **rest
    )
    return run(operation)[0].to(q.dtype)


def _width(width: int | None) -> int | None:
    """Return a width of a window that means the same and whose sums with positions are int32."""
    return None if width is None else max(min(width, _FARTHEST), -_FARTHEST)


def _lined_up(tensor: Any) -> Any:
    """Return a tensor whose heads have their elements side by side."""
    from lwc.backends.triton.run import computable

    found = computable(tensor)
    return found if found.stride(-1) == 1 else found.contiguous()


def _mask_for(mask: Any | None, shape: tuple[int, ...]) -> Any:
    """Return a mask as the kernel reads it: with strides 0 where it is broadcast."""
    import torch

    from lwc.backends.triton.run import computable

    if mask is None:
        return None
    try:
        spread = computable(mask).expand(shape)
    except RuntimeError as error:
        raise UsageError(
            f"mask has shape {list(mask.shape)}, which does not broadcast to {list(shape)}"
        ) from error
    if mask.dtype == torch.bool:
        return spread.view(torch.int8)
    _check_float(mask)
    return spread


def _check_batch(q: Any, k: Any, v: Any, key_lengths: Any | None, cap: float) -> tuple[int, ...]:
    """Check operands of attention; return the shape of `q`, [batch, heads, queries, size]."""
    shape = _shape_of("q", q, 4)
    _check_heads(q, k, v, cap)
    _check_shape("key_lengths", key_lengths, shape[:1])
    _check_integers("key_lengths", key_lengths)
    if k.shape[0] != shape[0]:
        raise UsageError(f"k is of batch {k.shape[0]} and q of {shape[0]}")
    return shape


def _check_heads(q: Any, k: Any, v: Any, cap: float) -> None:
    """Check [batch, heads, tokens, size] of `q` against those of `k` and `v`, and the cap."""
    from lwc.backends.triton.kernels.flash_attention import LARGEST

    _check_float(q)
    for name, tensor in (("k", k), ("v", v)):
        _shape_of(name, tensor, 4)
        if tensor.dtype != q.dtype:
            raise UsageError(f"{name} is of type {tensor.dtype} and q of {q.dtype}")
    if k.shape[:3] != v.shape[:3]:
        raise UsageError(f"k has shape {list(k.shape)}, which does not fit v's {list(v.shape)}")
    largest = max(q.shape[3], v.shape[3])
    if largest > LARGEST:
        raise UsageError(f"heads of {largest} elements are larger than {LARGEST}")
    fits = q.shape[3] == k.shape[3] and k.shape[1] and q.shape[1] % k.shape[1] == 0
    if not fits or not q.shape[3]:
        raise UsageError(f"k has shape {list(k.shape)}, which does not fit q's {list(q.shape)}")
    if not 0 <= cap < inf:
        raise UsageError(f"cap is {cap}", remedy="0 leaves scores as they are")


def _check_starts(name: str, starts: Any, tokens: int, longest: int) -> None:
    """Check where sequences begin among some tokens; the content, too, where it is at hand."""
    if starts.ndim != 1 or not starts.shape[0] or (starts.shape[0] == 1 and tokens):
        raise UsageError(f"{name} has shape {list(starts.shape)}, not [sequences + 1]")
    _check_integers(name, starts)
    if starts.device.type != "cpu":
        return
    first, *rest = starts.tolist()
    if first != 0:
        raise UsageError(f"{name} begins at {first}, not 0")
    for last in rest:
        if last < first:
            raise UsageError(f"{name} falls from {first} to {last}")
        if last - first > longest:
            raise UsageError(f"{name} has a sequence of {last - first}, and longest says {longest}")
        first = last
    if first > tokens:
        raise UsageError(f"{name} ends at {first}, and there are {tokens} tokens")


def _check_integers(name: str, tensor: Any | None) -> None:
    import torch

    if tensor is not None and tensor.dtype not in (torch.int32, torch.int64):
        raise UsageError(f"{name} is of type {tensor.dtype}, not int32 or int64")


def _shape_of(name: str, tensor: Any, rank: int) -> tuple[int, ...]:
    if tensor.ndim != rank:
        raise UsageError(f"{name} has {tensor.ndim} dimensions, not {rank}")
    return tuple(tensor.shape)


def _rows(tensor: Any) -> Any:
    """Return [rows, columns] with columns side by side; a view where the layout allows."""
    flat = tensor.reshape(prod(tensor.shape[:-1]), tensor.shape[-1])
    return flat if flat.stride(-1) == 1 or flat.shape[-1] == 1 else flat.contiguous()


def _check_shape(name: str, tensor: Any | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise UsageError(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")


def _check_float(*tensors: Any) -> None:
    import torch

    for tensor in tensors:
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise UsageError(f"type {tensor.dtype} is not float16, bfloat16 or float32")
