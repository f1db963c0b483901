"""Shampoo^2 scaled by its trace, S^-1 C^Shampoo2 (section 3 of the paper)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .grafting import grafted
from .ops.linalg import inverse_root, matmul_precision
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
from .shampoo import UngraftedShampoo

TraceScale = Literal["paper", "authors"]


class Shampoo2TraceRule(UngraftedShampoo):
    """U = S^1/2 L^-1/2 M^ R^-1/2, S = Tr(L) = Tr(R): every factor is divided by a power of its
    trace, and the exponent is -1/2 whatever the order.

    Exact where E[gg'] is a Kronecker product. For blocks of order k the power is (k - 1) / k, so
    that the product is scaled by S^-(k-1); with trace_scale "authors" 1/2, as in their code (one
    for matrices). exp_avg is M.
    """

    def __init__(self, eps: float, trace_scale: TraceScale = "paper") -> None:
        super().__init__(eps, grafting_eps=0.0)
        self.trace_scale = trace_scale

    def operator(
        self, eigenvalues: Tensor, eigenvectors: Tensor, order: Tensor, correction: Tensor
    ) -> Tensor:
        half = torch.full_like(order, 0.5)
        power = half if self.trace_scale == "authors" else (order - 1) / order
        with matmul_precision("highest"):
            values = eigenvalues / correction[:, None]
            least = max(self.eps, torch.finfo(values.dtype).tiny)
            scale = values.sum(-1).clamp_min(least) ** power
            return inverse_root(values / scale[:, None], eigenvectors, half, self.eps)


class Shampoo2Trace(PreconditionedOptimizer):
    """Shampoo^2 scaled by its trace, S^-1 (R (x) L) to the power -1/2, without
    grafting unless asked for.

    The roots are the identity before the first ones, at step F, so give a small F.

    Args:
        params: parameters, named parameters or groups, as torch's optimizers take them.
        lr: learning rate.
        betas: of the gradient's average, and of the factors L and R.
        eps: added to the scaled factors' eigenvalues before the root.
        weight_decay: decoupled, W <- W - lr (U + weight_decay W).
        precondition_frequency: steps between roots.
        trace_scale: "paper": the factors of a block of order k are divided by S^((k-1)/k), which
            leaves vectors alone; "authors": by S^(1/2), as their code does for every order.
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
        *,
        trace_scale: TraceScale = "paper",
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
            trace_scale=trace_scale,
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
            grafted(Shampoo2TraceRule(eps, trace_scale), grafting, grafting_eps, True),
            defaults,
            fixed=("eps", "trace_scale", "grafting", "grafting_eps"),
            solver=solver_of(eigensolver, eigen_workspace_mib),
            cuda_graph=cuda_graph,
            process_group=process_group,
            sharding=sharding,
        )
