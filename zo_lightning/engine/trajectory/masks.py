"""Masks in a step log: thresholds and lots as numbers in the record, stored bits and lists in a file beside the log."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from zo_lightning.engine.masks import Masks
from zo_lightning.engine.masks.rules import Chosen
from zo_lightning.engine.noise.dither import BLOCK
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
        return MaskEntry("list", len(mask.index)), mask.index.long()
    raise TypeError(f"A mask of class {type(mask).__name__} can't be written into a step log.")


def chosen_of(record: MaskRecord, parameters: Sequence[ParameterEntry], folder: Path, devices: Mapping[str, torch.device]) -> Chosen:
    """The masks of a record. ValueError where its file is missing, is another one, or does not fit the parameters."""
    stored = {} if record.file is None else _load(record, folder / record.file, parameters)
    chosen: Chosen = {}
    for parameter, entry in zip(parameters, record.entries, strict=True):
        own = stored.get(parameter.name)
        if own is not None:
            chosen[parameter_key(parameter.name)] = (Bits if entry.kind == "bits" else Listed)(own.to(devices[parameter.name]))
        elif entry.kind != "none":
            chosen[parameter_key(parameter.name)] = _number(entry, parameter)
    return chosen


def _load(record: MaskRecord, path: Path, parameters: Sequence[ParameterEntry]) -> dict[str, Tensor]:
    """The stored masks of a record. Sizes are looked at before contents: a made-up file could be as long as a disk is wide."""
    what, advice = f"the mask of step {record.step}", "Get the right file from where the log came from."
    if not os.path.isfile(path):
        raise ValueError(f"{path}, which has {what}, is not there. Put it beside the log again.")
    stored = load_base(path, advice=f"It should be {what}. {advice}")
    entries = {p.name: (p, entry) for p, entry in zip(parameters, record.entries, strict=True) if entry.kind in ("bits", "list")}
    is_it = stored.keys() == entries.keys() and all(_has_size(stored[name], *entries[name]) for name in entries)
    if not is_it or fingerprint(stored) != record.digest:
        raise ValueError(f"{path} is not {what}: the log has the digest of another one. {advice}")
    for name, (parameter, entry) in entries.items():
        if not (_is_bits if entry.kind == "bits" else _is_list)(stored[name], parameter, entry.number):
            raise ValueError(f"{path} can't be {what}: it does not fit the {_numel(parameter)} elements of {name!r}. {advice}")
    return stored


def _numel(parameter: ParameterEntry) -> int:
    return math.prod(parameter.shape)


def _has_size(stored: Tensor, parameter: ParameterEntry, entry: MaskEntry) -> bool:
    if entry.kind == "bits":
        return stored.dtype == torch.int32 and stored.shape == (Bits.length(_numel(parameter)),)
    return stored.dtype == torch.int64 and stored.shape == (entry.number,)


def _is_bits(words: Tensor, parameter: ParameterEntry, count: int) -> bool:
    """Whether so many bits are set, and none behind the last element."""
    behind = Bits(words[-2:]).keep(torch.empty(BLOCK), 0)[_numel(parameter) - BLOCK * (len(words) // 2 - 1) :] if len(words) else words
    return Bits(words).count == count and not bool(behind.any())


def _is_list(index: Tensor, parameter: ParameterEntry, count: int) -> bool:
    """Whether these are elements, each once and in order."""
    return bool((index[1:] > index[:-1]).all()) and bool(((index >= 0) & (index < _numel(parameter))).all())


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


def _number(entry: MaskEntry, parameter: ParameterEntry) -> Members | None:
    """A mask that is a number, None for the whole parameter."""
    if entry.kind == "all":
        return None
    if entry.kind == "lot":
        return Lot(entry.number, parameter_key(parameter.name), entry.bound)
    return Band(entry.bound, entry.number, getattr(torch, parameter.dtype), entry.kind == "large")
