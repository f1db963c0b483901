"""Tables of tiles: every entry of every result once, and no program without work."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from algoperf_shampoo.optim.gpu import tiles

rows = st.integers(1, 3)
sizes = st.integers(1, 300)


def entries(*spans):
    """How often each index tuple is met, given (first, step, size) per dimension."""
    total = 1
    for first, step, size in spans:
        total *= max(0, min(first + step, size) - first)
    return total


@given(st.lists(st.tuples(rows, st.integers(1, 5000)), min_size=1, max_size=4))
def test_elementwise(groups):
    met = Counter()
    for align, mine in tiles.elementwise([(range(n), size) for n, size in groups]).items():
        for group, row, start, _ in mine:
            assert groups[group][1] % align == 0 and start < groups[group][1]
            met[group, row, start] += 1
    assert set(met.values()) == {1}
    covered = Counter()
    for (group, row, start), _ in met.items():
        covered[group, row] += entries((start, tiles.ENTRIES, groups[group][1]))
    assert covered == {(g, r): size for g, (n, size) in enumerate(groups) for r in range(n)}


@pytest.mark.parametrize("wide", [tiles.SMALL, tiles.LARGE, tiles.LARGE_ROUNDED])
@given(groups=st.lists(st.tuples(rows, sizes, sizes, sizes), min_size=1, max_size=4))
def test_products(wide, groups):
    covered = Counter()
    seen = set()
    table = tiles.products([(range(n), *size) for n, *size in groups], wide)
    for kind, mine in table.items():
        tile = tiles.shapes(wide)[kind.shape]
        sums = [groups[t[0]][3] for t in mine]
        assert sums == sorted(sums, reverse=True)
        for group, row, m, n in mine:
            _, M, N, K = groups[group]
            assert (M % kind.align_m, N % kind.align_n, K % kind.align_k) == (0, 0, 0)
            assert (group, row, m, n) not in seen
            seen.add((group, row, m, n))
            covered[group, row] += entries((m, tile.get("BM", 1), M), (n, tile["BN"], N))
    assert covered == {(g, r): M * N for g, (n, M, N, _) in enumerate(groups) for r in range(n)}


@given(
    st.lists(st.tuples(rows, sizes, st.integers(1, 3000), st.booleans()), min_size=1, max_size=3),
    st.booleans(),
)
def test_grams(groups, small):
    """One triangle, all of K once in each of its tiles; pieces add up in order."""
    triangle = Counter()
    for kind, mine in tiles.grams(groups, small).items():
        S = (tiles.OUTER if kind.outer else tiles.NARROW_GRAM if kind.narrow else tiles.GRAM)["S"]
        length = Counter()
        for group, row, i, j, first, last in mine:
            _, d, K, columns = groups[group]
            assert kind.columns == columns and d % kind.align_d == 0 and K % kind.align_k == 0
            assert 0 <= first < last <= K and i < d and j < d
            assert kind.outer == (K == 1) and (kind.outer or j <= i)
            length[group, row, i, j] += last - first
        for (group, row, i, j), total in length.items():
            _, d, K, _ = groups[group]
            assert total == K
            twice = 1 if kind.outer or i == j else 2
            triangle[group, row] += twice * entries((i, S, d), (j, S, d))
        if kind.in_pieces:
            met = []
            for group, row, i, j, first, last in tiles.sums(mine):
                met += range(first, last)
                pieces = mine[first:last]
                assert all(p[:4] == [group, row, i, j] for p in pieces)
                assert [p[4] for p in pieces] == sorted(p[4] for p in pieces)
            assert met == list(range(len(mine)))
    assert triangle == {(g, r): d * d for g, (n, d, _, _) in enumerate(groups) for r in range(n)}
