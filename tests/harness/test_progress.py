"""What a run says of itself: time left at most, why it went on, a machine that is busy."""

from __future__ import annotations

import pytest

from algoperf_shampoo.harness import progress
from algoperf_shampoo.study import busy
from tests.harness.fakes import FakeWorkload


def test_the_time_left_is_that_of_the_steps_left_or_of_the_budget():
    clock = progress.Clock(max_steps=100, max_seconds=1000.0)
    assert clock.left(1, spent=50.0, now=60.0) is None  # the first step compiles
    # 10 steps took 20 s of wall time: 89 are left
    assert clock.left(11, spent=55.0, now=80.0) == pytest.approx(89 * 2.0)
    # 945 s of submission time are left, at 4 s of wall time for each
    assert progress.Clock(None, 1000.0).left(1, 50.0, 60.0) is None
    timed = progress.Clock(None, 1000.0)
    timed.left(1, 50.0, 60.0)
    assert timed.left(11, 55.0, 80.0) == pytest.approx(945 * 4.0)
    short = progress.Clock(100_000, 60.0)
    short.left(1, 50.0, 60.0)
    assert short.left(11, 55.0, 65.0) == pytest.approx(5.0)
    assert short.left(12, 61.0, 66.0) == 0.0


def test_durations_read_at_a_glance():
    assert [progress.duration(s) for s in (3.4, 119, 121, 7000, 9000)] == [
        "3 s", "119 s", "2 min", "117 min", "2.5 h",
    ]  # fmt: skip


def test_a_line_shows_the_target_and_the_time_left():
    row = {"validation/accuracy": 0.5, "accumulated_submission_time": 2.0}
    line = progress.line(FakeWorkload(), row, 10, 30.0, reached=False)
    assert line == "step 10/40 | accuracy 0.5000 (target 0.9000) | 2.0 s | at most 30 s left"
    line = progress.line(FakeWorkload(), row, 10, None, reached=True)
    assert line == "step 10/40 | accuracy 0.5000 (target 0.9000, reached) | 2.0 s"


def test_a_summary_says_why_a_run_went_on_after_its_target():
    result = {
        "global_step": 100,
        "steps_to_target": 75,
        "time_to_target": 3.21,
        "stop_reason": "targets reached",
    }
    assert progress.summary(result) == (
        "target reached at step 75, 3.2 s of submission time; it went on to step 100 for the test "
        "target (targets reached)"
    )
    assert "went on" not in progress.summary(result | {"steps_to_target": 100})
    missed = result | {"steps_to_target": None, "stop_reason": "step budget spent"}
    assert progress.summary(missed) == "target not reached in 100 steps (step budget spent)"
    assert "diverged at step 7" in progress.summary(missed | {"diverged_at_step": 7})


@pytest.mark.parametrize(
    ("threads", "cores", "load", "words"),
    [
        (1, 2, 0.0, None),
        (1, 2, 1.2, None),
        (2, 2, 0.4, None),
        (1, 2, 1.9, "the load is 1.9 on 2 cores): steps stay the same, seconds do not count"),
        (2, 2, 1.0, "OMP_NUM_THREADS=1 loses least"),
        (1, 2, 9.0, "this machine is busy"),
        (4, 2, 0.0, "4 threads on 2 cores: set OMP_NUM_THREADS=2 or less"),
    ],
)
def test_a_busy_machine_is_said(threads, cores, load, words):
    note = busy.note(threads, cores, load)
    assert note is None if words is None else words in note
    assert busy.cores() >= 1 and busy.load() >= 0.0
