"""What a masking run tells once: what starts at zero, and which layers died."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from spartan.methods.masking.contract import MaskingMethod
from spartan.methods.masking.groups import BudgetGroup
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.methods.masking.powerpropagation import Powerpropagation

# A layer this much sparser than its group has lost practically everything. Layers of one budget do
# differ: in the demo, 5 % in all, from 2.8 to 25 %.
_NEXT_TO_NOTHING = 0.05
_EXPECTED = 10  # units by the share of the group; of fewer, one that is left says nothing


def note_newborn(weights: Sequence[MaskedWeight], method: MaskingMethod, reached: bool) -> None:
    """Note which weights begin as nothing but zeros, before they compete with trained ones.

    Args:
        weights: All weights.
        method: The method that masks them.
        reached: Whether the budget holds from the very beginning.
    """
    for weight in weights:
        weight.newborn = not bool(torch.count_nonzero(weight.parameter))
    names = ", ".join(repr(weight.name) for weight in weights if weight.newborn)
    if not names:
        return
    if isinstance(method, Powerpropagation) and method.alpha > 1:
        warnings.warn(
            f"{names} begins as all zeros, which is a fixed point of 'powerpropagation': it never "
            "moves. Initialise it, exclude it, or take another method.",
            stacklevel=4,
        )
    elif reached and method.finds_masks:
        warnings.warn(
            f"{names} begins as all zeros, and the budget holds from the first step: the other "
            "weights take all of it. Exclude it, initialise it, or let the method warm up.",
            stacklevel=4,
        )


def warn_of_dead_layers(groups: Sequence[BudgetGroup], step: int) -> None:
    """Name the layers that keep nothing, or next to nothing, of what they had."""
    dead, dying = [], []
    for group in groups:
        share = group.kept / sum(weight.cost * weight.units for weight in group.weights)
        for weight in group.weights:
            expected = share * weight.units
            if weight.kept == 0:
                dead.append(repr(weight.name))
            elif weight.kept <= max(1, _NEXT_TO_NOTHING * expected) and expected >= _EXPECTED:
                dying.append(f"{weight.name!r} ({weight.kept:,} of {weight.units:,} units)")
    told = [f"Nothing is kept of {', '.join(dead)}"] if dead else []
    told += [f"Next to nothing is kept of {', '.join(dying)}"] if dying else []
    if told:
        warnings.warn(
            f"{'. '.join(told)} at step {step}. Weights can come back while masks move; if these "
            "do not, spread the budget with allocation='erk' or 'uniform', or exclude them.",
            stacklevel=3,
        )
