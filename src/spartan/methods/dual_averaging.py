r"""Dual averaging, or Top-KAST (Jayakumar et al., NeurIPS 2020).

The forward pass uses the top |θ| only; a larger set receives gradients:

    A = top k of |θ|,  B = top k_B of |θ|,  A ⊆ B
    w = θ · 1_A                      forward
    dL/dθ = G · 1_B                  straight-through; 1 everywhere for a dense backward pass

so pruned weights keep accumulating gradients and enter A when they have grown. The penalty that
Top-KAST puts on θ is the weight decay of the user's optimizer.

Nothing but that decay holds pruned weights back. Under a global budget, at high sparsity and with
norms between the layers, whole layers can lose all their weights (`benchmarks/cifar10.py` at 98 %);
allocate per layer then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from spartan.errors import MethodError
from spartan.methods.base import Method, mask_gradients
from spartan.methods.groups import Contest, Group, contests_of, keep_largest
from spartan.methods.sites import Site
from spartan.schedules import check_annealing, check_fraction, check_order, progress
from spartan.selection.hard import find_cut, select_rows


@dataclass(frozen=True)
class DualAveraging(Method):
    """Hard top-k forward, straight-through gradients to a larger set.

    Attributes:
        backward_density: Fraction of the units that receive gradients; 1.0 is dense.
        warmup: Fraction of the run over which the density falls from 1 to the target.
        finetune: Last fraction of the run: the masks are fixed, and only kept weights train.
        annealing: Shape of the density schedule.

    Raises:
        MethodError: A setting is out of range.

    Source: Jayakumar et al., "Top-KAST: Top-K Always Sparse Training", NeurIPS 2020; with
    `backward_density=1` the dual averaging baseline of Tai et al., NeurIPS 2022.
    """

    backward_density: float = 1.0
    warmup: float = 0.2
    finetune: float = 0.2
    annealing: Literal["linear", "cosine"] = "linear"

    checks_weights: ClassVar[bool] = True
    name: ClassVar[str] = "dual-averaging"
    summary: ClassVar[str] = (
        "Top-KAST: moderate sparsity, or a budget for each layer; no soft masks"
    )
    paper: ClassVar[str] = "Jayakumar et al., NeurIPS 2020"
    step_cost: ClassVar[str] = "two to three passes over the weights, native on the CPU"

    def __post_init__(self) -> None:
        if not 0 < self.backward_density <= 1:
            raise MethodError(f"backward_density={self.backward_density} must lie in (0, 1].")
        check_fraction("warmup", self.warmup)
        check_fraction("finetune", self.finetune)
        check_order(self.warmup, self.finetune)
        check_annealing(self.annealing)

    def moves_masks(self, step: int, total_steps: int) -> bool:
        return step <= self._last_update(total_steps)

    def progress(self, step: int, total_steps: int) -> float:
        if step >= total_steps:
            return 1.0
        return progress(step, int(self.warmup * total_steps), self.annealing)

    def select(self, groups: Sequence[Group], step: int, total_steps: int) -> None:
        contests = contests_of(groups, self.progress(step, total_steps))
        keep_largest(contests)
        if self.backward_density < 1.0:
            for contest in contests:
                self._select_backward(contest)

    def _select_backward(self, contest: Contest) -> None:
        share = contest.group.share
        wider = max(contest.budget, share.of(self.backward_density))
        masks = (
            [select_rows(site.magnitudes(), round(wider)) for site in contest.sites]
            if share.rows
            else contest.masks(find_cut(contest.scores, wider))
        )
        for site, mask in zip(contest.sites, masks, strict=True):
            site.tensors["backward"] = mask

    def pull_back(self, group: Group, sites: Sequence[Site], step: int, total_steps: int) -> None:
        if step >= self._last_update(total_steps):
            mask_gradients(sites, [site.mask for site in sites])
        elif self.backward_density < 1.0:
            mask_gradients(sites, [site.tensors["backward"] for site in sites])

    def _last_update(self, total_steps: int) -> int:
        return total_steps - int(self.finetune * total_steps)
