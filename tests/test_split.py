"""The split of a step: on a clock that stands still but for what a test adds to one part.

So nothing here depends on how fast a machine is, and the step is the real one of a mini.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator
from typing import Any

import pytest

from algoperf_shampoo.workloads import load
from benchmarks import parts, split

MS = 1e-3
INJECTED = ("data", "forward_backward", "gather", "statistics", "eigen", "rotations", "update")


class StandingClock:
    """Time goes on by what is added alone."""

    nests = True

    def __init__(self) -> None:
        self.time = 0.0

    def mark(self) -> float:
        return self.time

    def between(self, one: float, other: float) -> float:
        return other - one

    def now(self) -> float:
        return self.time


class Injected:
    """A mini's training whose parts take as many milliseconds as ``extra`` says at that time."""

    def __init__(self, variant: str) -> None:
        self.clock = StandingClock()
        self.extra = dict.fromkeys(INJECTED, 0.0)
        self.calls = dict.fromkeys(INJECTED, 0)
        self.calls_a_step: dict[str, float] = {}
        self.training = split.Training(
            load("ogbg_mini"), variant, self.clock, {"precondition_frequency": 2}
        )
        optimizer: Any = self.training.optimizer
        (group,) = optimizer._groups
        self._slow(optimizer.solver, "solve", "eigen")
        self._slow(group.layout, "apply", "update")
        self._slow(group.layout, "gather", "gather")
        operations = group.by_torch
        self._slow(operations, "gram_ema", "statistics")
        self._slow(operations, "rotate", "rotations")
        self._slow(self.training.workload, "loss_fn", "forward_backward")
        self.training._queue = self._slow_batches(self.training._queue)
        parts.hook_rotations(optimizer, lambda: self.training.timeline.part("rotations"))
        for _ in range(6):
            self.training.step()

    def _slow(self, owner: Any, name: str, part: str) -> None:
        call = getattr(owner, name)

        def slow(*arguments: Any, **more: Any) -> Any:
            self.clock.time += self.extra[part]
            self.calls[part] += 1
            return call(*arguments, **more)

        object.__setattr__(owner, name, slow)  # solvers are frozen

    def _slow_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        for batch in batches:
            self.clock.time += self.extra["data"]
            self.calls["data"] += 1
            yield batch

    def mean_step(self) -> tuple[dict[str, float], float]:
        """Parts of a mean step at F = 2, and the step without marks."""
        self.calls = dict.fromkeys(INJECTED, 0)
        found = split.run_periods(self.training, frequency=2, count=1)
        self.calls_a_step = {name: calls / 4 for name, calls in self.calls.items()}
        ordinary, due = (
            split.paired(found.marked[kind], found.whole[kind]) for kind in ("ordinary", "due")
        )
        whole = (found.whole["ordinary"][0] + found.whole["due"][0]) / 2
        return parts.amortised(ordinary, due, 2), whole


@pytest.fixture(scope="module")
def measured() -> tuple[Injected, dict[str, float], float]:
    """EShampoo, and its parts and step when each call of each part takes 5 ms."""
    eshampoo = Injected("eshampoo_fixed")
    eshampoo.extra = dict.fromkeys(INJECTED, 5 * MS)
    return eshampoo, *eshampoo.mean_step()


@pytest.mark.parametrize("part", INJECTED)
def test_a_millisecond_in_one_part_moves_that_row_by_it(measured: Any, part: str):
    eshampoo, before, step_before = measured
    eshampoo.extra = {**dict.fromkeys(INJECTED, 5 * MS), part: 6 * MS}
    after, step_after = eshampoo.mean_step()
    # Solvers are called at every second step alone, gradients gathered again after they were.
    calls = eshampoo.calls_a_step[part]
    assert calls > 0 and before[part] == pytest.approx(calls * 5 * MS)
    for name in INJECTED:
        moved = calls * MS if name == part else 0.0
        assert after[name] - before[name] == pytest.approx(moved, abs=1e-12), name
    # The step without marks moves alike: nothing goes to the residual.
    assert step_after - step_before == pytest.approx(calls * MS, abs=1e-12)
    assert sum(after.values()) == pytest.approx(step_after, abs=1e-12)


def test_a_period_that_was_disturbed_moves_no_row(measured: Any):
    """The host stalls for a second in one marked period of three, and in one unmarked one."""
    eshampoo, before, step_before = measured
    eshampoo.extra = dict.fromkeys(INJECTED, 5 * MS)
    step, calls = eshampoo.training.step, []

    def stalling() -> None:
        calls.append(eshampoo.training.timeline.on)
        # The first step of the first unmarked, and of the first marked, period.
        eshampoo.extra["data"] = 1.0 if len(calls) in (1, 3) else 5 * MS
        step()

    eshampoo.training.step = stalling
    try:
        found = split.run_periods(eshampoo.training, frequency=2, count=3)
    finally:
        eshampoo.training.step = step
    # Off, on, on, off, off, on; two steps each.
    assert calls[::2] == calls[1::2] == [False, True, True, False, False, True]
    ordinary, due = (
        split.paired(found.marked[kind], found.whole[kind]) for kind in ("ordinary", "due")
    )
    after = parts.amortised(ordinary, due, 2)
    assert after == pytest.approx(before, abs=1e-12)
    whole = sorted(found.whole["ordinary"])
    stall = 1.0 - 5 * MS
    assert whole[2] - whole[1] == pytest.approx(stall) and whole[1] == pytest.approx(whole[0])
    assert max(parts_of["data"] for parts_of in found.marked["ordinary"]) == pytest.approx(1.0)


def test_a_host_that_becomes_slower_moves_no_share():
    """Its speed halves over the periods, at random times at that: shares stay."""
    speeds = [1.0, 1.05, 1.3, 1.25, 1.9, 2.0, 1.1, 1.0]
    whole = [10 * MS * speed for speed in speeds]
    marked = [{"eigen": 4 * MS * speed, "update": 6 * MS * speed} for speed in speeds]
    found = split.paired(marked, whole)
    assert found["eigen"] == pytest.approx(0.4 * statistics.median(whole))
    assert sum(found.values()) == pytest.approx(statistics.median(whole))


def test_a_variant_without_factors_has_no_time_in_their_parts():
    nadamw = Injected("nadamw")
    for name in INJECTED:
        nadamw.extra[name] = MS
    found, step = nadamw.mean_step()
    assert {n for n, seconds in found.items() if seconds} == {
        "data", "forward_backward", "gather", "update"
    }  # fmt: skip
    assert sum(found.values()) == pytest.approx(step) == pytest.approx(4 * MS)


def test_marks_change_nothing_in_the_training():
    losses = []
    for marked in (False, True):
        training = split.Training(load("ogbg_mini"), "eshampoo_fixed", StandingClock())
        training.timeline.on = marked
        for _ in range(4):
            training.step()
        training.timeline.take()
        losses.append(training._state["monitor"].flush()["loss"])
    assert losses[0] == losses[1]


def test_a_record_adds_up_and_can_be_written(tmp_path):
    record = split.measure(
        load("ogbg_mini"), "shampoo_grafting", parts.HostClock(), frequency=2, periods=1,
        evaluations=False,
    )  # fmt: skip
    assert sum(record["parts"].values()) == pytest.approx(record["step"])
    assert set(record["parts"]) == {*parts.PARTS, split.RESIDUAL}
    for name in ("data", "forward_backward", "statistics", "eigen", "rotations", "update"):
        assert record["parts"][name] > 0, name
    compared = split.compare(
        [record, {**record, "variant": "b"}],
        {("ogbg", "shampoo_grafting"): 120, ("ogbg", "b"): 60},
    )
    split._write(str(tmp_path / "r.json"), {"records": [record], "speed_ups": compared})
    text = "\n".join(split.lines([record], compared))
    assert "residual" in text and "ogbg_mini: shampoo_grafting 120 steps" in text
    saved = json.loads((tmp_path / "r.json").read_text())["speed_ups"][0]["saved"]
    assert saved["steps"] == pytest.approx(60 * record["step"])
    assert all(value == 0 for name, value in saved.items() if name != "steps")


def test_a_speed_up_is_split_without_a_rest():
    one = {"forward_backward": 0.100, "eigen": 0.030, "residual": 0.002}
    other = {"forward_backward": 0.100, "eigen": 0.010, "residual": -0.001}
    rows = parts.speed_up(one, other, (4301, 2536))
    assert math.fsum(rows.values()) == pytest.approx(4301 * 0.132 - 2536 * 0.109)
    assert rows["forward_backward"] == 0.0
    assert rows["eigen"] == pytest.approx(0.020 * (4301 + 2536) / 2)
    assert rows["steps"] == pytest.approx((4301 - 2536) * (0.132 + 0.109) / 2)


def test_the_papers_steps():
    steps = split.paper_steps()
    assert steps["fastmri", "shampoo_grafting"] == 4301
    assert steps["fastmri", "eshampoo_fixed"] == 2536


def test_a_full_size_batch_keeps_its_form():
    workload = load("ogbg")
    batch = workload.synthetic_batch(2, [0, 1])
    copy = split._each(batch, lambda t: t + 0)
    assert type(copy) is type(batch) and copy.keys() == batch.keys()
    assert type(copy["inputs"]) is type(batch["inputs"])
    assert copy["targets"].equal(batch["targets"]) and copy["targets"] is not batch["targets"]
