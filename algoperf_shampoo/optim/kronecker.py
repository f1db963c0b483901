"""The optimizer: one step loop for the whole family. ``step`` is the whole algorithm."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from . import gpu, state
from .arithmetic import Arithmetic, Hyper
from .blocking import Block, cut
from .buckets import Layout, Stack
from .eigen.solvers import Solver
from .eigenbasis import FactorSet, build_factor_sets, refresh
from .gpu.graphs import Recorder, Run, direct
from .gpu.grouped import Grouped
from .precision import MATMUL_PRECISIONS, matmul_precision
from .preconditioners import Adam, EShampoo, GraftedShampoo, Rule


@dataclass
class Group:
    """One parameter group laid out in stacks: which rule takes which, and all their factors.

    recorder: on one GPU, runs steps in which all parameters take part; grouped: computes them,
    where our kernels work, and ``by_torch`` all others.
    """

    layout: Layout
    rules: list[tuple[Rule, list[Stack]]]
    factor_sets: list[FactorSet]
    recorder: Recorder | None
    grouped: Grouped | None
    by_torch: Arithmetic


class Kronecker(torch.optim.Optimizer):
    """Shampoo-family optimizer with one rule; the named variants below choose the rule.

    Parameters are merged and cut into blocks (:mod:`.blocking`), blocks of one shape are stacked
    (:mod:`.buckets`), and everything runs batched on stacks. State is float32 (float64 for float64
    parameters). Parameters without a gradient are skipped and keep their own step count; from then
    on steps go by torch's operations stack by stack, several times slower on a GPU than by our
    kernels, which want all blocks to have the same count.

    Args:
        params: parameters or groups. Groups may differ in lr, betas, eps, weight_decay and nadam.
        rule: the preconditioner of blocks with factors.
        lr: alpha in the paper.
        betas: (beta1, beta2): of the gradient's average, and of all second-moment statistics.
        eps: epsilon added to sqrt(D).
        weight_decay: lambda, decoupled: W <- W - lr * (U + weight_decay * W).
        nadam: numerator beta1 M + (1 - beta1) G.
        precondition_frequency: F, steps between checks of a block's factors.
        tau: threshold of Eq. 11 in [0, 1); 0 refreshes at every check.
        max_preconditioner_dim: larger dimensions are cut.
        one_dim: "full" for full-matrix Adam on 1-D blocks, "adam" for Adam.
        matmul_precision: of the rotations on a GPU, "highest" (accurate to float32) or "high"
            (inputs rounded to 11 bits, as in TF32); Grams and criterion are always accurate to
            float32.
        solver: how factors are decomposed.
        cuda_graph: on a GPU, replay steps with all gradients there as recorded graphs; see
            :mod:`.graphs`.
        process_group: set when the processes of the group hold replicas that see equal gradients.

    Raises:
        ValueError: a hyperparameter out of range (named, with its range), or an empty, sparse or
            complex parameter.
    """

    def __init__(
        self,
        params: ParamsT,
        rule: Rule,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        nadam: bool = False,
        precondition_frequency: int = 100,
        tau: float = 0.0,
        max_preconditioner_dim: int = 1024,
        one_dim: str = "full",
        matmul_precision: str = "highest",
        solver: Solver | None = None,
        cuda_graph: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        frequency = precondition_frequency
        if not isinstance(frequency, int) or isinstance(frequency, bool) or frequency < 1:
            raise ValueError(f"precondition_frequency must be an integer >= 1, got {frequency!r}")
        if not 0 <= tau < 1:
            raise ValueError(f"tau must be in [0, 1), got {tau!r}")
        if one_dim not in ("full", "adam"):
            raise ValueError(f'one_dim must be "full" or "adam", got {one_dim!r}')
        if matmul_precision not in MATMUL_PRECISIONS:
            known = ", ".join(MATMUL_PRECISIONS)
            raise ValueError(f"matmul_precision must be one of {known}, got {matmul_precision!r}")
        self.rule = rule
        self._adam = Adam()
        self.precondition_frequency = frequency
        self.tau = tau
        self.max_preconditioner_dim = max_preconditioner_dim
        self.one_dim = one_dim
        self.matmul_precision = matmul_precision
        self.solver = solver or Solver()
        self.cuda_graph = cuda_graph
        self.process_group = process_group
        self._groups: list[Group] = []
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, nadam=nadam)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_group(group)
        layout = Layout(group["params"], self._blocks)
        by_rule: dict[int, tuple[Rule, list[Stack]]] = {}
        for stack in layout.stacks:
            rule = self._rule_for(stack.shape)
            by_rule.setdefault(id(rule), (rule, []))[1].append(stack)
        rules = list(by_rule.values())
        sets = build_factor_sets([s for rule, mine in rules if rule.has_factors for s in mine])
        (device, dtype), *others = {(s.device, s.dtype) for s in layout.stacks}
        one_gpu = device.type == "cuda" and not others
        ours = one_gpu and gpu.multiplies(dtype, device)
        layout.allocate(self.rule.moments, scratch=self.rule.has_factors)
        recorder = Recorder(device, self.cuda_graph) if one_gpu else None
        grouped = Grouped(layout.stacks) if ours else None
        self._groups.append(Group(layout, rules, sets, recorder, grouped, Arithmetic()))

    def _blocks(self, param: Tensor) -> list[Block]:
        return cut(tuple(param.shape), self.max_preconditioner_dim)

    def _rule_for(self, shape: tuple[int, ...]) -> Rule:
        # A 1x1 factor has one direction: every rule of the family is Adam there.
        plain = shape == (1,) or (len(shape) == 1 and self.one_dim == "adam")
        return self._adam if plain else self.rule

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the parameters that have gradients.

        No host synchronisation unless a check is due (t mod F = 0): then one read for all factors,
        and more only where factors are refreshed.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for settings, group in zip(self.param_groups, self._groups, strict=True):
            self._step_group(settings, group)
        return loss

    def _step_group(self, settings: dict[str, Any], group: Group) -> None:
        layout = group.layout
        present = layout.gather()  # first, so that the device has work during the bookkeeping
        if not any(present):
            return
        everyone = all(present)
        rows = {id(s): s.rows(None if everyone else present) for s in layout.stacks}
        for stack in layout.stacks:
            stack.count(rows[id(stack)])
        with_factors = [s for rule, stacks in group.rules if rule.has_factors for s in stacks]
        due = {id(s): s.due(rows[id(s)], self.precondition_frequency) for s in with_factors}
        h = self._hyper(settings)
        run: Run = direct
        arithmetic = group.by_torch
        if group.recorder is not None and everyone and _in_step(layout):
            h, run = group.recorder.begin(layout, h)
            arithmetic = group.grouped or arithmetic
        statistics = functools.partial(self._statistics, group, rows, h, arithmetic)
        update = functools.partial(self._update, group, rows, present, h, arithmetic)
        if not with_factors:
            run("update", update)
        elif self.rule.statistics_first:
            run("statistics", statistics)
            self._refresh(group, due, h, arithmetic, run)
            run("update", update)
        else:
            run("update", update)
            layout.gather()
            run("statistics", statistics)
            self._refresh(group, due, h, arithmetic, run)

    def _statistics(
        self, group: Group, rows: dict[int, list[int]], h: Hyper, arithmetic: Arithmetic
    ) -> None:
        """The factors learn the gradients."""
        arithmetic.gradients_came(group.layout.stacks)
        with matmul_precision("highest"):
            for rule, stacks in _taking_part(group, rows):
                if rule.has_factors:
                    with _parts(stacks, rows) as parts:
                        rule.accumulate(parts, h, arithmetic)

    def _update(
        self,
        group: Group,
        rows: dict[int, list[int]],
        present: list[bool],
        h: Hyper,
        arithmetic: Arithmetic,
    ) -> None:
        """Update directions from gathered gradients, and the parameters from those."""
        if not self.rule.statistics_first:
            arithmetic.gradients_came(group.layout.stacks)
        with matmul_precision(h.matmul_precision):
            for rule, stacks in _taking_part(group, rows):
                with _parts(stacks, rows) as parts:
                    rule.update(parts, h, arithmetic)
        group.layout.apply(present, h.lr, h.weight_decay)

    def _refresh(
        self,
        group: Group,
        due: dict[int, list[int]],
        h: Hyper,
        arithmetic: Arithmetic,
        run: Run,
    ) -> None:
        """Check the factors that are due, and bring back the gradients if the update needs them."""
        if not any(due.values()):
            return
        overwritten = refresh(
            group.factor_sets,
            due,
            self.rule,
            h.beta2,
            self.tau,
            self.solver,
            arithmetic,
            group.layout.lent,
            self.process_group,
            run,
        )
        if overwritten and self.rule.statistics_first:
            group.layout.gather()

    def _hyper(self, settings: dict[str, Any]) -> Hyper:
        beta1, beta2 = settings["betas"]
        return Hyper(
            float(settings["lr"]),
            beta1,
            beta2,
            settings["eps"],
            settings["weight_decay"],
            settings["nadam"],
            self.matmul_precision,
        )

    def state_dict(self) -> dict[str, Any]:
        """Canonical: per parameter and per block, independent of stacking, device and back end.

        {"state": {i: {"step": t, "blocks": [{"start", "shape", "ready", name: tensor, ...}]}},
        "param_groups": [...]}, parameters numbered as torch does. Moments are copies,
        factors and operators views of the live state: copy them if you step on.
        """
        return state.pack(self.param_groups, [(g.layout, g.factor_sets) for g in self._groups])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, to the bit.

        Raises:
            ValueError: other parameters, shapes or blocks than this optimizer's, or a tensor is
                missing; nothing has been changed then.
        """
        layouts = [(g.layout, g.factor_sets) for g in self._groups]
        state.unpack(state_dict, self.param_groups, layouts)

    def factor_sets(self) -> Iterable[FactorSet]:
        """All factor sets, for telemetry and tests."""
        for group in self._groups:
            yield from group.factor_sets


def _in_step(layout: Layout) -> bool:
    """Whether all blocks have the same step count."""
    step = layout.stacks[0].steps[0]
    return all(s.uniform and s.steps[0] == step for s in layout.stacks)


def _taking_part(group: Group, rows: dict[int, list[int]]) -> Iterator[tuple[Rule, list[Stack]]]:
    """Each rule with those of its stacks that have rows taking part."""
    for rule, stacks in group.rules:
        if here := [s for s in stacks if rows[id(s)]]:
            yield rule, here


@contextlib.contextmanager
def _parts(stacks: list[Stack], rows: dict[int, list[int]]) -> Iterator[list[Stack]]:
    """The stacks reduced to the rows that take part; what was copied is written back."""
    parts = [s if len(rows[id(s)]) == len(s) else s.select(rows[id(s)]) for s in stacks]
    yield parts
    for stack, part in zip(stacks, parts, strict=True):
        if part is not stack:
            stack.put(rows[id(stack)], part)


def _check_group(group: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    for name, value, good, wanted in (
        ("lr", group["lr"], float(group["lr"]) >= 0, ">= 0"),
        ("beta1", beta1, 0 <= beta1 < 1, "in [0, 1)"),
        ("beta2", beta2, 0 <= beta2 < 1, "in [0, 1)"),
        ("eps", group["eps"], group["eps"] >= 0, ">= 0"),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0, ">= 0"),
    ):
        if not good:
            raise ValueError(f"{name} must be {wanted}, got {value!r}")


def eshampoo(params: ParamsT, **settings: Any) -> Kronecker:
    """EShampoo (Algorithm 2). tau = 0: fixed frequency F; tau > 0: adaptive, checked every F
    steps."""
    return Kronecker(params, EShampoo(), **settings)


def shampoo_grafting(
    params: ParamsT,
    *,
    eps: float = 1e-8,
    grafting_eps: float = 1e-8,
    exponent_multiplier: float = 1.0,
    **settings: Any,
) -> Kronecker:
    """Shampoo with Adam grafting (Algorithm 3); eps is added to the factors' eigenvalues."""
    rule = GraftedShampoo(eps, grafting_eps, exponent_multiplier)
    return Kronecker(params, rule, eps=grafting_eps, **settings)


def adamw(params: ParamsT, **settings: Any) -> Kronecker:
    """AdamW, or with nadam=True AlgoPerf's NAdamW: the baseline, on the same step loop."""
    return Kronecker(params, Adam(), **settings)
