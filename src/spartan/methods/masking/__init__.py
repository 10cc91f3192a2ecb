"""What an author of a masking method imports: contract, state, selection, schedules.

A method is one file in this folder, one line in `spartan.methods.registry`, and one row in the
contract test; see "Add a masking method" in the docs.
"""

from spartan.errors import MethodError
from spartan.kernels import Scores, masks_of
from spartan.methods.masking.contract import MaskingMethod, mask_gradients, scale_gradients
from spartan.methods.masking.groups import (
    BudgetGroup,
    Competition,
    RowCompetition,
    by_rows,
    competitions_of,
    keep_counts,
    keep_largest,
    require_finite,
)
from spartan.methods.masking.masked_weight import MaskedWeight
from spartan.methods.masking.state import Forecast, GroupState, WeightState, unsaved
from spartan.schedules import check_fraction, check_order, interpolate, progress
from spartan.selection.hard import find_cutoff, select_rows

__all__ = [
    "BudgetGroup",
    "Competition",
    "Forecast",
    "GroupState",
    "MaskedWeight",
    "MaskingMethod",
    "MethodError",
    "RowCompetition",
    "Scores",
    "WeightState",
    "by_rows",
    "check_fraction",
    "check_order",
    "competitions_of",
    "find_cutoff",
    "interpolate",
    "keep_counts",
    "keep_largest",
    "mask_gradients",
    "masks_of",
    "progress",
    "require_finite",
    "scale_gradients",
    "select_rows",
    "unsaved",
]
