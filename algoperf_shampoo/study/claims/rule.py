"""The rule by which claims are decided, declared before any run of them is made.

* A part of a claim compares paired runs: the same seed on the same mini, at both arms. Per pair the
  difference is of logarithms for a loss, else of the numbers, less the margin that the rule allows.
* Its test is the exact signed-rank test (Wilcoxon 1945): absolute differences are ranked within
  each mini, ties by midranks, and the signs of each mini's are flipped in every way; the minis'
  sums are added. So each mini counts alike, whatever its loss is measured in.
* What is not finite ranks worst: a pair with one such side has the largest difference, a pair with
  two has none and is left out, like a pair of equal numbers.
* Equivalence is two one-sided tests (Schuirmann 1987); a claim of several parts has the largest p
  of them (Berger 1982), and the opposite of it the smallest times their number.
* A claim has one p-value, two-sided: twice the smaller of that for it and that against it. Holm
  (1979) corrects over the claims at :data:`ALPHA`.
* A claim whose smallest possible p exceeds ALPHA over the number of claims cannot be decided by its
  design: it is no claim of the study, and is neither run nor counted.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from algoperf_shampoo.study import significance
from algoperf_shampoo.study.claims.file import Claim, Part
from algoperf_shampoo.study.claims.statistics import STATISTICS

ALPHA = 0.05
SUPPORTED, CONTRADICTED, UNDECIDED = "supported", "contradicted", "undecided"

Value = Callable[[str, str, int, str], float | None]
"""(arm, mini, seed, statistic) -> number, ``math.inf`` if not finite, None if there is no run."""
Differences = Mapping[str, Sequence[float | None]]
"""By mini, of each pair; infinite where one side is not finite, None for both sides."""


@dataclass(frozen=True)
class Evidence:
    """What the runs of a claim say. Without all of its pairs there are no p-values.

    ``effects``: for each part and mini the median difference, of a loss as a ratio less 1, None
    where it is not finite; ``spoiled``: pairs of it with a side that is not finite.
    """

    claim: Claim
    pairs: int
    wanted: int
    effects: tuple[Mapping[str, float | None], ...]
    spoiled: int
    p_for: float | None
    p_against: float | None

    @property
    def p(self) -> float | None:
        """The claim's p-value, two-sided, without correction."""
        if self.p_for is None or self.p_against is None:
            return None
        return min(1.0, 2 * min(self.p_for, self.p_against))


@dataclass(frozen=True)
class Verdict:
    """A claim's p-value after Holm's correction, and what follows at :data:`ALPHA`."""

    evidence: Evidence
    corrected: float | None
    verdict: str


def least_p(pairs: int) -> float:
    """The smallest two-sided p of so many pairs: all signs alike, of 2^pairs ways."""
    return min(1.0, 2.0 ** (1 - pairs))


def reachable(pairs: int, claims: int) -> float:
    """The smallest p after Holm's correction over so many claims, whatever the others show."""
    return min(1.0, claims * least_p(pairs))


def decidable(claims: Sequence[Claim], pairs: int) -> tuple[list[Claim], list[Claim]]:
    """The claims that a design of so many pairs each can decide, and those that it cannot.

    All designs are alike, so it is all or none of those that wait for nothing.
    """
    live = [claim for claim in claims if not claim.waits_for]
    return (live, []) if reachable(pairs, len(live)) <= ALPHA else ([], live)


def weigh(claim: Claim, minis: Sequence[str], seeds: Sequence[int], value: Value) -> Evidence:
    """Evidence for one claim from the runs there are."""
    effects, both, spoiled = [], [], 0
    pairs = math.inf
    for part in claim.parts:
        by_mini = {mini: _differences(part, mini, seeds, value) for mini in minis}
        pairs = min(pairs, sum(len(found) for found in by_mini.values()))
        known = [d for found in by_mini.values() for d in found]
        spoiled += sum(d is None or math.isinf(d) for d in known)
        effects.append({mini: _effect(part, found) for mini, found in by_mini.items()})
        both.append(_test(part, by_mini))
    wanted = len(minis) * len(seeds)
    whole = pairs == wanted
    return Evidence(
        claim=claim,
        pairs=int(pairs),
        wanted=wanted,
        effects=tuple(effects),
        spoiled=spoiled,
        p_for=max(p for p, _ in both) if whole else None,
        p_against=min(1.0, len(both) * min(p for _, p in both)) if whole else None,
    )


def decide(evidence: Sequence[Evidence]) -> list[Verdict]:
    """What the claims of a study say, corrected together; those without all runs count with p 1."""
    corrected = significance.holm([1.0 if one.p is None else one.p for one in evidence])
    made = []
    for one, p in zip(evidence, corrected, strict=True):
        if one.p_for is None or one.p_against is None:
            made.append(Verdict(one, None, f"incomplete: {one.pairs} of {one.wanted} pairs"))
            continue
        verdict = UNDECIDED
        if p <= ALPHA:
            verdict = SUPPORTED if one.p_for < one.p_against else CONTRADICTED
        made.append(Verdict(one, p, verdict))
    return made


def signed_rank(differences: Differences, shift: float = 0.0) -> tuple[float, float]:
    """Exact probabilities of a sum of signed ranks at most, and at least, the one seen.

    Small for differences below ``shift``, and above it.
    """
    ways, seen = {0: 1}, 0
    for found in differences.values():
        moved = [d - shift for d in found if d is not None]
        moved = [d for d in moved if d != 0]
        ranks = significance.doubled_midranks([abs(d) for d in moved])
        seen += sum(rank for rank, d in zip(ranks, moved, strict=True) if d > 0)
        for rank in ranks:
            ways = significance.convolved(ways, {0: 1, rank: 1})
    total = sum(ways.values())
    low = sum(count for value, count in ways.items() if value <= seen)
    high = sum(count for value, count in ways.items() if value >= seen)
    return float(Fraction(low, total)), float(Fraction(high, total))


def _test(part: Part, differences: Differences) -> tuple[float, float]:
    """One-sided p-values for the part and against it."""
    margin = math.log1p(part.margin) if STATISTICS[part.statistic].logarithmic else part.margin
    if part.rule == "less":
        return signed_rank(differences)
    below, above = signed_rank(differences, margin)
    if part.rule == "noninferior":
        return below, above
    under, over = signed_rank(differences, -margin)
    return max(below, over), min(1.0, 2 * min(above, under))


def _differences(part: Part, mini: str, seeds: Sequence[int], value: Value) -> list[float | None]:
    """One for each seed that has all of its runs."""
    found = []
    for seed in seeds:
        sides = [[value(a, mini, seed, part.statistic) for a in s] for s in (part.low, part.high)]
        if all(number is not None for side in sides for number in side):
            low, high = ([n for n in side if n is not None] for side in sides)
            found.append(_difference(part, low, high))
    return found


def _difference(part: Part, low: Sequence[float], high: Sequence[float]) -> float | None:
    worst = [not all(math.isfinite(number) for number in side) for side in (low, high)]
    if any(worst):
        return None if all(worst) else (math.inf if worst[0] else -math.inf)
    if STATISTICS[part.statistic].logarithmic:  # of_run gives numbers above 0 alone
        return math.fsum(map(math.log, low)) - math.fsum(map(math.log, high))
    return sum(low) - sum(high) - part.than


def _effect(part: Part, found: Sequence[float | None]) -> float | None:
    """The median difference; of a loss as a ratio less 1."""
    known = [d for d in found if d is not None]
    if not known:
        return None
    median = statistics.median(known)
    if not math.isfinite(median):
        return None
    return math.expm1(median) if STATISTICS[part.statistic].logarithmic else median
