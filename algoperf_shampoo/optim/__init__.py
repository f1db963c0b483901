"""The optimizers. Imports torch and the standard library, nothing else of this project."""

from .adamw import AdamW
from .eigen.solver import Solver
from .eshampoo import EShampoo
from .optimizer import Kronecker
from .shampoo import Shampoo

__all__ = ["AdamW", "EShampoo", "Kronecker", "Shampoo", "Solver"]
