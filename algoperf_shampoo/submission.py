"""AlgoPerf's submission functions, written once for every variant.

A submission module says which optimizer it is and hands out the bound methods of one
:class:`Submission`. The same file runs under AlgoPerf's ``submission_runner.py`` and under the
embedded harness: everything that differs between the two is asked of the objects they pass in.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from . import batch_sizes, factor_log, points, repeatable
from .contract import ForwardPassMode
from .optim import PreconditionedOptimizer
from .optim.telemetry import COLUMNS, Telemetry, describe

log = logging.getLogger(__name__)

# Set to "replay" to read past the batches that were used before a run under AlgoPerf's harness was
# resumed (exact continuation, but on the clock); by default the input pipeline starts over.
RESUME_DATA = "SHAMPOO_RESUME_DATA"
# Checks of factors that are written down in a run of the whole schedule, at most.
SAMPLES = 100

MakeOptimizer = Callable[
    [list[torch.nn.Parameter], Any, "dist.ProcessGroup | None"], PreconditionedOptimizer
]


def common_settings(point: Any) -> dict[str, Any]:
    """The optimizer arguments that every variant takes from its point, checked and completed;
    nadam where it is a field of the variant's."""
    settings = {
        "lr": point.learning_rate,
        "betas": (1.0 - point.one_minus_beta1, 1.0 - point.one_minus_beta2),
        "eps": point.epsilon,
        "weight_decay": point.weight_decay,
        "nonfinite_gradients": point.nonfinite_gradients,
        "nonfinite_limit": point.nonfinite_limit,
    }
    return settings | ({"nadam": point.use_nadam} if hasattr(point, "use_nadam") else {})


def kronecker_settings(point: Any) -> dict[str, Any]:
    """:func:`common_settings` and what the variants with Kronecker factors take besides; the solver
    where it is a field of the variant's."""
    settings = {
        **common_settings(point),
        "precondition_frequency": point.precondition_frequency,
        "max_preconditioner_dim": point.max_preconditioner_dim,
        "one_dim": point.one_dim,
        "matmul_precision": point.matmul_precision,
        "small_matrices": point.small_matrices,
        "eigen_workspace_mib": point.eigen_workspace_mib,
        "sharding": point.sharding,
    }
    return settings | ({"eigensolver": point.eigensolver} if hasattr(point, "eigensolver") else {})


def eshampoo_settings(point: Any) -> dict[str, Any]:
    """:func:`kronecker_settings` and what EShampoo takes besides."""
    return {
        **kronecker_settings(point),
        "noise_directions": point.noise_directions,
        "noise_level": point.noise_level,
        **grafting_settings(point),
        "beta3": None if point.one_minus_beta3 == "beta2" else 1.0 - point.one_minus_beta3,
        "basis_aware": point.basis_aware,
        "tau_later": getattr(point, "tau_later", 0.0),
    }


def grafting_settings(point: Any) -> dict[str, Any]:
    """Of the variants that may be grafted or not."""
    return {
        "grafting": None if point.grafting == "none" else point.grafting,
        "grafting_eps": point.grafting_epsilon,
    }


def warmup_cosine(step: int, warmup_steps: int, total_steps: float) -> float:
    """Factor of the learning rate: linear from 1e-10 to 1 over ``warmup_steps``, then cosine to 0.

    0 past ``total_steps`` (the 2024 submission's scheduler rises again there).
    """
    if step < warmup_steps:
        return 1e-10 + (1 - 1e-10) * step / warmup_steps
    done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Monitor:
    """Training loss since the last evaluation, kept on the device, and the batches drawn so far.

    Logging inside update_params is on the benchmark's clock, so nothing is read or written
    before prepare_for_eval. The factors' telemetry, which is more, is read off the clock: where
    the embedded harness flushes its tables; under AlgoPerf's in :meth:`state_dict`, which that
    calls on rank 0 when it saves a checkpoint after an evaluation.

    Args:
        telemetry: of the optimizer's factors, if they are watched.
        file: of its rows under AlgoPerf's harness.
    """

    def __init__(
        self, telemetry: Telemetry | None = None, file: factor_log.FactorLog | None = None
    ) -> None:
        self.telemetry, self.file = telemetry, file
        self.batches = 0
        self.resumed_here = False  # batches were drawn by an earlier process
        self.unsettled = False  # so were steps, and this process has made none
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, loss: Tensor) -> None:
        loss = loss.detach().float()
        # A state may have been loaded onto another device.
        self._sum = loss.clone() if self._sum is None else self._sum.to(loss.device).add_(loss)
        self._count += 1

    def flush(self) -> dict[str, float]:
        """Mean loss since the last flush; {} when there was no step."""
        if self._sum is None:
            return {}
        mean = self._sum.item() / self._count
        self._sum, self._count = None, 0
        return {"loss": mean}

    def state_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = {"batches": self.batches, "sum": self._sum, "count": self._count}
        if self.telemetry is not None:
            if self.file is not None:
                self.file.append(self.telemetry.rows())
                state[factor_log.NAME] = self.file.content
            state["telemetry"] = self.telemetry.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.batches, self._sum, self._count = state["batches"], state["sum"], state["count"]
        self.resumed_here = self.unsettled = True
        if self.telemetry is not None and "telemetry" in state:
            self.telemetry.load_state_dict(state["telemetry"])
        if self.file is not None:
            self.file.replace(state.get(factor_log.NAME, ""))


class Submission:
    """AlgoPerf's functions for one optimizer; hand out the methods as a module's functions.

    Args:
        make_optimizer: (parameters, point, process group or None) -> optimizer. The point is
            checked, and has every field of ``fields``. The process group is given when several
            processes hold replicas.
        fields: groups and names of the fields it reads; see :mod:`.points`.
        built_in: the point of a self-tuning submission, which AlgoPerf hands none.
    """

    def __init__(
        self,
        make_optimizer: MakeOptimizer,
        fields: Sequence[str],
        built_in: Mapping[str, Any] | None = None,
    ) -> None:
        self.make_optimizer = make_optimizer
        self.fields = tuple(fields)
        self.built_in = built_in
        self._last: tuple[Any, Any] = (None, None)

    def point(self, hyperparameters: Any) -> Any:
        """``hyperparameters``, or the point built in, checked and completed.

        Raises:
            ValueError: a field is unknown, missing or out of range, or there are two points; one
                line names it.
        """
        if self.built_in is not None and hyperparameters is not None:
            raise points.PointError(
                "this submission has its point built in and takes no other: run it with "
                "--tuning_ruleset=self and without a search space"
            )
        # AlgoPerf hands over the same object at every step.
        if self._last[1] is None or self._last[0] is not hyperparameters:
            given = hyperparameters if self.built_in is None else self.built_in
            self._last = hyperparameters, points.complete(given, self.fields)
        return self._last[1]

    @staticmethod
    def get_batch_size(workload_name: str) -> int:
        """Global batch size.

        Raises:
            ValueError: unknown workload (AlgoPerf then asks again with the base workload's name).
        """
        return batch_sizes.of(workload_name)

    def init_optimizer_state(
        self,
        workload: Any,
        model_params: torch.nn.Module,
        model_state: Any,
        hyperparameters: Any,
        rng: Any,
    ) -> dict[str, Any]:
        """Optimizer, scheduler and monitor: every entry has state_dict and load_state_dict, because
        AlgoPerf's restore fails on entries that have not.

        Raises:
            ValueError: see :meth:`point`.
        """
        point = self.point(hyperparameters)
        repeatable.set_up()
        if hasattr(point, "sharding") and _flag("skip_evals", False) and _checkpoint_follows():
            # AlgoPerf saves one at the end, on rank 0 alone: nobody calls prepare_for_eval first.
            point = point._replace(sharding="off")
        optimizer = self.make_optimizer(list(model_params.parameters()), point, _process_group())
        total = point.step_hint_factor * workload.step_hint
        for name in ("tau_switch", "freeze_after"):
            if getattr(point, name, 1.0) < 1:  # shares of the schedule
                for group in optimizer.param_groups:
                    group[name] = int(getattr(point, name) * total)
        warmup = int(point.warmup_factor * total)
        scheduler = LambdaLR(optimizer, lambda step: warmup_cosine(step, warmup, total))
        monitor = Monitor(*_watch(optimizer, model_params, total))
        return {"optimizer": optimizer, "scheduler": scheduler, "monitor": monitor}

    def update_params(
        self,
        workload: Any,
        current_param_container: torch.nn.Module,
        current_params_types: Any,
        model_state: Any,
        hyperparameters: Any,
        batch: dict[str, Any],
        loss_type: Any,
        optimizer_state: dict[str, Any],
        eval_results: list[tuple[int, Any]],
        global_step: int,
        rng: Any,
        train_state: Mapping[str, Any] | None = None,
    ) -> tuple[dict[str, Any], torch.nn.Module, Any]:
        """One training step; returns (optimizer_state, model, model_state)."""
        point = self.point(hyperparameters)
        model = _ensure_ddp(current_param_container)
        model.train()
        optimizer, monitor = optimizer_state["optimizer"], optimizer_state["monitor"]
        optimizer.zero_grad(set_to_none=True)
        options = {}
        if "dropout_rate" in inspect.signature(workload.model_fn).parameters:
            # Left out, the workload's own default applies silently (0.1 for OGBG).
            options["dropout_rate"] = point.dropout_rate

        def backward() -> tuple[Tensor, Any]:
            """The loss, with gradients in place, and the new model_state."""
            logits, new_state = workload.model_fn(
                params=model,
                augmented_and_preprocessed_input_batch=batch,
                model_state=model_state,
                mode=_train_mode(),
                rng=rng,
                update_batch_norm=True,
                **options,
            )
            result = workload.loss_fn(
                label_batch=batch["targets"],
                logits_batch=logits,
                mask_batch=batch.get("weights"),
                label_smoothing=point.label_smoothing,
            )
            loss = _global_mean(result["summed"], result["n_valid_examples"])
            loss.backward()
            return loss, new_state

        if monitor.unsettled:
            monitor.unsettled = False
            if repeatable.buckets_matter(model):
                repeatable.throw_away(model, backward)
        loss, model_state = backward()
        optimizer.step()
        optimizer_state["scheduler"].step()
        monitor.add(loss)
        return optimizer_state, model, model_state

    def prepare_for_eval(
        self,
        workload: Any,
        current_param_container: torch.nn.Module,
        current_params_types: Any,
        model_state: Any,
        hyperparameters: Any,
        loss_type: Any,
        optimizer_state: dict[str, Any],
        eval_results: list[tuple[int, Any]],
        global_step: int,
        rng: Any,
    ) -> tuple[dict[str, Any], torch.nn.Module, Any]:
        """Write what the monitor and the optimizer gathered since the last evaluation.

        Raises:
            NonFiniteGradientError: gradients that are not finite, too many in a row.
        """
        optimizer = optimizer_state["optimizer"]
        metrics = optimizer_state["monitor"].flush()
        metrics["learning_rate"] = float(optimizer.param_groups[0]["lr"])
        if _checkpoint_follows():  # written by rank 0 alone
            optimizer.gather_state(to=0)
        else:
            optimizer.gather_counters()
        if optimizer.rule.has_factors:
            sets = list(optimizer.factor_sets(everywhere=True))
            for name in ("checks", "refreshes", "failures"):
                metrics[f"eigenbasis_{name}"] = sum(sum(getattr(s, name)) for s in sets)
            metrics |= _by_kind(sets)
        if optimizer.process_group is not None:
            unequal, parted = optimizer.replicas_differ()
            metrics["replicas_unequal_gradients"], metrics["replicas_differ"] = unequal, int(parted)
            if unequal or parted:
                log.warning(
                    "step %d: gradients of the processes differed at %d checks, and their "
                    "parameters %s: this run trains several models",
                    global_step, unequal, "differ" if parted else "are equal",
                )  # fmt: skip
        skipped = optimizer.skipped_gradients()
        metrics["gradients_skipped"] = sum(count.total for count in skipped.values())
        in_a_row = [count.in_a_row for count in skipped.values()]
        metrics["gradients_skipped_in_a_row"] = max(in_a_row, default=0)
        logger = getattr(workload, "metrics_logger", None)
        if logger is not None:  # None off rank 0
            logger.append_scalar_metrics(metrics, global_step)
            log.info("step %d: %s", global_step, metrics)
        if (telemetry := optimizer.telemetry) is not None:
            telemetry.gather(_process_group())
            if logger is not None and hasattr(logger, "append_rows"):  # the embedded harness's
                logger.append_rows(factor_log.NAME, telemetry.rows)
        optimizer.check_gradients()
        return optimizer_state, current_param_container, model_state

    @staticmethod
    def data_selection(
        workload: Any,
        input_queue: Iterator[dict[str, Any]],
        optimizer_state: dict[str, Any],
        current_param_container: torch.nn.Module,
        model_state: Any,
        hyperparameters: Any,
        global_step: int,
        rng: Any,
    ) -> dict[str, Any]:
        """The next batch. After a resume the position in the data is the harness's affair if its
        queue can skip; AlgoPerf's cannot, see RESUME_DATA."""
        monitor = optimizer_state["monitor"]
        if monitor.resumed_here and not hasattr(input_queue, "skip"):
            if os.environ.get(RESUME_DATA) == "replay":
                log.warning("resumed: reading past %d batches, on the clock", monitor.batches)
                for _ in range(monitor.batches):
                    next(input_queue)
            else:
                log.warning(
                    "resumed at step %d, but the input pipeline starts over at its first batch; "
                    "set %s=replay for the exact continuation",
                    global_step,
                    RESUME_DATA,
                )
        monitor.resumed_here = False
        monitor.batches += 1
        return next(input_queue)


def _by_kind(sets: Sequence[Any]) -> dict[str, int]:
    """Checks and refreshes so far by kind of factor: of 1-D blocks (the paper's A), of the first
    dimension of others (its L), and of their last (its R)."""
    counts: dict[str, int] = {}
    for factors in sets:
        for span in factors.spans:
            order, rows = len(span.stack.shape), slice(span.start, span.start + len(span.stack))
            kind = "one_dim" if order == 1 else {0: "left", order - 1: "right"}.get(span.mode)
            for name in ("checks", "refreshes") if kind else ():
                key = f"eigenbasis_{name}_{kind}"
                counts[key] = counts.get(key, 0) + sum(getattr(factors, name)[rows])
    return counts


def _train_mode() -> Any:
    """ForwardPassMode.TRAIN of the harness at work: AlgoPerf's once it has been imported."""
    return getattr(sys.modules.get("algoperf.spec"), "ForwardPassMode", ForwardPassMode).TRAIN


def _watch(
    optimizer: PreconditionedOptimizer, model: torch.nn.Module, total_steps: float
) -> tuple[Telemetry | None, factor_log.FactorLog | None]:
    """Watch the optimizer's factors, where that is wanted and there are any.

    Raises:
        ValueError: what the environment says is neither "off" nor a folder.
    """
    variable = factor_log.VARIABLE
    asked = os.environ.get(variable, "")
    if asked not in ("", "off") and not Path(asked).is_dir():
        raise points.PointError(f'{variable}={asked}: it must be "off", or a folder that is there')
    under_algoperf = "algoperf.spec" in sys.modules
    wanted = asked != "off" and (asked or not under_algoperf)
    # Asked of the rule, whose answer is that of every rank: all of them gather, or none.
    if not wanted or not optimizer.rule.has_factors:
        return None, None
    every = max(1, math.ceil(total_steps / SAMPLES))
    optimizer.telemetry = Telemetry(optimizer, describe(model), every)
    if not under_algoperf or (_process_group() and dist.get_rank()):
        return optimizer.telemetry, None
    return optimizer.telemetry, factor_log.FactorLog(Path(asked), COLUMNS)


def _checkpoint_follows() -> bool:
    """Whether the harness saves a checkpoint after an evaluation: AlgoPerf's may be told not to."""
    return _flag("save_checkpoints", True)


def _flag(name: str, default: bool) -> bool:
    """Of AlgoPerf's harness."""
    flags = getattr(sys.modules.get("absl.flags"), "FLAGS", None)
    if flags is None or not flags.is_parsed():
        return default
    return bool(getattr(flags, name, default))


def _process_group() -> dist.ProcessGroup | None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return dist.group.WORLD
    return None


def _ensure_ddp(model: torch.nn.Module) -> torch.nn.Module:
    """Wrap a bare module in DDP when several processes train it.

    AlgoPerf's restore hands back the module without its wrapper, and gradients would silently stop
    syncing. The parameters stay the same objects, so the optimizer goes on with them.
    """
    if _process_group() is None:
        return model
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, DistributedDataParallel):
        return model
    log.warning("the model came without DistributedDataParallel (resumed?); wrapping it again")
    device = next(model.parameters()).device
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def _global_mean(summed: Tensor, count: Any) -> Tensor:
    """Mean loss over the global batch, such that DDP's mean of gradients is its gradient.

    The valid examples of all processes are counted (they differ on OGBG), and the local sum is
    multiplied by the number of processes that DDP will divide by.
    """
    group = _process_group()
    if group is None:
        return summed / count
    total = torch.as_tensor(count, dtype=summed.dtype, device=summed.device).clone()
    dist.all_reduce(total, group=group)
    return summed * dist.get_world_size(group) / total
