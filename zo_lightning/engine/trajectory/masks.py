"""Masks in a step log: thresholds and lots as numbers in the record, stored bits and lists in a file beside the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zo_lightning.engine.masks import Masks
from zo_lightning.engine.masks.rules import Chosen
from zo_lightning.engine.noise.members import Band, Bits, Listed, Lot, Members
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.seeds import parameter_key
from zo_lightning.engine.trajectory.fingerprint import fingerprint
from zo_lightning.engine.trajectory.records import MaskEntry, MaskRecord, ParameterEntry, Segment
from zo_lightning.engine.trajectory.weights import load_base, save_tensors

if TYPE_CHECKING:
    from zo_lightning.engine.optimizer import ZOOptimizer


def record_of(masks: Masks, step: int, trained: Sequence[Trained], folder: Path | None) -> MaskRecord:
    """The record of the mask at hand; its file is written into `folder`, by the process that has one. OSError where it can't be."""
    if masks.mask is None:
        raise ValueError("Nothing is masked.")
    entries, stored = [], dict[str, Tensor]()
    for p in trained:
        entry, tensor = _entry(masks.of(p.key) if masks.trains(p.key) else _NOTHING)
        entries.append(entry)
        if tensor is not None:
            stored[p.name] = tensor
    if not stored:
        return MaskRecord(step, masks.mask.rule.name, tuple(entries))
    digest = fingerprint(stored)
    name = f"mask-{step:08d}-{digest[:8]}.safetensors"
    if folder is not None:
        save_tensors(folder / name, stored)
    return MaskRecord(step, masks.mask.rule.name, tuple(entries), name, digest)


_NOTHING = Listed(torch.empty(0, dtype=torch.int64))


def _entry(mask: Members | None) -> tuple[MaskEntry, Tensor | None]:
    if mask is None:
        return MaskEntry("all"), None
    if mask is _NOTHING:
        return MaskEntry("none"), None
    if isinstance(mask, Band):
        return MaskEntry("large" if mask.largest else "small", mask.last, mask.bound), None
    if isinstance(mask, Lot):
        return MaskEntry("lot", mask.seed, mask.cut), None
    if isinstance(mask, Bits):
        return MaskEntry("bits", mask.count), mask.words
    if isinstance(mask, Listed):
        return MaskEntry("list", len(mask.index)), mask.index
    raise TypeError(f"A mask of class {type(mask).__name__} can't be written into a step log.")


def chosen_of(record: MaskRecord, parameters: Sequence[ParameterEntry], folder: Path, devices: Mapping[str, torch.device]) -> Chosen:
    """The masks of a record. ValueError where its file is missing, is another one, or does not fit the parameters."""
    stored: dict[str, Tensor] = {}
    if record.file is not None:
        path = folder / record.file
        if not path.exists():
            raise ValueError(f"The mask of step {record.step} is in {path}, which is not there. Put it beside the log again.")
        stored = load_base(path)
        if fingerprint(stored) != record.digest:
            raise ValueError(f"{path} is not the mask of step {record.step} that the log has the digest of. Get the right file.")
    chosen: Chosen = {}
    for parameter, entry in zip(parameters, record.entries, strict=True):
        if entry.kind != "none":
            own = stored.get(parameter.name)
            chosen[parameter_key(parameter.name)] = _mask(entry, parameter, None if own is None else own.to(devices[parameter.name]))
    return chosen


def follow(optimizer: ZOOptimizer, recorded: MaskRecord | None, segment: Segment, folder: Path) -> None:
    """A step that is made again begins with a mask of this process: it must be the one that was recorded, or becomes it.

    A rule that no seed and no weight determines gives another one each time; then the recorded one is used. ValueError where masks differ.
    """
    masks, trained, step = optimizer.masks, optimizer.residency.trained, optimizer.steps
    if recorded is not None and not masks.reproducible:
        masks.take(chosen_of(recorded, segment.parameters, folder, {p.name: p.tensor.device for p in trained}))
    elif recorded != record_of(masks, step, trained, None):
        there = "none" if recorded is None else f"one of the rule {recorded.name!r}"
        raise ValueError(
            f"At step {step} the mask is not the one that the run in {folder} had: {there} there, {masks.mask!r} here. Set it as it was, "
            "or begin anew with resume=False."
        )


def _mask(entry: MaskEntry, parameter: ParameterEntry, stored: Tensor | None) -> Members | None:
    if entry.kind == "all":
        return None
    if entry.kind in ("small", "large"):
        return Band(entry.bound, entry.number, getattr(torch, parameter.dtype), entry.kind == "large")
    if entry.kind == "lot":
        return Lot(entry.number, parameter_key(parameter.name), entry.bound)
    numel = 1
    for size in parameter.shape:
        numel *= size
    bits = entry.kind == "bits"
    if stored is None or stored.dim() != 1 or stored.dtype != (torch.int32 if bits else torch.int64):
        raise ValueError(f"The mask of {parameter.name!r} is not in the file of the mask. Get the right file.")
    if bits:
        fits = len(stored) == Bits.length(numel)
    else:
        fits = len(stored) <= numel and bool((stored[1:] > stored[:-1]).all()) and bool(((stored >= 0) & (stored < numel)).all())
    if not fits:
        raise ValueError(f"The mask of {parameter.name!r} does not fit its {numel} elements. Get the right file.")
    return Bits(stored) if bits else Listed(stored)
