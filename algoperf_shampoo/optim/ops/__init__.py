"""What rules compute, in operations that are right on every device: :class:`.base.Operations`."""

from .base import Operations
from .basis_change import BasisChange
from .hyper import Hyper, bias_corrections
from .values import ModeVectors, Operators, State, Value

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
