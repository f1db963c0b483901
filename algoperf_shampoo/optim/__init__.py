"""The optimizers. Imports torch and the standard library, nothing else of this project."""

from .eigen.solvers import Solver
from .kronecker import Kronecker, adamw, eshampoo, shampoo_grafting

__all__ = ["Kronecker", "Solver", "adamw", "eshampoo", "shampoo_grafting"]
