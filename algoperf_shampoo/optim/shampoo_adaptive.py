"""Shampoo kept as eigenvectors and eigenvalues, with Eq. 11 deciding on the eigenvectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .grafting import grafted
from .ops import BasisChange, Hyper, Operations, State, Value, bias_corrections
from .ops.linalg import inverse_powers
from .optimizer import PreconditionedOptimizer
from .options import (
    Eigensolver,
    Grafting,
    MatmulPrecision,
    NonFinite,
    OneDim,
    Sharding,
    SmallMatrices,
    solver_of,
)
from .rule import Rule
from .shampoo import numerator


class ShampooAdaptiveRule(Rule):
    """U = Q_L (Lambda_L^-1/4 (Q_L' M^ Q_R) Lambda_R^-1/4) Q_R', the exponent 1/(2k) for order k.

    The vectors "roots" are Lambda^-1/(2k), 1 before the first check. At a check where Eq. 11 holds
    Q stays, and Lambda becomes diag(Q'LQ); else both are those of a new decomposition. So what is
    stale between checks is the whole, and across checks only the basis. exp_avg is M.
    """

    moments = ("exp_avg",)
    vectors: ClassVar[Mapping[str, float]] = {"roots": 1.0}
    eigenvalues_at_checks = True
    adam_eps = "grafting_eps"

    def __init__(self, eps: float) -> None:
        self.eps = eps

    def direction(self, G: Value, s: State, h: Hyper, ops: Operations) -> Value:
        ops.ema(s["exp_avg"], G, h.beta1)
        numerator(G, s, h, ops)
        X = ops.rotate(G, s.bases, scale=s.vectors("roots"))
        U = ops.rotate_back(X, s.bases)
        ops.scale(U, [1 / bias_corrections(stack, h)[0] for stack in U.stacks])
        return U

    def rebase(self, s: State, change: BasisChange, ops: Operations) -> Iterator[None]:
        yield
        self.keep(s, change, ops)

    def keep(self, s: State, change: BasisChange, ops: Operations) -> None:
        (mine,) = s.vectors("roots").vectors
        lam = change.eigenvalues / change.corrections[:, None]
        exponent = lam.new_full((len(lam),), 1 / (2 * len(mine)))
        change.assign_vector(mine[change.mode], inverse_powers(lam, exponent, self.eps))


class ShampooAdaptive(PreconditionedOptimizer):
    """Shampoo whose eigenvectors are computed anew where Eq. 11 exceeds tau, its eigenvalues at
    every check; without grafting unless asked for.

    Before the first check, at step F, U is M, so give a small F.

    Args:
        params: parameters, named parameters or groups, as torch's optimizers take them.
        lr: learning rate.
        betas: of the gradient's average, and of the factors L and R.
        eps: added to the factors' eigenvalues before the root. Eq. 11 is checked without it, where
            the authors' code adds it before.
        weight_decay: decoupled, W <- W - lr (U + weight_decay W).
        precondition_frequency: steps between checks.
        tau: threshold of Eq. 11; 0: new eigenvectors at every check, which is
            :class:`~.shampoo.Shampoo` without grafting.
        grafting: "adam": every block's update gets the norm of Adam's. None: it stays as it is.
        grafting_eps: added to Adam's sqrt(D), of grafting and of the blocks that Adam takes.
        nadam: numerator beta1 M + (1 - beta1) G instead of M, as in AlgoPerf's NAdamW.

    The other arguments are :class:`~.eshampoo.EShampoo`'s.

    Raises:
        ValueError: as :class:`~.eshampoo.EShampoo`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,  # alpha
        betas: tuple[float, float] = (0.9, 0.999),  # beta_1, beta_2
        eps: float = 1e-8,  # epsilon
        weight_decay: float = 1e-2,  # lambda
        precondition_frequency: int = 10,  # F
        tau: float = 0.1,  # tau
        *,
        grafting: Grafting = None,
        grafting_eps: float = 1e-8,
        nadam: bool = False,
        one_dim: OneDim = "full",
        small_matrices: SmallMatrices = "vector",
        max_preconditioner_dim: int = 1024,
        matmul_precision: MatmulPrecision = "highest",
        eigensolver: Eigensolver = "eigh",
        eigen_workspace_mib: int | None = None,
        nonfinite_gradients: NonFinite = "skip",
        nonfinite_limit: int = 100,
        cuda_graph: bool = True,
        process_group: dist.ProcessGroup | None = None,
        sharding: Sharding = "auto",
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            precondition_frequency=precondition_frequency,
            tau=tau,
            grafting=grafting,
            grafting_eps=grafting_eps,
            nadam=nadam,
            one_dim=one_dim,
            small_matrices=small_matrices,
            max_preconditioner_dim=max_preconditioner_dim,
            matmul_precision=matmul_precision,
            nonfinite_gradients=nonfinite_gradients,
            nonfinite_limit=nonfinite_limit,
        )
        super().__init__(
            params,
            grafted(ShampooAdaptiveRule(eps), grafting, grafting_eps, True),
            defaults,
            fixed=("eps", "grafting", "grafting_eps"),
            solver=solver_of(eigensolver, eigen_workspace_mib),
            cuda_graph=cuda_graph,
            process_group=process_group,
            sharding=sharding,
        )
