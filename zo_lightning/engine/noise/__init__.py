"""Noise as a function: z[i] = noise(seed, parameter key, i), and the kernels that add it to weights."""

from zo_lightning.engine.noise.base import Elementwise, Noise
from zo_lightning.engine.noise.basis import Basis
from zo_lightning.engine.noise.changes import Change, Weights, apply_changes
from zo_lightning.engine.noise.gaussian import Gaussian
from zo_lightning.engine.noise.low_rank import LowRank
from zo_lightning.engine.noise.naming import NOISES, as_noise
from zo_lightning.engine.noise.rademacher import Rademacher
from zo_lightning.engine.noise.shaped import Place, Shaped
from zo_lightning.engine.noise.sphere import Sphere
from zo_lightning.engine.noise.sweep import Item, joins, sweep, sweep_both

__all__ = [
    "NOISES",
    "Basis",
    "Change",
    "Elementwise",
    "Gaussian",
    "Item",
    "LowRank",
    "Noise",
    "Place",
    "Rademacher",
    "Shaped",
    "Sphere",
    "Weights",
    "apply_changes",
    "as_noise",
    "joins",
    "sweep",
    "sweep_both",
]
