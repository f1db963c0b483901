"""The optimizer: one step loop for the whole family. ``step`` is the whole algorithm."""

from __future__ import annotations

import functools
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.optim.optimizer import ParamsT

from . import costs, gpu, settings, state
from .arithmetic import Arithmetic, Hyper
from .blocking import cut
from .buckets import Layout, Stack
from .eigen.solvers import Solver
from .eigenbasis import FactorSet, build_factor_sets, refresh
from .gpu.graphs import Recorder, Run, direct
from .gpu.grouped import Grouped
from .journal import Journal
from .nonfinite import Guard, NonFiniteGradientError, Skipped
from .precision import matmul_precision
from .preconditioners import Adam, Rule
from .replicas import Replicas

log = logging.getLogger(__name__)

MAX_DIM = 1024  # a dimension above is cut, unless max_preconditioner_dim says otherwise


@dataclass
class Group:
    """One parameter group laid out in stacks: which rule takes which, and all their factors.

    state: as it stands in ``optimizer.state``.
    recorder: on one GPU, runs steps in which all parameters take part; grouped: computes them,
    where our kernels work, and ``by_torch`` all others.
    guard: knows which gradients are not to be learnt from.
    options: those in use, but for the learning rate: whether they changed.
    """

    layout: Layout
    rules: list[tuple[Rule, list[Stack]]]
    factor_sets: list[FactorSet]
    state: state.GroupState
    recorder: Recorder | None
    grouped: Grouped | None
    by_torch: Arithmetic
    guard: Guard
    options: dict[str, Any]


class Kronecker(torch.optim.Optimizer):
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
        self._adam = Adam()
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
        layout.allocate(lambda s: moments[id(s)], scratch=self.rule.has_factors)
        kinds = {(s.device, s.dtype) for s in layout.stacks}
        recorder = grouped = None
        once = self._journal.once
        if len(kinds) == 1:
            ((device, dtype),) = kinds
            if device.type == "cuda":
                recorder = Recorder(device, self.cuda_graph, self._journal)
                grouped = Grouped(layout.stacks, once) if gpu.multiplies(dtype, device) else None
        group_state = state.GroupState(layout, sets)
        by_torch, guard, seen = Arithmetic(once), Guard(layout), _changeable(options)
        layout.tops = grouped.tops_of_gradients if grouped is not None else None
        return Group(layout, rules, sets, group_state, recorder, grouped, by_torch, guard, seen)

    def _rule_for(self, shape: tuple[int, ...], one_dim: str) -> Rule:
        # A 1x1 factor has one direction: every rule of the family is Adam there.
        plain = shape == (1,) or (len(shape) == 1 and one_dim == "adam")
        return self._adam if plain else self.rule

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
                self._step_group(number, here)
                for number, here in enumerate(present)
                if any(here)
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
        rows = {id(s): s.rows(None if all(fit) else fit) for s in layout.stacks}
        counted = {id(s): s.rows(present) for s in layout.stacks} if bad else rows
        section("count", functools.partial(self._count, group, counted, present, bad))
        with_factors = [s for rule, stacks in group.rules if rule.has_factors for s in stacks]
        frequency = options.get("precondition_frequency", 1)
        due = {id(s): s.due(counted[id(s)], frequency) for s in with_factors}
        h = self._hyper(options)
        run: Run = direct
        arithmetic = group.by_torch
        if group.recorder is not None and all(present):
            h, run = group.recorder.begin(layout, h)
            arithmetic = group.grouped or arithmetic
        if not layout.measured:
            arithmetic.gradients_came(layout.stacks)
        learn = functools.partial(self._statistics, group, rows, present, h, arithmetic)
        change = functools.partial(self._update, group, rows, present, fit, h, arithmetic)
        statistics = functools.partial(section, "statistics", lambda: run("statistics", learn))
        update = functools.partial(section, "update", lambda: run("update", change))
        tau = options.get("tau", 0.0)
        check = functools.partial(self._refresh, group, due, h, tau, arithmetic, run)
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
            if not layout.measured:
                arithmetic.gradients_came(layout.stacks)
            statistics()
            if any(due.values()):
                _, worst = section("refresh", check)
        group.state.publish_steps()
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

    def _statistics(
        self,
        group: Group,
        rows: dict[int, list[int]],
        present: list[bool],
        h: Hyper,
        arithmetic: Arithmetic,
    ) -> None:
        """The factors learn the gradients."""
        if self.rule.statistics_first:
            arithmetic.judge(group.guard, present)
        arithmetic.spare(group.layout.stacks)
        with matmul_precision("highest"):
            for rule, stacks in group.rules:
                if rule.has_factors:
                    _act(rule.accumulate, stacks, rows, h, arithmetic)

    def _update(
        self,
        group: Group,
        rows: dict[int, list[int]],
        present: list[bool],
        fit: list[bool],
        h: Hyper,
        arithmetic: Arithmetic,
    ) -> None:
        """Update directions from gathered gradients, and the parameters from those."""
        if not (self.rule.statistics_first and group.factor_sets):
            arithmetic.judge(group.guard, present)
        arithmetic.spare(group.layout.stacks)
        with matmul_precision(h.matmul_precision):
            for rule, stacks in group.rules:
                _act(rule.update, stacks, rows, h, arithmetic)
        group.layout.apply(fit, h.lr, h.weight_decay, arithmetic.once)

    def _refresh(
        self,
        group: Group,
        due: dict[int, list[int]],
        h: Hyper,
        tau: float,
        arithmetic: Arithmetic,
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
            arithmetic,
            group.layout.lent,
            self.process_group,
            run,
            h.skip,
        )
        group.state.publish()
        return overwritten, arithmetic.once(group.guard.worst)

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

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state, which does not change while training goes on.

        As torch's: {"state": {number of a parameter: its entry, see :mod:`.state`},
        "param_groups": [...]}. The same whatever the stacks, the device or the back end. Takes as
        much memory as the state itself.
        """
        self._journal.check_complete()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        entries: list[dict[str, Any]] = []
        groups = []
        for options, group in zip(self.param_groups, self._groups, strict=True):
            numbers = list(range(len(entries), len(entries) + len(group.layout.params)))
            entries += group.state.copies()
            packed = {k: state.copy_of(v) for k, v in options.items() if k != "params"}
            groups.append({**packed, "params": numbers})
        packed = {"state": dict(enumerate(entries)), "param_groups": groups}
        for after in self._optimizer_state_dict_post_hooks.values():
            result = after(self, packed)
            packed = packed if result is None else result
        return packed

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, to the bit, the options of groups included.

        A parameter whose state is not finite (an overflow, before such gradients were left out)
        starts anew, as on its first step, unless nonfinite_gradients is "propagate"; a warning
        names it.

        Raises:
            ValueError: saved by another rule, for other parameters or blocks, with options on which
                the state's meaning depends (rule, one_dim, max_preconditioner_dim, ...) other than
                this optimizer's, or damaged; nothing has been changed then.
        """
        state_dict = dict(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            result = before(self, state_dict)
            state_dict = state_dict if result is None else result
        loads = state.loading(
            state_dict,
            self.param_groups,
            [g.state for g in self._groups],
            (*self._fixed, *settings.LAYOUT),
        )
        for load in loads:
            load()
        self._journal.replace()
        for options, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            options.update({k: state.copy_of(v) for k, v in saved.items() if k != "params"})
        first = 0
        for options, group in zip(self.param_groups, self._groups, strict=True):
            group.guard.forget_rows()
            group.by_torch.state_replaced()
            if options.get("nonfinite_gradients", "skip") == "skip":
                for param in group.state.mend():
                    log.warning("parameter %d: state not finite, it starts anew", first + param)
            first += len(group.layout.params)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which have the state but no hooks, as torch's."""
        self._journal.check_complete()
        entries = [entry for group in self._groups for entry in group.state.copies()]
        params = [p for group in self._groups for p in group.layout.params]
        return {
            **super().__getstate__(),
            "state": dict(zip(params, entries, strict=True)),
            **{name: self.__dict__[name] for name in ("rule", "solver", "cuda_graph", "_fixed")},
            "process_group": Replicas(self.process_group),
        }

    @torch.no_grad()
    def __setstate__(self, state_: dict[str, Any]) -> None:
        super().__setstate__(state_)
        self.process_group = state_["process_group"].group
        self._adam = Adam()
        self._groups = []
        self._journal, self._loss = Journal(), None
        saved, self.state = self.state, defaultdict(dict)
        for options in self.param_groups:
            group = self._lay_out(options)
            group.state.loading([saved[p] for p in options["params"]], 0)()
            self._groups.append(group)
            self.state.update(zip(options["params"], group.state.entries, strict=True))

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


def _act(
    action: Callable[[Sequence[Stack], Hyper, Arithmetic], None],
    stacks: Sequence[Stack],
    rows: dict[int, list[int]],
    h: Hyper,
    arithmetic: Arithmetic,
) -> None:
    """Let a rule act on the rows that take part: on stacks as they are, and where only some of a
    stack's rows do, on copies of those, which are written back."""
    if whole := [s for s in stacks if len(rows[id(s)]) == len(s)]:
        action(whole, h, arithmetic)
    if some := [s for s in stacks if 0 < len(rows[id(s)]) < len(s)]:

        def on_copies() -> list[Stack]:
            parts = [s.select(rows[id(s)]) for s in some]
            action(parts, h, Arithmetic())
            return parts

        for stack, part in zip(some, arithmetic.once(on_copies), strict=True):
            stack.put(rows[id(stack)], part)
        arithmetic.state_replaced()


def _changeable(options: dict[str, Any]) -> dict[str, Any]:
    """What must be checked when it has changed: all options but the learning rate."""
    return {name: options[name] for name in settings.OPTIONS if name in options and name != "lr"}
