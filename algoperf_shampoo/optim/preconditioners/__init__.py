"""One file per rule."""

from ..ops import Hyper
from .adam import Adam
from .base import Rule
from .eshampoo import EShampoo
from .shampoo import GraftedShampoo, UngraftedShampoo

__all__ = ["Adam", "EShampoo", "GraftedShampoo", "Hyper", "Rule", "UngraftedShampoo"]
