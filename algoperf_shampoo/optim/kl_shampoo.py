"""KL-Shampoo and KL-SOAP: Shampoo's factors by least Kullback-Leibler divergence, as their authors
run them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .eigen.solver import Solver
from .ops import BasisChange, Hyper, ModeVectors, Operations, State, Value
from .optimizer import PreconditionedOptimizer
from .options import MatmulPrecision, NonFinite, OneDim, Sharding, SmallMatrices
from .rule import Rule
from .soap import decayed

INITIAL_EIGENVALUE = 0.1
LARGEST_CLAMP = 4000

Eigenvalues = Literal["ema", "decomposition"]


class KLShampooRule(Rule):
    """U = Q (M / (sqrt(lambda_1 (x) ... (x) lambda_k) + eps)), M the plain average of Q'G.

    M, exp_avg, is kept in the basis: rotating is linear, so as long as Q stands this is the rotated
    average of gradients, and M is rotated over when Q changes. The factor of mode i learns (G,
    whitened in all other modes) squared, divided by the product of the others' dimensions:

        S_i <- beta2 S_i + (1 - beta2) X_i X_i' / (d / d_i),   X = Q_j' G_j / sqrt(lambda_j), j /= i

    and with eigenvalues "ema" lambda_i the mean over the other modes of (Q_i' X_i)^2. All of it,
    the update too, is with the bases and eigenvalues of the steps before. lambda^-1/2 never exceeds
    max(10, min(d, 4000)).
    """

    refresh_last = True
    starts = True
    moments: tuple[str, ...] = ("exp_avg",)
    vectors: ClassVar[Mapping[str, float]] = {"eigenvalues": INITIAL_EIGENVALUE}

    def __init__(self, eigenvalues: Eigenvalues = "ema", clamp: bool = True) -> None:
        self.eigenvalues = eigenvalues
        self.clamp = clamp

    def work_buffers_of(self, order: int) -> int:
        """Several products on the way from a gradient that is needed once more want two."""
        return 1 if order <= 2 else 2

    def start(self, G: Value, s: State, h: Hyper, ops: Operations) -> None:
        ops.gram_ema(G, h.beta2, 1 - h.beta2, mean=True)

    def accumulate(self, G: Value, s: State, h: Hyper, ops: Operations) -> None:
        """All factors but the last mode's."""
        scale = ops.inverse_sqrt(s.vectors("eigenvalues"), self.limit)
        for i in range(len(s.modes), 1, -1):
            X = ops.rotate(G, s.bases, skip=-i, keep=True)
            ops.gram_ema(X, h.beta2, 1 - h.beta2, mode=-i, mean=True, scale=scale)

    def direction(self, G: Value, s: State, h: Hyper, ops: Operations) -> Value:
        P, scale = self.learn(G, s, h, ops)
        ops.momentum(P, s["exp_avg"], h.beta1, scale, h.eps, decayed(h))
        return ops.rotate_back(P, s.bases)

    def learn(self, G: Value, s: State, h: Hyper, ops: Operations) -> tuple[Value, ModeVectors]:
        """G in the bases, mode by mode, on the way to which the last mode's factor and the
        eigenvalues learn it; and lambda^-1/2 as it was."""
        lam = s.vectors("eigenvalues")
        scale = ops.inverse_sqrt(lam, self.limit)
        with ops.accurate():
            X = ops.rotate(G, s.bases, skip=-1)
            ops.gram_ema(X, h.beta2, 1 - h.beta2, mode=-1, mean=True, scale=scale)
            P = ops.rotate(X, s.bases, only=-1)
            if self.eigenvalues == "ema":
                ops.mean_square_ema(lam, P, h.beta2, scale, self.limit)
        return P, scale

    def rebase(self, s: State, change: BasisChange, ops: Operations) -> Iterator[None]:
        """M goes over to the new basis; lambda stays, by index, or comes from the decomposition."""
        change.leave(s["exp_avg"])
        yield
        change.enter(s["exp_avg"])
        if self.eigenvalues == "decomposition" and not change.first:
            (mine,) = s.vectors("eigenvalues").vectors
            change.assign_vector(mine[change.mode], change.eigenvalues)

    def limit(self, d: int) -> float:
        """What lambda^-1/2 does not exceed in a mode of size d."""
        return max(10, min(d, LARGEST_CLAMP)) if self.clamp else math.inf


class KLSOAPRule(KLShampooRule):
    """KL-Shampoo's factors and bases; in them Adam, without bias corrections.

    exp_avg and exp_avg_sq are in the basis: when it changes, M goes along, D stays, by index.
    """

    moments = ("exp_avg", "exp_avg_sq")

    def direction(self, G: Value, s: State, h: Hyper, ops: Operations) -> Value:
        P, _ = self.learn(G, s, h, ops)
        factors = [decayed(h)] * len(P.stacks)
        ops.adam(P, s["exp_avg"], s["exp_avg_sq"], h, corrected=False, factors=factors)
        return ops.rotate_back(P, s.bases)


class KLShampoo(PreconditionedOptimizer):
    """KL-Shampoo (Lin et al., 2025), as its authors' code computes it, without grafting.

    The first step only starts the factors: nothing moves, and t stays 0. There are no bias
    corrections; a basis makes one step of simultaneous iteration every F steps, its columns as they
    stand; weight decay is applied to the updated W: all as theirs. Other than theirs: all in
    float32; vectors are taken too; dimensions are merged, and cut above max_preconditioner_dim; for
    blocks of order 3 all eigenvalues are renewed at once from the old ones, where theirs go one
    mode after the other, the later ones seeing the new values of the earlier.

    Args:
        params: parameters, named parameters or groups, as torch's optimizers take them.
        lr: learning rate.
        betas: of the gradient's average, and of the factors S and their eigenvalues.
        eps: added to sqrt(lambda_1 (x) ... (x) lambda_k).
        weight_decay: decoupled, after the update: W <- (W - lr U) (1 - lr weight_decay).
        precondition_frequency: steps between QR iterations of the bases.
        eigenvalues: "ema": by an average of their own, as the authors'. "decomposition": diag(Q'SQ)
            when a basis is renewed, the other reading in public code.
        clamp: lambda^-1/2 is at most max(10, min(d, 4000)), and lambda set accordingly.

    The other arguments are :class:`~.eshampoo.EShampoo`'s; vectors with one_dim="adam" go by
    AdamW as everywhere here.

    Raises:
        ValueError: as :class:`~.eshampoo.EShampoo`.
    """

    _rule: type[KLShampooRule] = KLShampooRule

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,  # alpha
        betas: tuple[float, float] = (0.9, 0.98),  # beta_1, beta_2
        eps: float = 1e-8,  # epsilon
        weight_decay: float = 1e-2,  # lambda
        precondition_frequency: int = 10,  # F
        *,
        eigenvalues: Eigenvalues = "ema",
        clamp: bool = True,
        one_dim: OneDim = "full",
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
            eigenvalues=eigenvalues,
            clamp=clamp,
            one_dim=one_dim,
            small_matrices=small_matrices,
            max_preconditioner_dim=max_preconditioner_dim,
            matmul_precision=matmul_precision,
            nonfinite_gradients=nonfinite_gradients,
            nonfinite_limit=nonfinite_limit,
        )
        super().__init__(
            params,
            self._rule(eigenvalues, clamp),
            defaults,
            fixed=("eigenvalues", "clamp"),
            solver=Solver(
                method="qr", max_iterations=1, sort=False, workspace_mib=eigen_workspace_mib
            ),
            cuda_graph=cuda_graph,
            process_group=process_group,
            sharding=sharding,
        )


class KLSOAP(KLShampoo):
    """KL-SOAP (Lin et al., 2025), as its authors' code computes it: Adam, without bias corrections,
    in the eigenbasis of KL-Shampoo's factors.

    Arguments, errors, and what is other than the authors': :class:`KLShampoo`'s; eps is added to
    sqrt(D).
    """

    _rule = KLSOAPRule
