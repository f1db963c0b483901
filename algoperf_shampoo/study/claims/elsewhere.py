"""Runs of a study of claims that lie below another label than they would be given now.

A label says in what a run's point differs from its variant's own (:func:`..points.label`). When the
variant's point changes, so do the labels of runs that are as they were: a record's own point says
which run it is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from algoperf_shampoo.harness import spec
from algoperf_shampoo.harness.spec import RunSpec
from algoperf_shampoo.study import files, logs, progress, trust
from algoperf_shampoo.study.study import Job


class Elsewhere:
    """The runs of all steps in a folder OUT, by what they are; read when they are first asked for.

    Args:
        out: holds LABEL/study_SEED/WORKLOAD_pytorch/trial_N.
    """

    def __init__(self, out: Path) -> None:
        self._out = out

    def found(self, jobs: Sequence[Job]) -> tuple[Job, ...]:
        """The jobs; each whose own folder is not there, or holds another run (a label may have been
        another point's), with the folder in which it is done, if there is one."""
        return tuple(self._found(job) for job in jobs)

    def _found(self, job: Job) -> Job:
        folders = self._folders.get(_key(job.run), [])
        if job.run.run_dir in folders:
            return job
        for folder in folders:
            done = progress.of(folder, job.run).state == progress.DONE
            if done and not trust.another(job.run, logs.read_trial(folder)):
                return replace(job, run=replace(job.run, run_dir=folder))
        return job

    @cached_property
    def _folders(self) -> dict[tuple[Any, ...], list[Path]]:
        found: dict[tuple[Any, ...], list[Path]] = {}
        for record in sorted(self._out.glob("*_allsteps*/study_*/*_pytorch/trial_*/run.json")):
            try:
                identity = files.read_json(record)["identity"]
                names = ("variant", "workload", "seed", "trial", spec.EVAL_PERIOD)
                key = (*(identity.get(name) for name in names), _text(identity.get("hparams")))
                found.setdefault(key, []).append(record.parent)
            except (files.Unreadable, KeyError, AttributeError, TypeError):
                continue  # a damaged one is none of them; where it should lie, it is said
        return found


def _key(run: RunSpec) -> tuple[Any, ...]:
    own = run.variant, run.workload, run.seed, run.trial, run.eval_period
    return (*own, _text(run.hparams))


def _text(point: Any) -> str:
    return json.dumps(point, sort_keys=True)
