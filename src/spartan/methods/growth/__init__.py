"""What an author of a growth method needs: the contract, what it is given, and common parts."""

from spartan.kernels.key_lists import is_in
from spartan.methods.growth.contract import (
    AnnealedGrowth,
    GrowingLayer,
    GrowthMethod,
    averaged,
    largest,
    untied,
)

__all__ = [
    "AnnealedGrowth",
    "GrowingLayer",
    "GrowthMethod",
    "averaged",
    "is_in",
    "largest",
    "untied",
]
