"""One file per rule."""

from .adam import Adam
from .base import Hyper, Rule
from .eshampoo import EShampoo
from .shampoo import GraftedShampoo, UngraftedShampoo

__all__ = ["Adam", "EShampoo", "GraftedShampoo", "Hyper", "Rule", "UngraftedShampoo"]
