"""Weights that live in files or in CPU memory, and are where they are computed with block by block, while they are used."""

from zo_lightning.engine.offload.buffers import InBuffers, Traffic
from zo_lightning.engine.offload.choose import Offload
from zo_lightning.engine.offload.disk import DiskTier
from zo_lightning.engine.offload.parcels import Parcel, parcels_of
from zo_lightning.engine.offload.sources import open_weights

__all__ = ["DiskTier", "InBuffers", "Offload", "Parcel", "Traffic", "open_weights", "parcels_of"]
