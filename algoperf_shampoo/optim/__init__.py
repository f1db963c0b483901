"""The optimizers. Imports torch and the standard library, nothing else of this project."""

from .adamw import AdamW
from .eigen.solver import Solver
from .eshampoo import EShampoo
from .kl_shampoo import KLSOAP, KLShampoo
from .optimizer import PreconditionedOptimizer
from .shampoo import Shampoo
from .shampoo2 import Shampoo2Trace
from .shampoo_adaptive import ShampooAdaptive
from .soap import SOAP

__all__ = [
    "KLSOAP",
    "SOAP",
    "AdamW",
    "EShampoo",
    "KLShampoo",
    "PreconditionedOptimizer",
    "Shampoo",
    "Shampoo2Trace",
    "ShampooAdaptive",
    "Solver",
]
