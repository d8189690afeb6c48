"""Noise as a function: z[i] = noise(seed, parameter key, i), and the kernels that add it to weights."""

from zo_lightning.engine.noise.base import Noise
from zo_lightning.engine.noise.changes import Change, Weights, apply_changes
from zo_lightning.engine.noise.gaussian import Gaussian
from zo_lightning.engine.noise.rademacher import Rademacher
from zo_lightning.engine.noise.sweep import Item, joins, sweep, sweep_both

NOISES: dict[str, object] = {"rademacher": Rademacher, "gaussian": Gaussian}

__all__ = ["NOISES", "Change", "Gaussian", "Item", "Noise", "Rademacher", "Weights", "apply_changes", "joins", "sweep", "sweep_both"]
