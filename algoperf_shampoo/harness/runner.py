"""Train one submission on one workload as AlgoPerf's ``train_once`` does, in one process.

On the submission's clock: data selection, ``update_params`` and ``prepare_for_eval``, with the GPU
synchronised before each reading. Off it: evaluation, logging, checkpoints. A run is a function of
its :class:`RunSpec`; killed at any time and started again, it continues from its last checkpoint
along the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from algoperf_shampoo import interrupt, paths
from algoperf_shampoo.contract import TrainingCompleteError
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import (
    checkpoint,
    compiler,
    determinism,
    disk,
    divergence,
    environment,
    hparams,
    prng,
    progress,
    record,
    run_folder,
    run_lock,
    run_record,
    step_norms,
)
from algoperf_shampoo.harness.clock import now as _now
from algoperf_shampoo.harness.progress import summary
from algoperf_shampoo.harness.run_record import identity
from algoperf_shampoo.harness.spec import ALL_STEPS_DONE, RunSpec, Standing, hit_line, no_standing
from algoperf_shampoo.harness.submission_loader import Submission

__all__ = ["execute", "identity", "summary"]

Echo = Callable[[str], None]
_ACCUMULATED = ("accumulated_submission_time", "accumulated_eval_time", "accumulated_logging_time")


def execute(
    run: RunSpec,
    workload: Any,
    submission: Submission,
    root: Path,
    data_dir: Path | None = None,
    flags: dict[str, Any] | None = None,
    echo: Echo = print,
    keep_diverged: bool = False,
    standing: Standing = no_standing,
) -> dict[str, Any]:
    """Start, continue or merely report a run; its ``run.json`` as a dict.

    Args:
        keep_diverged: a run whose loss is not finite goes on to the end of its budget, also one
            that had ended for it; else it ends at the evaluation that sees it.
        standing: asked after each evaluation, off the clock, for a line to print.

    Raises:
        UserError: the folder holds another run, is in use, cannot be written to, has only damaged
            checkpoints, or has lost what cannot be made again; the submission's state cannot be
            saved.
    """
    own = identity(run, workload, root, data_dir)
    found = run_folder.check(run.run_dir, own)
    if found is not None and run_record.is_over(found, keep_diverged):
        return _report(run, found, echo)
    with run_lock.hold(run.run_dir, echo=echo) as lock:
        ledger = run_record.RunRecord(run, own, lock, echo)
        if run_record.is_over(ledger.content, keep_diverged):  # another process was faster
            return _report(run, ledger.content, echo)
        training = _Training(run, workload, submission, data_dir, echo, keep_diverged, standing)
        with (
            interrupt.saying(training.where),
            training.recording_losses(),
            determinism.repeatable_on_cpu(),
            compiler.left_out(),
        ):
            training.start(ledger)
            session = {
                "preemption_count": training.preemption_count,
                "from_step": training.global_step,
                **environment.describe(root),
            }
            training.log_to(session, flags or {})
            training.loop()
            result = training.finish()
        status = "diverged" if training.watch.diverged_at_step is not None else "finished"
        checkpoint.prune(run.run_dir, keep=1)
        ledger.end(status, result, training.logger.sealed())
    echo(f"{run.name}: {summary(result)}; {paths.shown(run.run_dir, root)}")
    return ledger.content


def _report(run: RunSpec, found: dict[str, Any], echo: Echo) -> dict[str, Any]:
    run_record.check_intact(run.run_dir, found)
    echo(f"{run.name}: finished before: {summary(found['result'])}")
    return found


class _Training:
    """The state of ``train_once``: what AlgoPerf keeps in local variables."""

    def __init__(
        self,
        run: RunSpec,
        workload: Any,
        submission: Submission,
        data_dir: Path | None,
        echo: Echo,
        keep_diverged: bool,
        standing: Standing,
    ) -> None:
        self.run, self.workload, self.submission, self.echo = run, workload, submission, echo
        self.data_dir = str(data_dir) if data_dir is not None else None
        self.hyperparameters = hparams.as_namedtuple(run.hparams)
        self.losses = record.LossRecorder(workload.loss_fn)
        self.train_state: dict[str, Any] = {
            "validation_goal_reached": False,
            "test_goal_reached": False,
            "is_time_remaining": True,
            "last_eval_time": 0.0,
            "training_complete": False,
            "accumulated_submission_time": 0.0,
            "accumulated_eval_time": 0.0,
            "accumulated_logging_time": 0.0,
            "last_step_end_time": None,
        }
        self.global_step = 0
        self.preemption_count = 0
        self.duration_before = 0.0
        self.eval_results: list[tuple[int, dict[str, Any]]] = []
        self.saved_step: int | None = None
        self.keep_diverged, self.standing = keep_diverged, standing
        self.watch = divergence.Watch(workload.target_metric_name)
        self.ledger: run_record.RunRecord
        self.logger: record.MetricsLogger
        self._contents: dict[str, str] = {}  # of the CSVs, as the checkpoint has them

    def where(self) -> str:
        """How far the run is, and what the same command will do."""
        then = f"goes on from step {self.saved_step}" if self.saved_step else "starts it again"
        return f"{self.run.name}: at step {self.global_step}; the same command {then}"

    @contextmanager
    def recording_losses(self) -> Iterator[None]:
        """Put the loss recorder in the workload's place of ``loss_fn`` for a while."""
        original = self.workload.loss_fn
        self.workload.loss_fn = self.losses
        try:
            yield
        finally:
            self.workload.loss_fn = original
            self.workload.attach_metrics_logger(None)

    def start(self, ledger: run_record.RunRecord) -> None:
        """Build data, model and optimizer from the seed; go on from a checkpoint, if any.

        Nothing is written yet. Without a checkpoint the time in the run's record stays spent.
        """
        self.ledger = ledger
        key, _ = prng.split(prng.PRNGKey(self.run.seed), 2)
        data_rng, optimizer_rng, model_rng, self.rng = prng.split(key, 4)
        determinism.seed_global_generators(int(prng.fold_in(key, 0)[0]))
        self.input_queue = self.workload._build_input_queue(
            data_rng,
            "train",
            data_dir=self.data_dir,
            global_batch_size=self.submission.batch_size(self.run.workload),
        )
        self.params, self.model_state = self.workload.init_model_fn(model_rng)
        self.optimizer_state = self.submission.init_optimizer_state(
            self.workload, self.params, self.model_state, self.hyperparameters, optimizer_rng
        )
        for name, entry in self.optimizer_state.items():
            if not hasattr(entry, "state_dict") or not hasattr(entry, "load_state_dict"):
                raise UserError(
                    f"{self.submission.path}: optimizer_state[{name!r}] is a "
                    f"{type(entry).__name__} without state_dict and load_state_dict: a run could "
                    "not be continued from its checkpoints"
                )
        if not self._restore():
            self._start_over()

    def log_to(self, session: dict[str, Any], flags: dict[str, Any]) -> None:
        """Bring the folder to the state that the run goes on from, and open its files."""
        run_dir = self.run.run_dir
        if self.ledger.sessions:
            self.ledger.unseal()
        checkpoint.discard_after(run_dir, self.global_step)
        if self.saved_step is None and self.preemption_count:
            for name in record.TABLES:
                if (run_dir / name).exists():
                    disk.set_aside(run_dir / name)
        self.logger = record.MetricsLogger(run_dir, self._contents)
        for note in self.logger.notes():
            self.echo(f"{self.run.name}: {note}")
        self.ledger.begin_session(session, self.workload, flags, self.logger.sealed())
        self.workload.attach_metrics_logger(self.logger)

    def loop(self) -> None:
        """Train until the targets, the step budget or the time budget is reached; until the step
        budget alone in a run that does not stop at its targets."""
        state = self.train_state
        self.started = state["last_step_end_time"] = _now()
        self.clock = progress.Clock(self.workload.max_steps, self._time_budget())
        if self.global_step:
            state["last_eval_time"] = self.started  # the checkpoint is of an evaluation
        while (
            state["is_time_remaining"]
            and not self._is_to_stop_at_goals()
            and not state["training_complete"]
            and not self._is_given_up()
        ):
            prepare_rng, eval_rng = self._step()
            now = _now()
            state["accumulated_submission_time"] += now - state["last_step_end_time"]
            if self._eval_is_due(now):
                self._prepare_for_eval(prepare_rng)
                state["is_time_remaining"] = (
                    state["accumulated_submission_time"] < self._time_budget()
                )
                if state["is_time_remaining"]:
                    self._evaluate(eval_rng)
            state["last_step_end_time"] = _now()

    def finish(self) -> dict[str, Any]:
        """Write the last row and checkpoint; the outcome of the run."""
        self._take_losses({})
        self.logger.append_scalar_metrics(
            {"score": self.train_state["accumulated_submission_time"]},
            global_step=self.global_step,
            preemption_count=self.preemption_count,
        )
        self._flush()
        if self.saved_step != self.global_step:
            self._save()
        hit = next(
            (
                (step, result["accumulated_submission_time"])
                for step, result in self.eval_results
                if self.workload.has_reached_validation_target(result)
            ),
            (None, None),
        )
        return {
            "stop_reason": self._stop_reason(),
            "global_step": self.global_step,
            "accumulated_submission_time": self.train_state["accumulated_submission_time"],
            "steps_to_target": hit[0],
            "time_to_target": hit[1],
            "preemption_count": self.preemption_count,
            "diverged_at_step": self.watch.diverged_at_step,
            "params_sha256": determinism.hash_parameters(self.params),
        }

    def _step(self) -> tuple[np.ndarray, np.ndarray]:
        step_rng = prng.fold_in(self.rng, self.global_step)
        select_rng, update_rng, prepare_rng, eval_rng = prng.split(step_rng, 4)
        batch = self.submission.data_selection(
            self.workload,
            self.input_queue,
            self.optimizer_state,
            self.params,
            self.model_state,
            self.hyperparameters,
            self.global_step,
            select_rng,
        )
        optional: dict[str, Any] = {}
        if self.submission.needs_train_state:
            optional["train_state"] = MappingProxyType(self.train_state)
        self.losses.step = self.global_step + 1
        try:
            with self.watch.giving_up(self.run.name, self.global_step + 1, self.echo):
                self.optimizer_state, self.params, self.model_state = self.submission.update_params(
                    **self._keywords(update_rng), batch=batch, **optional
                )
        except TrainingCompleteError:
            self.train_state["training_complete"] = True
        self.losses.step = None
        self.global_step += 1
        if self.global_step == self.workload.max_steps:
            self.train_state["training_complete"] = True
        return prepare_rng, eval_rng

    def _eval_is_due(self, now: float) -> bool:
        if self.train_state["training_complete"]:
            return True
        period = self.run.eval_period or self.workload.eval_period_steps
        if period is not None:
            return self.global_step == 1 or self.global_step % period == 0
        since = now - self.train_state["last_eval_time"]
        return self.global_step == 1 or since >= self.workload.eval_period_time_sec

    def _prepare_for_eval(self, rng: np.ndarray) -> None:
        if self.submission.prepare_for_eval is None:
            return
        start = _now()
        with self.watch.giving_up(self.run.name, self.global_step, self.echo):
            self.optimizer_state, self.params, self.model_state = self.submission.prepare_for_eval(
                **self._keywords(rng)
            )
        self.train_state["accumulated_submission_time"] += _now() - start

    def _evaluate(self, rng: np.ndarray) -> None:
        state, workload = self.train_state, self.workload
        eval_batch_size = workload.eval_batch_size
        if self.submission.get_eval_batch_size is not None:
            eval_batch_size = self.submission.get_eval_batch_size(workload.name)
        start = _now()
        result = workload.eval_model(
            eval_batch_size,
            self.params,
            self.model_state,
            rng,
            self.data_dir,
            None,
            self.global_step,
        )
        hit_before = state["validation_goal_reached"]
        for goal, reached in (
            ("validation_goal_reached", workload.has_reached_validation_target),
            ("test_goal_reached", workload.has_reached_test_target),
        ):
            state[goal] = bool(reached(result)) or state[goal]
        end = state["last_eval_time"] = _now()
        state["accumulated_eval_time"] += end - start
        row = {
            **{key: _number(value) for key, value in result.items()},
            "score": state["accumulated_submission_time"],
            "total_duration": self.duration_before + end - self.started,
            "accumulated_submission_time": state["accumulated_submission_time"],
            "accumulated_eval_time": state["accumulated_eval_time"],
            "accumulated_logging_time": state["accumulated_logging_time"],
        }
        self.eval_results.append((self.global_step, row))
        self._take_losses(row)
        self.logger.append_scalar_metrics(
            row, self.global_step, self.preemption_count, is_eval=True
        )
        if known := step_norms.metrics(self.optimizer_state):
            self.logger.append_scalar_metrics(known, self.global_step, self.preemption_count)
        self._flush()
        self._save()
        state["accumulated_logging_time"] += _now() - end
        left = self.clock.left(self.global_step, state["accumulated_submission_time"], end)
        reached = state["validation_goal_reached"]
        line = progress.line(workload, row, self.global_step, left, reached)
        self.echo(f"{self.run.name} | {line}")
        if state["validation_goal_reached"] and not hit_before:
            metric, target = workload.target_metric_name, workload.validation_target_value
            self.echo(hit_line(self.run.name, metric, target, self.global_step, row["score"]))
        if words := self.standing(self.run.run_dir, self.run.name):
            self.echo(words)

    def _keywords(self, rng: np.ndarray) -> dict[str, Any]:
        return {
            "workload": self.workload,
            "current_param_container": self.params,
            "current_params_types": self.workload.model_params_types,
            "model_state": self.model_state,
            "hyperparameters": self.hyperparameters,
            "loss_type": self.workload.loss_type,
            "optimizer_state": self.optimizer_state,
            "eval_results": self.eval_results,
            "global_step": self.global_step,
            "rng": rng,
        }

    def _take_losses(self, row: dict[str, Any]) -> None:
        """Log the steps' losses, and say when they, or those of an evaluation, are not finite."""
        losses = self.losses.drain()
        self.logger.append_losses(losses)
        known = self.watch.diverged_at_step
        news = self.watch.look(self.global_step, losses, row)
        if news and self.watch.diverged_at_step not in (None, known):
            ends = "it ends here, a miss; --keep_diverged lets such runs go on"
            news += ": it goes on" if self.keep_diverged else f": {ends}"
        if news:
            self.echo(f"{self.run.name}: {news}")

    def _is_given_up(self) -> bool:
        return self.watch.diverged_at_step is not None and not self.keep_diverged

    def _flush(self) -> None:
        """Bring the CSVs up to date, on disk."""
        self.ledger.verify()
        self.logger.flush(before_rewriting=self.ledger.unseal)
        for note in self.logger.notes():
            self.echo(f"{self.run.name}: {note}")

    def _save(self) -> None:
        """Write a checkpoint and the run's record; older checkpoints go once both are on disk."""
        state = {
            "model_params": self.params.state_dict(),
            "optimizer_state": {n: e.state_dict() for n, e in self.optimizer_state.items()},
            "model_state": self.model_state,
            "train_state": self.train_state,
            "eval_results": self.eval_results,
            "global_step": self.global_step,
            "preemption_count": self.preemption_count,
            "diverged_at_step": self.watch.diverged_at_step,
            "tables": self.logger.contents(),
            "rng_states": checkpoint.rng_states(),
        }
        run_dir, first = self.run.run_dir, self.saved_step is None
        checkpoint.save(run_dir, self.global_step, state)
        if first:
            checkpoint.refuse_unloadable(run_dir, self.global_step)
        self.ledger.update(self._spent(), self.logger.sealed())
        checkpoint.prune(run_dir, keep=2)
        self.saved_step = self.global_step

    def _spent(self) -> dict[str, Any]:
        times = {name: value for name, value in self.train_state.items() if name in _ACCUMULATED}
        duration = self.eval_results[-1][1]["total_duration"] if self.eval_results else 0.0
        return {"global_step": self.global_step, **times, "total_duration": duration}

    def _restore(self) -> bool:
        """Load the newest whole checkpoint; whether there is one."""
        saved, damaged = checkpoint.load_newest(self.run.run_dir)
        for problem in damaged:
            self.echo(f"{self.run.name}: {problem}: going back to the one before")
        if saved is None:
            return False
        self.params.load_state_dict(saved["model_params"])
        for name, entry in self.optimizer_state.items():
            try:
                entry.load_state_dict(saved["optimizer_state"][name])
            except ValueError as error:
                raise UserError(
                    f"{self.run.run_dir}/checkpoint_{saved['global_step']}: {name}: {error}; "
                    "remove the folder to start the run again"
                ) from error
        self.model_state = saved["model_state"]
        self.train_state = saved["train_state"]
        self.eval_results = saved["eval_results"]
        self.global_step = self.saved_step = saved["global_step"]
        self.preemption_count = saved["preemption_count"] + 1
        self.watch.diverged_at_step = saved["diverged_at_step"]
        if self.eval_results:
            self.duration_before = self.eval_results[-1][1]["total_duration"]
        self._contents = saved["tables"]
        self.input_queue.skip(self.global_step)
        checkpoint.restore_rng_states(saved["rng_states"])
        spent = self.train_state["accumulated_submission_time"]
        self.echo(
            f"{self.run.name}: continuing from step {self.global_step}, {spent:.1f} s already spent"
        )
        return True

    def _start_over(self) -> None:
        """From step 0, but with the time that the run's record says is spent."""
        before = self.ledger.progress
        if not before:
            return
        self.train_state |= {name: before[name] for name in _ACCUMULATED}
        self.duration_before = before["total_duration"]
        self.preemption_count = self.ledger.sessions[-1]["preemption_count"] + 1
        self.echo(
            f"{self.run.name}: no checkpoint is left of {before['global_step']} steps: starting "
            f"over; the {before['accumulated_submission_time']:.1f} s already spent count"
        )

    def _is_to_stop_at_goals(self) -> bool:
        state = self.train_state
        both = state["validation_goal_reached"] and state["test_goal_reached"]
        return self.run.stop_at_target and both

    def _time_budget(self) -> float:
        """Seconds of submission time. All steps are all steps, on a slow machine too."""
        return self.workload.max_allowed_runtime_sec if self.run.stop_at_target else math.inf

    def _stop_reason(self) -> str:
        if self._is_to_stop_at_goals():
            return "targets reached"
        if self._is_given_up():
            return run_record.DIVERGED
        if not self.train_state["is_time_remaining"]:
            return "time budget spent"
        if self.global_step == self.workload.max_steps:
            return "step budget spent" if self.run.stop_at_target else ALL_STEPS_DONE
        return "ended by the submission"


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
