"""How an optimizer is saved, loaded, copied and pickled, as torch's are."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from . import settings
from .blocks.state_dict import GroupState, copy_of
from .group import Group
from .journal import Journal
from .options import Sharding
from .replicas import Replicas
from .sharding import Comparison, gather_counters, gather_state

log = logging.getLogger(__name__)

PICKLED = ("rule", "solver", "cuda_graph", "sharding", "_fixed")


class Saving(torch.optim.Optimizer):
    """A torch.optim.Optimizer whose state stands in groups."""

    process_group: dist.ProcessGroup | None
    sharding: Sharding = "off"  # of pickles that know of none
    _comparison: Comparison
    _fixed: tuple[str, ...]
    _groups: list[Group]
    _journal: Journal
    _loss: Any

    @abstractmethod
    def _lay_out(self, options: dict[str, Any]) -> Group:
        """A parameter group, whose state starts anew."""

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state, which does not change while training goes on.

        As torch's: {"state": {number of a parameter: its entry, see :mod:`.blocks.state_dict`},
        "param_groups": [...]}. The same whatever the stacks, the device or the back end. Takes as
        much memory as the state itself.

        Raises:
            RuntimeError: the last step failed half-way; or ranks share the work, and what the
                others keep has not been gathered since the last step.
        """
        self._check_complete()
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        entries: list[dict[str, Any]] = []
        groups = []
        for options, group in zip(self.param_groups, self._groups, strict=True):
            numbers = list(range(len(entries), len(entries) + len(group.layout.params)))
            entries += group.state.copies()
            packed = {k: copy_of(v) for k, v in options.items() if k != "params"}
            groups.append({**packed, "params": numbers})
        packed = {"state": dict(enumerate(entries)), "param_groups": groups}
        for after in self._optimizer_state_dict_post_hooks.values():
            result = after(self, packed)
            packed = packed if result is None else result
        return packed

    @torch.no_grad()
    def gather_state(self, to: int | None = None) -> None:
        """Where ranks share the work: what the others keep comes to rank ``to`` of the process
        group (or to all), in host memory, so that :meth:`state_dict` there is complete until the
        next step. All ranks must call it, with the same ``to``; nothing happens where none share.

        Raises:
            RuntimeError: the last step failed half-way. ValueError: there is no rank ``to``.
        """
        self._journal.check_complete()
        ranks = 1 if self.process_group is None else dist.get_world_size(self.process_group)
        if to is not None and not 0 <= to < ranks:
            raise ValueError(f"to must be a rank of the process group, at most {ranks - 1}: {to!r}")
        for group in self._groups:
            shard = group.shard
            if shard.shared:
                state = group.state
                gather_state(group.layout, group.factor_sets, state.others, shard, to)
                if to is None or to == shard.rank:
                    state.gathered()

    def gather_counters(self) -> None:
        """Where ranks share the work: every one learns what the others' factor sets have counted,
        which is all of :meth:`gather_state` that measurements need. All ranks must call it."""
        for group in self._groups:
            if group.shard.shared:
                sets, others = group.factor_sets, group.state.others
                gather_counters(group.layout, sets, others, group.shard)

    def _release(self) -> None:
        """A step begins: what was gathered is not true any more."""
        for group in self._groups:
            group.state.release()

    def _check_complete(self) -> None:
        self._journal.check_complete()
        if not all(group.state.complete for group in self._groups):
            raise RuntimeError(
                "ranks share this optimizer's state, and this one has not got all of it: call "
                "gather_state() on every rank first, after the last step"
            )

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
        loads = loading(
            state_dict,
            self.param_groups,
            [g.state for g in self._groups],
            (*self._fixed, *settings.LAYOUT),
        )
        for load in loads:
            load()
        self._journal.replace()
        self._comparison.steps = 0  # as on all ranks, though the last step failed on one alone
        for options, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            options.update({k: copy_of(v) for k, v in saved.items() if k != "params"})
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
        self._check_complete()
        entries = [entry for group in self._groups for entry in group.state.copies()]
        params = [p for group in self._groups for p in group.layout.params]
        return {
            **super().__getstate__(),
            "state": dict(zip(params, entries, strict=True)),
            **{name: getattr(self, name) for name in PICKLED},
            "process_group": Replicas(self.process_group),
        }

    @torch.no_grad()
    def __setstate__(self, state_: dict[str, Any]) -> None:
        super().__setstate__(state_)
        self.process_group = state_["process_group"].group
        self._groups = []
        self._journal, self._loss = Journal(), None
        self._comparison = Comparison()
        saved, self.state = self.state, defaultdict(dict)
        for options in self.param_groups:
            group = self._lay_out(options)
            group.state.loading([saved[p] for p in options["params"]], 0)()
            self._groups.append(group)
            self.state.update(zip(options["params"], group.state.entries, strict=True))


def loading(
    state_dict: Any,
    param_groups: Sequence[Mapping[str, Any]],
    groups: Sequence[GroupState],
    meaning: Sequence[str],
) -> list[Callable[[], None]]:
    """Check a whole state_dict; what is returned copies its state.

    Args:
        param_groups: the optimizer's own, with its options.
        meaning: names of options on which the meaning of the state depends.

    Raises:
        ValueError: see :meth:`Saving.load_state_dict`.
    """
    for key, kind in (("state", Mapping), ("param_groups", Sequence)):
        if not isinstance(state_dict, Mapping) or not isinstance(state_dict.get(key), kind):
            raise ValueError(f"state_dict has no {key!r}; it must be what state_dict() gave")
    saved_groups, entries = state_dict["param_groups"], state_dict["state"]
    for number, saved in enumerate(saved_groups):
        params = saved.get("params") if isinstance(saved, Mapping) else None
        if not isinstance(params, Sequence):
            raise ValueError(f"state_dict: param_groups[{number}] has no 'params'")
    sizes, saved_sizes = [len(g.entries) for g in groups], [len(g["params"]) for g in saved_groups]
    if sizes != saved_sizes:
        raise ValueError(
            f"state_dict has parameter groups of sizes {saved_sizes}, this optimizer {sizes}"
        )
    loads, first = [], 0
    for number, (saved, own, group) in enumerate(
        zip(saved_groups, param_groups, groups, strict=True)
    ):
        _check_options(f"state_dict, param_groups[{number}]", saved, own, meaning)
        found = [entries.get(key) for key in saved["params"]]
        loads.append(group.loading(found, first))
        first += len(found)
    return loads


def _check_options(
    where: str, saved: Mapping[str, Any], own: Mapping[str, Any], meaning: Sequence[str]
) -> None:
    if "rule" not in saved:
        raise ValueError(f"{where}: names no rule; saved by an optimizer other than {own['rule']}")
    settings.check_same(where, saved, own, ["rule"])
    if missing := [name for name in own if name in settings.OPTIONS and name not in saved]:
        raise ValueError(f"{where}: lacks {', '.join(missing)}")
    settings.check_same(where, saved, own, [name for name in meaning if name in own])
    try:
        settings.check(saved)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
