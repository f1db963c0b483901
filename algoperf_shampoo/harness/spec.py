"""What a run is, and the plan of many: what the harnesses are handed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from algoperf_shampoo.contract import ForwardPassMode as ForwardPassMode

MINI = "_mini"
"""Ends the name of a workload whose model and data are both small (embedded harness)."""
MINIDATA = "_minidata"
"""Ends the name of AlgoPerf's own workload, its model unchanged, on little data."""

STOP_AT_TARGET = "stop_at_target"
"""Of a run's identity: False where the run does every step of its budget."""
EVAL_PERIOD = "eval_period_steps"
"""Of a run's identity: steps between evaluations, where they are not the workload's."""
ALL_STEPS_DONE = "all steps done"
"""The ``stop_reason`` of such a run."""


@dataclass(frozen=True)
class RunSpec:
    """One training run: everything that, with the code and the data, determines its curve.

    ``label`` is the variant plus its overrides (``eshampoo_adaptive_F20_tau0.05``), ``trial``
    counts the points of the search space from 1, as AlgoPerf's ``trial_N`` folders do. ``ruleset``
    is AlgoPerf's: "external" hands the point over, in "self" the submission has it built in.
    Without ``stop_at_target`` (embedded harness alone) a run does every step of its budget, past
    its targets and whatever time that takes: it says nothing on a time to target. ``max_steps`` is
    its step limit where the plan knows it, ``eval_period`` the steps between its evaluations where
    they are not the workload's (embedded harness alone; no step depends on it).
    """

    variant: str
    label: str
    workload: str
    seed: int
    trial: int
    hparams: dict[str, Any] = field(hash=False)
    run_dir: Path
    ruleset: str = "external"
    stop_at_target: bool = True
    max_steps: int | None = None
    eval_period: int | None = None

    @property
    def name(self) -> str:
        """Short name for progress lines and messages."""
        trial = f" trial {self.trial}" if self.trial != 1 else ""
        return f"{self.label} {self.workload} seed {self.seed}{trial}"


@dataclass(frozen=True)
class Plan:
    """Runs to launch, and the settings they share. Paths are absolute.

    ``gpus`` is the number asked for, None to take what there is. ``config_dir`` holds the workload
    files, None for the suite's own. ``search_spaces`` are the files the points came from.
    ``steps`` is the shorter budget asked for, None for the workload's own; the embedded harness
    runs minis alone, so there it is that of a mini. ``version`` is AlgoPerf's, whose numbers full
    workloads get; None for those of the AlgoPerf that is installed.
    """

    root: Path
    harness: str
    size: str
    out: Path
    runs: tuple[RunSpec, ...]
    search_spaces: dict[str, Path]
    gpus: int | None = None
    data_dir: Path | None = None
    config_dir: Path | None = None
    steps: int | None = None
    version: str | None = None
    dry_run: bool = False


Standing = Callable[[Path, str], str | None]
"""From a run's folder and name a line on where it stands, None of nothing to say; from who can read
its log."""


def no_standing(run_dir: Path, name: str) -> None:
    """Says nothing of any run."""


def hit_line(name: str, metric: str, target: float, step: int, seconds: float) -> str:
    """The line printed when a run reaches its target; ``seconds`` of submission time."""
    return (
        f"{name}: hit: {metric} {target:g} reached at step {step}, {seconds:.1f} s of submission "
        "time"
    )
