"""The optimizer: one step loop for the whole family. ``step`` is the whole algorithm."""

from __future__ import annotations

import contextlib
import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from .precision import matmul_precision
from .preconditioners import Adam, Rule
from .replicas import Replicas

MAX_DIM = 1024  # a dimension above is cut, unless max_preconditioner_dim says otherwise


@dataclass
class Group:
    """One parameter group laid out in stacks: which rule takes which, and all their factors.

    state: as it stands in ``optimizer.state``.
    recorder: on one GPU, runs steps in which all parameters take part; grouped: computes them,
    where our kernels work, and ``by_torch`` all others.
    options: those in use, but for the learning rate: whether they changed.
    """

    layout: Layout
    rules: list[tuple[Rule, list[Stack]]]
    factor_sets: list[FactorSet]
    state: state.GroupState
    recorder: Recorder | None
    grouped: Grouped | None
    by_torch: Arithmetic
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
        if len(kinds) == 1:
            ((device, dtype),) = kinds
            if device.type == "cuda":
                recorder = Recorder(device, self.cuda_graph)
                grouped = Grouped(layout.stacks) if gpu.multiplies(dtype, device) else None
        group_state = state.GroupState(layout, sets)
        seen = _changeable(options)
        return Group(layout, rules, sets, group_state, recorder, grouped, Arithmetic(), seen)

    def _rule_for(self, shape: tuple[int, ...], one_dim: str) -> Rule:
        # A 1x1 factor has one direction: every rule of the family is Adam there.
        plain = shape == (1,) or (len(shape) == 1 and one_dim == "adam")
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
        self._check_before_step()
        for options, group in zip(self.param_groups, self._groups, strict=True):
            self._step_group(options, group)
        return loss

    def _check_before_step(self) -> None:
        """Refuse what cannot be stepped on, before anything is changed."""
        number = 0
        for options, group in zip(self.param_groups, self._groups, strict=True):
            for p in group.layout.params:
                if p.grad is not None and p.grad.layout != torch.strided:
                    raise ValueError(
                        f"the gradient of parameter {number} is sparse; only dense ones work"
                    )
                number += 1
            if (now := _changeable(options)) != group.options:
                settings.check(now)
                where = "changed after the group was added"
                names = [n for n in now if n in self._fixed or n in settings.LAYOUT]
                settings.check_same(where, now, group.options, names)
                group.options = now

    def _step_group(self, options: dict[str, Any], group: Group) -> None:
        layout = group.layout
        present = layout.gather()  # first, so that the device has work during the bookkeeping
        if not any(present):
            return
        everyone = all(present)
        rows = {id(s): s.rows(None if everyone else present) for s in layout.stacks}
        for stack in layout.stacks:
            stack.count(rows[id(stack)])
        with_factors = [s for rule, stacks in group.rules if rule.has_factors for s in stacks]
        frequency = options.get("precondition_frequency", 1)
        due = {id(s): s.due(rows[id(s)], frequency) for s in with_factors}
        h = self._hyper(options)
        run: Run = direct
        arithmetic = group.by_torch
        if group.recorder is not None and everyone:
            h, run = group.recorder.begin(layout, h)
            arithmetic = group.grouped or arithmetic
        statistics = functools.partial(self._statistics, group, rows, h, arithmetic)
        update = functools.partial(self._update, group, rows, present, h, arithmetic)
        check = functools.partial(
            self._refresh, group, due, h, options.get("tau", 0.0), arithmetic, run
        )
        if not with_factors:
            run("update", update)
        elif self.rule.statistics_first:
            run("statistics", statistics)
            check()
            run("update", update)
        else:
            run("update", update)
            layout.gather()
            run("statistics", statistics)
            check()
        group.state.publish_steps()

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
        tau: float,
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
            tau,
            self.solver,
            arithmetic,
            group.layout.lent,
            self.process_group,
            run,
        )
        group.state.publish()
        if overwritten and self.rule.statistics_first:
            group.layout.gather()

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
        )

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state, which does not change while training goes on.

        As torch's: {"state": {number of a parameter: its entry, see :mod:`.state`},
        "param_groups": [...]}. The same whatever the stacks, the device or the back end. Takes as
        much memory as the state itself.
        """
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
        for options, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            options.update({k: state.copy_of(v) for k, v in saved.items() if k != "params"})
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which have the state but no hooks, as torch's."""
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
        saved, self.state = self.state, defaultdict(dict)
        for options in self.param_groups:
            group = self._lay_out(options)
            group.state.loading([saved[p] for p in options["params"]], 0)()
            self._groups.append(group)
            self.state.update(zip(options["params"], group.state.entries, strict=True))

    def factor_sets(self) -> Iterable[FactorSet]:
        """All factor sets, for telemetry and tests."""
        for group in self._groups:
            yield from group.factor_sets


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


def _changeable(options: dict[str, Any]) -> dict[str, Any]:
    """What must be checked when it has changed: all options but the learning rate."""
    return {name: options[name] for name in settings.OPTIONS if name in options and name != "lr"}
