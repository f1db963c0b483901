"""The optimizers. Imports torch and the standard library, nothing else of this project."""

from .kronecker import Kronecker, adamw, eshampoo, shampoo_grafting

__all__ = ["Kronecker", "adamw", "eshampoo", "shampoo_grafting"]
