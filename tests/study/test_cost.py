"""Costs before launch: figures by hand, their sources, and what is not known said so."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness.spec import RunSpec
from algoperf_shampoo.study import cost, logs, memory, plan

ROOT = Path(__file__).parents[2]
PAPERS_GPUS = {"fastmri": 1, "imagenet_vit": 4, "ogbg": 1}


def runs(variant: str, workload: str = "all", **words: str) -> tuple[RunSpec, ...]:
    size = words.pop("size", "full")
    return plan.make_plan(ROOT, [variant], workload=workload, size=size, **words).runs


def test_time_and_money_by_hand():
    (vit,) = cost.estimate(runs("eshampoo_fixed", "imagenet_vit", seeds="2"))
    measured = json.loads(
        (ROOT / "results/measured/h100/optimizer_step_imagenet_vit.json").read_text()
    )["contenders"]["ours, fp32"]
    ordinary, refresh = (measured[f"{k}_ms"]["median"] for k in ("ordinary", "refresh"))
    share = (ordinary * 0.99 + refresh * 0.01) / 1000 * 989 / 312
    assert (vit.runs, vit.gpus, vit.steps) == (2, 4, 76226)  # the paper's row, F = 100
    assert vit.share_s == pytest.approx(share) and vit.step_s == pytest.approx(0.321 + share)
    assert vit.hours == pytest.approx(76226 * (0.321 + share) * 1.22 / 3600)
    assert vit.hours_at_most == pytest.approx(69768 * 1.22 / 3600)
    assert vit.money(vit.hours, 2.5) == pytest.approx(vit.hours * 4 * 2.5)
    lines = cost.preview(runs("eshampoo_fixed", "imagenet_vit", seeds="2"), price=2.5)
    text = "\n".join(lines)
    assert f"in all, to the targets: {2 * vit.hours:.1f} node-hours" in text
    assert f"{2 * 4 * 2.5 * vit.hours:.2f} in money" in text
    assert "pull request 892" in text and "x 3.2 for an A100" in text
    assert max(map(len, lines)) <= cost.WIDTH


def test_on_the_papers_gpus_the_papers_time_is_taken():
    (fastmri,) = cost.estimate(runs("eshampoo_fixed", "fastmri"), PAPERS_GPUS)
    assert fastmri.step_s == pytest.approx(10.44 * 60 / 2536) and fastmri.share_s is None
    # a baseline on four, of which one has a quarter
    (nadamw,) = cost.estimate(runs("nadamw", "fastmri"), PAPERS_GPUS)
    assert nadamw.step_s == pytest.approx(4 * 0.376 + nadamw.share_s)
    assert nadamw.steps is None and nadamw.hours is None and nadamw.hours_at_most is not None
    text = "\n".join(cost.preview(runs("nadamw", "fastmri", seeds="3"), gpus=PAPERS_GPUS))
    assert "3 runs not in it" not in text and "in all, to the targets" not in text


def test_a_budget_that_ends_before_the_target_is_said():
    (vit,) = cost.estimate(runs("shampoo_grafting", "imagenet_vit"), 1)
    assert vit.steps * vit.step_s > 69768
    assert vit.hours == vit.hours_at_most == pytest.approx(69768 * 1.22 / 3600)
    said = "imagenet_vit shampoo_grafting F=100: the budget ends before the target"
    assert said in vit.sources
    (four,) = cost.estimate(runs("shampoo_grafting", "imagenet_vit"), 4)
    (self_tuned,) = cost.estimate(
        runs("shampoo_grafting", "imagenet_vit"), 4, version="2026", ruleset="self"
    )
    assert self_tuned.hours_at_most == pytest.approx(1.5 * 64292 * 1.22 / 3600, rel=1e-4)
    assert four.hours < four.hours_at_most and not any("ends before" in s for s in four.sources)


def test_our_own_runs_come_first():
    trials = logs.find_trials([ROOT / "results/measured/mini/seeds"])
    (own,) = cost.estimate(
        runs("eshampoo_adaptive", "ogbg", size="mini", seeds="3"), records=trials
    )
    mine = [
        t for t in trials if t.label.startswith("eshampoo_adaptive") and t.workload == "ogbg_mini"
    ]
    assert len(mine) > 3
    seconds = sorted(t.evaluations[-1].submission_time / t.evaluations[-1].step for t in mine)
    median = statistics.median(seconds)
    assert own.step_s == pytest.approx(median) and own.gpus == 0 and own.hours_at_most is None
    (unknown,) = cost.estimate(runs("eshampoo_adaptive", "ogbg", size="mini"))
    assert unknown.step_s is unknown.hours is None and "no run of ours" in unknown.sources[0]


def test_memory_is_the_formulas_and_the_measured_rest():
    (vit,) = cost.estimate(runs("eshampoo_fixed", "imagenet_vit"))
    point = runs("eshampoo_fixed")[0].hparams
    shapes = memory.shapes("imagenet_vit")
    # Measured on one GPU, at 256 examples; of four each keeps its part, and DDP copies gradients.
    alone, shared = (memory.need(shapes, point, n).total / 2**20 for n in (1, 4))
    assert vit.gib == pytest.approx((19122.2 - alone + shared) / 1024, rel=1e-3)
    together = memory.need(shapes, {**point, "sharding": "off"}, 4).total / 2**20
    assert together - alone == pytest.approx(4 * 22_122_472 / 2**20) and shared < together
    (four_times,) = cost.estimate(runs("eshampoo_fixed", "imagenet_vit"), 1)
    need = memory.need(memory.shapes("imagenet_vit"), runs("eshampoo_fixed")[0].hparams, 1).total
    mib = need / 2**20
    assert four_times.gib == pytest.approx((4 * (19122.2 - mib) + mib) / 1024, rel=1e-3)
    text = "\n".join(cost.preview(runs("eshampoo_fixed", "imagenet_vit"), gpus=1))
    assert "warning: imagenet_vit eshampoo_fixed F=100 needs" in text
    assert "the cards of v0.6 have 16" in text


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "1e99", "two", "1_0", "٣"])
def test_a_price_is_a_number(text):
    assert cost.parse_price("2.5") == 2.5 and cost.parse_price("0") == 0
    with pytest.raises(UserError, match="PRICE="):
        cost.parse_price(text)


def test_the_published_ratio_of_wall_time_is_that_of_the_logs():
    published = json.loads((ROOT / "results/published/seconds_a_step.json").read_text())
    for workload, stated in published["wall_over_submission_time"].items():
        if workload == "source":
            continue
        ratios = []
        for path in (ROOT / "tests/data/published_v06/shampoo").glob(f"*/{workload}_*/trial_2"):
            last = logs.read_trial(path).evaluations[-1]
            ratios.append(last.row["total_duration"] / last.submission_time)
        assert len(ratios) == 3 and sorted(ratios)[1] == pytest.approx(stated, abs=0.006)
