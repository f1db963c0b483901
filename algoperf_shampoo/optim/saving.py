"""How an optimizer is saved, loaded, copied and pickled, as torch's are."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist

from . import settings
from .blocks.state_dict import copy_of, loading
from .group import Group
from .journal import Journal
from .replicas import Replicas

log = logging.getLogger(__name__)


class Saving(torch.optim.Optimizer):
    """A torch.optim.Optimizer whose state stands in groups."""

    process_group: dist.ProcessGroup | None
    _fixed: tuple[str, ...]
    _groups: list[Group]
    _journal: Journal
    _loss: Any

    @abstractmethod
    def _lay_out(self, options: dict[str, Any]) -> Group:
        """A parameter group, whose state starts anew."""

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
            packed = {k: copy_of(v) for k, v in options.items() if k != "params"}
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
        loads = loading(
            state_dict,
            self.param_groups,
            [g.state for g in self._groups],
            (*self._fixed, *settings.LAYOUT),
        )
        for load in loads:
            load()
        self._journal.replace()
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
        self._groups = []
        self._journal, self._loss = Journal(), None
        saved, self.state = self.state, defaultdict(dict)
        for options in self.param_groups:
            group = self._lay_out(options)
            group.state.loading([saved[p] for p in options["params"]], 0)()
            self._groups.append(group)
            self.state.update(zip(options["params"], group.state.entries, strict=True))
