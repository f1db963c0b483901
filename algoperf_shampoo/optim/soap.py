"""SOAP: Adam in the eigenbasis of Shampoo's factors, as its authors run it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .blocks.layout import Stack
from .eigen.solver import Solver
from .ops import BasisChange, Hyper, Operations, State, Value, bias_corrections
from .optimizer import PreconditionedOptimizer
from .options import MatmulPrecision, NonFinite, OneDim, Sharding, SmallMatrices
from .rule import Rule


class SOAPRule(Rule):
    """U = Q_L (M / (sqrt(D) + eps)) Q_R' sqrt(1 - beta2^t) / (1 - beta1^t), M and D in the basis.

    exp_avg is M, the average of Q_L' G Q_R, and exp_avg_sq is D. The first gradient starts factors
    and bases and moves nothing. Then the factors learn, the update is made with the bases of the
    steps before, and every F steps a basis makes one step of simultaneous iteration, its columns
    sorted beforehand: D is permuted with them, M goes over to the new basis.
    """

    refresh_last = True
    starts = True

    def direction(self, G: Value, s: State, h: Hyper, ops: Operations) -> Value:
        X = ops.rotate(G, s.bases)
        factors = _factors(X.stacks, h)
        ops.adam(X, s["exp_avg"], s["exp_avg_sq"], h, corrected=False, factors=factors)
        return ops.rotate_back(X, s.bases)

    def rebase(self, s: State, change: BasisChange, ops: Operations) -> Iterator[None]:
        change.leave(s["exp_avg"])
        yield
        change.permute(s["exp_avg_sq"])
        change.enter(s["exp_avg"])


class SOAP(PreconditionedOptimizer):
    """SOAP (Vyas et al., 2025), as its authors' code computes it.

    The first step only starts the factors: nothing moves, and t stays 0. Factors are not
    bias-corrected, eps stands beside the uncorrected sqrt(D), and weight decay is applied to the
    updated W, all as theirs. Other than theirs: dimensions are merged and, above
    max_preconditioner_dim, cut instead of left in their coordinates; vectors with one_dim="adam",
    which is their way too, go by AdamW as everywhere here, which moves on the first step and has
    eps beside the corrected sqrt(D).

    Args:
        params: parameters, named parameters or groups, as torch's optimizers take them.
        lr: learning rate.
        betas: of the gradient's average, and of D and the factors L and R.
        eps: added to sqrt(D).
        weight_decay: decoupled, after the update: W <- (W - lr U) (1 - lr weight_decay).
        precondition_frequency: steps between QR iterations of the bases.

    The other arguments are :class:`~.eshampoo.EShampoo`'s.

    Raises:
        ValueError: as :class:`~.eshampoo.EShampoo`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 3e-3,  # alpha
        betas: tuple[float, float] = (0.95, 0.95),  # beta_1, beta_2
        eps: float = 1e-8,  # epsilon
        weight_decay: float = 1e-2,  # lambda
        precondition_frequency: int = 10,  # F
        *,
        one_dim: OneDim = "adam",
        small_matrices: SmallMatrices = "matrix",
        max_preconditioner_dim: int = 1024,
        matmul_precision: MatmulPrecision = "highest",
        eigen_workspace_mib: int = 8,
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
            one_dim=one_dim,
            small_matrices=small_matrices,
            max_preconditioner_dim=max_preconditioner_dim,
            matmul_precision=matmul_precision,
            nonfinite_gradients=nonfinite_gradients,
            nonfinite_limit=nonfinite_limit,
        )
        super().__init__(
            params,
            SOAPRule(),
            defaults,
            solver=Solver(method="qr", max_iterations=1, workspace_mib=eigen_workspace_mib),
            cuda_graph=cuda_graph,
            process_group=process_group,
            sharding=sharding,
        )


def decayed(h: Hyper) -> float | Tensor:
    """What turns U into that of W <- (W - lr U) (1 - lr weight_decay)."""
    return 1 - h.lr * h.weight_decay


def _factors(stacks: Sequence[Stack], h: Hyper) -> list[Any]:
    """sqrt(1 - beta2^t) / (1 - beta1^t) of each stack, and what weight decay wants."""
    corrections = [bias_corrections(stack, h) for stack in stacks]
    if not all(isinstance(c1, Tensor) for c1, _ in corrections):
        return [c2**0.5 / c1 * decayed(h) for c1, c2 in corrections]
    c1s, c2s = (list(c) for c in zip(*corrections, strict=True))
    factors = list(torch._foreach_sqrt(c2s))
    torch._foreach_div_(factors, c1s)
    torch._foreach_mul_(factors, decayed(h))
    return factors
