"""A tiny real workload and submission on the harness's contract, for tests of the harness alone.

Linear regression with dropout noise from the global torch generator: a curve that resumes to the
bit only if data, optimizer, schedule and generator states all come back.
"""

from __future__ import annotations

import os
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from algoperf_shampoo.harness import checkpoint, runner, submission_loader
from algoperf_shampoo.harness.spec import RunSpec


class _Batches:
    """Batch t is a function of the key and t alone, so skipping is free."""

    def __init__(self, rng: np.ndarray, batch_size: int) -> None:
        self.seed, self.size, self.t = [int(word) for word in rng], batch_size, 0

    def __iter__(self) -> _Batches:
        return self

    def __next__(self) -> dict[str, torch.Tensor]:
        generator = np.random.default_rng([*self.seed, self.t])
        self.t += 1
        x = torch.from_numpy(generator.standard_normal((self.size, 6))).float()
        return {"inputs": x, "targets": x.sum(1, keepdim=True)}

    def skip(self, n: int) -> None:
        self.t += n


class FakeWorkload:
    name = "fake_mini"
    step_hint = 30
    target_metric_name = "accuracy"
    validation_target_value = 0.9
    test_target_value = 2.0
    eval_batch_size = 8
    eval_period_time_sec = 1e9
    max_allowed_runtime_sec = 1e9
    loss_type = None
    model_params_types: dict[str, Any] = {}
    num_train_examples = num_validation_examples = num_test_examples = 8

    def __init__(self, **settings: Any) -> None:
        self.max_steps: int | None = 40
        self.eval_period_steps: int | None = 10
        self.metrics_logger = None
        self._kill_at_step = -1  # private: not part of what makes two runs the same
        self.__dict__.update(settings)

    def attach_metrics_logger(self, logger: Any) -> None:
        self.metrics_logger = logger

    def _build_input_queue(
        self, data_rng: Any, split: str, data_dir: Any, global_batch_size: int, **_: Any
    ) -> _Batches:
        return _Batches(data_rng, global_batch_size)

    def init_model_fn(self, rng: Any) -> tuple[torch.nn.Module, None]:
        with torch.random.fork_rng():
            torch.manual_seed(int(rng[0]))
            model = torch.nn.Sequential(
                torch.nn.Linear(6, 5), torch.nn.Dropout(0.2), torch.nn.Linear(5, 1)
            )
        return model, None

    def model_fn(self, params: Any, batch: Any, model_state: Any, mode: Any, *_: Any) -> Any:
        params.train(mode == "TRAIN")
        return params(batch["inputs"]), None

    def loss_fn(self, label_batch: Any, logits_batch: Any, **_: Any) -> dict[str, Any]:
        losses = (logits_batch - label_batch).square().flatten()
        return {"summed": losses.sum(), "n_valid_examples": len(losses), "per_example": losses}

    def eval_model(self, *arguments: Any) -> dict[str, Any]:
        params, step = arguments[1], arguments[6]
        torch.rand(3)  # an evaluation that draws from the global generator
        batch = next(_Batches(np.array([1, 2], dtype=np.uint32), 64))
        with torch.no_grad():
            logits, _ = self.model_fn(params, batch, None, "EVAL")
            loss = self.loss_fn(batch["targets"], logits)["summed"].item() / 64
        if step == self._kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        accuracy = 1 / (1 + loss)
        return {
            f"{split}/{key}": value
            for split in ("train", "validation", "test")
            for key, value in (("accuracy", accuracy), ("loss", loss), ("num_examples", 64))
        }

    def has_reached_validation_target(self, result: dict[str, Any]) -> bool:
        return bool(result["validation/accuracy"] >= self.validation_target_value)

    def has_reached_test_target(self, result: dict[str, Any]) -> bool:
        return bool(result["test/accuracy"] >= self.test_target_value)


def make_submission(**replaced: Any) -> submission_loader.Submission:
    """Adam with a decaying rate, on AlgoPerf's contract; ``replaced`` functions take its place."""
    module = types.SimpleNamespace(
        get_batch_size=lambda workload_name: 16,
        init_optimizer_state=_init_optimizer_state,
        update_params=_update_params,
        data_selection=_data_selection,
        prepare_for_eval=_prepare_for_eval,
    )
    module.__dict__.update(replaced)
    return submission_loader.from_module(module, Path("submissions/fake/submission.py"))


def _init_optimizer_state(
    workload: Any, model_params: Any, model_state: Any, hyperparameters: Any, rng: Any
) -> dict[str, Any]:
    optimizer = torch.optim.Adam(model_params.parameters(), lr=hyperparameters.learning_rate)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    return {"optimizer": optimizer, "scheduler": scheduler}


def _update_params(
    workload: Any,
    current_param_container: Any,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    batch: Any,
    loss_type: Any,
    optimizer_state: Any,
    eval_results: Any,
    global_step: int,
    rng: Any,
    train_state: Any = None,
) -> tuple[Any, Any, Any]:
    optimizer_state["optimizer"].zero_grad()
    logits, _ = workload.model_fn(current_param_container, batch, model_state, "TRAIN")
    loss = workload.loss_fn(label_batch=batch["targets"], logits_batch=logits)
    (loss["summed"] / loss["n_valid_examples"]).backward()
    optimizer_state["optimizer"].step()
    optimizer_state["scheduler"].step()
    if global_step % 7 == 0 and workload.metrics_logger is not None:
        workload.metrics_logger.append_scalar_metrics(
            {"loss": loss["summed"].detach()}, global_step
        )
    return optimizer_state, current_param_container, model_state


def _prepare_for_eval(
    workload: Any,
    current_param_container: Any,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    loss_type: Any,
    optimizer_state: Any,
    eval_results: Any,
    global_step: int,
    rng: Any,
) -> tuple[Any, Any, Any]:
    return optimizer_state, current_param_container, model_state


def _data_selection(
    workload: Any,
    input_queue: Any,
    optimizer_state: Any,
    current_param_container: Any,
    model_state: Any,
    hyperparameters: Any,
    global_step: int,
    rng: Any,
) -> Any:
    return next(input_queue)


def spec_in(folder: Path, seed: int = 1, **hparams: Any) -> RunSpec:
    """A run of the fake submission in AlgoPerf's folder layout below ``folder``."""
    return RunSpec(
        variant="fake",
        label="fake",
        workload="fake_mini",
        seed=seed,
        trial=1,
        hparams={"learning_rate": 0.05, **hparams},
        run_dir=folder / "fake" / f"study_{seed}" / "fake_mini_pytorch" / "trial_1",
    )


def execute(
    run: RunSpec,
    workload: FakeWorkload | None = None,
    echo: Callable[[str], None] = lambda line: None,
    **replaced: Any,
) -> dict[str, Any]:
    """Run to the end, with functions of the submission replaced."""
    return runner.execute(
        run,
        workload or FakeWorkload(),
        make_submission(**replaced),
        root=Path(__file__).parents[2],
        echo=echo,
    )


def main() -> None:
    """A run in a process of its own: FOLDER STEP MOMENT, killed at that moment of that step."""
    folder, step, moment = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    workload = FakeWorkload(_kill_at_step=step if moment == "evaluating" else -1)
    save = checkpoint.save

    def dying_save(run_dir: Path, at: int, state: dict[str, Any]) -> None:
        if moment == "saved" or at != step:
            save(run_dir, at, state)
        if at == step and moment != "evaluating":
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint.save = dying_save  # type: ignore[assignment]
    runner.execute(spec_in(folder), workload, make_submission(), root=Path(__file__).parents[2])


if __name__ == "__main__":
    main()
