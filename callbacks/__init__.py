"""Callbacks for both hosts, imported as `zo_lightning.callbacks`."""

from zo_lightning.callbacks.base import Run, ZOCallback, zo_callbacks
from zo_lightning.callbacks.generation_objective import GenerationObjective
from zo_lightning.callbacks.metric_objective import MetricObjective
from zo_lightning.callbacks.monitor import ZOMonitor
from zo_lightning.callbacks.prefix_init import PrefixInit
from zo_lightning.callbacks.rank_equality import RankEquality
from zo_lightning.callbacks.ranking_objective import RankingObjective
from zo_lightning.callbacks.sparse_mask import SparseMask
from zo_lightning.callbacks.trajectory_log import TrajectoryLog
from zo_lightning.callbacks.weight_offload import WeightOffload

__all__ = [
    "GenerationObjective",
    "MetricObjective",
    "PrefixInit",
    "RankEquality",
    "RankingObjective",
    "Run",
    "SparseMask",
    "TrajectoryLog",
    "WeightOffload",
    "ZOCallback",
    "ZOMonitor",
    "zo_callbacks",
]
