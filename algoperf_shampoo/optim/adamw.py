"""AdamW and AlgoPerf's NAdamW: for 1-D parameters (section 4.4) and as a baseline."""

from __future__ import annotations

from torch import Tensor
from torch.optim.optimizer import ParamsT

from .optimizer import PreconditionedOptimizer
from .options import NonFinite
from .rule import AdamRule


class AdamW(PreconditionedOptimizer):
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
        super().__init__(params, AdamRule(), defaults, cuda_graph=cuda_graph)
