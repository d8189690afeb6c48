"""Callbacks for both hosts, imported as `zo_lightning.callbacks`."""

from zo_lightning.callbacks.base import Run, ZOCallback, zo_callbacks
from zo_lightning.callbacks.monitor import ZOMonitor

__all__ = ["Run", "ZOCallback", "ZOMonitor", "zo_callbacks"]
