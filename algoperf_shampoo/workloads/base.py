"""What every workload is: the part of AlgoPerf's contract that submissions and our harness use."""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from algoperf_shampoo.contract import ForwardPassMode, LossType
from algoperf_shampoo.errors import UserError
from algoperf_shampoo.workloads import metrics
from algoperf_shampoo.workloads.config import Schema, WorkloadConfig
from algoperf_shampoo.workloads.queues import (
    Batch,
    MakeBatch,
    TrainQueue,
    evaluation_batches,
    generator,
    seed_words,
)

EVAL_SPLITS = ("eval_train", "validation", "test")


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """torch draws from ``seed`` inside; the generators outside are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


class Workload(abc.ABC):
    """One workload at one size.

    Attributes are AlgoPerf's, plus ``max_steps`` and ``eval_period_steps`` (mini only, else None).
    Random states are uint32 arrays [2]. Metrics are better when higher; a target is hit at or above
    it. ``default_dropout_rate`` is what AlgoPerf's model takes where a submission names none.
    """

    full_name: ClassVar[str]
    loss_type: ClassVar[LossType]
    default_dropout_rate: ClassVar[float] = 0.0
    model_schema: ClassVar[Schema]
    data_schema: ClassVar[Schema]

    def __init__(self, config: WorkloadConfig) -> None:
        """Raises UserError when the sizes in ``config`` do not fit together."""
        self.config = config
        self.is_mini = config.data is not None
        self.name = f"{self.full_name}_mini" if self.is_mini else self.full_name
        self.target_metric_name = config.target_metric_name
        self.step_hint = config.step_hint
        self.max_steps = config.max_steps
        self.eval_period_steps = config.eval_period_steps
        self.eval_period_time_sec = config.eval_period_time_sec
        self.max_allowed_runtime_sec = config.max_allowed_runtime_sec
        self.validation_target_value = config.validation_target_value
        self.test_target_value = config.test_target_value
        self.eval_batch_size = config.eval_batch_size
        self.num_train_examples = config.num_train_examples
        self.num_eval_train_examples = config.num_eval_train_examples
        self.num_validation_examples = config.num_validation_examples
        self.num_test_examples = config.num_test_examples
        self.model_params_types: dict[str, Any] = {}
        self.metrics_logger: Any = None
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._eval_batches: dict[tuple[str, int, str | None], list[Batch]] = {}
        self._check()

    # What a workload has to say.

    @abc.abstractmethod
    def _check(self) -> None:
        """Raises UserError when the model's sizes do not fit each other or the data."""

    @abc.abstractmethod
    def _new_model(self) -> nn.Module:
        """The network, freshly initialised from torch's generator, on the CPU."""

    @abc.abstractmethod
    def _forward(self, model: nn.Module, batch: Batch, dropout_rate: float) -> Tensor:
        """The logits of a batch; each workload says their shape and that of its inputs."""

    @abc.abstractmethod
    def loss_fn(
        self,
        label_batch: Tensor,
        logits_batch: Tensor,
        mask_batch: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        """Returns "summed" (scalar), "n_valid_examples" (scalar) and "per_example" losses."""

    @abc.abstractmethod
    def _open_split(
        self, split: str, data_dir: str | Path | None, data_rng: Any
    ) -> tuple[int, MakeBatch]:
        """Loads a split of the mini data: how many examples, and what makes a batch of indices.

        A training batch may draw numbers from ``data_rng`` and its position alone.
        """

    @abc.abstractmethod
    def _evaluate(self, model: nn.Module, batches: list[Batch], rng: Any) -> dict[str, float]:
        """The metric and "loss" over the batches of one split."""

    @abc.abstractmethod
    def synthetic_batch(self, batch_size: int, rng: Any) -> Batch:
        """A random training batch of AlgoPerf's shapes and dtypes, for benchmarks."""

    # What they share.

    def attach_metrics_logger(self, logger: Any) -> None:
        """Gives the submission a place to log scalars to."""
        self.metrics_logger = logger

    def has_reached_validation_target(self, eval_result: dict[str, float]) -> bool:
        return self._reached(eval_result, "validation", self.validation_target_value)

    def has_reached_test_target(self, eval_result: dict[str, float]) -> bool:
        return self._reached(eval_result, "test", self.test_target_value)

    def _reached(self, eval_result: dict[str, float], split: str, target: float) -> bool:
        return bool(eval_result[f"{split}/{self.target_metric_name}"] >= target)

    def init_model_fn(self, rng: Any) -> tuple[nn.Module, None]:
        """A new model on the device, from the first word of ``rng`` alone (as AlgoPerf)."""
        with _seeded(seed_words(rng)[0], torch.device("cpu")):
            model = self._new_model()
        return model.to(self.device), None

    def model_fn(
        self,
        params: nn.Module,
        augmented_and_preprocessed_input_batch: Batch,
        model_state: None,
        mode: Any,
        rng: Any,
        update_batch_norm: bool,
        dropout_rate: float | None = None,
    ) -> tuple[Tensor, None]:
        """Logits of a batch, and None for the model state, which no workload here has.

        Args:
          mode: ``ForwardPassMode.TRAIN``, or EVAL: no gradients and no dropout.
          dropout_rate: None is AlgoPerf's default, 0.1 on OGBG and 0 elsewhere: a submission that
            wants none must say so.
        """
        del model_state, update_batch_norm
        model, batch = params, augmented_and_preprocessed_input_batch
        if mode.name == "EVAL":
            model.eval()
            with torch.no_grad():
                return self._forward(model, batch, 0.0), None
        model.train()
        rate = self.default_dropout_rate if dropout_rate is None else dropout_rate
        if not rate:
            return self._forward(model, batch, 0.0), None
        # Dropout follows ``rng``, not torch's global state: a resumed run repeats to the bit.
        first, *rest = seed_words(rng)
        with _seeded(first << 32 | (rest[0] if rest else 0), self.device):
            return self._forward(model, batch, rate), None

    def _build_input_queue(
        self,
        data_rng: Any,
        split: str,
        data_dir: str | Path | None,
        global_batch_size: int,
        cache: bool | None = None,
        repeat_final_dataset: bool | None = None,
        num_batches: int | None = None,
    ) -> Iterator[Batch]:
        """Batches of a split, tensors on the device.

        "train" is endless and can ``skip(n)``; "eval_train", "validation" and "test" are one pass
        in a fixed order, repeated if ``repeat_final_dataset``.

        Raises:
          UserError: full size (its data pipeline is AlgoPerf's), unknown split, missing or broken
            data.
        """
        del cache  # everything is in memory already
        if not self.is_mini:
            raise UserError(
                f"{self.name}: full-size training runs under AlgoPerf's own harness, which owns "
                "its data pipeline; use HARNESS=algoperf, or SIZE=mini here"
            )
        if split != "train" and split not in EVAL_SPLITS:
            known = ", ".join(("train", *EVAL_SPLITS))
            raise UserError(f"{self.name}: unknown split {split!r}; there are {known}")
        available, make_batch = self._open_split(split, data_dir, data_rng)
        if split == "train":
            return TrainQueue(available, global_batch_size, data_rng, make_batch)
        wanted = getattr(self, f"num_{split}_examples")
        batches = evaluation_batches(wanted, available, global_batch_size, make_batch)
        if num_batches is not None:
            batches = itertools.islice(batches, num_batches)
        return itertools.cycle(batches) if repeat_final_dataset else batches

    def _check_count(self, split: str, found: int) -> int:
        """Raises UserError unless the data has as many examples as the configuration says."""
        key = f"num_{split}_examples"
        if found != getattr(self, key):
            raise UserError(
                f"{self.config.source}: mini.{key} is {getattr(self, key)}; the data has {found}"
            )
        return found

    def eval_model(
        self,
        global_eval_batch_size: int,
        params: nn.Module,
        model_state: Any,
        rng: Any,
        data_dir: str | Path | None,
        imagenet_v2_data_dir: str | Path | None,
        global_step: int,
    ) -> dict[str, float]:
        """Metric and loss on part of the training data, on validation and on test data.

        Returns AlgoPerf's keys: train/, validation/ and test/ with the metric and "loss", and
        validation/num_examples and test/num_examples.
        """
        del model_state, imagenet_v2_data_dir, global_step
        results: dict[str, float] = {}
        for split, prefix in zip(EVAL_SPLITS, ("train", "validation", "test"), strict=True):
            key = (split, global_eval_batch_size, None if data_dir is None else str(data_dir))
            if key not in self._eval_batches:
                self._eval_batches[key] = list(
                    self._build_input_queue(rng, split, data_dir, global_eval_batch_size)
                )
            found = self._evaluate(params, self._eval_batches[key], rng)
            results.update({f"{prefix}/{name}": value for name, value in found.items()})
            if split != "eval_train":
                results[f"{prefix}/num_examples"] = getattr(self, f"num_{split}_examples")
        return results

    def _evaluated(self, model: nn.Module, batch: Batch, rng: Any) -> Tensor:
        """The logits of a batch of an evaluation."""
        return self.model_fn(model, batch, None, ForwardPassMode.EVAL, rng, False)[0]

    def _mean_over_examples(
        self,
        model: nn.Module,
        batches: list[Batch],
        score: Callable[[Tensor, Batch], Tensor],
        rng: Any,
    ) -> dict[str, float]:
        """Averages ``score`` (one number an example) and the loss over all examples.

        An output that is not finite makes both NaN.
        """
        total, loss, count = 0.0, 0.0, 0
        for batch in batches:
            logits = self._evaluated(model, batch, rng)
            total += float(score(logits, batch).sum())
            per_example = self.loss_fn(batch["targets"], logits)["per_example"]
            loss += float(metrics.where_finite(per_example, logits).sum())
            count += len(logits)
        return {self.target_metric_name: total / count, "loss": loss / count}

    def _masked(self, per_example: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        """Applies a mask [B] to losses [B] and sums them."""
        if mask is None:
            count = torch.tensor(len(per_example), device=per_example.device)
        else:
            per_example = per_example * mask
            count = mask.sum()
        return {"summed": per_example.sum(), "n_valid_examples": count, "per_example": per_example}

    def _torch_generator(self, rng: Any) -> torch.Generator:
        seed = int(generator(rng).integers(2**63))
        return torch.Generator().manual_seed(seed)

    def _complain(self, key: str, value: Any, wanted: str) -> UserError:
        size = "mini" if self.is_mini else "full"
        return UserError(f"{self.config.source}: {size}.{key} is {value!r}; {wanted}")
