"""Attribution: which heads and channels carry safety, and the freeze plan that follows from it."""

from .builder import LABELS, MaskBuilder, UnitLabels, UnitSelection, read_labels
from .scores import SetScores, UnitScores, encode_pairs, score_units
from .units import Family, UnitLayout, find_units, register_family

__all__ = [
    "LABELS",
    "Family",
    "MaskBuilder",
    "SetScores",
    "UnitLabels",
    "UnitLayout",
    "UnitScores",
    "UnitSelection",
    "encode_pairs",
    "find_units",
    "read_labels",
    "register_family",
    "score_units",
]
