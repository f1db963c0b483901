"""A run as the tables take it: what :mod:`.logs` reads of one ``trial_N`` folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from algoperf_shampoo import versions
from algoperf_shampoo.study.evaluations import Evaluation


@dataclass(frozen=True)
class Trial:
    """One ``trial_N`` folder, read.

    ``outcome`` is "hit", "miss" (the budget was spent short of the target, or the run diverged),
    "unfinished" (an embedded run still going, or killed), "all steps" (one that was not to stop at
    its target, and has ended) or "unknown" (the log does not say, or is not to be trusted; see
    ``holes``). ``steps_to_target`` and ``time_to_target`` (seconds) are None
    unless the outcome is a hit.
    """

    path: Path
    source: str
    label: str
    study: str
    workload: str
    framework: str
    trial: int
    seed: int | None
    metric: str | None
    target: float | None
    step_hint: int | None
    hparams: dict[str, Any] | None
    evaluations: list[Evaluation]
    holes: list[str]
    outcome: str
    steps_to_target: int | None
    time_to_target: float | None
    diverged: bool = False
    version: str = versions.UNKNOWN
    """AlgoPerf's, told by what the run logged: "v0.6", say; "mini" and "minidata" of small data."""
    ruleset: str = "external"
    """AlgoPerf's tuning ruleset, "external" or "self"."""
    variant: str | None = None
    """As the run's record says; None without one."""
    terms: tuple[str, ...] = ()
    """Target, steps and seconds at most, digest of the data: what a row's runs have in common."""
    stamps: tuple[str, ...] = ()
    """Digests by which a copy is known: of log and record, of seed and trained parameters."""
    recorded: bool = False
    """Whether there is a record of ours, so that ``seed`` is what sets it apart in its row."""
    to_target: bool = True
    """Whether the run stops at its target; one that does not is in no table of times to target."""
    left_out: bool = False
    """Whether it is not counted because another run is there: the same one, or one of its seed."""
    made_by: dict[str, str] = field(default_factory=dict)
    """Sources, software and machine, of a run of ours as far as it says."""
