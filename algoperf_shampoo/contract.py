"""The few names of AlgoPerf's contract that workloads, submissions and harness share."""

from __future__ import annotations

import enum


class ForwardPassMode(enum.Enum):
    """Passed to ``model_fn``. Compare ``mode.name``: AlgoPerf's own enum is another class."""

    TRAIN = 0
    EVAL = 1


class LossType(enum.Enum):
    """The loss types the three workloads have, under AlgoPerf's names and values."""

    SOFTMAX_CROSS_ENTROPY = 0
    MEAN_ABSOLUTE_ERROR = 4


class TrainingCompleteError(Exception):
    """A submission raises it in ``update_params`` to end its own run."""
