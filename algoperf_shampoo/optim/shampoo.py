"""Shampoo, with Adam grafting as the winning AlgoPerf submission runs it (Algorithm 3), and
without."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .blocks.layout import Stack
from .ops import Hyper, Operations, State, Value, bias_corrections
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
from .rule import Rule


class _InverseRoots(Rule):
    """A rule whose operators are roots L^-e, e = exponent_multiplier / (2k) for blocks of order k.

    Args:
        eps: epsilon added to the factors' eigenvalues.
        grafting_eps: Adam's epsilon.
    """

    roots = True
    orthogonal = False
    adam_eps = "grafting_eps"

    def __init__(self, eps: float, grafting_eps: float, exponent_multiplier: float = 1.0) -> None:
        self.eps = eps
        self.grafting_eps = grafting_eps
        self.exponent_multiplier = exponent_multiplier

    def operator(
        self, eigenvalues: Tensor, eigenvectors: Tensor, order: Tensor, correction: Tensor
    ) -> Tensor:
        exponent = self.exponent_multiplier / (2 * order)
        with matmul_precision("highest"):
            values = eigenvalues / correction[:, None]
            return inverse_root(values, eigenvectors, exponent, self.eps)


class GraftedShampoo(_InverseRoots):
    """U = S ||A|| / (||S|| + 1e-16), S = L^-1/4 M^ R^-1/4, A = Adam's direction; norms per block.

    Algorithm 3: L and R learn as in :meth:`.Rule.accumulate`, their roots are ``operator`` above.
    Pure Adam before the first roots.
    """

    def direction(self, G: Value, s: State, h: Hyper, ops: Operations) -> Value:
        # NAdam's numerator needs the gradient, whose place Adam's direction A takes.
        N = ops.copy(G, lambda stack: stack.based)
        A = G
        ops.adam(A, s["exp_avg"], s["exp_avg_sq"], h._replace(eps=self.grafting_eps))
        if not N.stacks:
            return A
        # The bias correction of M scales S alone, and the norm takes it out again.
        numerator(N, s, h, ops)
        some = [i for i, stack in enumerate(A.stacks) if stack.based]
        lengths, tensors = ops.norm(A), A.tensors()
        lengths = [lengths[i] for i in some]
        # Where some rows' first root is still to come, those stay with Adam.
        adams = [None if all(A.stacks[i].ready) else tensors[i].clone() for i in some]
        S = ops.rotate(N, s.roots)
        lengths_of_S = torch._foreach_add(ops.norm(S), 1e-16)
        ops.scale(S, torch._foreach_div(lengths, lengths_of_S))
        with ops.write(S) as tensors:
            for stack, tensor, a in zip(S.stacks, tensors, adams, strict=True):
                if a is not None:
                    rows = stack.ready_rows()
                    tensor.copy_(a.index_copy_(0, rows, tensor[rows]))
        return S.over(A)


class UngraftedShampoo(_InverseRoots):
    """U = L^-1/4 M^ R^-1/4, the roots being the identity before the first ones.

    exp_avg is M; no second moment is kept, but for blocks that Adam takes.
    """

    moments = ("exp_avg",)

    def direction(self, G: Value, s: State, h: Hyper, ops: Operations) -> Value:
        ops.ema(s["exp_avg"], G, h.beta1)
        numerator(G, s, h, ops)
        with ops.write(G) as tensors:
            for stack, x in zip(G.stacks, tensors, strict=True):
                x.div_(bias_corrections(stack, h)[0])
        return ops.rotate(G, s.roots)


def _norm_ratios(stack: Stack, beta2: float, eps: float) -> list[float]:
    """||L^-1/4 M R^-1/4|| / ||M / (sqrt(D^) + eps)|| of each row that has roots."""
    M, D = stack.state["exp_avg"], stack.state["exp_avg_sq"]
    A = M / ((D / stack.bias_correction(beta2)).sqrt() + eps)
    S = M
    with matmul_precision("highest"):
        for mode, root in enumerate(stack.operators, start=1):
            S = torch.einsum("b...i,bji->b...j", S.movedim(mode, -1), root).movedim(-1, mode)
    lengths = [x.flatten(1).norm(dim=1) for x in (S, A)]
    return (lengths[0] / lengths[1])[stack.ready_rows()].tolist()


def numerator(x: Value, s: State, h: Hyper, ops: Operations) -> None:
    """The gradient x becomes M, or beta1 M + (1 - beta1) G with ``nadam``."""
    averages = {id(stack): m for stack, m in s["exp_avg"].pairs()}
    with ops.write(x) as tensors:
        for stack, tensor in zip(x.stacks, tensors, strict=True):
            m = averages[id(stack)]
            tensor.lerp_(m, h.beta1) if h.nadam else tensor.copy_(m)


class Shampoo(PreconditionedOptimizer):
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
        grafting: Grafting = "adam",
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
        sharding: Sharding = "auto",
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
            solver=solver_of(eigensolver, eigen_workspace_mib),
            cuda_graph=cuda_graph,
            process_group=process_group,
            sharding=sharding,
        )

    @torch.no_grad()
    def norm_ratios(self) -> list[tuple[tuple[int, ...], float]]:
        """Shape of each block that has roots, and the norm of Shampoo's direction over Adam's, both
        of the moments as they are: what grafting divides by. [] without grafting, which keeps no D.
        Reads from the device.
        """
        found = []
        for group, options in zip(self._groups, self.param_groups, strict=True):
            for rule, stacks in group.rules:
                if isinstance(rule, GraftedShampoo):
                    for stack in (s for s in stacks if s.based):
                        ratios = _norm_ratios(stack, options["betas"][1], rule.grafting_eps)
                        found += [(stack.shape, ratio) for ratio in ratios]
        return found
