"""Train one submission on one workload as AlgoPerf's ``train_once`` does, in one process.

On the submission's clock: data selection, ``update_params`` and ``prepare_for_eval``, with the GPU
synchronised before each reading. Off it: evaluation, logging, checkpoints. A run is a function of
its :class:`RunSpec`; killed at any time and started again, it continues from its last checkpoint
along the same curve.
"""

from __future__ import annotations

import functools
import hashlib
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import numpy as np
import torch

from algoperf_shampoo.errors import UserError
from algoperf_shampoo.harness import (
    checkpoint,
    environment,
    hparams,
    prng,
    record,
    run_folder,
    run_lock,
    seal,
)
from algoperf_shampoo.harness.spec import RunSpec, TrainingCompleteError, hit_line
from algoperf_shampoo.harness.submission_loader import Submission

Echo = Callable[[str], None]


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
    }


def execute(
    run: RunSpec,
    workload: Any,
    submission: Submission,
    root: Path,
    data_dir: Path | None = None,
    flags: dict[str, Any] | None = None,
    echo: Echo = print,
) -> dict[str, Any]:
    """Start, continue or merely report a run; its ``run.json`` as a dict.

    Raises:
        UserError: the folder holds another run, is in use, or has only damaged checkpoints; the
            submission's state cannot be saved.
    """
    own = identity(run, workload, root, data_dir)
    found = run_folder.check(run.run_dir, own)
    if _finished(found, run, echo):
        return found
    with run_lock.hold(run.run_dir, echo=echo):
        found = run_folder.check(run.run_dir, own)
        if _finished(found, run, echo):  # while the lock was waited for
            return found
        folder_record = found or {
            "format": 1,
            "status": "running",
            "identity": own,
            "sessions": [],
        }
        training = _Training(run, workload, submission, data_dir, echo)
        with training.recording_losses(), _deterministic_cpu():
            training.start()
            session = {
                "preemption_count": training.preemption_count,
                "from_step": training.global_step,
                "started_unix_time": round(time.time(), 3),
                **environment.describe(root),
            }
            _warn_of_changes(run, folder_record["sessions"], session, echo)
            folder_record["sessions"].append(session)
            _write_start(run, workload, training, folder_record, flags or {})
            training.on_saved = functools.partial(_write_sealed, run.run_dir, folder_record)
            training.loop()
            folder_record["result"] = training.finish()
        folder_record["status"] = "finished"
        _write_sealed(run.run_dir, folder_record)
    echo(f"{run.name}: {summary(folder_record['result'])}")
    return folder_record


def _finished(found: dict[str, Any] | None, run: RunSpec, echo: Echo) -> TypeGuard[dict[str, Any]]:
    if found is None or found["status"] != "finished":
        return False
    echo(f"{run.name}: finished before: {summary(found['result'])}")
    return True


def summary(result: dict[str, Any]) -> str:
    """One line for a finished run."""
    if result["steps_to_target"] is not None:
        hit = (
            f"target reached at step {result['steps_to_target']}, "
            f"{result['time_to_target']:.1f} s of submission time"
        )
    else:
        hit = f"target not reached in {result['global_step']} steps"
    return f"{hit} (ended: {result['stop_reason']})"


class _Training:
    """The state of ``train_once``: what AlgoPerf keeps in local variables."""

    def __init__(
        self,
        run: RunSpec,
        workload: Any,
        submission: Submission,
        data_dir: Path | None,
        echo: Echo,
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
        self.on_saved: Callable[[], None] = lambda: None
        """Called after each checkpoint, off the clock: brings the run's record up to date."""

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

    def start(self) -> None:
        """Build data, model and optimizer from the seed; go on from a checkpoint, if any."""
        key, _ = prng.split(prng.PRNGKey(self.run.seed), 2)
        data_rng, optimizer_rng, model_rng, self.rng = prng.split(key, 4)
        # Nothing below should draw from the global generators, but what does stays repeatable.
        seed = int(prng.fold_in(key, 0)[0])
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
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
        rows = self._restore()
        self.logger = record.MetricsLogger(self.run.run_dir, rows)
        self.workload.attach_metrics_logger(self.logger)

    def loop(self) -> None:
        """Train until the targets, the step budget or the time budget is reached."""
        state = self.train_state
        self.started = state["last_step_end_time"] = _now()
        while state["is_time_remaining"] and not self._goals() and not state["training_complete"]:
            prepare_rng, eval_rng = self._step()
            now = _now()
            state["accumulated_submission_time"] += now - state["last_step_end_time"]
            if self._eval_is_due(now):
                self._prepare_for_eval(prepare_rng)
                state["is_time_remaining"] = (
                    state["accumulated_submission_time"] < self.workload.max_allowed_runtime_sec
                )
                if state["is_time_remaining"]:
                    self._evaluate(eval_rng)
            state["last_step_end_time"] = _now()

    def finish(self) -> dict[str, Any]:
        """Write the last row and checkpoint; the outcome of the run."""
        self.logger.append_losses(self.losses.drain())
        self.logger.append_scalar_metrics(
            {"score": self.train_state["accumulated_submission_time"]},
            global_step=self.global_step,
            preemption_count=self.preemption_count,
        )
        rows = self.logger.flush()
        if self.saved_step != self.global_step:
            self._save(rows)
        checkpoint.prune(self.run.run_dir, keep=1)
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
            "params_sha256": hash_parameters(self.params),
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
        period = self.workload.eval_period_steps
        if period is not None:
            return self.global_step == 1 or self.global_step % period == 0
        return now - self.train_state["last_eval_time"] >= self.workload.eval_period_time_sec

    def _prepare_for_eval(self, rng: np.ndarray) -> None:
        if self.submission.prepare_for_eval is None:
            return
        start = _now()
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
        self.logger.append_losses(self.losses.drain())
        self.logger.append_scalar_metrics(
            row, self.global_step, self.preemption_count, is_eval=True
        )
        self._save(self.logger.flush())
        state["accumulated_logging_time"] += _now() - end
        self.echo(self._progress(row))
        if state["validation_goal_reached"] and not hit_before:
            metric, target = workload.target_metric_name, workload.validation_target_value
            self.echo(hit_line(self.run.name, metric, target, self.global_step, row["score"]))

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

    def _save(self, rows: dict[str, int]) -> None:
        state = {
            "model_params": self.params.state_dict(),
            "optimizer_state": {n: e.state_dict() for n, e in self.optimizer_state.items()},
            "model_state": self.model_state,
            "train_state": self.train_state,
            "eval_results": self.eval_results,
            "global_step": self.global_step,
            "preemption_count": self.preemption_count,
            "rows": rows,
            "rng_states": checkpoint.rng_states(),
        }
        checkpoint.save(self.run.run_dir, self.global_step, state)
        self.saved_step = self.global_step
        self.on_saved()

    def _restore(self) -> dict[str, int]:
        """Load the newest whole checkpoint; the number of rows each CSV had then."""
        saved, damaged = checkpoint.load_newest(self.run.run_dir)
        for problem in damaged:
            self.echo(f"{self.run.name}: {problem}: going back to the one before")
        if saved is None:
            return {}
        self.params.load_state_dict(saved["model_params"])
        for name, entry in self.optimizer_state.items():
            entry.load_state_dict(saved["optimizer_state"][name])
        self.model_state = saved["model_state"]
        self.train_state = saved["train_state"]
        self.eval_results = saved["eval_results"]
        self.global_step = self.saved_step = saved["global_step"]
        self.preemption_count = saved["preemption_count"] + 1
        if self.eval_results:
            self.duration_before = self.eval_results[-1][1]["total_duration"]
        checkpoint.discard_after(self.run.run_dir, self.global_step)
        self.input_queue.skip(self.global_step)
        checkpoint.restore_rng_states(saved["rng_states"])
        spent = self.train_state["accumulated_submission_time"]
        self.echo(f"{self.run.name}: continuing from step {self.global_step}, {spent:.1f} s spent")
        return saved["rows"]

    def _goals(self) -> bool:
        return self.train_state["validation_goal_reached"] and self.train_state["test_goal_reached"]

    def _stop_reason(self) -> str:
        if self._goals():
            return "targets reached"
        if not self.train_state["is_time_remaining"]:
            return "time budget spent"
        if self.global_step == self.workload.max_steps:
            return "step budget spent"
        return "ended by the submission"

    def _progress(self, row: dict[str, Any]) -> str:
        metric, limit = self.workload.target_metric_name, self.workload.max_steps
        spent = row["accumulated_submission_time"]
        left = f"{max(0.0, self.workload.max_allowed_runtime_sec - spent):.0f} s"
        if limit is not None:
            left = f"{limit - self.global_step} steps, {left}"
        return (
            f"{self.run.name} | step {self.global_step}{f'/{limit}' if limit else ''} | "
            f"{metric} {row[f'validation/{metric}']:.4f} "
            f"(target {self.workload.validation_target_value:.4f}) | "
            f"{spent:.1f} s | left {left}"
        )


def hash_parameters(model: torch.nn.Module) -> str:
    """sha256 over the names, dtypes, shapes and bytes of a model's state, in its own order."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        value = tensor.detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {list(value.shape)}\0".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def _write_sealed(run_dir: Path, folder_record: dict[str, Any]) -> None:
    """Bring ``run.json`` up to date with what the folder holds now."""
    folder_record[seal.FILES] = seal.make(run_dir)
    run_folder.write_record(run_dir, folder_record)


def _write_start(
    run: RunSpec,
    workload: Any,
    training: _Training,
    folder_record: dict[str, Any],
    flags: dict[str, Any],
) -> None:
    """Write the record first: from here on the folder says whose it is."""
    run_folder.write_record(run.run_dir, folder_record)
    record.write_json(run.run_dir / "hparams.json", run.hparams)
    properties = environment.workload_properties(workload)
    meta = {f"workload.{name}": value for name, value in properties.items()}
    meta |= {**folder_record["sessions"][-1], "rng_seed": run.seed}
    record.write_json(run.run_dir / f"meta_data_{training.preemption_count}.json", meta)
    own_flags = {
        "workload": run.workload,
        "framework": "pytorch",
        "submission_path": f"submissions/{run.variant}/submission.py",
        "tuning_ruleset": "external",
        "rng_seed": run.seed,
        "max_global_steps": workload.max_steps,
    }
    record.write_json(
        run.run_dir / f"flags_{training.preemption_count}.json", {**flags, **own_flags}
    )


def _warn_of_changes(
    run: RunSpec, sessions: list[dict[str, Any]], session: dict[str, Any], echo: Echo
) -> None:
    """Say what may keep the rest of the curve from being the unbroken run's to the bit."""
    for key in ("packages", "cpu_model_name", "torch_num_threads", "gpu_model_name"):
        if sessions and sessions[-1].get(key) != session.get(key):
            echo(
                f"{run.name}: {key} was {sessions[-1].get(key)} and is {session.get(key)} now: "
                "from here on the last bits may differ from an unbroken run's"
            )


@contextmanager
def _deterministic_cpu() -> Iterator[None]:
    """Ask torch for repeatable kernels on a CPU; on a GPU its own choices stay, as in AlgoPerf."""
    if torch.cuda.is_available():
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    options: Any = torch.utils.deterministic  # a module whose attributes are made at run time
    fill = options.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    options.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
        options.fill_uninitialized_memory = fill


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.time()


def _number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value
