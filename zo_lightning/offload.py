"""Train models that do not fit into memory: `weights=Offload()`, and models opened from safetensors files without being read."""

from zo_lightning.engine.offload import open_weights
from zo_lightning.engine.residency import Offload

__all__ = ["Offload", "open_weights"]
