"""The optimizer: one step loop for the whole family. ``step`` is the whole algorithm."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import ParamsT

from . import gpu, settings
from .blocks import costs
from .blocks.factors import FactorSet, build_factor_sets
from .blocks.layout import Layout, Stack
from .blocks.partition import cut
from .blocks.state_dict import GroupState
from .eigen.solver import Solver
from .gpu.graphs import Recorder
from .gpu.triton_ops import TritonOperations
from .group import Group
from .journal import Journal, Run, directly_run
from .nonfinite import Guard, NonFiniteGradientError, Skipped
from .ops import Hyper, Operations, State
from .ops.precision import matmul_precision
from .ops.torch_ops import TorchOperations
from .refresh import refresh
from .rule import AdamRule, Rule
from .saving import Saving

log = logging.getLogger(__name__)

ADAM = AdamRule()
MAX_DIM = 1024  # a dimension above is cut, unless max_preconditioner_dim says otherwise


class Kronecker(Saving):
    """Shampoo-family optimizer with one rule; the classes of :mod:`.optimizers` choose the rule.

    Parameters are merged and cut into blocks (:mod:`.blocking`), blocks of one shape are stacked
    (:mod:`.buckets`), and everything runs batched on stacks. State is float32 (float64 for float64
    parameters), in ``state`` from construction on (:mod:`.state`). Parameters without a gradient
    are skipped and keep their own step count; a step in which one is missing goes by torch's
    operations stack by stack, several times slower on a GPU than by our kernels.

    Args:
        params: parameters or groups.
        rule: the preconditioner of blocks with factors.
        defaults: the options of groups, see :mod:`.settings`.
        fixed: names of those that are one for all groups.
        solver: how factors are decomposed.
        cuda_graph: on a GPU, replay steps with all gradients there as recorded graphs; see
            :mod:`.graphs`.
        process_group: set when the processes of the group hold replicas that see equal gradients.

    Raises:
        ValueError: an option out of range (named, with its range), or a parameter that is empty,
            sparse or not of real floating-point numbers (named by its number).
    """

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
    ) -> None:
        defaults = {"rule": type(self).__name__, **defaults}
        settings.check(defaults)
        self.rule = rule
        self.solver = solver or Solver()
        self.cuda_graph = cuda_graph
        self.process_group = process_group
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
        limit = options.get("max_preconditioner_dim", MAX_DIM)
        small = options.get("small_matrices", "vector")
        first = sum(len(g.layout.params) for g in self._groups)
        layout = Layout(options["params"], lambda p: cut(tuple(p.shape), limit, small), first)
        by_rule: dict[int, tuple[Rule, list[Stack]]] = {}
        for stack in layout.stacks:
            rule = self._rule_for(stack.shape, options.get("one_dim", "full"))
            by_rule.setdefault(id(rule), (rule, []))[1].append(stack)
        rules = list(by_rule.values())
        sets = build_factor_sets([s for rule, mine in rules if rule.has_factors for s in mine])
        moments = {id(s): rule.moments for rule, mine in rules for s in mine}
        vectors = {id(s): rule.vectors for rule, mine in rules for s in mine}
        layout.allocate(lambda s: moments[id(s)], self.rule.work_buffers, lambda s: vectors[id(s)])
        kinds = {(s.device, s.dtype) for s in layout.stacks}
        recorder = by_kernels = None
        once = self._journal.once
        if len(kinds) == 1:
            ((device, dtype),) = kinds
            if device.type == "cuda":
                recorder = Recorder(device, self.cuda_graph, self._journal)
                if gpu.multiplies(dtype, device):
                    by_kernels = TritonOperations(layout.stacks, once)
        group_state = GroupState(layout, sets)
        by_torch, guard, seen = TorchOperations(once), Guard(layout), _changeable(options)
        layout.tops = by_kernels.tops_of_gradients if by_kernels is not None else None
        return Group(layout, rules, sets, group_state, recorder, by_kernels, by_torch, guard, seen)

    def _rule_for(self, shape: tuple[int, ...], one_dim: str) -> Rule:
        # A 1x1 factor has one direction: every rule of the family is Adam there.
        plain = shape == (1,) or (len(shape) == 1 and one_dim == "adam")
        return ADAM if plain else self.rule

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
            # First, so that a device has work during the bookkeeping.
            present = [group.layout.gather() for group in self._groups]
            self._check_options()
            worst = [
                self._step_group(number, here) for number, here in enumerate(present) if any(here)
            ]
        if any(worst):
            self.check_gradients()
        loss, self._loss = self._loss, None
        return loss

    def _check_options(self) -> None:
        """Refuse options that cannot be stepped with, before anything is changed."""
        for options, group in zip(self.param_groups, self._groups, strict=True):
            if (now := _changeable(options)) != group.options:
                settings.check(now)
                where = "changed after the group was added"
                names = [n for n in now if n in self._fixed or n in settings.LAYOUT]
                settings.check_same(where, now, group.options, names)
                group.options = now

    def _step_group(self, number: int, present: list[bool]) -> bool:
        """One group's step, its gradients gathered; whether too many in a row were bad, which is
        looked at at checks.

        present: which parameters have a gradient.
        """
        options, group = self.param_groups[number], self._groups[number]
        layout, guard = group.layout, group.guard
        section = functools.partial(self._section, number)
        policy = options.get("nonfinite_gradients", "skip")
        guard.arm(policy)
        bad = guard.look(present) if policy == "skip" else []
        if section("gradients", lambda: (present, bad)) != (present, bad):
            raise RuntimeError(
                "the last step failed half-way, and now other gradients are missing or not "
                "finite; only a step with the same gradients finishes it"
            )
        fit = [here and i not in bad for i, here in enumerate(present)] if bad else present
        h = self._hyper(options)
        if policy == "skip":
            h = h._replace(gradient_square=guard.square)
        if self.rule.starts and any(new := section("new", lambda: _new(group, fit))):
            section("start", lambda: self._start(group, new, h))
            present = [here and not starts for here, starts in zip(present, new, strict=True)]
            fit = [here and not starts for here, starts in zip(fit, new, strict=True)]
            if not any(present):
                group.state.publish()
                return False
            layout.gather()
        rows = {id(s): s.rows(None if all(fit) else fit) for s in layout.stacks}
        counted = {id(s): s.rows(present) for s in layout.stacks} if bad else rows
        section("count", functools.partial(self._count, group, counted, present, bad))
        with_factors = [s for rule, stacks in group.rules if rule.has_factors for s in stacks]
        frequency = options.get("precondition_frequency", 1)
        due = {id(s): s.due(counted[id(s)], frequency) for s in with_factors}
        run: Run = directly_run
        ops: Operations = group.by_torch
        if group.recorder is not None and all(present):
            h, run = group.recorder.begin(layout, h)
            ops = group.by_kernels or ops
        ops.gradients_came(layout.stacks, layout.measured)
        learn = functools.partial(self._statistics, group, rows, present, h, ops)
        change = functools.partial(self._update, group, rows, present, fit, h, ops)
        statistics = functools.partial(section, "statistics", lambda: run("statistics", learn))
        update = functools.partial(section, "update", lambda: run("update", change))
        tau = options.get("tau", 0.0)
        check = functools.partial(self._refresh, group, due, h, tau, ops, run)
        worst = 0
        if not with_factors:
            update()
        elif self.rule.statistics_first:
            statistics()
            if any(due.values()):
                overwritten, worst = section("refresh", check)
                if overwritten:
                    layout.gather()
            update()
        else:
            update()
            layout.gather()
            ops.gradients_came(layout.stacks, layout.measured)
            statistics()
            if any(due.values()):
                _, worst = section("refresh", check)
        group.state.publish_steps()
        layout.finish()
        return worst >= options.get("nonfinite_limit", math.inf)

    def _section(self, number: int, name: str, body: Callable[[], Any]) -> Any:
        """A section of a group's step, once."""
        return self._journal.section((number, name), body)

    def _count(
        self, group: Group, rows: dict[int, list[int]], present: list[bool], bad: list[int]
    ) -> None:
        for stack in group.layout.stacks:
            stack.count(rows[id(stack)])
        group.guard.count(present, bad)

    def _start(self, group: Group, new: list[bool], h: Hyper) -> None:
        """The parameters marked start: their factors learn, and are decomposed."""
        stacks = [s for rule, mine in group.rules if rule.starts for s in mine]
        rows = {id(s): s.rows(new) for s in stacks}
        ops = group.by_torch
        ops.judge(group.guard, new)
        for s in stacks:  # those with bad gradients start another time; the host asks, this once
            bad = s.bad.tolist() if s.bad is not None else [0] * len(s)
            rows[id(s)] = [r for r in rows[id(s)] if not bad[r]]
        ops.begin()
        with matmul_precision("highest"):
            _act(_begin, self.rule, stacks, rows, h, ops)
        refresh(
            group.factor_sets,
            rows,
            self.rule,
            h.beta2,
            0.0,
            Solver(workspace_mib=self.solver.workspace_mib),
            ops,
            group.layout.lent,
            self.process_group,
            mend=h.skip,
            first=True,
        )
        for stack in stacks:
            for row in rows[id(stack)]:
                stack.ready[row] = True

    def _statistics(
        self,
        group: Group,
        rows: dict[int, list[int]],
        present: list[bool],
        h: Hyper,
        ops: Operations,
    ) -> None:
        """The factors learn the gradients."""
        if self.rule.statistics_first:
            ops.judge(group.guard, present)
        ops.spare(group.layout.stacks)
        ops.begin()
        with matmul_precision("highest"):
            for rule, stacks in group.rules:
                if rule.has_factors:
                    _act(_accumulate, rule, stacks, rows, h, ops)

    def _update(
        self,
        group: Group,
        rows: dict[int, list[int]],
        present: list[bool],
        fit: list[bool],
        h: Hyper,
        ops: Operations,
    ) -> None:
        """Update directions from gathered gradients, and the parameters from those."""
        if not (self.rule.statistics_first and group.factor_sets):
            ops.judge(group.guard, present)
        ops.spare(group.layout.stacks)
        ops.begin(h.matmul_precision)
        with matmul_precision(h.matmul_precision):
            for rule, stacks in group.rules:
                _act(_direction, rule, stacks, rows, h, ops)
        group.layout.apply(fit, h.lr, h.weight_decay, ops.once)

    def _refresh(
        self,
        group: Group,
        due: dict[int, list[int]],
        h: Hyper,
        tau: float,
        ops: Operations,
        run: Run,
    ) -> tuple[bool, int]:
        """Check the factors that are due. Whether the gradients' memory was worked in, and the most
        bad gradients in a row."""
        overwritten = refresh(
            group.factor_sets,
            due,
            self.rule,
            h.beta2,
            tau,
            self.solver,
            ops,
            group.layout.lent,
            self.process_group,
            run,
            h.skip,
        )
        group.state.publish()
        return overwritten, ops.once(group.guard.worst)

    def _hyper(self, options: dict[str, Any]) -> Hyper:
        beta1, beta2 = options["betas"]
        return Hyper(
            float(options["lr"]),
            beta1,
            beta2,
            options.get("grafting_eps", options["eps"]),  # Adam's, not the factors'
            options["weight_decay"],
            options["nadam"],
            options.get("matmul_precision", "highest"),
            skip=options.get("nonfinite_gradients", "skip") == "skip",
            noise_level=options.get("noise_level", 0.0)
            if options.get("noise_directions") == "drop"
            else 0.0,
        )

    def skipped_gradients(self) -> dict[int, Skipped]:
        """Parameters whose gradients were not finite, or not below :data:`.nonfinite.BOUND`, and
        how often, since the optimizer was made in this process. Waits for the device."""
        counts = [c for group in self._groups for c in group.guard.counts()]
        return {number: c for number, c in enumerate(counts) if c.total}

    def check_gradients(self) -> None:
        """
        Raises:
            NonFiniteGradientError: parameters have had ``nonfinite_limit`` bad gradients in a row
                (or more). The state is that of a complete step, and may be stepped on or saved.
        """
        first, found = 0, []
        for options, group in zip(self.param_groups, self._groups, strict=True):
            limit = options.get("nonfinite_limit", math.inf)
            for number, c in enumerate(group.guard.counts(), first):
                if c.in_a_row >= limit:
                    found.append(f"parameter {number} {c.in_a_row} (of {c.total} in all)")
            first += len(group.layout.params)
        if found:
            more = f" and {len(found) - 5} parameters more" if len(found) > 5 else ""
            raise NonFiniteGradientError(
                "gradients not finite, or too large, in so many steps in a row: "
                f"{', '.join(found[:5])}{more}; weights of those stay as they are"
            )

    def factor_sets(self) -> Iterable[FactorSet]:
        """All factor sets, for telemetry and tests."""
        for group in self._groups:
            yield from group.factor_sets


def _new(group: Group, fit: Sequence[bool]) -> list[bool]:
    """Which parameters that take part are of a rule that ``starts``, and have not started."""
    new = [False] * len(fit)
    for rule, stacks in group.rules:
        for stack in stacks if rule.starts else ():
            for member, ready in zip(stack.members, stack.ready, strict=True):
                new[member.param] |= fit[member.param] and not ready
    return new


def _begin(rule: Rule, stacks: list[Stack], h: Hyper, ops: Operations) -> None:
    state = State(stacks, rule.orthogonal)
    rule.start(ops.gradients(stacks, kept=True), state, h, ops)


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
    if whole := [s for s in stacks if len(rows[id(s)]) == len(s)]:
        action(rule, whole, h, ops)
    if some := [s for s in stacks if 0 < len(rows[id(s)]) < len(s)]:

        def on_copies() -> list[Stack]:
            parts = [s.select(rows[id(s)]) for s in some]
            action(rule, parts, h, Operations())
            return parts

        for stack, part in zip(some, ops.once(on_copies), strict=True):
            stack.put(rows[id(stack)], part)
        ops.state_replaced()


def _changeable(options: dict[str, Any]) -> dict[str, Any]:
    """What must be checked when it has changed: all options but the learning rate."""
    return {name: options[name] for name in settings.OPTIONS if name in options and name != "lr"}
