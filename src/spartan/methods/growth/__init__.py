"""What an author of a growth method imports: contract, layers and what can be measured on them."""

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
