"""What arguments of the optimizers may be, in types."""

from __future__ import annotations

from typing import Literal

from .eigen.solver import Solver

Eigensolver = Literal["eigh", "warm", "qr"] | Solver
OneDim = Literal["full", "adam", "only"]
SmallMatrices = Literal["vector", "matrix"]
MatmulPrecision = Literal["highest", "high"]
NonFinite = Literal["skip", "propagate"]
Noise = Literal["drop", "keep"]
Grafting = Literal["adam"] | None
Sharding = Literal["auto", "on", "off"]


def solver_of(eigensolver: Eigensolver, workspace_mib: int | None) -> Solver:
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
