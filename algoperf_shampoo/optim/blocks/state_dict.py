"""The state of an optimizer as torch sees it: flat per parameter, the same whatever the stacks, the
device or the back end.

``optimizer.state[p]`` is there from construction on and live. It holds, for block j of the
parameter (:func:`.partition.cut`) and its mode i:

| key | value |
|---|---|
| step | t, updates so far: int64 [] on the CPU |
| j.exp_avg, j.exp_avg_sq, ... | what the rule keeps, shaped like the block |
| j.eigenvalues_i, ... | [d_i]: what the rule keeps of each mode |
| j.factor_i, j.operator_i | [d_i, d_i]: L or R; its eigenbasis, or its inverse root |
| j.ready | 1 once any operator of the block was computed; until then they are the identity |
| j.checks_i, j.refreshes_i, j.failures_i | how often it was due, got a new operator, could not |

No key holds a list or a string, because torch.distributed.checkpoint flattens neither. Where ranks
share the work, tensors of blocks that another rank keeps are on torch's meta device, shapes without
memory, until they have been gathered, and again from the next step on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..blocks.factors import FactorSet
from .layout import Layout, Stack

Entry = dict[str, Any]  # of one parameter
COUNTERS = ("checks", "refreshes", "failures")


class GroupState:
    """One group's part of ``optimizer.state``: views of the stacks, and copies of their counters.

    Attributes:
        entries: per parameter of the group, its part of ``optimizer.state``.
        complete: whether it holds what other ranks keep.

    Args:
        others: factor sets of other ranks' blocks.
    """

    def __init__(
        self,
        layout: Layout,
        factor_sets: Sequence[FactorSet],
        others: Sequence[FactorSet] = (),
    ) -> None:
        self._rows: list[list[tuple[Stack, int]]] = [[] for _ in layout.params]
        by_place = {
            (member.param, member.index): (stack, row)
            for stack in layout.everywhere
            for row, member in enumerate(stack.members)
        }
        for param, index in sorted(by_place):
            self._rows[param].append(by_place[param, index])
        # (id(stack), mode) -> the factor set, and where in it the stack begins.
        self._sets = {
            (id(span.stack), span.mode): (factor_set, span.start)
            for factor_set in (*factor_sets, *others)
            for span in factor_set.spans
        }
        self._layout = layout
        self.complete = not layout.others
        self.others = list(others)
        self._spoiled_elsewhere: list[int] = []
        self.entries: list[Entry] = []
        for param, rows in enumerate(self._rows):
            entry: Entry = {"step": layout.step_counts[param]}
            for j, (stack, row) in enumerate(rows):
                entry |= {f"{j}.{name}": x for name, x in _tensors(stack, row)}
            self.entries.append(entry)
        self.publish()

    def publish(self) -> None:
        """Bring all that is no tensor of a stack up to date: step counts and counters."""
        self._layout.publish_steps()
        for entry, rows in zip(self.entries, self._rows, strict=True):
            for j, (stack, row) in enumerate(rows):
                entry[f"{j}.ready"] = int(stack.ready[row])
                for name, counts, k in self._counters(stack, row):
                    entry[f"{j}.{name}"] = counts[k]

    def gathered(self) -> None:
        """What other ranks keep has come into the tensors of their stacks."""
        self.complete = True
        self._link_others()
        self.publish()

    def release(self) -> None:
        """A step begins: what was gathered from other ranks is not true any more."""
        if not self._layout.others or not self.complete:
            return
        self.complete = False
        for stack in self._layout.others:
            for tensors, key in tensors_of(stack):
                tensors[key] = torch.empty_like(tensors[key], device="meta")
        self._link_others()

    def _link_others(self) -> None:
        for entry, rows in zip(self.entries, self._rows, strict=True):
            for j, (stack, row) in enumerate(rows):
                if stack.owner != self._layout.rank:
                    entry |= {f"{j}.{name}": x for name, x in _tensors(stack, row)}

    def copies(self) -> list[Entry]:
        """The entries, sharing no memory with them or with each other.

        Views share the memory of a whole stack and of its gradient buffer, and torch.save writes
        all of a memory that a tensor belongs to.
        """
        return [{name: copy_of(x) for name, x in entry.items()} for entry in self.entries]

    def loading(self, saved: Sequence[Any], first: int) -> Callable[[], None]:
        """Check entries; what is returned copies them into the state.

        Args:
            saved: an entry of each parameter. None for one that is frozen
                (torch.distributed.checkpoint leaves those out): its state starts anew.
            first: number of the group's first parameter, for messages.

        Raises:
            ValueError: an entry is not of such a parameter; names the parameter and the key.
        """
        tensors: list[tuple[Tensor, Tensor]] = []
        numbers: list[tuple[list[Any], int, Any]] = []
        elsewhere: list[tuple[int, Tensor]] = []
        frozen = []
        for param, (rows, found) in enumerate(zip(self._rows, saved, strict=True)):
            if found is None and not self._layout.params[param].requires_grad:
                frozen.append(param)
                continue
            live, where = self.entries[param], f"state_dict, parameter {first + param}"
            _check_keys(where, live, found)
            step = _whole(where, found, "step")
            for name, x in live.items():
                if name != "step" and isinstance(x, Tensor):
                    value = _tensor_like(where, found, name, x)
                    if self._is_elsewhere(param, name):
                        elsewhere.append((param, value.to(x.dtype)))
                    else:
                        tensors.append((x, value))
            for j, (stack, row) in enumerate(rows):
                numbers.append((stack.steps, row, step))
                numbers.append((stack.ready, row, bool(_whole(where, found, f"{j}.ready"))))
                for name, counts, k in self._counters(stack, row):
                    numbers.append((counts, k, _whole(where, found, f"{j}.{name}")))

        def load() -> None:
            self._spoiled_elsewhere = [p for p, x in elsewhere if not _finite(x)]
            self.release()
            for live, value in tensors:
                live.copy_(value)
            for target, index, value in numbers:
                target[index] = value
            for param in frozen:
                self._start_anew(param)
            self.publish()

        return load

    def mend(self) -> list[int]:
        """Parameters whose state is not finite start anew, as on their first step; which those are.

        Reads all of the state once; of other ranks' blocks what was loaded is known.
        """
        rows = [row for stack in self._layout.stacks for row in _finite_rows(stack)]
        members = [m.param for stack in self._layout.stacks for m in stack.members]
        here = {p for p, fine in zip(members, rows, strict=True) if not fine}
        spoiled = sorted({*here, *self._spoiled_elsewhere})
        self._spoiled_elsewhere = []
        for param in spoiled:
            self._start_anew(param)
        if spoiled:
            self.publish()
        return spoiled

    def _start_anew(self, param: int) -> None:
        for stack, row in self._rows[param]:
            stack.steps[row], stack.ready[row] = 0, False
            for name, x in _tensors(stack, row) if stack.owner == self._layout.rank else ():
                x.zero_()
                if name.startswith("operator_"):
                    x.fill_diagonal_(1)
            for name, initial in stack.initial.items():
                for x in stack.vectors[name]:
                    x[row].fill_(initial)  # nothing happens on the meta device
            for _, counts, k in self._counters(stack, row):
                counts[k] = 0

    def _is_elsewhere(self, param: int, name: str) -> bool:
        stack, _ = self._rows[param][int(name.partition(".")[0])]
        return stack.owner != self._layout.rank

    def _counters(self, stack: Stack, row: int) -> Iterator[tuple[str, list[int], int]]:
        """(key, counts, k) of all counters counts[k] of one block."""
        for mode in range(len(stack.factors)):
            factor_set, start = self._sets[id(stack), mode]
            for name in COUNTERS:
                yield f"{name}_{mode}", getattr(factor_set, name), start + row


def tensors_of(stack: Stack) -> Iterator[tuple[Any, Any]]:
    """(list or dict, key) of all state tensors of a stack, in the same order on every rank."""
    yield from ((stack.state, name) for name in stack.state)
    for vectors in stack.vectors.values():
        yield from ((vectors, i) for i in range(len(vectors)))
    yield from ((stack.factors, i) for i in range(len(stack.factors)))
    yield from ((stack.operators, i) for i in range(len(stack.operators)))


def copy_of(value: Any) -> Any:
    """A tensor with memory of its own; anything else as it is."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def blocks_of(entry: Mapping[str, Any]) -> list[Entry]:
    """A parameter's entry block by block: ``{"1.ready": 1}`` -> ``[..., {"ready": 1}]``."""
    blocks: dict[int, Entry] = {}
    for key, value in entry.items():
        number, dot, name = key.partition(".")
        if dot:
            blocks.setdefault(int(number), {})[name] = value
    return [blocks[j] for j in sorted(blocks)]


def _tensors(stack: Stack, row: int) -> Iterator[tuple[str, Tensor]]:
    """Names and live views of all tensors of one block."""
    for name, x in stack.state.items():
        yield name, x[row]
    for name, vectors in stack.vectors.items():
        for mode, x in enumerate(vectors):
            yield f"{name}_{mode}", x[row]
    for mode, x in enumerate(stack.factors):
        yield f"factor_{mode}", x[row]
    for mode, x in enumerate(stack.operators):
        yield f"operator_{mode}", x[row]


def _finite(x: Tensor) -> bool:
    low, high = x.aminmax()
    return bool(low.isfinite() & high.isfinite())


def _finite_rows(stack: Stack) -> list[bool]:
    """Per row, whether all that is kept of it is finite."""
    vectors = itertools.chain(*stack.vectors.values())
    tensors = [*stack.state.values(), *vectors, *stack.factors, *stack.operators]
    fine = torch.ones(len(stack), dtype=torch.bool, device=stack.device)
    for x in tensors:
        # Not a sum: finite numbers may have one that is not.
        low, high = x.flatten(1).aminmax(dim=1)
        fine &= low.isfinite() & high.isfinite()
    return fine.tolist()


def _check_keys(where: str, live: Entry, found: Any) -> None:
    if not isinstance(found, Mapping) or not found:
        raise ValueError(f"{where}: no state; it was saved by an optimizer that had none for it")
    if "blocks" in found:
        raise ValueError(
            f"{where}: saved by a version that kept lists of blocks, which this one does not read; "
            "start again, or load it with that version"
        )
    missing = [name for name in live if name not in found]
    unknown = [str(name) for name in found if name not in live]
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] if missing else []
        parts += [f"has {', '.join(unknown)}, which is not of this optimizer"] if unknown else []
        raise ValueError(
            f"{where}: {' and '.join(parts)}; was it saved by another optimizer, or for other "
            "shapes?"
        )


def _tensor_like(where: str, found: Mapping[str, Any], name: str, live: Tensor) -> Tensor:
    value = found[name]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = f"of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{where}: {name} is {kind}; it must be a floating-point tensor")
    if value.shape != live.shape:
        shapes = f"{tuple(value.shape)}, expected {tuple(live.shape)}"
        raise ValueError(f"{where}: {name} is of shape {shapes}")
    return value


def _whole(where: str, found: Mapping[str, Any], name: str) -> int:
    value = found[name]
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    if not isinstance(value, int | float) or value != value // 1 or value < 0:
        raise ValueError(f"{where}: {name} is {value!r}; it must be a count >= 0")
    return int(value)
