"""The optimizers. Imports torch and the standard library, nothing else of this project."""

from .eigen.solvers import Solver
from .kronecker import Kronecker
from .optimizers import AdamW, EShampoo, Shampoo

__all__ = ["AdamW", "EShampoo", "Kronecker", "Shampoo", "Solver"]
