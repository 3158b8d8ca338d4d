"""Attribution: which heads, channels and single weights carry safety, and the freeze plan that follows from it."""

from .batches import encode_pairs
from .builder import MaskBuilder
from .families import Bank, Family, register_family
from .grains import Grains
from .scores import METHODS, SetScores, UnitScores, refusal_margins, score_units
from .selections import LABELS, Stability, UnitLabels, UnitRanking, UnitSelection, stability
from .sources import plan_from_neurons, plan_from_weights, read_labels, scores_from, scores_from_weights, units_from
from .units import Piece, Reader, UnitLayout, find_units
from .weights import WEIGHT_METHODS, SquaredGradients, WeightScores, WeightSelection, score_weights

__all__ = [
    "LABELS",
    "METHODS",
    "WEIGHT_METHODS",
    "Bank",
    "Family",
    "Grains",
    "MaskBuilder",
    "Piece",
    "Reader",
    "SetScores",
    "SquaredGradients",
    "Stability",
    "UnitLabels",
    "UnitLayout",
    "UnitRanking",
    "UnitScores",
    "UnitSelection",
    "WeightScores",
    "WeightSelection",
    "encode_pairs",
    "find_units",
    "plan_from_neurons",
    "plan_from_weights",
    "read_labels",
    "refusal_margins",
    "register_family",
    "score_units",
    "score_weights",
    "scores_from",
    "scores_from_weights",
    "stability",
    "units_from",
]
