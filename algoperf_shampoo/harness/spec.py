"""The few names of AlgoPerf's contract that the embedded harness and its callers share."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MINI = "_mini"
"""Ends the name of a workload whose model and data are both small (embedded harness)."""
MINIDATA = "_minidata"
"""Ends the name of AlgoPerf's own workload, its model unchanged, on little data."""


class ForwardPassMode(enum.Enum):
    """Passed to ``model_fn``. AlgoPerf has an enum of the same names: compare ``mode.name``."""

    TRAIN = 0
    EVAL = 1


class TrainingCompleteError(Exception):
    """A submission raises it in ``update_params`` to end its own run."""


@dataclass(frozen=True)
class RunSpec:
    """One training run: everything that, with the code and the data, determines its curve.

    ``label`` is the variant plus its overrides (``eshampoo_adaptive_F20_tau0.05``), ``trial``
    counts the points of the search space from 1, as AlgoPerf's ``trial_N`` folders do. ``ruleset``
    is AlgoPerf's: "external" hands the point over, in "self" the submission has it built in.
    """

    variant: str
    label: str
    workload: str
    seed: int
    trial: int
    hparams: dict[str, Any] = field(hash=False)
    run_dir: Path
    ruleset: str = "external"

    @property
    def name(self) -> str:
        """Short name for progress lines and messages."""
        trial = f" trial {self.trial}" if self.trial != 1 else ""
        return f"{self.label} {self.workload} seed {self.seed}{trial}"


def hit_line(name: str, metric: str, target: float, step: int, seconds: float) -> str:
    """The line printed when a run reaches its target; ``seconds`` of submission time."""
    return (
        f"{name}: hit: {metric} {target:g} reached at step {step}, {seconds:.1f} s of submission "
        "time"
    )
