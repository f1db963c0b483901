"""The optimizers as a user holds them: torch.optim classes, the paper's symbols beside arguments.

Their defaults of lr, betas, eps and weight_decay are torch.optim.AdamW's. All options but those of
the last lines (from ``eigensolver`` on) stand in ``param_groups``; a group may set its own, and lr,
betas, eps, weight_decay, nadam, precondition_frequency, tau and matmul_precision may change between
steps.
"""

from __future__ import annotations

from typing import Literal

import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .eigen.solvers import Solver
from .kronecker import Kronecker
from .preconditioners import Adam, GraftedShampoo, UngraftedShampoo
from .preconditioners import EShampoo as EShampooRule

Eigensolver = Literal["eigh", "warm"] | Solver
OneDim = Literal["full", "adam"]
SmallMatrices = Literal["vector", "matrix"]
MatmulPrecision = Literal["highest", "high"]


class EShampoo(Kronecker):
    """Eigenvalue-corrected Shampoo (Algorithm 2): Adam in the eigenbasis of Shampoo's factors.

    Before the first basis, at step F, it is AdamW (NAdamW).

    Args:
        params: parameters, named parameters or groups, as torch's optimizers take them.
        lr: learning rate.
        betas: of the gradient's average, and of all second moments: D and the factors L and R.
        eps: added to sqrt(D).
        weight_decay: decoupled, W <- W - lr (U + weight_decay W).
        precondition_frequency: steps between checks of the eigenbases.
        tau: a basis is computed anew where the left side of Eq. 11 exceeds tau; 0: at every check.
        nadam: numerator beta1 M + (1 - beta1) G instead of M, as in AlgoPerf's NAdamW.
        one_dim: vectors by "full"-matrix Adam in its eigenbasis, or by "adam", which costs nothing.
        small_matrices: a parameter with at most max_preconditioner_dim entries becomes one "vector"
            with one factor (the paper's footnote 8), or stays a "matrix" with two.
        max_preconditioner_dim: larger dimensions are cut into pieces of this size.
        matmul_precision: of rotations on a GPU, "highest" (accurate to float32) or "high" (inputs
            rounded to 11 bits, as in TF32); statistics and criterion are always accurate to
            float32.
        eigensolver: "eigh" (exact), "warm" (iterated from the old basis), or a :class:`Solver`.
        eigen_workspace_mib: bound on the memory a refresh takes anew, 8 unless given.
        cuda_graph: on a GPU, replay steps with all gradients there as recorded graphs.
        process_group: set when its processes hold replicas that see equal gradients; then they
            decide alike which bases to compute anew.

    Raises:
        ValueError: an option out of range (named, with its range), or a parameter that is empty,
            sparse or not of real floating-point numbers (named by its number).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,  # alpha
        betas: tuple[float, float] = (0.9, 0.999),  # beta_1, beta_2
        eps: float = 1e-8,  # epsilon
        weight_decay: float = 1e-2,  # lambda
        precondition_frequency: int = 100,  # F
        tau: float = 0.0,  # tau
        *,
        nadam: bool = False,
        one_dim: OneDim = "full",
        small_matrices: SmallMatrices = "vector",
        max_preconditioner_dim: int = 1024,
        matmul_precision: MatmulPrecision = "highest",
        eigensolver: Eigensolver = "eigh",
        eigen_workspace_mib: int | None = None,
        cuda_graph: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            precondition_frequency=precondition_frequency,
            tau=tau,
            nadam=nadam,
            one_dim=one_dim,
            small_matrices=small_matrices,
            max_preconditioner_dim=max_preconditioner_dim,
            matmul_precision=matmul_precision,
        )
        super().__init__(
            params,
            EShampooRule(),
            defaults,
            solver=_solver(eigensolver, eigen_workspace_mib),
            cuda_graph=cuda_graph,
            process_group=process_group,
        )


class Shampoo(Kronecker):
    """Shampoo, its step size grafted from Adam (Algorithm 3) or its own.

    With grafting it is AdamW (NAdamW) before the first inverse roots, at step F; without, the
    roots are the identity until then, so give a small F.

    Args:
        params: parameters, named parameters or groups, as torch's optimizers take them.
        lr: learning rate.
        betas: of the gradient's average, and of all second moments: D and the factors L and R.
        eps: added to the factors' eigenvalues before the root.
        weight_decay: decoupled, W <- W - lr (U + weight_decay W).
        precondition_frequency: steps between roots.
        grafting: "adam": every block's update gets the norm of Adam's. None: it stays
            L^(-1/4) M R^(-1/4), all bias-corrected, the exponent being 1 / (2k) for k factors.
        grafting_eps: added to Adam's sqrt(D).
        exponent_multiplier: multiplies the exponents.
        nadam: numerator beta1 M + (1 - beta1) G instead of M, as in AlgoPerf's NAdamW.

    The other arguments are :class:`EShampoo`'s.

    Raises:
        ValueError: as :class:`EShampoo`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,  # alpha
        betas: tuple[float, float] = (0.9, 0.999),  # beta_1, beta_2
        eps: float = 1e-8,  # epsilon
        weight_decay: float = 1e-2,  # lambda
        precondition_frequency: int = 100,  # F
        *,
        grafting: Literal["adam"] | None = "adam",
        grafting_eps: float = 1e-8,
        exponent_multiplier: float = 1.0,
        nadam: bool = False,
        one_dim: OneDim = "full",
        small_matrices: SmallMatrices = "vector",
        max_preconditioner_dim: int = 1024,
        matmul_precision: MatmulPrecision = "highest",
        eigensolver: Eigensolver = "eigh",
        eigen_workspace_mib: int | None = None,
        cuda_graph: bool = True,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            precondition_frequency=precondition_frequency,
            grafting=grafting,
            grafting_eps=grafting_eps,
            exponent_multiplier=exponent_multiplier,
            nadam=nadam,
            one_dim=one_dim,
            small_matrices=small_matrices,
            max_preconditioner_dim=max_preconditioner_dim,
            matmul_precision=matmul_precision,
        )
        rule = (
            UngraftedShampoo(eps, grafting_eps, exponent_multiplier)
            if grafting is None
            else GraftedShampoo(eps, grafting_eps, exponent_multiplier)
        )
        super().__init__(
            params,
            rule,
            defaults,
            fixed=("eps", "grafting", "grafting_eps", "exponent_multiplier"),
            solver=_solver(eigensolver, eigen_workspace_mib),
            cuda_graph=cuda_graph,
            process_group=process_group,
        )


class AdamW(Kronecker):
    """AdamW, or with ``nadam`` AlgoPerf's NAdamW: the baseline, on the same step loop.

    Args:
        params: parameters, named parameters or groups, as torch's optimizers take them.
        lr, betas, eps, weight_decay: as torch.optim.AdamW's.
        nadam: numerator beta1 M + (1 - beta1) G instead of M.
        cuda_graph: on a GPU, replay steps with all gradients there as recorded graphs.

    Raises:
        ValueError: as :class:`EShampoo`.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,  # alpha
        betas: tuple[float, float] = (0.9, 0.999),  # beta_1, beta_2
        eps: float = 1e-8,  # epsilon
        weight_decay: float = 1e-2,  # lambda
        *,
        nadam: bool = False,
        cuda_graph: bool = True,
    ) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, nadam=nadam)
        super().__init__(params, Adam(), defaults, cuda_graph=cuda_graph)


def _solver(eigensolver: Eigensolver, workspace_mib: int | None) -> Solver:
    """
    Raises:
        ValueError: an unknown method, a workspace < 1, or one beside a Solver, which has its own.
    """
    if isinstance(eigensolver, Solver):
        if workspace_mib is not None:
            raise ValueError("eigen_workspace_mib: the eigensolver given has workspace_mib already")
        return eigensolver
    if workspace_mib is None:
        return Solver(method=eigensolver)
    return Solver(method=eigensolver, workspace_mib=workspace_mib)
