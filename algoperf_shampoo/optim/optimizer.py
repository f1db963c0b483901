"""The optimizer: one step loop for the whole family. ``step`` is the whole algorithm."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.optim.optimizer import ParamsT

from . import settings
from .blocks import costs
from .blocks.layout import Stack
from .eigen.solver import Solver
from .group import Group, lay_out
from .journal import Journal, Run, directly_run
from .ops import Hyper, Operations, State
from .ops.linalg import matmul_precision
from .options import Sharding
from .refresh import refresh
from .reports import Reports
from .rule import Rule
from .sharding import CHOICES, Comparison, exchange, roomier
from .step import begin, by_tau, starting
from .telemetry import Telemetry

T = TypeVar("T")


@dataclass
class Step:
    """What the phases of one group's step share.

    Attributes:
        number, options, group: which group.
        h: hyperparameters.
        present: which parameters have a gradient; fit: those among them that learn.
        rows: id(stack) -> rows that learn; due: id(stack) -> rows whose factors are checked, of
            other ranks' stacks too: all ranks know of every check.
        ops, run: what computes, and what runs or replays its sections.
        gathered: whether ``g`` holds the gradients.
        worst: the most bad gradients in a row, where that was looked at.
        checked: whether replicas compare gradients.
    """

    number: int
    options: dict[str, Any]
    group: Group
    h: Hyper
    present: list[bool]
    fit: list[bool]
    rows: dict[int, list[int]]
    due: dict[int, list[int]]
    ops: Operations
    run: Run
    gathered: bool
    worst: int = 0
    checked: bool = False

    def gather_again(self) -> None:
        """Gradients into ``g``, where something else is."""
        if not self.gathered:
            layout = self.group.layout
            layout.gather()
            self.ops.gradients_gathered(layout.stacks, layout.measured)
            self.gathered = True


class PreconditionedOptimizer(Reports):
    """Shampoo-family optimizer with one rule, which a class like :class:`.eshampoo.EShampoo` names.

    Parameters are merged and cut into blocks (:mod:`.blocks.partition`), blocks of one shape are
    stacked (:mod:`.blocks.layout`), and everything runs batched on stacks. State is float32
    (float64 for float64 parameters), in ``state`` from construction on (:mod:`.blocks.state_dict`).
    Parameters without a gradient are skipped and keep their own step count; a step in which one is
    missing goes by torch's operations stack by stack, several times slower on a GPU than by our
    kernels.

    Args:
        params: parameters or groups.
        rule: the preconditioner of blocks with factors.
        defaults: the options of groups, see :mod:`.settings`.
        fixed: names of those that are one for all groups.
        solver: how factors are decomposed.
        cuda_graph: on a GPU, replay steps with all gradients there as recorded graphs; see
            :mod:`.gpu.graphs`.
        process_group: set when the processes of the group hold replicas that see equal gradients.
            Every one of them must then take every step.
        sharding: whether these share the work (:mod:`.sharding`): "on", "off", or "auto": if, by
            the shapes, more is saved than gathering the directions takes. Saving then needs
            :meth:`gather_state` on all of them first.

    Raises:
        ValueError: an option out of range (named, with its range), or a parameter that is empty,
            sparse or not of real floating-point numbers (named by its number).
    """

    telemetry: Telemetry | None = None  # watches the factors; copies and pickles are without

    def __init__(
        self,
        params: ParamsT,
        rule: Rule,
        defaults: dict[str, Any],
        *,
        fixed: Sequence[str] = (),
        solver: Solver | None = None,
        cuda_graph: bool = True,
        process_group: dist.ProcessGroup | None = None,
        sharding: Sharding = "off",
    ) -> None:
        if sharding not in CHOICES:
            raise ValueError(f"sharding must be one of {', '.join(CHOICES)}, got {sharding!r}")
        if process_group is not None and dist.get_rank(process_group) < 0:
            raise ValueError("process_group: this process is not one of it")
        defaults = {"rule": type(self).__name__, **defaults}
        settings.check(defaults)
        self.rule = rule
        self.solver = solver or Solver()
        self.cuda_graph = cuda_graph
        self.process_group = process_group
        self.sharding = sharding
        self._comparison = Comparison()
        self._fixed = ("rule", *fixed)
        self._groups: list[Group] = []
        self._journal = Journal()
        self._loss: Any = None
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's; if it is refused, the optimizer is as it was.

        Raises:
            ValueError: as the constructor; or an option that this optimizer does not read, or that
                is one for all groups.
        """
        if isinstance(param_group, dict):
            settings.check_given(param_group, self.defaults, self._fixed)
        number = len(self.param_groups)
        super().add_param_group(param_group)
        try:
            options = self.param_groups[number]
            settings.check(options)
            group = self._lay_out(options)
        except BaseException:
            del self.param_groups[number:]
            raise
        self._groups.append(group)
        self.state.update(zip(options["params"], group.state.entries, strict=True))
        costs.warn(group.layout, options)

    def _lay_out(self, options: dict[str, Any]) -> Group:
        first = sum(len(g.layout.params) for g in self._groups)
        seen = _changeable(options)
        return lay_out(
            options,
            seen,
            self.rule,
            first,
            self._journal,
            self.cuda_graph,
            self.sharding,
            self.process_group,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on the parameters that have gradients.

        No host synchronisation unless a check is due (t mod F = 0): then one read for all factors,
        and more only where factors are refreshed.

        If it fails half-way (a solver's error, no memory), state_dict() refuses until it has been
        called again: with the same gradients it goes on where it stopped, without the closure, and
        ends with the same parameters, to the bit, as a step that did not fail.

        Raises:
            NonFiniteGradientError: see :meth:`check_gradients`; at checks, the step is complete.
            RuntimeError: the step before failed in a way that leaves the state unknown, or it
                failed half-way and these are not its gradients.
        """
        with self._journal.step():
            if closure is not None and not self._journal:
                with torch.enable_grad():
                    self._loss = closure()
            if self._shares:
                self._release()
            # First, so that a device has work during the bookkeeping.
            present = [group.layout.gather() for group in self._groups]
            self._check_options()
            worst = [
                self._step_group(number, here) for number, here in enumerate(present) if any(here)
            ]
        self._comparison.steps += 1
        if self.telemetry is not None:
            self.telemetry.step += 1
        if any(worst):
            self.check_gradients()
        loss, self._loss = self._loss, None
        return loss

    @property
    def _shares(self) -> bool:
        """Whether ranks share the work."""
        return self.process_group is not None and any(g.shard.shared for g in self._groups)

    def _check_options(self) -> None:
        """Refuse options that cannot be stepped with, before anything is changed."""
        for options, group in zip(self.param_groups, self._groups, strict=True):
            then, count = group.options, len(settings.CHANGEABLE.intersection(options))
            if count != len(then) or not then.items() <= options.items():
                now = _changeable(options)
                settings.check(now)
                where = "changed after the group was added"
                names = [n for n in now if n in self._fixed or n in settings.LAYOUT]
                settings.check_same(where, now, then, names)
                group.options = now

    def _step_group(self, number: int, present: list[bool]) -> bool:
        """One group's step, its gradients gathered; whether too many in a row were bad, which is
        looked at at checks.

        present: which parameters have a gradient.
        """
        step = self._prepare(number, present)
        if step is None:
            return False
        if self.rule.statistics_first:
            self._statistics(step)
            if not self.rule.refresh_last:
                self._refresh(step)
            self._update(step)
        else:
            self._update(step)
            self._statistics(step)
        if self.rule.refresh_last or not self.rule.statistics_first:
            self._refresh(step)
        step.group.layout.publish_steps()
        step.group.layout.finish()
        return step.worst >= step.options.get("nonfinite_limit", math.inf)

    def _prepare(self, number: int, present: list[bool]) -> Step | None:
        """Who takes part, and with what; None if nobody does."""
        options, group = self.param_groups[number], self._groups[number]
        layout, guard = group.layout, group.guard
        policy = options.get("nonfinite_gradients", "skip")
        guard.arm(policy)
        bad = guard.look(present) if policy == "skip" else []
        if self._once(number, "gradients", _pair, present, bad) != (present, bad):
            raise RuntimeError(
                "the last step failed half-way, and now other gradients are missing or not "
                "finite; only a step with the same gradients finishes it"
            )
        fit = [here and i not in bad for i, here in enumerate(present)] if bad else present
        h = self._hyper(options)
        if policy == "skip":
            h = h._replace(gradient_square=guard.square)
        gathered = True
        if self.rule.starts and any(late := self._once(number, "late", starting, group, present)):
            self._once(number, "start", self._start, group, late, fit, bad, h)
            present = [here and not starts for here, starts in zip(present, late, strict=True)]
            fit = [here and not starts for here, starts in zip(fit, late, strict=True)]
            bad = [i for i in bad if not late[i]]
            if not any(present):
                return None
            gathered = False
        rows = layout.every_row if all(fit) else {id(s): s.rows(fit) for s in layout.everywhere}
        counted = {id(s): s.rows(present) for s in layout.everywhere} if bad else rows
        self._once(number, "count", _count, group, counted, present, bad)
        frequency = options.get("precondition_frequency", 1)
        with_factors = [s for s in layout.everywhere if s.factors]
        due = {}
        if (t := layout.common_step()) is None or t % frequency == 0:
            due = {id(s): s.due(counted[id(s)], frequency) for s in with_factors}
        if due and (last := options.get("freeze_after")) is not None:
            for s in with_factors:
                due[id(s)] = [r for r in due[id(s)] if s.steps[r] <= last]
        run: Run = directly_run
        ops = group.by_torch
        if group.recorder is not None and all(present):
            h, run = group.recorder.begin(layout, h)
            ops = group.by_kernels or ops
        step = Step(number, options, group, h, present, fit, rows, due, ops, run, gathered)
        compares = self.process_group is not None and self._comparison.due(frequency)
        step.checked = compares and bool(with_factors)
        if gathered:
            ops.gradients_gathered(layout.stacks, layout.measured)
        return step

    def _once(self, number: int, name: str, body: Callable[..., T], *arguments: Any) -> T:
        """A section of a group's step, once."""
        return self._journal.section((number, name), functools.partial(body, *arguments))

    def _start(
        self, group: Group, late: list[bool], fit: list[bool], bad: list[int], h: Hyper
    ) -> None:
        """Of the parameters marked as late, those that are fit start: their factors learn, and are
        decomposed."""
        new = [starts and good for starts, good in zip(late, fit, strict=True)]
        group.by_torch.once(group.guard.count, new, [i for i in bad if late[i]])
        stacks = [s for rule, mine in group.rules if rule.starts for s in mine]
        # Of other ranks' too: every rank knows which start.
        every = [*stacks, *(s for s in group.layout.others if s.factors)]
        rows = {id(s): s.rows(new) for s in every}
        ops = group.by_torch
        ops.judge(group.guard, new)
        for s in every:  # those with bad gradients start another time; the host asks, this once
            bad = s.bad.tolist() if s.bad is not None else [0] * len(s)
            rows[id(s)] = [r for r in rows[id(s)] if not bad[r]]
        ops.begin()
        with matmul_precision("highest"):
            _act(begin, self.rule, stacks, rows, h, ops)
        refresh(
            group.factor_sets,
            rows,
            self.rule,
            h.beta2,
            0.0,
            self.solver.start(),
            ops,
            group.layout.borrowed,
            self._deciding(group),
            mend=h.skip,
            first=True,
            telemetry=self.telemetry,
        )
        for stack in every:
            for row in rows[id(stack)]:
                stack.ready[row] = True
        group.state.publish()

    def _statistics(self, step: Step) -> None:
        """Phase: the factors learn the gradients."""
        if step.group.factor_sets:
            step.gather_again()
            self._once(step.number, "statistics", self._run_statistics, step)

    def _run_statistics(self, step: Step) -> None:
        step.run("statistics", functools.partial(self._learn, step))

    def _learn(self, step: Step) -> None:
        group, ops = step.group, step.ops
        if self.rule.statistics_first:
            ops.judge(group.guard, step.present)
        ops.spare(group.layout.stacks)
        ops.begin()
        with matmul_precision("highest"):
            for rule, stacks in group.rules:
                if rule.has_factors:
                    _act(_accumulate, rule, stacks, step.rows, step.h, ops)

    def _update(self, step: Step) -> None:
        """Phase: update directions from gradients, and the parameters from those."""
        step.gather_again()
        self._once(step.number, "update", self._run_update, step)
        step.gathered = False

    def _run_update(self, step: Step) -> None:
        group, h = step.group, step.h
        apply = functools.partial(group.layout.apply, step.fit, h.lr, h.weight_decay, step.ops.once)
        find = functools.partial(self._find_directions, step)
        if group.layout.ranks == 1:
            step.run("update", functools.partial(_in_turn, find, apply))
            return
        step.run("update", find)
        with self._journal.shared():
            exchange(group.layout, group.shard)
            apply()

    def _find_directions(self, step: Step) -> None:
        group, h, ops = step.group, step.h, step.ops
        if not (self.rule.statistics_first and group.factor_sets):
            ops.judge(group.guard, step.present)
        ops.spare(group.layout.stacks)
        ops.begin(h.matmul_precision)
        with matmul_precision(h.matmul_precision):
            for rule, stacks in group.rules:
                _act(_direction, rule, stacks, step.rows, h, ops)

    def _refresh(self, step: Step) -> None:
        """Phase, when any factor is due: those that fail the check get a new basis."""
        if step.checked and self.process_group is not None:
            step.gather_again()
            # Once: the others do so once.
            arguments = step.group.layout, step.present, self.process_group
            with self._journal.shared():
                self._once(step.number, "compare", self._comparison.gradients, *arguments)
        if any(step.due.values()):
            overwritten, step.worst = self._once(step.number, "refresh", self._check, step)
            step.gathered = step.gathered and not overwritten

    def _check(self, step: Step) -> tuple[bool, int]:
        """Whether the gradients' memory was worked in, and the most bad gradients in a row."""
        group = step.group
        overwritten = [
            refresh(
                group.factor_sets,
                due,
                self.rule,
                step.h.beta2,
                tau,
                roomier(self.solver, group.layout) if self._shares else self.solver,
                step.ops,
                group.layout.borrowed,
                self._deciding(group),
                step.run,
                step.h.skip,
                telemetry=self.telemetry,
            )
            for tau, due in by_tau(step.options, group.with_factors, step.due).items()
        ]
        group.state.publish()
        return any(overwritten), step.ops.once(group.guard.worst)

    def _hyper(self, options: dict[str, Any]) -> Hyper:
        beta1, beta2 = options["betas"]
        return Hyper(
            float(options["lr"]),
            beta1,
            beta2,
            options[self.rule.adam_eps],
            options["weight_decay"],
            options.get("nadam", False),
            options.get("matmul_precision", "highest"),
            skip=options.get("nonfinite_gradients", "skip") == "skip",
            noise_level=options.get("noise_level", 0.0)
            if options.get("noise_directions") == "drop"
            else 0.0,
            beta3=options.get("beta3"),
        )

    def _deciding(self, group: Group) -> dist.ProcessGroup | None:
        """The processes that must decide alike which bases to compute anew."""
        return None if group.shard.shared else self.process_group


def _in_turn(*actions: Callable[[], None]) -> None:
    for action in actions:
        action()


def _pair(present: list[bool], bad: list[int]) -> tuple[list[bool], list[int]]:
    return present, bad


def _changeable(options: dict[str, Any]) -> dict[str, Any]:
    """What must be checked when it has changed: all options but the learning rate."""
    return {name: options[name] for name in settings.OPTIONS if name in options and name != "lr"}


def _count(group: Group, rows: dict[int, list[int]], present: list[bool], bad: list[int]) -> None:
    """One step more for these rows."""
    for stack in group.layout.everywhere:
        stack.count(rows[id(stack)])
    group.guard.count(present, bad)


def _accumulate(rule: Rule, stacks: list[Stack], h: Hyper, ops: Operations) -> None:
    state = State(stacks, rule.orthogonal)
    rule.accumulate(ops.gradients(stacks, kept=True), state, h, ops)


def _direction(rule: Rule, stacks: list[Stack], h: Hyper, ops: Operations) -> None:
    state = State(stacks, rule.orthogonal)
    ops.deliver(rule.direction(ops.gradients(stacks, kept=False), state, h, ops))


def _act(
    action: Callable[[Rule, list[Stack], Hyper, Operations], None],
    rule: Rule,
    stacks: Sequence[Stack],
    rows: dict[int, list[int]],
    h: Hyper,
    ops: Operations,
) -> None:
    """Let a rule act on the rows that take part: on stacks as they are, and where only some of a
    stack's rows do, on copies of those, which are written back."""
    if whole := [s for s in stacks if len(rows[id(s)]) == len(s.members)]:
        action(rule, whole, h, ops)
    if len(whole) == len(stacks):
        return
    if some := [s for s in stacks if 0 < len(rows[id(s)]) < len(s)]:

        def on_copies() -> list[Stack]:
            parts = [s.select(rows[id(s)]) for s in some]
            action(rule, parts, h, Operations())
            return parts

        for stack, part in zip(some, ops.once(on_copies), strict=True):
            stack.put(rows[id(stack)], part)
        ops.state_replaced()
