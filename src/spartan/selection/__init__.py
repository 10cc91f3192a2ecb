"""Score + cost + budget → hard mask or soft mask. Knows nothing of modules or optimizers."""

from spartan.selection.hard import hard_topk
from spartan.selection.soft import soft_topk

__all__ = ["hard_topk", "soft_topk"]
