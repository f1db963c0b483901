"""Which runs make a row, and which runs are one run that lies there twice.

Runs of a row share everything but the seed: what they ran, under which benchmark, to which target,
within which budget, on which data. A run counts once however many copies of it there are, and no
seed counts twice.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from algoperf_shampoo.study import files
from algoperf_shampoo.study.trial import Trial

COUNTED = ("hit", "miss")
"""Outcomes of the runs that a table counts."""

_COMPARED, _DIGITS = 3, 1e-5
"""Evaluations that are compared, and the relative difference of numbers that are the same."""

Key = tuple[Any, ...]
KEY = (
    "workload", "version", "label", "point", "ruleset", "framework", "trial",
    "target", "steps at most", "seconds at most", "data",
)  # fmt: skip
"""What the elements of a row's key are."""


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

    Of runs alike (one log, the same record, or the same seed and the same trained parameters) in
    one row one counts: the first with a record of ours, else the first. Of different runs of one
    seed none does: nothing says which is the seed's. Seeds are compared where a run has a record;
    other logs by their content alone (:func:`alike`). Such a log that lies in two rows, under two
    labels, say, counts in neither, unless the other is a run with a record, which says its place.
    """
    out = list(trials)
    counted = [place for place, trial in enumerate(trials) if trial.outcome in COUNTED]
    counted.sort(key=lambda place: not trials[place].recorded)
    keys = {place: (row_of(trials[place]), trials[place].to_target) for place in counted}
    kept = _first_of_alike(trials, out, counted, keys)
    _leave_out_of_two_rows(trials, out, kept, keys)
    by_seed: dict[tuple[Any, ...], list[int]] = {}
    for place in kept:
        if trials[place].recorded and trials[place].seed is not None:
            by_seed.setdefault((keys[place], trials[place].seed), []).append(place)
    for places in by_seed.values():
        for place in places if len(places) > 1 else []:
            other = next(trials[p] for p in places if p != place)
            reason = f"another run of seed {trials[place].seed} than {_name(other)}"
            out[place] = _left_out(trials[place], f"{reason}, and of one row: neither is counted")
    return out


def alike(one: Trial, other: Trial) -> bool:
    """Whether one log is a copy of the other, written anew or cut short, say, by its evaluations.

    The first three must agree to five digits (programs that show a table round its numbers). Of two
    runs with records the records say what they are.
    """
    if one.recorded and other.recorded:
        return False
    pairs = list(zip(one.evaluations, other.evaluations, strict=False))[:_COMPARED]
    return bool(pairs) and all(
        a.step == b.step
        and _close(a.submission_time, b.submission_time)
        and _close(a.value, b.value)
        for a, b in pairs
    )


def _close(one: float, other: float) -> bool:
    both_nan = math.isnan(one) and math.isnan(other)
    return both_nan or math.isclose(one, other, rel_tol=_DIGITS)


def _first_of_alike(
    trials: Sequence[Trial], out: list[Trial], counted: Sequence[int], keys: dict[int, Any]
) -> list[int]:
    """The places that are left when of runs alike in a row the first is kept."""
    kept: list[int] = []
    stamped: dict[tuple[Any, str], int] = {}
    by_row: dict[Any, list[int]] = {}
    for place in counted:
        trial, key = trials[place], keys[place]
        first = next((stamped[key, s] for s in trial.stamps if (key, s) in stamped), None)
        if first is None:
            first = next((p for p in by_row.get(key, []) if alike(trials[p], trial)), None)
        for stamp in trial.stamps:
            stamped.setdefault((key, stamp), place if first is None else first)
        if first is not None:
            out[place] = _left_out(trial, f"the same run as {_name(trials[first])}")
        else:
            kept.append(place)
            by_row.setdefault(key, []).append(place)
    return kept


def _leave_out_of_two_rows(
    trials: Sequence[Trial], out: list[Trial], kept: Sequence[int], keys: dict[int, Any]
) -> None:
    by_workload: dict[str, list[int]] = {}
    for place in kept:
        if trials[place].evaluations:
            by_workload.setdefault(trials[place].workload, []).append(place)
    for places in by_workload.values():
        # Steps are equal where logs are alike, and near in time: only neighbours are compared.
        places.sort(key=lambda p: trials[p].evaluations[0].submission_time)
        for index, place in enumerate(places):
            for other in places[index + 1 :]:
                times = [trials[p].evaluations[0].submission_time for p in (place, other)]
                if not _close(*times):
                    break
                if keys[place] != keys[other] and alike(trials[place], trials[other]):
                    for here, there in ((place, other), (other, place)):
                        if not trials[here].recorded:
                            out[here] = _left_out(
                                trials[here],
                                f"the same run as {_name(trials[there])}, which is of another row"
                                + (": neither is counted" * (not trials[there].recorded)),
                            )


def made_by(trials: Sequence[Trial]) -> dict[str, dict[str, int]]:
    """What the runs that count were made with, each value with their number; "" not said."""
    runs = [trial for trial in trials if trial.outcome in COUNTED]
    names = dict.fromkeys(what for trial in runs for what in trial.made_by)
    counts = {what: Counter(trial.made_by.get(what, "") for trial in runs) for what in names}
    return {what: dict(of.most_common()) for what, of in counts.items()}


def differing(made: Mapping[str, Mapping[str, int]]) -> list[str]:
    """A line for each source, program or machine in which the runs of a row are not alike."""
    return [
        f"its runs differ in {what}: "
        + ", ".join(f"{value or 'not said'} ({count})" for value, count in values.items())
        for what, values in made.items()
        if len(values) > 1
    ]


def _name(trial: Trial) -> str:
    return files.printable(trial.path.as_posix(), 400)


def _left_out(trial: Trial, reason: str) -> Trial:
    return replace(
        trial, outcome="unknown", steps_to_target=None, time_to_target=None,
        holes=[*trial.holes, reason], left_out=True,
    )  # fmt: skip
