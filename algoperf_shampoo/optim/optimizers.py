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
NonFinite = Literal["skip", "propagate"]
Noise = Literal["drop", "keep"]


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
        noise_directions: "drop": coordinates in the eigenbasis whose moment and D are the rounding
            of a step's own rotation take no step, see :mod:`.noise`; "keep": they do.
        noise_level: what counts as rounding, in units of eps_machine times the norm of the
            block's gradients. The default is twice what was seen; 4096 leaves out, besides,
            what weak directions of the gradients leak into the others.
        nonfinite_gradients: "skip": a parameter with an entry that is NaN, infinite or at least
            2^48 (2^496 in float64) keeps weight, moments and factors in this step, t goes on; see
            :mod:`.nonfinite`. "propagate": it is learnt from like any other.
        nonfinite_limit: so many such steps in a row raise a
            :class:`~.nonfinite.NonFiniteGradientError` at the next check of the bases, after a
            complete step; :meth:`~.kronecker.Kronecker.check_gradients` looks at any time.
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
        noise_directions: Noise = "drop",
        noise_level: float = 32.0,
        nonfinite_gradients: NonFinite = "skip",
        nonfinite_limit: int = 100,
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
            noise_directions=noise_directions,
            noise_level=noise_level,
            nonfinite_gradients=nonfinite_gradients,
            nonfinite_limit=nonfinite_limit,
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
    roots are the identity until then, so give a small F. The root of a factor that is all zero at a
    check is eps^(-1/2k) I, as in the paper's authors' code: with grafting, its blocks move along M
    by Adam's norm until the next check.

    Args:
        params: parameters, named parameters or groups, as torch's optimizers take them.
        lr: learning rate.
        betas: of the gradient's average, and of all second moments: D and the factors L and R.
        eps: added to the factors' eigenvalues before the root. With 0, directions whose eigenvalue
            is rounding (n eps_machine of the largest) take no step, and the root of zero is I.
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
        nonfinite_gradients: NonFinite = "skip",
        nonfinite_limit: int = 100,
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
            nonfinite_gradients=nonfinite_gradients,
            nonfinite_limit=nonfinite_limit,
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
        nonfinite_gradients, nonfinite_limit: as :class:`EShampoo`'s.
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
        nonfinite_gradients: NonFinite = "skip",
        nonfinite_limit: int = 100,
        cuda_graph: bool = True,
    ) -> None:
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            nadam=nadam,
            nonfinite_gradients=nonfinite_gradients,
            nonfinite_limit=nonfinite_limit,
        )
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
