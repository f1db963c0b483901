"""Which program of a launch works on what: tables of tiles for all stacks of a model.

Pure functions of sizes. Stacks are numbered as in the launch's table of groups; what differs in
more than sizes (a kernel's compile-time settings) is a kind, and each kind a launch of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Tile = list[int]

# Tiles of products. Few columns are kernel sizes of convolutions, 3 or 9; they would waste most of
# a wide tile. Models too small for a few large tiles on every multiprocessor get small ones.
LARGE = dict(BM=128, BN=128, BK=32, num_warps=8, num_stages=3)
LARGE_ROUNDED = dict(BM=128, BN=64, BK=32, num_warps=4, num_stages=3)  # of inputs of 11 bits
SMALL = dict(BM=64, BN=64, BK=32, num_warps=4, num_stages=3)
NARROW = dict(BM=256, BN=16, BK=16, num_warps=4, num_stages=1)
# Entry by entry, loads ahead of time take longer than they save.
UNALIGNED = dict(BM=64, BN=64, BK=64, num_warps=4, num_stages=2)
VECTOR = dict(BN=32, BK=128, num_warps=4)
SMALL_MODEL = 2**24  # entries of all stacks
# Tiles of Gram products.
GRAM = dict(S=64, BK=32, num_warps=4, num_stages=3)
NARROW_GRAM = dict(S=16, BK=128, num_warps=2, num_stages=1)
OUTER = dict(S=64, num_warps=4)
NARROW_COLUMNS = 16
# Longer sums are cut, or a few programs would run long after all others. That takes memory for the
# pieces, so large models, which have other work meanwhile, cut only much longer ones.
LONGEST_SUM, LONGEST_SUM_OF_LARGE = 1024, 8192
ENTRIES = 1024  # a program without products works on
SQUARES = dict(BN=32, BK=64)  # tiles of sums of squares
LONGEST_SQUARES = 4096  # entries a program sums


class ProductKind(NamedTuple):
    """shape: "vector", "narrow", "unaligned" or "wide"; the others divide M, N and K."""

    shape: str
    align_m: int
    align_n: int
    align_k: int


class GramKind(NamedTuple):
    """x is [K, d] with ``columns``, else [d, K]; ``outer`` products have K = 1."""

    outer: bool
    narrow: bool
    columns: bool
    in_pieces: bool
    align_d: int
    align_k: int


def elementwise(sizes: Sequence[tuple[Sequence[int], int]]) -> dict[int, list[Tile]]:
    """Alignment -> [group, row, first entry, 0], given (rows, entries a row) of each group."""
    tiles = (
        (alignment(size), [group, row, start, 0])
        for group, (rows, size) in enumerate(sizes)
        for row in rows
        for start in range(0, size, ENTRIES)
    )
    return _by_kind(tiles)


def shapes(wide: dict[str, int]) -> dict[str, dict[str, int]]:
    """The tile of each shape of products, ``wide`` being that for large ones."""
    return {"vector": VECTOR, "narrow": NARROW, "unaligned": UNALIGNED, "wide": wide}


def products(
    sizes: Sequence[tuple[Sequence[int], int, int, int]], wide: dict[str, int]
) -> dict[ProductKind, list[Tile]]:
    """Kind -> [group, row, first m, first n], given (rows, M, N, K) of each group: products
    [M, N] with sums over K."""
    tiles = []
    # Long sums first, so that no program starts one when all others are done.
    for group, (rows, M, N, K) in sorted(enumerate(sizes), key=lambda x: -x[1][3]):
        aligned = alignment(M), alignment(N), alignment(K)
        shape = "wide" if min(aligned) > 1 else "unaligned"
        shape = "narrow" if N <= NARROW_COLUMNS else shape
        shape = "vector" if M == 1 and N == K else shape
        tile = shapes(wide)[shape]
        kind = ProductKind(shape, *aligned)
        tiles += [
            (kind, [group, row, m, n])
            for row in rows
            for m in range(0, M, tile.get("BM", 1))
            for n in range(0, N, tile["BN"])
        ]
    return _by_kind(tiles)


def grams(sizes: Sequence[tuple[int, int, int, bool]], small: bool) -> dict[GramKind, list[Tile]]:
    """Kind -> [group, row, first row, first column <= first row, first k, last k + 1], given
    (rows, d, K, columns) of each group: products [d, d] with sums over K. small: a small model.

    Pieces of one product stand together and in order. Outer products have all columns.
    """
    tiles = []
    for group, (rows, d, K, columns) in sorted(enumerate(sizes), key=lambda x: -x[1][2]):
        outer, narrow = K == 1, d <= NARROW_COLUMNS and K > 1
        align_k = 1 if columns or outer else alignment(K)
        longest = LONGEST_SUM if small or narrow else LONGEST_SUM_OF_LARGE
        kind = GramKind(outer, narrow, columns, longest < K, alignment(d), align_k)
        S = (OUTER if outer else NARROW_GRAM if narrow else GRAM)["S"]
        tiles += [
            (kind, [group, row, i, j, start, min(start + longest, K)])
            for row in range(rows)
            for i in range(0, d, S)
            for j in range(0, d if outer else i + 1, S)
            for start in range(0, K, longest)
        ]
    return _by_kind(tiles)


def squares(sizes: Sequence[tuple[int, int, int]]) -> list[Tile]:
    """[group, row, first entry, 0, first k, last k + 1], given (rows, d, K) of each group: sums
    over K for each of d entries. Pieces of one sum stand together and in order."""
    return [
        [group, row, n, 0, start, min(start + LONGEST_SQUARES, K)]
        for group, (rows, d, K) in enumerate(sizes)
        for row in range(rows)
        for n in range(0, d, SQUARES["BN"])
        for start in range(0, K, LONGEST_SQUARES)
    ]


def sums(pieces: Sequence[Tile]) -> list[Tile]:
    """[group, row, first row, first column, first piece, last piece + 1] for tiles of
    :func:`grams`, or :func:`squares`."""
    totals: list[Tile] = []
    for number, piece in enumerate(pieces):
        if not totals or totals[-1][:4] != piece[:4]:
            totals.append([*piece[:4], number, number])
        totals[-1][5] = number + 1
    return totals


def alignment(size: int) -> int:
    """4 if rows of that many float32 entries all start at multiples of 16 bytes, else 1."""
    return 4 if size % 4 == 0 else 1


def _by_kind(tiles: Iterable[tuple[Any, Tile]]) -> dict[Any, list[Tile]]:
    kinds: dict[Any, list[Tile]] = {}
    for kind, tile in tiles:
        kinds.setdefault(kind, []).append(tile)
    return kinds
