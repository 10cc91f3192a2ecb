"""`Sparsifier`: keeps a model at its budget while an optimizer trains it."""

from spartan.sparsifier.freezing import freeze
from spartan.sparsifier.layer_summary import LayerSummary
from spartan.sparsifier.sparsifier import Sparsifier

__all__ = ["LayerSummary", "Sparsifier", "freeze"]
