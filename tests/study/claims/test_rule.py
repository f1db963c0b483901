"""The rule of claims: exact p-values against enumeration, a simulated effect and a simulated null
through the code that decides the study, what is not finite, and what cannot be decided."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from algoperf_shampoo.study import study
from algoperf_shampoo.study.claims import file, rule
from algoperf_shampoo.study.claims.file import Claim, Part

MINIS = ("fastmri", "imagenet_vit", "ogbg")
SCALE = {"fastmri": 0.3, "imagenet_vit": 1.5, "ogbg": 0.05}  # losses of different sizes
DECLARED = file.read(study.STUDIES / "claims.json")


def claim(rule_name: str = "less", margin: float = 0.0, **part) -> Claim:
    made = {"statistic": "loss", "low": ("a",), "high": ("b",), "than": 0.0, **part}
    return Claim("c", "", "", (Part(rule=rule_name, margin=margin, **made),), ())


def value_of(table: dict):
    return lambda arm, mini, seed, name: table.get((arm, mini, seed))


def enumerated(differences: dict) -> tuple[float, float]:
    """P(W <= seen), P(W >= seen), by all sign patterns; W: the sum of the ranks of positives."""
    ranks, positive = [], []
    for found in differences.values():
        own = [abs(d) for d in found if d]
        for d in (d for d in found if d):
            equal = [r for r, other in enumerate(sorted(own), start=1) if other == abs(d)]
            ranks.append(sum(equal) / len(equal))
            positive.append(d > 0)
    seen = sum(r for r, p in zip(ranks, positive, strict=True) if p)
    sums = [
        sum(r for r, p in zip(ranks, signs, strict=True) if p)
        for signs in itertools.product([False, True], repeat=len(ranks))
    ]
    low, high = (sum(c) / len(sums) for c in ([s <= seen for s in sums], [s >= seen for s in sums]))
    return low, high


@pytest.mark.parametrize("seed", range(8))
def test_the_signed_rank_test_is_exact(seed):
    draw = np.random.default_rng(seed)
    # Few distinct values: ties, zeros, and what is not finite.
    values = [-math.inf, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0, math.inf]
    differences = {m: [float(v) for v in draw.choice(values, size=4)] for m in MINIS}
    assert rule.signed_rank(differences) == pytest.approx(enumerated(differences), rel=1e-12)


def test_by_hand():
    # One mini, differences 1, 2, -3: W+ = 3; of the sums 0..6 (8 patterns) five are <= 3.
    low, high = rule.signed_rank({"ogbg": [1.0, 2.0, -3.0]})
    assert (low, high) == (5 / 8, 5 / 8)
    # A shift that moves all below: only one pattern is as low.
    assert rule.signed_rank({"ogbg": [1.0, 2.0, -3.0]}, shift=5.0)[0] == 1 / 8


def test_each_mini_counts_alike_whatever_its_scale():
    small = {"a": [1e-6, 2e-6], "b": [-3.0, 1.0]}
    large = {"a": [1e6, 2e6], "b": [-3.0, 1.0]}
    assert rule.signed_rank(small) == rule.signed_rank(large)


def simulate(effects: dict[str, float], seed: int, seeds: int = 8) -> dict:
    """Losses of every arm of the committed study: a run's own noise, and what its seed shares."""
    draw = np.random.default_rng(seed)
    table = {}
    for mini in MINIS:
        for s in range(seeds):
            shared = draw.normal(0, 0.05)
            for arm in DECLARED.arms:
                noise = shared + draw.normal(0, 0.01)
                table[arm, mini, s] = SCALE[mini] * math.exp(noise + effects.get(arm, 0.0))
    return table


def judged(effects: dict[str, float], seed: int, only: str = "loss") -> dict[str, rule.Verdict]:
    live = [
        c for c in DECLARED.claims if not c.waits_for and all(p.statistic == only for p in c.parts)
    ]
    value = value_of(simulate(effects, seed))
    evidence = [rule.weigh(c, MINIS, range(8), value) for c in live]
    return {v.evidence.claim.name: v for v in rule.decide(evidence)}


def test_a_simulated_effect_is_found_and_its_opposite_contradicted():
    for seed in range(5):
        found = judged({"eshampoo_F20": -0.03, "eshampoo_F2": -0.03, "adaptive_F10": -0.03}, seed)
        assert found["eshampoo_nadamw"].verdict == rule.SUPPORTED
        assert found["eshampoo_grafting"].verdict == rule.SUPPORTED
        assert found["frequency_is_robust"].verdict == rule.SUPPORTED
        assert found["adaptive_matches_fixed"].verdict == rule.SUPPORTED
        worse = judged({"eshampoo_F20": 0.1}, seed)
        assert worse["eshampoo_nadamw"].verdict == rule.CONTRADICTED
        assert worse["frequency_is_robust"].verdict == rule.CONTRADICTED
        assert worse["rate_transfers"].verdict == rule.CONTRADICTED


def test_a_simulated_null_is_seldom_taken_for_a_difference():
    """Of 200 studies in which no arm differs; the family-wise rate is 5% at most by design."""
    wrong = 0
    for seed in range(200):
        found = judged({}, seed)
        differences = [found[name].verdict for name in ("eshampoo_nadamw", "eshampoo_grafting")]
        wrong += any(verdict != rule.UNDECIDED for verdict in differences)
    assert wrong <= 18  # P(X > 18) = 0.008 for X ~ Binomial(200, 0.05)
    # At the margin itself equivalence and non-inferiority are as seldom claimed.
    at_margin = sum(
        judged({"eshampoo_F2": -math.log1p(0.02)}, seed)["frequency_is_robust"].verdict
        == rule.SUPPORTED
        for seed in range(100)
    )
    assert at_margin <= 11  # P(X > 11) = 0.004


def test_margins_decide_equivalence_and_noninferiority():
    def table(ratio: float) -> dict:
        return {
            (arm, mini, s): SCALE[mini] * (ratio if arm == "a" else 1.0) * (1 + 1e-4 * s)
            for arm in "ab" for mini in MINIS for s in range(8)
        }  # fmt: skip

    for ratio, worse, same in ((1.01, True, True), (1.03, False, False), (0.9, True, False)):
        value = value_of(table(ratio))
        for name, holds in (("noninferior", worse), ("equivalent", same)):
            one = rule.weigh(claim(name, 0.02), MINIS, range(8), value)
            (verdict,) = rule.decide([one])
            assert verdict.verdict == (rule.SUPPORTED if holds else rule.CONTRADICTED), ratio


def test_what_is_not_finite_ranks_worst_and_two_of_them_say_nothing():
    table = {(arm, m, s): 1.0 + 0.01 * s for arm in "ab" for m in MINIS for s in range(8)}
    table |= {("a", m, s): 1.001 * table["b", m, s] for m in MINIS for s in range(8)}
    plain = rule.weigh(claim(), MINIS, range(8), value_of(table))
    table["b", "ogbg", 3] = math.inf
    one = rule.weigh(claim(), MINIS, range(8), value_of(table))
    # The only pair in favour of a, and the largest difference of its mini: rank 8 of 8.
    assert one.spoiled == 1 and plain.p_for == 1.0
    differences = {m: [1.0 + s for s in range(8)] for m in MINIS}
    differences["ogbg"][3] = -100.0
    assert (one.p_for, one.p_against) == rule.signed_rank(differences)
    table["a", "ogbg", 3] = math.inf
    both = rule.weigh(claim(), MINIS, range(8), value_of(table))
    assert both.pairs == 24 and both.p_against == 2.0**-23  # 23 pairs are left
    assert both.effects[0]["ogbg"] == pytest.approx(0.001)


def test_a_difference_in_differences():
    both = claim(low=("a", "d"), high=("b", "c"))
    table = {}
    for mini in MINIS:
        for s in range(8):
            table |= {(arm, mini, s): 1.0 + 0.1 * s for arm in "abcd"}
            table["a", mini, s] *= 1.05  # a over b rises by 5%, c over d by 10%
            table["c", mini, s] *= 1.10
    one = rule.weigh(both, MINIS, range(8), value_of(table))
    assert one.effects[0]["ogbg"] == pytest.approx(1.05 / 1.10 - 1)
    assert one.p_for == 2.0**-24


def test_a_claim_of_several_parts_needs_all_of_them():
    easy, hard = claim().parts[0], claim(low=("a",), high=("c",)).parts[0]
    two = Claim("c", "", "", (easy, hard), ())
    table = {}
    for mini in MINIS:
        for s in range(8):
            sign = 1 if s % 2 else -1
            table |= {("a", mini, s): 1.0, ("b", mini, s): 2.0, ("c", mini, s): 1 + 0.1 * sign}
    one = rule.weigh(two, MINIS, range(8), value_of(table))
    alone = rule.weigh(Claim("c", "", "", (hard,), ()), MINIS, range(8), value_of(table))
    assert one.p_for == alone.p_for and rule.decide([one])[0].verdict == rule.UNDECIDED


def test_runs_that_are_not_there_leave_no_verdict_and_help_no_other_claim():
    table = {(arm, m, s): 1.0 + (arm == "b") for arm in "ab" for m in MINIS for s in range(8)}
    whole = rule.weigh(claim(), MINIS, range(8), value_of(table))
    del table["a", "fastmri", 2]
    short = rule.weigh(claim(), MINIS, range(8), value_of(table))
    first, second = rule.decide([whole, short])
    assert (second.verdict, second.corrected) == ("incomplete: 23 of 24 pairs", None)
    assert first.corrected == pytest.approx(2 * whole.p)  # Holm over two all the same


@pytest.mark.parametrize(("pairs", "can"), [(3, False), (6, False), (12, True), (24, True)])
def test_what_a_design_can_reach(pairs, can):
    live, hopeless = rule.decidable(DECLARED.claims, pairs)
    count = sum(not c.waits_for for c in DECLARED.claims)
    assert (len(live), len(hopeless)) == ((count, 0) if can else (0, count))
    # The bound is attained: all pairs alike, in every mini.
    per_mini = pairs // 3
    table = {(a, m, s): 1.0 + (a == "b") for a in "ab" for m in MINIS for s in range(per_mini)}
    one = rule.weigh(claim(), MINIS, range(per_mini), value_of(table))
    assert one.p == pytest.approx(rule.least_p(pairs))


def test_the_file_declares_what_it_needs():
    live = [c for c in DECLARED.claims if not c.waits_for]
    assert len(DECLARED.seeds) == 8 and len(DECLARED.quick_seeds) == 2
    assert len(live) >= 18 and len(DECLARED.claims) >= 20
    assert Path(study.STUDIES / "claims.json").is_file()
