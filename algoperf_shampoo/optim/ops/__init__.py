"""What rules compute, in operations that are right on every device: :class:`.base.Operations`."""

from .base import Operations
from .basis_change import BasisChange
from .values import Hyper, ModeVectors, Operators, State, Value, bias_corrections

__all__ = [
    "BasisChange",
    "Hyper",
    "ModeVectors",
    "Operations",
    "Operators",
    "State",
    "Value",
    "bias_corrections",
]
