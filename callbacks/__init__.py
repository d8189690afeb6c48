"""Callbacks for both hosts, imported as `zo_lightning.callbacks`."""

from zo_lightning.callbacks.base import Run, ZOCallback, zo_callbacks
from zo_lightning.callbacks.monitor import ZOMonitor
from zo_lightning.callbacks.sparse_mask import SparseMask
from zo_lightning.callbacks.trajectory_log import TrajectoryLog

__all__ = ["Run", "SparseMask", "TrajectoryLog", "ZOCallback", "ZOMonitor", "zo_callbacks"]
