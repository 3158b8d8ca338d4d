"""Attribution: which heads and channels carry safety, and the freeze plan that follows from it."""

from .batches import encode_pairs
from .builder import MaskBuilder
from .families import Bank, Family, register_family
from .scores import METHODS, SetScores, UnitScores, refusal_margins, score_units
from .selections import LABELS, Stability, UnitLabels, UnitRanking, UnitSelection, stability
from .sources import plan_from_neurons, plan_from_weights, read_labels, scores_from, scores_from_weights, units_from
from .units import Piece, Reader, UnitLayout, find_units

__all__ = [
    "LABELS",
    "METHODS",
    "Bank",
    "Family",
    "MaskBuilder",
    "Piece",
    "Reader",
    "SetScores",
    "Stability",
    "UnitLabels",
    "UnitLayout",
    "UnitRanking",
    "UnitScores",
    "UnitSelection",
    "encode_pairs",
    "find_units",
    "plan_from_neurons",
    "plan_from_weights",
    "read_labels",
    "refusal_margins",
    "register_family",
    "score_units",
    "scores_from",
    "scores_from_weights",
    "stability",
    "units_from",
]
