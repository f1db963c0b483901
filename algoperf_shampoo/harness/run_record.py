"""``run.json`` of an embedded run, kept up to date: identity, sessions, seals and outcome."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import environment, record, run_folder, seal
from algoperf_shampoo.harness.spec import EVAL_PERIOD, STOP_AT_TARGET, RunSpec

Echo = Callable[[str], None]
Files = dict[str, dict[str, Any]]
DIVERGED = "diverged"
"""The ``stop_reason`` of a run that ended because its loss is not finite."""


def identity(run: RunSpec, workload: Any, root: Path, data_dir: Path | None) -> dict[str, Any]:
    """What must be equal for two runs to be the same run; kept in ``run.json``."""
    return {
        "harness": "embedded",
        "variant": run.variant,
        "label": run.label,
        "workload": run.workload,
        "seed": run.seed,
        "trial": run.trial,
        "hparams": run.hparams,
        "workload_properties": environment.workload_properties(workload),
        "workload_config": environment.workload_config(workload),
        "data_dir": data_dir.name if data_dir is not None else None,
        "source_sha256": environment.source_digests(root, run.variant),
        # Said where it is not so: records without it are of runs to the target.
        **({} if run.stop_at_target else {STOP_AT_TARGET: False}),
        **({} if run.eval_period is None else {EVAL_PERIOD: run.eval_period}),
    }


def is_over(content: dict[str, Any], keep_diverged: bool) -> bool:
    """Whether a record is of a run that has nothing more to do."""
    ended_early = content.get("result", {}).get("stop_reason") == DIVERGED
    return content.get("status") in run_folder.ENDED and not (keep_diverged and ended_early)


def check_intact(run_dir: Path, content: dict[str, Any]) -> None:
    """See that the files of a run that is over are what its record says.

    Raises:
        UserError: a file has been lost, changed or added.
    """
    problems = seal.problems(run_dir, content, ended=True)
    if problems:
        raise UserError(
            f"{run_dir}: finished before, and damaged since: {'; '.join(problems)}; put back a "
            "copy, or remove the folder to run it again"
        )


class RunRecord:
    """The record of a run that this process holds the lock of.

    ``content`` has "format", "status" ("running", "finished", "diverged"), "identity", "sessions",
    "progress" (step and accumulated seconds at the last checkpoint), "result" once the run is over,
    and what :mod:`.seal` says.
    """

    def __init__(self, run: RunSpec, identity: dict[str, Any], lock: int, echo: Echo) -> None:
        """Read the folder's record, or begin one. Writes nothing.

        Args:
            lock: descriptor of the folder's lock.

        Raises:
            UserError: the folder is of another run, or files of it that cannot be made again have
                been lost or changed.
        """
        self._run, self._lock, self._echo = run, lock, echo
        found = run_folder.check(run.run_dir, identity)
        self.content: dict[str, Any] = found or {
            "format": 2,
            "status": "running",
            "identity": identity,
            "sessions": [],
            "progress": None,
            seal.FILES: {},
        }
        if found is not None:
            self._check_files(found)

    @property
    def progress(self) -> dict[str, Any] | None:
        """Step and accumulated seconds at the last checkpoint, None before the first."""
        return self.content.get("progress")

    @property
    def sessions(self) -> list[dict[str, Any]]:
        """What each process that trained this run ran on, the oldest first."""
        return self.content["sessions"]

    def begin_session(
        self, session: dict[str, Any], workload: Any, flags: dict[str, Any], files: Files
    ) -> None:
        """Say whose the folder is, then write AlgoPerf's files of this session.

        Args:
            files: seals of the CSVs as they are now.
        """
        run, count = self._run, session["preemption_count"]
        session = {**session, "started_unix_time": round(time.time(), 3)}  # a label, no clock
        self._warn_of_changes(session)
        self.sessions.append(session)
        self.content["status"] = "running"
        self.content.pop("result", None)
        self.unseal()
        record.write_json(run.run_dir / "hparams.json", run.hparams)
        properties = environment.workload_properties(workload)
        meta = {f"workload.{name}": value for name, value in properties.items()}
        record.write_json(
            run.run_dir / f"meta_data_{count}.json", {**meta, **session, "rng_seed": run.seed}
        )
        own_flags = {
            "workload": run.workload,
            "framework": "pytorch",
            "submission_path": f"submissions/{run.variant}/submission.py",
            "tuning_ruleset": "external",
            "rng_seed": run.seed,
            "max_global_steps": workload.max_steps,
            STOP_AT_TARGET: run.stop_at_target,
        }
        record.write_json(run.run_dir / f"flags_{count}.json", {**flags, **own_flags})
        made = seal.make(run.run_dir)
        self.content[seal.FILES] = {n: e for n, e in made.items() if n.endswith(".json")}
        self.update(self.progress, files)

    def verify(self) -> None:
        """See that the folder is still there and ours, before anything is written to it."""
        run_folder.verify(self._run.run_dir, self._lock)

    def unseal(self) -> None:
        """Withdraw the seals of the CSVs: they are about to be written anew, not only to grow."""
        self._drop_seals()
        self._write()

    def update(self, progress: dict[str, Any] | None, files: Files) -> None:
        """Write down how far the run is and what its CSVs hold; on disk with all written before."""
        self.content["progress"] = progress
        self._drop_seals()
        self.content[seal.FILES] |= files
        self._write()

    def end(self, status: str, result: dict[str, Any], files: Files) -> None:
        """Write the outcome down, and say what others have changed in the folder meanwhile."""
        self.content["status"], self.content["result"] = status, result
        self.update(self.progress, files)
        for problem in seal.problems(self._run.run_dir, self.content, ended=True):
            self._echo(f"{self._run.name}: note: {problem}")

    def _write(self) -> None:
        self.verify()
        run_folder.write_record(self._run.run_dir, self.content)

    def _drop_seals(self) -> None:
        files = self.content.get(seal.FILES, {})
        self.content[seal.FILES] = {n: e for n, e in files.items() if n.endswith(".json")}

    def _check_files(self, found: dict[str, Any]) -> None:
        """The CSVs and hparams.json are made again; the record and the other files cannot be."""
        rebuilt = (*record.TABLES, "hparams.json")
        found_problems = seal.problems(self._run.run_dir, found, ended=False)
        lost = [p for p in found_problems if p.split(":")[0] not in rebuilt]
        if lost:
            raise UserError(
                f"{self._run.run_dir}: {'; '.join(lost)}; put back a copy, or remove the folder to "
                "start the run again"
            )

    def _warn_of_changes(self, session: dict[str, Any]) -> None:
        """Say what may keep the rest of the curve from being the unbroken run's to the bit."""
        for key in ("packages", "cpu_model_name", "torch_num_threads", "gpu_model_name"):
            if self.sessions and self.sessions[-1].get(key) != session.get(key):
                self._echo(
                    f"{self._run.name}: {key} was {self.sessions[-1].get(key)} and is "
                    f"{session.get(key)} now: from here on the last bits may differ from an "
                    "unbroken run's"
                )
