"""Weights that live in files or in CPU memory, and come to where they are computed with block by block."""

from zo_lightning.engine.offload.disk import DiskTier
from zo_lightning.engine.offload.parcels import Parcel, parcels_of
from zo_lightning.engine.offload.sources import open_weights
from zo_lightning.engine.offload.stream import Stream, Traffic, Update

__all__ = ["DiskTier", "Parcel", "Stream", "Traffic", "Update", "open_weights", "parcels_of"]
