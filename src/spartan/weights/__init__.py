"""Prunable weights of a model, and the sparsity patterns that divide them into units."""

from spartan.weights.patterns import NM, Block, Channel, Pattern, Unstructured
from spartan.weights.prunable import Prunable, find_prunable

__all__ = ["NM", "Block", "Channel", "Pattern", "Prunable", "Unstructured", "find_prunable"]
