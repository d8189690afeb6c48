"""Weights in the folder of `Offload(folder)` and the log of the run: each parcel of a killed run is brought forward from its own stamp."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zo_lightning.engine.messages import say_once
from zo_lightning.engine.offload import DiskTier, Parcel
from zo_lightning.engine.offload.disk import Slot
from zo_lightning.engine.offload.parcels import FROZEN
from zo_lightning.engine.offload.stamps import Moment, Stamp
from zo_lightning.engine.residency import Offloaded
from zo_lightning.engine.trajectory.atomic import write_bytes
from zo_lightning.engine.trajectory.fingerprint import fingerprint
from zo_lightning.engine.trajectory.log import Log
from zo_lightning.engine.trajectory.weights import base_of, load_base, save_tensors

if TYPE_CHECKING:
    from zo_lightning.engine.optimizer import ZOOptimizer

RUN, RESIDENT = "run.json", "resident-*.safetensors"
"""In the folder: which run the weights are of, and its trained tensors that are in no slot, as they were when it began."""


@dataclass
class Left:
    """What of a run is in the folder of a tier."""

    folder: Path
    found: dict[Parcel, tuple[Slot, Moment]] = field(default_factory=dict)
    """For each parcel the newest whole slot that the log can be followed from."""
    missing: list[Parcel] = field(default_factory=list)
    """Parcels with trained tensors and no such slot."""
    torn: int = 0
    """Slots of this run whose bytes are not those that were stamped."""
    later: int = 0
    """Slots after more steps than the log has."""
    resident: dict[str, Tensor] | None = None
    """Tensors that are in no slot, as they were where the run goes on."""

    @property
    def complete(self) -> bool:
        """Whether no other weights are needed."""
        return bool(self.found) and not self.missing and self.resident is not None

    @property
    def problem(self) -> str:
        """What is lost of this run; "" where nothing is."""
        parts = [f"{self.torn} slots are torn or damaged"] if self.torn else []
        parts += [f"{self.later} slots are of later steps than the log has"] if self.later else []
        return " and ".join(parts) if self.missing else ""


def lasting(optimizer: ZOOptimizer) -> Offloaded | None:
    """The residency, where its weights are in files that stay behind."""
    residency = optimizer.residency
    if not isinstance(residency, Offloaded) or optimizer.exchange.world_size > 1:
        return None
    return residency if isinstance(residency.tier, DiskTier) and residency.tier.lasting else None


def note(optimizer: ZOOptimizer, moment: Moment) -> None:
    """The log has the step that leads to `moment`."""
    residency = lasting(optimizer)
    if residency is not None:
        residency.note(moment)


def bind(optimizer: ZOOptimizer, moment: Moment) -> None:
    """The weights are those of `moment`: say so in the folder. What another run has left there is gone. OSError where it can't be."""
    residency = lasting(optimizer)
    if residency is not None:
        (residency.files.folder / RUN).unlink(missing_ok=True)
        residency.bind(moment)
        _write(optimizer, residency, moment)


def look(optimizer: ZOOptimizer, log: Log) -> Left | None:
    """What the folder has of the run of a log that goes on at `optimizer.steps`; None where no earlier run has left anything.

    It reads all trained weights. A slot counts where the log has its moment and the changes from there on, and its checksum is right.
    """
    residency = lasting(optimizer)
    if residency is None or not residency.files.undecided:
        return None
    tier, step = residency.files, optimizer.steps
    left = Left(tier.folder)
    run = _read(tier.folder)
    slots: dict[str, list[tuple[Slot, Stamp]]] = {}
    if step in log.moments and run.get("mask", _mask(optimizer)) == _mask(optimizer):
        for slot, stamp in tier.left():
            moment = stamp.moment
            if moment.chain is not None and moment.step > log.end_step:
                left.later += 1
            elif moment.chain is not None and moment.step >= step and log.moments.get(moment.step) == moment.chain:
                slots.setdefault(stamp.parcel, []).append((slot, stamp))
    for parcel in residency.parcels:
        if any(p.group != FROZEN for p in parcel.tensors):
            for slot, stamp in sorted(slots.get(parcel.name, []), key=lambda one: -one[1].moment.step):
                if slot.nbytes >= parcel.nbytes and tier.whole(slot, stamp):
                    left.found[parcel] = slot, stamp.moment
                    break
                left.torn += 1
            else:
                left.missing.append(parcel)
    if step in log.moments and _moment(run) == Moment(step, log.moments[step]):
        left.resident = _resident(tier.folder, run, residency)
    return left


def go_on(optimizer: ZOOptimizer, log: Log, left: Left | None, given: bool) -> None:
    """The run of a log goes on: from what was left, where there is something, else from the weights at hand.

    `given`: these are the weights of `optimizer.steps`; otherwise `left` is complete, and the log's base file is only read where somebody
    reads weights of steps before the stamps.
    """
    residency, step = lasting(optimizer), optimizer.steps
    if residency is None:
        return
    made = Moment(step, log.moments.get(step))
    if left is None or not left.found:
        bind(optimizer, made)
        return
    if given and left.problem:
        say_once(
            f"offload.left.{left.folder}",
            f"In {left.folder}, {left.problem}: {len(left.missing)} of {len(left.missing) + len(left.found)} parts of the weights are made "
            f"again from those after {step} steps.",
        )
    tensors = {p.name: home for parcel in residency.parcels for p, home in zip(parcel.tensors, residency.files.home(parcel), strict=True)}
    if not given and left.resident is not None:
        with torch.inference_mode(False), torch.no_grad():
            for p in residency.steady():
                p.tensor.copy_(left.resident[p.name])
    residency.adopt(made, left.found, (lambda: tensors) if given else lambda: _based(log, step, left.folder))
    if _moment(_read(left.folder)) not in [Moment(*one) for one in log.moments.items()]:
        _write(optimizer, residency, made)


def _based(log: Log, step: int, folder: Path) -> Mapping[str, Tensor]:
    """The weights that the run began with, from its base file."""
    for segment in log.segments:
        loaded = base_of(segment, log.path.parent) if segment.step == step else None
        if loaded is not None:
            return {p.name: p.tensor for p in loaded}
    raise ValueError(
        f"Something reads the weights while the steps from {step} on are made again (validation, a checkpoint, an evaluation that leaves "
        f"traces), but {folder} has those of later steps, and there is no base file beside {log.path}. Give the model the weights that the "
        "run began with, or leave that out until the run has caught up."
    )


def _mask(optimizer: ZOOptimizer) -> Any:
    mask = optimizer.masks.mask
    return None if mask is None else json.loads(json.dumps(mask.described()))


def _write(optimizer: ZOOptimizer, residency: Offloaded, moment: Moment) -> None:
    """Say whose weights these are; the tensors that are in no slot come first."""
    folder, tensors = residency.files.folder, {p.name: p.tensor for p in residency.steady()}
    digest = fingerprint(tensors)
    name = RESIDENT.replace("*", f"{moment.step:08d}-{digest[:8]}")
    save_tensors(folder / name, tensors)
    words = {"step": moment.step, "log": moment.chain, "resident": name, "digest": digest, "mask": _mask(optimizer)}
    write_bytes(folder / RUN, json.dumps(words, indent=1).encode())
    for path in folder.glob(RESIDENT):
        if path.name != name:
            path.unlink()


def _read(folder: Path) -> dict[str, Any]:
    """What `_write` has written; empty where it is not there or damaged."""
    try:
        words = json.loads((folder / RUN).read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return words if isinstance(words, dict) else {}


def _moment(run: Mapping[str, Any]) -> Moment | None:
    step, chain = run.get("step"), run.get("log")
    return Moment(step, chain) if type(step) is int and type(chain) is int else None


def _resident(folder: Path, run: Mapping[str, Any], residency: Offloaded) -> dict[str, Tensor] | None:
    """The tensors that are in no slot; None where the file is missing, damaged, or of others."""
    name = str(run.get("resident"))
    if os.path.basename(name) != name or not (folder / name).is_file():
        return None
    try:
        tensors = load_base(folder / name)
    except ValueError:
        return None
    goals = {p.name: p.tensor for p in residency.steady()}
    fits = tensors.keys() == goals.keys() and all(tensors[key].shape == goals[key].shape for key in goals)
    return tensors if fits and fingerprint(tensors) == run.get("digest") else None
