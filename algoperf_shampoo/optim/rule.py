"""What a preconditioner rule is: the few lines in which the family's algorithms differ.

The step loop (:mod:`algoperf_shampoo.optim.optimizer`) owns everything rules share: gathering
gradients, deciding when to refresh, decomposing factors, weight decay, writing parameters. A rule
declares what it keeps and when its statistics come, and says in
:class:`~algoperf_shampoo.optim.ops.Operations` how those turn a gradient into an update direction.
It is right on every device as soon as it is written; what a back end does faster is the back end's
affair.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import ClassVar

from torch import Tensor

from .ops import BasisChange, Hyper, Operations, State, Value


class Rule(ABC):
    """Turns gradients into update directions for stacks of blocks of any order.

    Attributes:
        has_factors: whether blocks have factors L_i [d_i, d_i] and operators.
        statistics_first: whether :meth:`accumulate` comes before :meth:`direction` in a step, with
            a refresh between the two; else after it, and the refresh last.
        refresh_last: whether the refresh comes after :meth:`direction` all the same (SOAP,
            KL-Shampoo), which then may let the factors learn as well, with what it computes anyway.
        orthogonal: whether operators are eigenbases, else something like inverse roots.
        roots: whether operators are roots, which an all-zero factor has too.
        moments: state shaped like the blocks, zero at first: ``s[name]``.
        vectors: state of one vector per mode, [B, d_i], and what all its entries are at first:
            ``s.vectors(name)``.
        starts: whether the first gradient of a block only starts its factors and bases, by
            :meth:`start` and an exact decomposition: no update, t stays 0 (SOAP, KL-Shampoo).
        adam_eps: the option that is Adam's epsilon, where ``eps`` is added to factors.
        eigenvalues_at_checks: whether :meth:`keep` is called at checks.
        work_buffers: how many values live at a time besides the one in the gradient's place; where
            that depends on how many modes blocks have, see :meth:`work_buffers_of`.
    """

    has_factors: bool = True
    statistics_first: bool = True
    refresh_last: bool = False
    orthogonal: bool = True
    roots: bool = False
    moments: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    vectors: ClassVar[Mapping[str, float]] = {}
    starts: bool = False
    adam_eps: str = "eps"
    eigenvalues_at_checks: bool = False
    work_buffers: int = 1

    def work_buffers_of(self, order: int) -> int:
        """``work_buffers`` of blocks with so many modes."""
        return self.work_buffers

    def accumulate(self, G: Value, s: State, h: Hyper, ops: Operations) -> None:
        """The factors (and vectors) learn the gradient: Eq. 15 unless overridden. G is kept."""
        ops.gram_ema(G, h.beta2, 1 - h.beta2)

    def start(self, G: Value, s: State, h: Hyper, ops: Operations) -> None:
        """The first gradient, where it only starts blocks (``starts``)."""
        self.accumulate(G, s, h, ops)

    @abstractmethod
    def direction(self, G: Value, s: State, h: Hyper, ops: Operations) -> Value:
        """The direction U of W <- W - lr * U; updates moments. G may be used up, and U be G."""

    def operator(
        self, eigenvalues: Tensor, eigenvectors: Tensor, order: Tensor, correction: Tensor
    ) -> Tensor:
        """What is kept of a new eigendecomposition, [N, n, n]: by default the eigenvectors.

        eigenvalues [N, n] ascending and eigenvectors [N, n, n] of the factors as accumulated;
        order [N]: k of the block each factor belongs to; correction [N]: 1 - beta2^t.
        """
        return eigenvectors

    def rebase(self, s: State, change: BasisChange, ops: Operations) -> Iterator[None]:
        """The operators of one mode change, for some rows of the one stack of s.

        What comes before the ``yield`` is done while the old ones stand, what comes after it with
        the new ones: there ``change`` has the eigenvalues and the permutation of columns. What is
        kept in the old basis leaves it and enters the new one; what is not mentioned stays as it
        is, by index (D in Algorithm 2).
        """
        yield

    def keep(self, s: State, change: BasisChange, ops: Operations) -> None:
        """A check found the operators of one mode good enough, for some rows of the one stack of s:
        ``change`` has diag(Q'LQ) as eigenvalues. Called with ``eigenvalues_at_checks``."""
        raise NotImplementedError


class AdamRule(Rule):
    """U = M^ / (sqrt(D^) + eps), no factors."""

    has_factors = False
    work_buffers = 0

    def direction(self, G: Value, s: State, h: Hyper, ops: Operations) -> Value:
        ops.adam(G, s["exp_avg"], s["exp_avg_sq"], h)
        return G
