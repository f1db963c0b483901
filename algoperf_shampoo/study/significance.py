"""The rule by which tables mark differences, declared before any run of a table is made.

* What is compared: steps to the target of a row's runs with those of the reference row
  (:data:`REFERENCE`) on the same workload. Runs that miss the target rank worst, and alike.
* Difference: the exact two-sided permutation test of the rank sum (Wilcoxon 1945; Mann and Whitney
  1947), ties by midranks, so the p-value is exact whatever ties there are.
* Equivalence: the same test one-sided, twice (Schuirmann 1987), against differences of
  :data:`MARGIN` in the ratio of steps; the larger p counts.
* Over several workloads: rank sums are added and permuted within each (van Elteren 1960).
* A table's tests, of difference and of equivalence, are corrected together by Holm (1979) at
  :data:`ALPHA`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

ALPHA = 0.05
MARGIN = 0.10
"""Steps that differ by a factor of less than 1 + MARGIN are the same for all we care."""
REFERENCE = "shampoo_grafting"
MISS = math.inf

Stratum = tuple[Sequence[float], Sequence[float]]
"""Values of a row's runs and of the reference's on one workload; MISS for a miss."""


@dataclass(frozen=True)
class Tests:
    """P-values of one comparison, without correction; ``least`` is the smallest that the numbers
    of runs allow for a difference, ``least_equivalence`` for an equivalence."""

    difference: float
    fewer: float
    equivalence: float
    least: float
    least_equivalence: float


@dataclass(frozen=True)
class Verdict:
    """Holm's p-values, and what follows: "fewer", "more", "equivalent" or "undecided"."""

    difference: float
    equivalence: float
    verdict: str
    decidable: bool
    """Whether some outcome of these runs could have decided it, whatever the other tests gave."""


def test(strata: Sequence[Stratum]) -> Tests:
    """Difference and equivalence of two rows over one workload or several.

    Raises:
        ValueError: a row without runs.
    """
    if not strata or any(not a or not b for a, b in strata):
        raise ValueError("a comparison needs runs on both sides")
    fewer, more = _tails(strata)
    scaled = 1.0 + MARGIN
    # Not more than margin times the steps, and not less than one margin-th.
    upper, _ = _tails([(a, [scaled * x for x in b]) for a, b in strata])
    _, lower = _tails([(a, [x / scaled for x in b]) for a, b in strata])
    ways = math.prod(math.comb(len(a) + len(b), len(a)) for a, b in strata)
    return Tests(
        difference=min(1.0, float(2 * min(fewer, more))),
        fewer=float(fewer),
        equivalence=float(max(upper, lower)),
        least=min(1.0, 2 / ways),
        least_equivalence=1 / ways,
    )


def holm(values: Sequence[float]) -> list[float]:
    """Holm's corrected p-values, in the order given."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected = [0.0] * len(values)
    worst = 0.0
    for rank, index in enumerate(order):
        worst = max(worst, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = worst
    return corrected


def decide(tests: Sequence[Tests]) -> list[Verdict]:
    """What the tests of one table say, corrected together."""
    count = 2 * len(tests)
    corrected = holm([t.difference for t in tests] + [t.equivalence for t in tests])
    made = []
    for index, one in enumerate(tests):
        difference, equivalence = corrected[index], corrected[len(tests) + index]
        verdict = "undecided"
        if difference <= ALPHA:
            verdict = "fewer" if one.fewer <= 0.5 else "more"
        elif equivalence <= ALPHA:
            verdict = "equivalent"
        decidable = min(one.least, one.least_equivalence) * count <= ALPHA
        made.append(Verdict(difference, equivalence, verdict, decidable))
    return made


def fisher(hits: int, runs: int, other_hits: int, other_runs: int) -> float:
    """Fisher's exact two-sided p for hits of runs: the tables that are no likelier than this."""
    total, columns = runs + other_runs, hits + other_hits

    def weight(k: int) -> int:
        return math.comb(runs, k) * math.comb(other_runs, columns - k)

    possible = range(max(0, columns - other_runs), min(runs, columns) + 1)
    extreme = sum(weight(k) for k in possible if weight(k) <= weight(hits))
    return float(Fraction(extreme, math.comb(total, columns)))


def _tails(strata: Sequence[Stratum]) -> tuple[Fraction, Fraction]:
    """Exact probabilities of a rank sum of ``a`` at most, and at least, the one seen."""
    counts = {0: 1}
    seen = 0
    for a, b in strata:
        ranks = doubled_midranks([*a, *b])
        seen += sum(ranks[: len(a)])
        counts = convolved(counts, _rank_sums(ranks, len(a)))
    total = sum(counts.values())
    low = sum(count for value, count in counts.items() if value <= seen)
    high = sum(count for value, count in counts.items() if value >= seen)
    return Fraction(low, total), Fraction(high, total)


def doubled_midranks(values: Sequence[float]) -> list[int]:
    """Twice the rank of each value, from 1, the mean of the ranks among equal ones."""
    ordered = sorted(values)
    return [
        2 * ordered.index(value) + ordered.count(value) + 1  # (first + last) of 1-based ranks
        for value in values
    ]


def _rank_sums(ranks: Sequence[int], size: int) -> dict[int, int]:
    """How many subsets of ``size`` ranks have each sum."""
    by_size: list[dict[int, int]] = [{} for _ in range(size + 1)]
    by_size[0][0] = 1
    for rank in ranks:
        for taken in range(size - 1, -1, -1):
            for value, count in by_size[taken].items():
                above = by_size[taken + 1]
                above[value + rank] = above.get(value + rank, 0) + count
    return by_size[size]


def convolved(one: dict[int, int], other: dict[int, int]) -> dict[int, int]:
    """How many ways lead to each sum of two counts of ways."""
    made: dict[int, int] = {}
    for a, count in one.items():
        for b, more in other.items():
            made[a + b] = made.get(a + b, 0) + count * more
    return made
