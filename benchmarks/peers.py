"""Contenders of the benchmarks: ours, torch's AdamW, and public optimizers from a path given.

Peers are not part of this project and are not installed by it: check out
facebookresearch/optimizers and nikhilvyas/SOAP yourself and name the folders on the command line.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch

from algoperf_shampoo.optim import EShampoo, Shampoo

# The paper's point, as far as all contenders know it.
POINT: dict[str, Any] = dict(lr=1.4e-3, betas=(0.9747, 0.9749), weight_decay=2e-4)

# Largest dimension of a block, of all contenders that cut parameters into blocks.
BLOCKS = {"max_preconditioner_dim": 1024}

Build = Callable[[list[torch.nn.Parameter], int], torch.optim.Optimizer]


def ours(**settings: Any) -> Build:
    """EShampoo with the paper's point and ``settings``."""
    fixed = {**POINT, "nadam": True, **settings}
    return lambda params, F: EShampoo(params, precondition_frequency=F, **BLOCKS, **fixed)


def _check_only(params: list[torch.nn.Parameter], F: int) -> torch.optim.Optimizer:
    """Refreshes once, at step F; afterwards every check finds all factors good enough."""
    optimizer = ours()(params, F)
    steps = iter(range(1, F + 1))

    def after_step(*_: Any) -> None:
        if next(steps, F) == F:
            optimizer.param_groups[0]["tau"] = 0.999

    optimizer.register_step_post_hook(after_step)
    return optimizer


def contenders(meta: str | None, soap: str | None) -> dict[str, Build]:
    """Name -> how to build it for (parameters, F)."""
    table: dict[str, Build] = {
        "ours, fp32": ours(),
        "ours, 11-bit rotations": ours(matmul_precision="high"),
        "ours, fp32, warm": ours(eigensolver="warm"),
        "ours, 11-bit rotations, warm": ours(matmul_precision="high", eigensolver="warm"),
        "ours, fp32, 1 GiB workspace": ours(eigen_workspace_mib=1024),
        "ours, fp32, no graph": ours(cuda_graph=False),
        "ours, fp32, 1-D by Adam": ours(one_dim="adam"),
        "ours, fp32, check only": _check_only,
        "our Shampoo + grafting, fp32": lambda p, F: Shampoo(
            p, precondition_frequency=F, nadam=True, **BLOCKS, **POINT
        ),
        "torch AdamW": lambda p, F: torch.optim.AdamW(p, **POINT, fused=p[0].is_cuda or None),
    }
    if meta:
        table["public EShampoo"] = _meta(meta, "DefaultEigenvalueCorrectedShampooConfig")
    if soap:
        table["SOAP"] = _soap(soap)
    return table


def _meta(path: str, config: str) -> Build:
    sys.path.insert(0, path)
    module = importlib.import_module("distributed_shampoo")
    return _meta_with(module, getattr(module, config))


def _meta_with(module: Any, config: Any) -> Build:
    def build(params: list[torch.nn.Parameter], F: int) -> torch.optim.Optimizer:
        return module.DistributedShampoo(
            params,
            **POINT,
            epsilon=1e-8,
            **BLOCKS,
            precondition_frequency=F,
            grafting_config=None,
            preconditioner_config=config,
        )

    return build


def _soap(path: str) -> Build:
    sys.path.insert(0, path)
    module = importlib.import_module("soap")
    return lambda params, F: module.SOAP(
        params, **POINT, eps=1e-8, precondition_frequency=F, precondition_1d=True
    )


def adaptive_contenders(meta: str | None, tau: float) -> dict[str, Build]:
    """Name -> EShampoo with the adaptive criterion, for (parameters, F)."""
    table = {
        "ours, fp32": ours(tau=tau),
        "ours, 11-bit rotations": ours(tau=tau, matmul_precision="high"),
        "ours, fp32, warm": ours(tau=tau, eigensolver="warm"),
        "ours, 11-bit rotations, warm": ours(tau=tau, matmul_precision="high", eigensolver="warm"),
    }
    if meta:
        table["public EShampoo, eigh"] = _meta_adaptive(meta, "EighEigendecompositionConfig", tau)
        table["public EShampoo, QR"] = _meta_adaptive(
            meta, "QREigendecompositionConfig", tau, max_iterations=20
        )
    return table


def _meta_adaptive(path: str, config: str, tau: float, **settings: Any) -> Build:
    sys.path.insert(0, path)
    types = importlib.import_module("distributed_shampoo.preconditioner.matrix_functions_types")
    module = importlib.import_module("distributed_shampoo")
    solver = getattr(types, config)(tolerance=tau, **settings)
    chosen = module.EigenvalueCorrectedShampooPreconditionerConfig(
        amortized_computation_config=solver
    )
    return _meta_with(module, chosen)
