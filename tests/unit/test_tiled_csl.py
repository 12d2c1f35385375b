"""The two layouts of sparse matrices: tiled CSL as Flash-LLM writes it, and bitmaps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lwc.core import tiled_bitmap
from lwc.core.errors import LwcError
from lwc.core.tiled_bitmap import pack, unpack
from lwc.core.tiled_csl import TiledCsl, bank_conflicts, decode, encode, encoded_bytes

Array = np.ndarray[Any, Any]


def draw(seed: int, rows: int, columns: int, density: float, skew: float = 0) -> Array:
    """Draw a matrix; with skew, some columns and rows are much emptier than others."""
    rng = np.random.default_rng(seed)
    keep = density * (1 - skew * (np.arange(columns) % 3 == 0))
    keep = keep * (1 - skew * (np.arange(rows) % 5 == 0))[:, None]
    values = rng.normal(size=(rows, columns)) * (rng.random((rows, columns)) < keep)
    found: Array = values.astype(np.float16)
    return found


def one_tile(entries: Mapping[tuple[int, int], float]) -> Array:
    matrix = np.zeros((128, 64), np.float16)
    for place, value in entries.items():
        matrix[place] = value
    return matrix


def slow(tile: Array) -> list[int]:
    """Deal out one tile nonzero by nonzero, with stacks, as Flash-LLM describes it."""
    banks: list[list[int]] = [[] for _ in range(32)]
    zeros: dict[int, int] = {}
    for row, column in np.ndindex(tile.shape):
        permuted = column ^ row % 8 << 3
        bank, place = permuted // 2 % 32, row * 64 + permuted
        if tile[row, column] != 0:
            banks[bank].append(int(tile[row, column].view(np.uint16)) | place << 16)
        else:
            zeros.setdefault(bank, place)
    while sum(map(len, banks)) % 4:
        emptiest = min(range(32), key=lambda bank: len(banks[bank]))
        banks[emptiest].append(zeros[emptiest] << 16)

    def deal(lanes: int, steps: int) -> list[list[int]]:
        stacks: list[list[int]] = [[] for _ in range(lanes)]
        for _ in range(steps):
            for stack in stacks:
                stack.append(max(banks, key=len).pop())
        return stacks

    rounds, rest = divmod(sum(map(len, banks)) // 4, 32)
    tail, main = deal(rest, 4), deal(32, 4 * rounds)
    in_main = [[[main[b].pop() for b in range(32)] for _ in range(4)] for _ in range(rounds)]
    in_tail = [[tail[b].pop() for b in range(rest)] for _ in range(4)]
    layers = [*in_main, in_tail]
    return [layer[v][b] for layer in layers for b in range(len(layer[0])) for v in range(4)]


def test_a_few_nonzeros_by_hand() -> None:
    """Two in bank 0, one in bank 1; the zero goes to bank 2, which is empty."""
    matrix = one_tile({(0, 0): 1, (0, 1): -2, (0, 2): 0.5})
    encoded = encode(matrix)
    # Dealt: place 1 (bank 0 has two), then places 0, 2 and 4 in the order of banks; then reversed.
    assert [hex(word) for word in encoded.nonzeros] == ["0x40000", "0x23800", "0x3c00", "0x1c000"]
    assert encoded.tile_offsets.tolist() == [0, 1, 1]
    assert encoded.nonzeros.dtype == np.uint32
    assert encoded.tile_offsets.dtype == np.int32


def test_the_example_of_the_page() -> None:
    """docs/tiled_csl.md works it out step by step."""
    matrix = one_tile({(0, 0): 1, (0, 1): -2, (0, 2): 0.5, (9, 3): 4, (9, 60): -1})
    encoded = encode(matrix)
    assert [f"{word:08x}" for word in encoded.nonzeros] == [
        *("024b4400", "00060000", "00023800", "0001c000"),
        *("0274bc00", "00080000", "00040000", "00003c00"),
    ]
    assert encoded.tile_offsets.tolist() == [0, 2, 2]
    packed = pack(matrix)
    assert [hex(word) for word in packed.bits[0, 0, [0, 9]]] == ["0x3", "0x40000002"]
    assert packed.pairs.tolist() == [[1, -2], [0.5, 0], [0, 4], [-1, 0]]


def test_places_are_permuted_by_the_row() -> None:
    """Row 9 exchanges column 3 with column 3 ^ 8."""
    (*_, word) = encode(one_tile({(9, 3): 1}), reorder=False).nonzeros
    assert word >> 16 == 9 * 64 + (3 ^ 8)
    assert np.float16(1).view(np.uint16) == word & 0xFFFF


def test_the_first_zeros_pad_a_tile_kept_in_order() -> None:
    words = encode(one_tile({(0, 0): 1, (0, 3): 1}), reorder=False).nonzeros
    assert [(word >> 16, word & 0xFFFF) for word in words.tolist()] == [
        (0, 0x3C00),
        (1, 0),
        (2, 0),
        (3, 0x3C00),
    ]


def test_tiles_lie_row_by_row_and_offsets_count_fours() -> None:
    matrix = np.zeros((256, 128), np.float16)
    matrix[0, 64:69] = 1  # the second tile: five nonzeros, padded to eight
    matrix[128, 0] = 2  # the third
    encoded = encode(matrix)
    assert encoded.tile_offsets.tolist() == [0, 0, 2, 3, 3, 3]
    assert (encoded.nonzeros[8:] & 0xFFFF).tolist().count(0x4000) == 1


@pytest.mark.parametrize("density", [0.001, 0.02, 0.3, 0.97, 1])
@pytest.mark.parametrize("skew", [0, 0.9])
def test_it_is_what_dealing_one_by_one_gives(density: float, skew: float) -> None:
    matrix = draw(3, 128, 128, density, skew)
    encoded = encode(matrix)
    wanted = [word for tile in (matrix[:, :64], matrix[:, 64:]) for word in slow(tile)]
    assert encoded.nonzeros.tolist() == wanted


@pytest.mark.parametrize(
    "shape", [(1, 1), (127, 63), (128, 64), (129, 65), (5, 200), (300, 3), (0, 7), (7, 0)]
)
def test_odd_shapes_are_padded(shape: tuple[int, int]) -> None:
    matrix = draw(1, *shape, 0.4)
    tiles = -(-shape[0] // 128) * -(-shape[1] // 64)
    for reorder in (False, True):
        encoded = encode(matrix, reorder=reorder)
        assert len(encoded.tile_offsets) == tiles + 2
        np.testing.assert_array_equal(decode(encoded), matrix)
    packed = pack(matrix)
    assert len(packed.offsets) == tiles + 1
    np.testing.assert_array_equal(unpack(packed), matrix)


@given(
    rows=st.integers(1, 280),
    columns=st.integers(1, 150),
    density=st.sampled_from([0, 0.002, 0.1, 0.5, 0.95, 1]),
    skew=st.sampled_from([0, 0.5, 1]),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_matrices_survive(rows: int, columns: int, density: float, skew: float, seed: int) -> None:
    matrix = draw(seed, rows, columns, density, skew)
    dealt, kept = encode(matrix), encode(matrix, reorder=False)
    np.testing.assert_array_equal(decode(dealt).view(np.uint16), decode(kept).view(np.uint16))
    np.testing.assert_array_equal(decode(dealt), matrix)
    np.testing.assert_array_equal(unpack(pack(matrix)), matrix)
    if np.diff(kept.tile_offsets)[:-1].min() >= 128:
        assert bank_conflicts(dealt) <= bank_conflicts(kept)
    count = int(np.count_nonzero(matrix))
    padded = encoded_bytes(rows, columns, count)
    assert padded <= dealt.nbytes <= padded + 4 * 3 * (len(dealt.tile_offsets) - 2)


@pytest.mark.parametrize(
    ("bits", "kept"),
    [
        (0x0001, True),  # the smallest subnormal number
        (0x83FF, True),
        (0x7C00, True),  # infinities
        (0xFC00, True),
        (0x8000, False),  # negative zero
    ],
)
def test_what_counts_as_zero(bits: int, kept: bool) -> None:
    matrix = np.zeros((128, 64), np.float16)
    matrix.view(np.uint16)[17, 5] = bits
    found = decode(encode(matrix)).view(np.uint16)
    assert found[17, 5] == (bits if kept else 0)
    assert np.count_nonzero(found) == kept
    np.testing.assert_array_equal(unpack(pack(matrix)).view(np.uint16), found)


def test_nan_and_other_types_are_refused() -> None:
    matrix = np.ones((4, 4), np.float16)
    matrix[2, 1] = np.nan
    for function in (encode, pack):
        with pytest.raises(LwcError, match="NaN"):
            function(matrix)
        with pytest.raises(LwcError, match="float32"):
            function(np.ones((4, 4), np.float32))
        with pytest.raises(LwcError, match="rank 2"):
            function(np.ones(4, np.float16))


def test_damage_is_noticed() -> None:
    good = encode(draw(0, 128, 64, 0.5))
    for nonzeros, offsets in [
        (good.nonzeros[:-1], good.tile_offsets),
        (good.nonzeros, good.tile_offsets[:-1]),
        (good.nonzeros, good.tile_offsets[::-1]),
        (good.nonzeros | np.uint32(1 << 31), good.tile_offsets),
    ]:
        with pytest.raises(LwcError):
            decode(TiledCsl(128, 64, nonzeros, offsets))
    whole = pack(draw(0, 128, 64, 0.5))
    for damaged in (
        tiled_bitmap.TiledBitmap(128, 65, whole.bits, whole.pairs, whole.offsets),
        tiled_bitmap.TiledBitmap(128, 64, whole.bits, whole.pairs[:-1], whole.offsets),
        tiled_bitmap.TiledBitmap(128, 64, whole.bits, whole.pairs, whole.offsets * 2),
    ):
        with pytest.raises(LwcError):
            unpack(damaged)


def test_a_dense_tile_is_written_without_conflicts() -> None:
    """All banks are equally full; in the matrix' order half of them are busy twice."""
    dense = np.ones((128, 64), np.float16)
    assert bank_conflicts(encode(dense)) == 0
    assert bank_conflicts(encode(dense, reorder=False)) == 8192 // 32


def test_in_nearly_empty_tiles_the_order_of_the_matrix_can_be_better() -> None:
    """Of eight nonzeros, three in one bank, two threads write two of the three at once."""
    places = [(0, 0), (0, 2), (0, 4), (8, 0), (8, 4), (8, 6), (16, 0), (16, 6)]
    matrix = one_tile(dict.fromkeys(places, 1.0))
    assert bank_conflicts(encode(matrix)) == 1
    assert bank_conflicts(encode(matrix, reorder=False)) == 0


def test_conflicts_by_hand() -> None:
    """Threads 0 to 7 write four values each; columns 0 and 1 of rows 0 and 8 share a bank."""
    matrix = one_tile({(0, 0): 1, (8, 0): 1, (16, 0): 1, (24, 0): 1})
    assert bank_conflicts(encode(matrix)) == 0  # one thread, four writes
    matrix = one_tile({(8 * row, 0): 1 for row in range(8)})
    assert bank_conflicts(encode(matrix)) == 4  # two threads, each write in one bank
    assert bank_conflicts(encode(np.zeros((128, 64), np.float16))) == 0


@pytest.mark.parametrize("sparsity", [0.5, 0.7, 0.8, 0.9])
def test_sizes_are_the_formulas(sparsity: float) -> None:
    """Against float16, tiled CSL takes 2 (1 - s), a bitmap 1 - s^2 + 1 / 32, each up to 1 %."""
    matrix = draw(5, 1024, 1024, 1 - sparsity)
    encoded, packed = encode(matrix), pack(matrix)
    share = np.count_nonzero(matrix) / matrix.size
    assert encoded.nbytes / matrix.nbytes == pytest.approx(2 * share, rel=0.01)
    assert packed.nbytes / matrix.nbytes == pytest.approx(1 - (1 - share) ** 2 + 1 / 32, rel=0.01)
    pairs = int(np.count_nonzero(matrix.reshape(-1, 2).any(axis=1)))
    assert packed.nbytes - tiled_bitmap.packed_bytes(1024, 1024, pairs) < 128 * 3 * 4
    assert bank_conflicts(encoded) < bank_conflicts(encode(matrix, reorder=False)) / 4


def test_a_bitmap_by_hand() -> None:
    packed = pack(one_tile({(0, 5): 1, (0, 63): 2, (3, 0): 3, (3, 1): -0.0}))
    assert packed.bits[0, 0, :4].tolist() == [1 << 2 | 1 << 31, 0, 0, 1]
    assert packed.pairs.tolist() == [[0, 1], [0, 2], [3, 0], [0, 0]]
    assert not np.signbit(packed.pairs).any()
    assert packed.offsets.tolist() == [0, 1]
    assert packed.fullest == 4
