"""Objectives without a gradient: what is observed at each point, and one value from the samples of all micro-batches and ranks."""

from zo_lightning.engine.objectives.base import Objective, Ramp, Samples, Scheduled, measured, scheduled
from zo_lightning.engine.objectives.generation import Generated, Generation
from zo_lightning.engine.objectives.oracles import FileOracle, Oracle, TerminalOracle
from zo_lightning.engine.objectives.ranking import Ranking
from zo_lightning.engine.objectives.samples import joined, kept, number, restored, without
from zo_lightning.engine.objectives.score import HOSTS_OWN, Score, is_hosts, is_metric

__all__ = [
    "HOSTS_OWN",
    "FileOracle",
    "Generated",
    "Generation",
    "Objective",
    "Oracle",
    "Ramp",
    "Ranking",
    "Samples",
    "Scheduled",
    "Score",
    "TerminalOracle",
    "is_hosts",
    "is_metric",
    "joined",
    "kept",
    "measured",
    "number",
    "restored",
    "scheduled",
    "without",
]
