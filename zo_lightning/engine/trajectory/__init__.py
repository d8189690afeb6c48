"""The step log: every step appended as a few bytes; replayed, verified, undone and exported from them."""

from zo_lightning.engine.journal import StepRecord
from zo_lightning.engine.trajectory.atomic import replacing, write_bytes
from zo_lightning.engine.trajectory.export import FineTune, apply, export, load
from zo_lightning.engine.trajectory.fingerprint import fingerprint, frozen_fingerprint, trained_fingerprint
from zo_lightning.engine.trajectory.frames import LogError
from zo_lightning.engine.trajectory.keeper import Trajectory
from zo_lightning.engine.trajectory.log import Log, read_log
from zo_lightning.engine.trajectory.records import Checkpoint, End, Mark, ParameterEntry, Segment
from zo_lightning.engine.trajectory.replay import Verification, heal, replay, undo, verify
from zo_lightning.engine.trajectory.weights import load_base, save_base
from zo_lightning.engine.trajectory.writer import LogWriter
from zo_lightning.engine.updates import GroupSettings as Settings

__all__ = [
    "Checkpoint",
    "End",
    "FineTune",
    "Log",
    "LogError",
    "LogWriter",
    "Mark",
    "ParameterEntry",
    "Segment",
    "Settings",
    "StepRecord",
    "Trajectory",
    "Verification",
    "apply",
    "export",
    "fingerprint",
    "frozen_fingerprint",
    "heal",
    "load",
    "load_base",
    "read_log",
    "replacing",
    "replay",
    "save_base",
    "trained_fingerprint",
    "undo",
    "verify",
    "write_bytes",
]
