"""Which weights are trained: rules that choose them, and the mask of a run."""

from zo_lightning.engine.masks.parts import Blockwise, HalfLayers, LayerSampling, Structured, Where
from zo_lightning.engine.masks.plan import RULES, Mask
from zo_lightning.engine.masks.rules import LargeWeights, MaskRule, NofM, Random, SmallWeights
from zo_lightning.engine.masks.scored import PrincipalWeights, Sensitive
from zo_lightning.engine.masks.state import Masks

__all__ = [
    "RULES",
    "Blockwise",
    "HalfLayers",
    "LargeWeights",
    "LayerSampling",
    "Mask",
    "MaskRule",
    "Masks",
    "NofM",
    "PrincipalWeights",
    "Random",
    "Sensitive",
    "SmallWeights",
    "Structured",
    "Where",
]
