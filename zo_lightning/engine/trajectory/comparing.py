"""Whether a log is of this run: what a segment says about an optimizer, what differs, which checkpoints it names."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zo_lightning.engine.estimators import ADDED
from zo_lightning.engine.noise.compiling import available
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.trajectory.fingerprint import dtype_name
from zo_lightning.engine.trajectory.log import Log, read_log
from zo_lightning.engine.trajectory.records import LOST, ParameterEntry, Segment

if TYPE_CHECKING:
    from zo_lightning.engine.optimizer import ZOOptimizer

NAME = "trajectory.zolog"


def describe(optimizer: ZOOptimizer, fingerprint: str, frozen: str, base: str | None) -> Segment:
    """The segment that begins with the optimizer as it is now."""
    from zo_lightning import __version__

    residency = optimizer.residency
    device = next((one for one in residency.devices() if one.type != "cpu"), torch.device("cpu"))
    return Segment(
        step=optimizer.steps,
        seed=optimizer.seed,
        noise=optimizer.noise.text,
        estimator={"name": optimizer.estimator.name, "options": _options(optimizer.estimator)},
        rule={"name": optimizer.rule.name, "options": _options(optimizer.rule)},
        residency=residency.name,
        rounding="stochastic",
        compiled=available(device.type),
        device=str(device),
        versions={"zo_lightning": __version__, "torch": str(torch.__version__)},
        parameters=tuple(_entry(p) for p in residency.trained),
        fingerprint=fingerprint,
        frozen=frozen,
        base=base,
    )


def _entry(p: Trained) -> ParameterEntry:
    return ParameterEntry(p.name, p.shape, dtype_name(p.tensor.dtype), p.group, p.unit, p.least)


def _options(part: Any) -> dict[str, Any]:
    """Its fields; of those that came later only what is not as it was before."""
    if not dataclasses.is_dataclass(part) or isinstance(part, type):
        return {}
    before = {field.name for field in dataclasses.fields(part) if field.metadata.get(ADDED) and getattr(part, field.name) == field.default}
    return {name: value for name, value in dataclasses.asdict(part).items() if name not in before}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 100 else f"{text[:100]}..."


def differs(optimizer: ZOOptimizer, log: Log) -> str | None:
    """What of this run is not as the log has it at `optimizer.steps`; None where all is."""
    step = optimizer.steps
    begun = [segment for segment in log.segments if segment.step <= step]
    if not begun or step > log.end_step:
        return f"it holds the steps {log.segments[0].step} to {log.end_step}, and this run begins at step {step}"
    segment, own = begun[-1], describe(optimizer, "", "", None)
    for field in ("seed", "noise", "estimator", "rule", "rounding", "parameters"):
        there, here = getattr(segment, field), getattr(own, field)
        if there != here:
            return f"{field} differs ({_short(there)} there, {_short(here)} now)"
    if log.steps and bool(log.masks) != (optimizer.masks.mask is not None):
        return f"there was {'a' if log.masks else 'no'} mask there, and there is {'no' if log.masks else 'a'} mask now"
    if segment.residency != own.residency and "inplace" in (segment.residency, own.residency):
        return f"the weights were perturbed with weights={segment.residency!r} there and are with {own.residency!r} now"
    recorded = next((record for record in log.steps if record.step == step), None)
    settings = tuple(optimizer.settings())
    if recorded is not None and recorded.settings != settings:
        return f"step {step} was made with {_short(recorded.settings)} there and would be with {_short(settings)} now"
    return None


def check_same(optimizer: ZOOptimizer, folder: str | os.PathLike[str]) -> None:
    """Before a checkpoint replaces what the script has set: raise ValueError where the run in `folder` did not begin with the same."""
    path = Path(folder) / NAME
    if not path.exists():
        return
    log = read_log(path)
    problem = differs(optimizer, log) if log.segments[0].step == optimizer.steps else None
    if problem is not None:
        raise ValueError(
            f"The run in {folder} was cut off and has checkpoints to go on from, but it was another one: {problem}. Set it as it was, name "
            "the checkpoint to go on from (ckpt_path, resume_from_checkpoint), or begin anew, with TrajectoryLog(resume=False) or another "
            "folder."
        )


def noted_path(folder: Path, path: str) -> str:
    """A checkpoint's path as the log keeps it: relative where it lies in the log's folder, which may be moved."""
    if "://" in path:
        return path
    whole, root = os.path.abspath(path), os.path.abspath(folder)
    return os.path.relpath(whole, root).replace(os.sep, "/") if whole.startswith(os.path.join(root, "")) else whole


def newest_checkpoint(folder: str | os.PathLike[str], max_steps: int = -1, ended: bool = False) -> list[str]:
    """Paths of the checkpoints that the log of a run names, newest first; none for one that ended by itself, unless `ended`.

    Without those at the very end of the run or at `max_steps` (-1: no limit): hosts that begin there do not end as they would have, but
    with a step too many or without the end of the epoch.

    LogError for a damaged log.
    """
    path = Path(folder) / NAME
    if not path.exists():
        return []
    log = read_log(path)
    over = log.end is not None
    limit = min(log.end_step if over else sys.maxsize, max_steps if max_steps > 0 else sys.maxsize)
    if over and not ended:
        return []
    now = {record.path: record for record in log.checkpoints}  # a file may have been written over
    newest = sorted((r for r in now.values() if r.step < limit and r.host != LOST), key=lambda r: -r.step)
    return [r.path if "://" in r.path else os.path.join(os.path.abspath(folder), r.path) for r in newest]
