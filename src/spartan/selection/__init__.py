"""Hard and soft top-k: masks from scores, costs and a budget; no modules or optimizers."""

from spartan.selection.hard import hard_topk
from spartan.selection.soft import soft_topk

__all__ = ["hard_topk", "soft_topk"]
