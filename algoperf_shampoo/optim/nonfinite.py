"""Gradients that are not finite, or so large that their squares would not be: not learnt from.

A parameter with one entry that is NaN, infinite or not below BOUND keeps its weight (weight decay
included), its moments and its factors in this step, all its blocks alike; with
``nonfinite_gradients`` "propagate" nothing is looked at. Its step count t goes on, and with it F
and the bias corrections, because on a GPU the host does not know: there the decision is made on
the device, without a synchronisation, and inside a recorded graph. Replicas see the same reduced
gradients and decide alike, of blocks that another one keeps too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks.layout import Layout
from .blocks.memory import GRADIENT
from .journal import Once, directly

POLICIES = ("skip", "propagate")
# Entries from here on are refused. The squares of 2^30 entries below it sum to less than float32's
# (float64's) largest number, and D, factors and norms hold no more than such sums.
BOUND = {torch.float32: 2.0**48, torch.float64: 2.0**496}


class NonFiniteGradientError(RuntimeError, FloatingPointError):
    """A parameter's gradient was not finite, or too large, too often in a row."""


class Skipped(NamedTuple):
    """How many steps a parameter sat out for its gradient: in all, and in a row until now."""

    total: int
    in_a_row: int


class Guard:
    """The gradients of one group: which are fit to learn from, and how often they were not.

    Parameters of a GPU are marked on the device, in ``stack.bad`` of all rows and ``layout.bad``;
    of others the host is told. Counts are of this process: no part of the saved state.

    Attributes:
        square: sum of squares of the gradients last looked at; infinite where the host does not
            know it, or one is bad.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._on_host = [s for s in layout.everywhere if s.device.type == "cpu"]
        self._flat = [x for x in layout.flat(GRADIENT) if x.device.type == "cpu"]
        self._counts = [Skipped(0, 0)] * len(layout.params)  # of parameters on the host
        self._bad_lately = False
        self.square = math.inf
        devices = dict.fromkeys(s.device for s in layout.everywhere if s.device.type != "cpu")
        self._marks = [Marks(layout, device) for device in devices]

    def arm(self, policy: str) -> None:
        """Before a step: see to it that rows are marked, or not, as the policy wants it."""
        for marks in self._marks:
            marks.arm(policy == "skip")

    def look(self, present: Sequence[bool]) -> list[int]:
        """Parameters on the host, of those present, that are to sit this step out.

        One pass over the gradients while all is well.
        """
        self.square = math.inf
        squares = [_sum_of_squares(x) for x in self._flat]
        fine = [s < BOUND[x.dtype] ** 2 for s, x in zip(squares, self._flat, strict=True)]
        if all(fine):
            everywhere = len(self._on_host) == len(self._layout.everywhere)
            self.square = sum(squares) if everywhere else math.inf
            return []
        bad = set()
        for stack in self._on_host:
            row_absmax = stack.g.flatten(1).abs().amax(1).tolist()
            for member, absmax in zip(stack.members, row_absmax, strict=True):
                if present[member.param] and not absmax < BOUND[stack.dtype]:
                    bad.add(member.param)
        return sorted(bad)

    def count(self, present: Sequence[bool], bad: Sequence[int]) -> None:
        """Enter the parameters that :meth:`look` found."""
        if not bad and not self._bad_lately:
            return
        for param, (total, in_a_row) in enumerate(self._counts):
            if param in bad:
                self._counts[param] = Skipped(total + 1, in_a_row + 1)
            elif present[param]:
                self._counts[param] = Skipped(total, 0)
        self._bad_lately = any(c.in_a_row for c in self._counts)

    def mark(self, present: Sequence[bool], once: Once = directly) -> None:
        """Mark and count those on GPUs, by torch; ``stack.g`` holds the gradients."""
        for marks in self._marks:
            marks.mark(present, once)

    @property
    def marks(self) -> Marks:
        """Those of a group that is on one GPU."""
        (marks,) = self._marks
        return marks

    def worst(self) -> int:
        """The most steps in a row that a parameter has sat out; waits for the device."""
        on_host = max((c.in_a_row for c in self._counts), default=0) if self._bad_lately else 0
        return max([on_host, *(int(m.counts[1].max()) for m in self._marks)])

    def counts(self) -> list[Skipped]:
        """Per parameter; waits for the device."""
        found = list(self._counts)
        for marks in self._marks:
            totals, rows = marks.counts.tolist()
            for param, (total, row) in enumerate(zip(totals, rows, strict=True)):
                if total:
                    found[param] = Skipped(total, row)
        return found

    def forget_rows(self) -> None:
        """Another state has been loaded: nothing is in a row any more."""
        self._counts = [Skipped(c.total, 0) for c in self._counts]
        self._bad_lately = False
        for marks in self._marks:
            marks.counts[1].zero_()


class Marks:
    """What is kept on one GPU for the decision there.

    Attributes:
        rows, params: int32, not zero where the gradient of this step is bad, per row of the
            device's stacks, and per parameter of the group.
        counts: int32 [2, parameters]: see :class:`Skipped`.
        first, row_of: int32: those rows that are blocks of parameter p are
            row_of[first[p] : first[p + 1]].
    """

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self._layout = layout
        self._stacks = [s for s in layout.everywhere if s.device == device]
        members = [m.param for s in self._stacks for m in s.members]
        count = len(layout.params)
        self.rows = torch.zeros(len(members), dtype=torch.int32, device=device)
        self.params = torch.zeros(count, dtype=torch.int32, device=device)
        self.counts = torch.zeros(2, count, dtype=torch.int32, device=device)
        by_param: list[list[int]] = [[] for _ in range(count)]
        for row, param in enumerate(members):
            by_param[param].append(row)
        first = [0]
        for rows in by_param:
            first.append(first[-1] + len(rows))
        self.first = torch.tensor(first, dtype=torch.int32, device=device)
        self.row_of = torch.tensor(sum(by_param, []), dtype=torch.int32, device=device)
        self._param_of = torch.tensor(members, device=device)
        self._armed = False

    def arm(self, wanted: bool) -> None:
        if wanted == self._armed:
            return
        self._armed = wanted
        self.rows.zero_()
        self.params.zero_()
        parts = self.rows.split([len(s) for s in self._stacks])
        for stack, part in zip(self._stacks, parts, strict=True):
            stack.bad = part if wanted else None
        if wanted:
            self._layout.bad[self.rows.device] = self.params
        else:
            self._layout.bad.pop(self.rows.device, None)

    def mark(self, present: Sequence[bool], once: Once) -> None:
        if not self._armed:
            return
        fit = [s.g.flatten(1).abs().amax(1) < BOUND[s.dtype] for s in self._stacks]
        bad = torch.zeros_like(self.params)
        bad.scatter_reduce_(0, self._param_of, torch.cat(fit).logical_not_().int(), "amax")
        counts = self.counts + bad
        counts[1].mul_(bad)
        if not all(present):
            here = torch.tensor(present, device=bad.device)
            bad.mul_(here)
            counts = torch.where(here, counts, self.counts)
        self.params.copy_(bad)
        torch.index_select(bad, 0, self._param_of, out=self.rows)
        once(self.counts.copy_, counts)


def bound_bits() -> int:
    """BOUND of float32 as the bits of that number."""
    return (int(math.log2(BOUND[torch.float32])) + 127) << 23


def _sum_of_squares(x: Tensor) -> float:
    return torch.dot(x, x).item()
