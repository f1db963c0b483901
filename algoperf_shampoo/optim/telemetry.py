"""What becomes of every factor: checks and decompositions, the criterion, staleness, the spectrum.

    optimizer.telemetry = Telemetry(optimizer, describe(model), every=50)
    ...
    rows = optimizer.telemetry.rows()    # at an evaluation: this is where the host waits

All that is looked at happens at checks (t mod F = 0); other steps do nothing for it. Tensors stay
on the device until :meth:`Telemetry.rows`. Nothing is written that the optimizer reads, so that
every number of the training is the same to the bit with and without.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .blocks.factors import FactorSet
from .blocks.rows import take
from .criterion import scores

COLUMNS = (
    "global_step", "parameter", "kind", "block", "factor", "size", "refreshed", "criterion",
    "staleness", "checks", "refreshes", "failures", "largest", "smallest", "condition",
    "effective_rank",
)  # fmt: skip
"""Of a row of :meth:`Telemetry.rows`; docs/telemetry.md says what they mean."""

KINDS = ("weight", "bias", "norm", "embedding")
Row = dict[str, Any]
Key = tuple[int, int, int]
"""Parameter by its number, block of it, mode of that."""


@dataclass
class _Watched:
    """The factors of one set: whose they are and what the paper calls them, the steps of their last
    decomposition and of the one before it (0: none), its eigenvalues [N, n], and largest, smallest
    and effective rank [N, 3], but for those that are ``pending``."""

    factor_set: FactorSet
    keys: list[Key]
    letters: list[str]
    last: list[int]
    before: list[int]
    values: Tensor
    spectrum: Tensor
    pending: set[int] = field(default_factory=set)

    def settle(self) -> None:
        """Sum up eigenvalues that are new."""
        if self.pending:
            indices = sorted(self.pending)
            new = spectrum(take(self.values, indices))
            self.spectrum.index_copy_(0, torch.tensor(indices, device=new.device), new)
            self.pending.clear()


@dataclass
class _Sample:
    """What a check found of some factors of a set; its tensors are on the device.

    counts: per factor, its checks, refreshes and failures so far.
    """

    step: int
    watched: _Watched
    indices: list[int]
    criterion: list[float] | Tensor
    staleness: list[int] = field(default_factory=list)
    refreshed: list[bool] = field(default_factory=list)
    counts: list[tuple[int, int, int]] = field(default_factory=list)
    spectrum: Tensor = field(default_factory=lambda: torch.empty(0))


class Telemetry:
    """Watches the factors of an optimizer, which is to get it as its attribute ``telemetry``.

    Args:
        optimizer: a :class:`~.optimizer.PreconditionedOptimizer`, all its groups added.
        parameters: name and kind of every parameter, in the optimizer's order; none: their numbers.
        every: so many steps at least lie between two checks that are written down. Counts and
            staleness are exact all the same.

    Attributes:
        step: steps taken; the optimizer counts them.
        shared: whether ranks share the factors, so that each has seen its own alone.
    """

    def __init__(
        self,
        optimizer: Any,
        parameters: Sequence[tuple[str, str]] = (),
        every: int = 1,
    ) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.parameters = list(parameters)
        self.every = every
        self.step = 0
        self.shared = any(group.layout.ranks > 1 for group in optimizer._groups)
        self._sampled: int | None = None  # step of the last check that was written down
        self._watched: dict[int, _Watched] = {}
        self._open: list[_Sample] = []  # of the last check, whose factors may still change
        self._samples: list[_Sample] = []
        self._rows: list[tuple[tuple[int, Key], Row]] = []  # step and factor, to sort by
        self._elsewhere: dict[str, list[float]] = {}  # state of other ranks' factors
        first = 0
        for group in optimizer._groups:
            for factor_set in group.factor_sets:
                self._watched[id(factor_set)] = _watch(factor_set, first)
            first += len(group.layout.params)

    # What the optimizer tells.

    def checked(
        self, factor_set: FactorSet, found: Mapping[int, float], tau: float, orthogonal: bool
    ) -> None:
        """A check of factors, before any is counted or decomposed.

        Args:
            found: by index in the set, what exceeds tau where a factor needs a new operator.
            orthogonal: whether operators are bases, of which Eq. 11 speaks. Where tau is 0 and the
                check went without it, it is computed here, on the device, if this check is written
                down.
        """
        now = self.step + 1
        due = self._sampled is None or now == self._sampled or now - self._sampled >= self.every
        watched = self._watched.get(id(factor_set))
        if self._open and self._open[0].step < now:
            self._close()
        if watched is None or not due:
            return
        indices = list(found)
        criterion: list[float] | Tensor = list(found.values())
        if tau == 0:
            criterion = scores(factor_set, indices, 1.0) if orthogonal else [math.nan] * len(found)
        self._sampled = now
        self._open.append(_Sample(now, watched, indices, criterion))

    def decomposed(self, factor_set: FactorSet, indices: Sequence[int], values: Tensor) -> None:
        """Factors got new operators; values: their eigenvalues [len(indices), n]."""
        watched = self._watched.get(id(factor_set))
        if watched is None or not indices:
            return
        for i in indices:
            watched.before[i], watched.last[i] = watched.last[i], self.step + 1
        where = torch.tensor(indices, device=watched.values.device)
        watched.values.index_copy_(0, where, values.to(watched.values))
        watched.pending.update(indices)

    # What is asked of it, at evaluations.

    def rows(self) -> list[Row]:
        """What checks have found since the last call, by :data:`COLUMNS`, in the order of steps and
        parameters. Waits for the device, once."""
        self._read()
        found, self._rows = self._rows, []
        return [row for _, row in sorted(found, key=lambda pair: pair[0])]

    def gather(self, group: dist.ProcessGroup | None) -> None:
        """Called by every rank at evaluations: where ranks share the factors, what they have found
        comes to rank 0 here, after a host read. Replicas have all of it, and nothing moves."""
        if group is None or not self.shared:
            return
        self._read()
        mine = self._rows, self._own_state(), self._sampled
        everyone: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(everyone, mine, group=group)
        self._rows = []
        # As after a resume from rank 0's state, which may have no factors.
        self._sampled = max((at for _, _, at in everyone if at is not None), default=None)
        if dist.get_rank(group) == 0:
            # Factors of a group that is not shared come from every rank.
            self._rows = list(dict(pair for rows, _, _ in everyone for pair in rows).items())
            self._elsewhere = {k: v for _, state, _ in everyone for k, v in state.items()}

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on with the same rows; those not yet asked for are not in it."""
        sampled = -1 if self._sampled is None else self._sampled
        factors = {**self._elsewhere, **self._own_state()}
        return {"step": self.step, "sampled": sampled, "factors": factors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; factors that it does not know start anew."""
        self.step = state["step"]
        self._sampled = state["sampled"] if state["sampled"] >= 0 else None
        self._open, self._samples, self._rows = [], [], []
        known = state["factors"]
        for watched in self._watched.values():
            found = [known.get(_name(key), [0, 0, *[math.nan] * 3]) for key in watched.keys]
            watched.last = [int(values[0]) for values in found]
            watched.before = [int(values[1]) for values in found]
            watched.pending.clear()
            watched.spectrum.copy_(watched.spectrum.new_tensor([values[2:] for values in found]))

    def _close(self) -> None:
        """The last check that is written down is over: what became of its factors is known."""
        for sample in self._open:
            watched, indices = sample.watched, sample.indices
            factors = watched.factor_set
            sample.refreshed = [watched.last[i] == sample.step for i in indices]
            sample.staleness = [
                sample.step - (watched.before[i] if new else watched.last[i])
                for i, new in zip(indices, sample.refreshed, strict=True)
            ]
            sample.counts = [
                (factors.checks[i], factors.refreshes[i], factors.failures[i]) for i in indices
            ]
            watched.settle()
            sample.spectrum = take(watched.spectrum, indices).clone()
        self._samples += self._open
        self._open = []

    def _own_state(self) -> dict[str, list[float]]:
        state = {}
        for watched in self._watched.values():
            watched.settle()
            steps = zip(watched.last, watched.before, watched.spectrum.tolist(), strict=True)
            for key, (last, before, values) in zip(watched.keys, steps, strict=True):
                state[_name(key)] = [last, before, *values]
        return state

    def _read(self) -> None:
        """Samples become rows: this is the one host read."""
        self._close()
        if not self._samples:
            return
        device = max((s.spectrum.device for s in self._samples), key=str)
        parts = [s.spectrum.flatten().double().to(device) for s in self._samples]
        on_device = [s.criterion for s in self._samples if isinstance(s.criterion, Tensor)]
        parts += [x.double().to(device) for x in on_device]
        numbers = iter(torch.cat(parts).tolist())
        spectra = [[tuple(itertools.islice(numbers, 3)) for _ in s.indices] for s in self._samples]
        for sample, values in zip(self._samples, spectra, strict=True):
            criterion = sample.criterion
            if isinstance(criterion, Tensor):
                criterion = list(itertools.islice(numbers, len(sample.indices)))
            for position, pair in enumerate(zip(criterion, values, strict=True)):
                self._rows.append(_row(sample, position, *pair, self.parameters))
        self._samples.clear()


def describe(model: nn.Module) -> list[tuple[str, str]]:
    """Name and kind of every parameter of a model, in the order of ``model.parameters()``.

    Kinds are by the module that owns a parameter: "norm" and "embedding" by the name of its class
    (LayerNorm, RMSNorm, ..., Embedding), "bias" by the parameter's own, "weight" for all others.
    What DistributedDataParallel and torch.compile put before names is left out.
    """
    modules = dict(model.named_modules())
    found = []
    for full, _ in model.named_parameters():
        owner, _, own = full.rpartition(".")
        of = type(modules[owner]).__name__.lower()
        kind = "bias" if own.endswith("bias") else "weight"
        if "norm" in of:
            kind = "norm"
        elif "embed" in of or "embed" in own:
            kind = "embedding"
        parts = [part for part in full.split(".") if part not in ("module", "_orig_mod")]
        found.append((".".join(parts), kind))
    return found


def letter(mode: int, order: int) -> str:
    """The paper's name of a factor: A of a vector, L and R of a matrix; M1, M2, ... of others."""
    return {1: "A", 2: "LR"[mode % 2]}.get(order, f"M{mode + 1}")


def spectrum(values: Tensor) -> Tensor:
    """Largest, smallest, and effective rank exp(-sum p log p), p = lambda / sum lambda (Roy and
    Vetterli, 2007), of eigenvalues [N, n]: [N, 3]; the rank is nan where all are zero."""
    positive = values.clamp_min(0)
    p = positive / positive.sum(-1, keepdim=True)
    rank = torch.special.entr(p).sum(-1).exp()
    return torch.stack([values.amax(-1), values.amin(-1), rank], dim=-1)


def condition(largest: float, smallest: float, n: int, eps: float) -> float:
    """largest / smallest, at most 1 / (n eps): smaller eigenvalues are rounding."""
    if not largest > 0:
        return math.nan
    return largest / max(smallest, n * eps * largest)


def _watch(factor_set: FactorSet, first: int) -> _Watched:
    """first: number of the group's first parameter."""
    keys: list[Key] = []
    letters: list[str] = []
    for span in sorted(factor_set.spans, key=lambda span: span.start):
        keys += [(first + m.param, m.index, span.mode) for m in span.stack.members]
        letters += [letter(span.mode, len(span.stack.shape))] * len(span.stack)
    never = [0] * len(keys)
    values = factor_set.factors.new_zeros(len(keys), factor_set.n)
    unknown = values.new_full((len(keys), 3), math.nan)
    return _Watched(factor_set, keys, letters, never, list(never), values, unknown)


def _row(
    sample: _Sample,
    position: int,
    criterion: float,
    spectrum: tuple[float, ...],
    parameters: Sequence[tuple[str, str]],
) -> tuple[tuple[int, Key], Row]:
    watched, i = sample.watched, sample.indices[position]
    param, block, _ = key = watched.keys[i]
    name, kind = parameters[param] if parameters else (str(param), "")
    largest, smallest, rank = spectrum
    checks, refreshes, failures = sample.counts[position]
    factors = watched.factor_set
    eps = torch.finfo(factors.factors.dtype).eps
    return (sample.step, key), {
        "global_step": sample.step,
        "parameter": name,
        "kind": kind,
        "block": block,
        "factor": watched.letters[i],
        "size": factors.n,
        "refreshed": int(sample.refreshed[position]),
        "criterion": _written(criterion),
        "staleness": sample.staleness[position],
        "checks": checks,
        "refreshes": refreshes,
        "failures": failures,
        "largest": _written(largest),
        "smallest": _written(smallest),
        "condition": _written(condition(largest, smallest, factors.n, eps)),
        "effective_rank": _written(rank),
    }


def _name(key: Key) -> str:
    return ".".join(map(str, key))


def _written(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"
