"""Eigenvalue-corrected Shampoo: Adam in the eigenbasis of Shampoo's factors (Algorithm 2)."""

from __future__ import annotations

from collections.abc import Iterator

import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .grafting import grafted
from .ops import BasisChange, Hyper, Operations, State, Value
from .optimizer import PreconditionedOptimizer
from .options import (
    Eigensolver,
    Grafting,
    MatmulPrecision,
    Noise,
    NonFinite,
    OneDim,
    Sharding,
    SmallMatrices,
    solver_of,
)
from .rule import Rule


class EShampooRule(Rule):
    """U = Q_L ((Q_L' M^ Q_R) / (sqrt(D^) + eps)) Q_R', D the average of (Q_L' G Q_R)^2 (Eq. 18).

    M is kept in the basis: rotating is linear, so the average of rotated gradients is the rotated
    average of gradients for as long as Q stands, and M is rotated over when Q changes.
    That saves one of the four rotations of a step and is Algorithm 2's update exactly (SOAP's
    code keeps M in the basis too, but there it is the algorithm).

    exp_avg is Q_L' M Q_R, exp_avg_sq is D. Before the first refresh Q = I and a step is AdamW's
    (NAdamW's) without any product. Coordinates that hold nothing but rounding take no step
    (:mod:`.noise`).
    """

    def __init__(self, basis_aware: bool = False) -> None:
        self.basis_aware = basis_aware

    def accumulate(self, G: Value, s: State, h: Hyper, ops: Operations) -> None:
        ops.gram_ema(G, h.beta2, 1 - h.beta2)  # line 5

    def direction(self, G: Value, s: State, h: Hyper, ops: Operations) -> Value:
        X = ops.rotate(G, s.bases)  # line 10
        ops.adam(X, s["exp_avg"], s["exp_avg_sq"], h, in_basis=True)  # lines 4, 11 and 12
        return ops.rotate_back(X, s.bases)  # line 13

    def rebase(self, s: State, change: BasisChange, ops: Operations) -> Iterator[None]:
        """M leaves the old basis and enters the new one; D stays where it is, by index (Algorithm
        2), or goes along with columns that a solver sorted. With ``basis_aware`` it becomes what
        Eq. 27 makes of it, a permutation being part of R (appendix D.2, which finds it hurts)."""
        old = change.old_operators() if self.basis_aware else None
        change.leave(s["exp_avg"])
        yield
        if old is None:
            change.permute(s["exp_avg_sq"])
        else:
            change.mix(s["exp_avg_sq"], old)
        change.enter(s["exp_avg"])


class EShampoo(PreconditionedOptimizer):
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
        one_dim: vectors by "full"-matrix Adam in its eigenbasis, or by "adam", which costs nothing;
            "only": vectors as with "full", and all others by Adam.
        small_matrices: a parameter with at most max_preconditioner_dim entries becomes one "vector"
            with one factor (the paper's footnote 8), or stays a "matrix" with two.
        max_preconditioner_dim: larger dimensions are cut into pieces of this size.
        matmul_precision: of rotations on a GPU, "highest" (accurate to float32) or "high" (inputs
            rounded to 11 bits, as in TF32); statistics and criterion are always accurate to
            float32.
        eigensolver: "eigh" (exact), "warm" (iterated from the old basis), "qr" (Algorithm 4), or a
            :class:`~.eigen.solver.Solver`.
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
            complete step; ``check_gradients()`` looks at any time.
        cuda_graph: on a GPU, replay steps with all gradients there as recorded graphs.
        process_group: set when its processes hold replicas that see equal gradients; then they
            decide alike which bases to compute anew, and every one of them must take every step.
        sharding: whether these share the work, each keeping the state of some blocks
            (:mod:`.sharding`): "on", "off", or "auto": if, by the shapes, a step saves more than
            gathering the directions takes. Saving needs :meth:`gather_state` on all of them first.
        grafting: for ablations, "adam": every block's update gets the norm of Adam's; None: it
            stays as it is.
        grafting_eps: added to Adam's sqrt(D).
        beta3: for ablations: of D; None: betas[1], which the factors keep.
        basis_aware: for ablations: D goes over to a new basis by Eq. 27 instead of staying as it
            is, by index.
        tau_later, tau_switch: for ablations: tau up to step tau_switch (of each parameter's own),
            then tau_later. None: tau all along.
        freeze_after: for ablations: no basis is computed anew after this step; None: never frozen.

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
        sharding: Sharding = "auto",
        grafting: Grafting = None,
        grafting_eps: float = 1e-8,
        beta3: float | None = None,  # beta_3
        basis_aware: bool = False,
        tau_later: float = 0.0,
        tau_switch: int | None = None,
        freeze_after: int | None = None,
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
            grafting=grafting,
            grafting_eps=grafting_eps,
            beta3=beta3,
            basis_aware=basis_aware,
            tau_later=tau_later,
            tau_switch=tau_switch,
            freeze_after=freeze_after,
        )
        super().__init__(
            params,
            grafted(EShampooRule(basis_aware), grafting, grafting_eps),
            defaults,
            fixed=("basis_aware", "grafting", "grafting_eps"),
            solver=solver_of(eigensolver, eigen_workspace_mib),
            cuda_graph=cuda_graph,
            process_group=process_group,
            sharding=sharding,
        )
