"""Which runs make a row, and which runs are one run that lies there twice.

Runs of a row share everything but the seed: what they ran, under which benchmark, to which target,
within which budget, on which data. A run counts once however many copies of it there are, and no
seed counts twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from algoperf_shampoo.study import files
from algoperf_shampoo.study.trial import Trial

COUNTED = ("hit", "miss")
"""Outcomes of the runs that a table counts."""

Key = tuple[Any, ...]


def row_of(trial: Trial) -> Key:
    """What must be equal for two runs to be in one row; elements can be ordered.

    Workload, benchmark version, label, point as JSON, ruleset, framework, the trial's number where
    it stands for a point that is not there; then the terms: target, steps, seconds, data.
    """
    point = json.dumps(trial.hparams, sort_keys=True)
    number = trial.trial if trial.hparams is None else 0
    run = (trial.workload, trial.version, trial.label, point, trial.ruleset, trial.framework)
    return (*run, number, *trial.terms)


def rows(trials: Iterable[Trial]) -> dict[Key, list[Trial]]:
    """The runs to the target, by row.

    A run whose terms cannot be read, which is not counted, stands with the first that are else
    like it.
    """
    groups: dict[Key, list[Trial]] = {}
    without: list[Trial] = []
    for trial in trials:
        if not trial.to_target:
            continue
        if trial.target is None or trial.metric is None:
            without.append(trial)
        else:
            groups.setdefault(row_of(trial), []).append(trial)
    for trial in without:
        key = row_of(trial)
        like = next((k for k in groups if k[:7] == key[:7]), key)
        groups.setdefault(like, []).append(trial)
    return groups


def once(trials: Sequence[Trial]) -> list[Trial]:
    """The runs in their order, each that must not count again with the reason in its holes.

    Of runs alike (the same log, or the same seed and the same trained parameters) in one row the
    first counts. Of different runs of one seed none does: nothing says which is the seed's.
    Seeds are compared where a run has a record of ours; other logs by their content alone.
    """
    out = list(trials)
    firsts: dict[tuple[Any, ...], int] = {}
    by_seed: dict[tuple[Any, ...], list[int]] = {}
    for place, trial in enumerate(trials):
        if trial.outcome not in COUNTED:
            continue
        key = (row_of(trial), trial.to_target)
        first = next((firsts[key, s] for s in trial.stamps if (key, s) in firsts), None)
        for stamp in trial.stamps:
            firsts.setdefault((key, stamp), place if first is None else first)
        if first is not None:
            out[place] = _left_out(trial, f"the same run as {_name(trials[first])}")
        elif trial.recorded and trial.seed is not None:
            by_seed.setdefault((key, trial.seed), []).append(place)
    for places in by_seed.values():
        for place in places if len(places) > 1 else []:
            other = next(trials[p] for p in places if p != place)
            reason = f"another run of seed {trials[place].seed} than {_name(other)}"
            out[place] = _left_out(trials[place], f"{reason}, and of one row: neither is counted")
    return out


def _name(trial: Trial) -> str:
    return files.printable(trial.path.as_posix(), 400)


def _left_out(trial: Trial, reason: str) -> Trial:
    return replace(
        trial, outcome="unknown", steps_to_target=None, time_to_target=None,
        holes=[*trial.holes, reason],
    )  # fmt: skip
