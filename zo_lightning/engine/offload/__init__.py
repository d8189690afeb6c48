"""Weights that live in files, and are in memory block by block while they are used."""

from zo_lightning.engine.offload.disk import DiskTier
from zo_lightning.engine.offload.parcels import Parcel, parcels_of
from zo_lightning.engine.offload.sources import open_weights

__all__ = ["DiskTier", "Parcel", "open_weights", "parcels_of"]
