"""A fine-tune as one small file that can be shared: the steps of a log as columns, without the weights."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path

import numpy as np

from zo_lightning.engine.journal import StepRecord
from zo_lightning.engine.trajectory import columns as layout
from zo_lightning.engine.trajectory.atomic import same_file, write_bytes
from zo_lightning.engine.trajectory.columns import FORMAT, Columns
from zo_lightning.engine.trajectory.encoding import canonical, mask_of, parse, segment_of, table_of
from zo_lightning.engine.trajectory.frames import MAGIC, LogError
from zo_lightning.engine.trajectory.log import Log, read_log
from zo_lightning.engine.trajectory.records import End, Mark, MaskRecord, Record, Segment, check
from zo_lightning.engine.trajectory.replay import Source, end_of, replay
from zo_lightning.engine.trajectory.targets import Target
from zo_lightning.engine.updates import GroupSettings

VERSION = "1"
_SETTINGS = ("lr", "eps", "weight_decay")


@dataclass(frozen=True)
class FineTune:
    """What an export holds: the base by fingerprint, the steps, and the fingerprint of the result ("" where the log had none)."""

    segment: Segment
    steps: tuple[StepRecord, ...]
    result: str
    masks: tuple[MaskRecord, ...] = ()
    """Where the elements that are trained change, in the order of the steps."""


def export(log: Source, path: str | os.PathLike[str], to_step: int | None = None) -> FineTune:
    """Write the steps of a log, up to `to_step`, as a safetensors file of under 40 bytes a step (one query, two groups).

    Whoever has the base weights gets the fine-tuned ones with `apply`. Raises ValueError for a log whose weights were perturbed in place
    (the roundings of those passes are not in an export), where the weights were changed by something else between the steps, and for a
    `path` that is the log's own.
    """
    log = log if isinstance(log, Log) else read_log(log)
    segment, *more = log.segments
    end = end_of(log, to_step)
    if same_file(log.path, path):
        raise ValueError(f"Invalid path: {path} is the step log itself, which the export would replace. Name another file.")
    if segment.residency == "inplace":
        raise ValueError(
            f'{log.path} was made with weights="inplace": its passes over the weights leave roundings that an export has no room for. '
            "Share the log itself, with `replay`."
        )
    if more and end > more[0].step:
        raise ValueError(
            f"{log.path} has {len(log.segments)} segments: at step {more[0].step} the weights were changed by something else than a step, "
            f"and each segment needs its own base. Export up to there (to_step={more[0].step}), or share the log with its bases."
        )
    steps = tuple(step for step in log.steps if step.step < end)
    if not steps:
        span = f"{log.path} has the steps {segment.step} to {log.end_step}"
        raise ValueError(f"Invalid to_step: {to_step!r}. An export needs at least one step; {span}.")
    masks = tuple({mask.step: mask for mask in log.masks if mask.step < end}.values())
    stored = next((mask.file for mask in masks if mask.file is not None), None)
    if stored is not None:
        raise ValueError(
            f"{log.path} has masks that are stored in files ({stored}, ...), which an export has no room for. Share the log with its "
            "files, and `replay` it."
        )
    kept = tuple(replace(step, micro_batches=1, traces=False) for step in steps)
    result = [r.fingerprint for r in log.records if isinstance(r, (Mark, End)) and r.step == end]
    tune = FineTune(replace(segment, base=None), kept, result[0] if result else "", masks)
    write_bytes(path, encode(tune))
    return tune


def load(path: str | os.PathLike[str]) -> FineTune:
    """Read an export. LogError for any byte that `export` would not have written, OSError where it can't be read."""
    data = Path(path).read_bytes()
    if data.startswith(MAGIC[:-1]):
        raise LogError(f"{path} is a step log, not an export of one. Make its steps with `replay`, or `export` it first.")
    try:
        return decode(data)
    except ValueError as error:
        message = f"{path} is not an export of a step log, or is damaged: {error}. Get the file again from where it came from."
        raise LogError(message) from error


def apply(target: Target, path: str | os.PathLike[str]) -> int:
    """Make the steps of an export on a model that has its base weights; returns the step reached. ValueError for other weights."""
    tune = load(path)
    masks = {mask.step: mask for mask in tune.masks}
    records: list[Record] = [tune.segment]
    for step in tune.steps:
        records += [masks[step.step], step] if step.step in masks else [step]
    end = tune.steps[-1].step + 1
    if tune.result:
        records.append(Mark(end, tune.result))
    return replay(target, Log(Path(path), records, end_step=end))


def encode(tune: FineTune) -> bytes:
    """The bytes of an export."""
    steps = tune.steps
    columns: Columns = {
        "values": np.array([step.values for step in steps], "<f8"),
        "skipped": np.packbits(np.array([step.skipped for step in steps], bool), bitorder="little"),
        **_pack(steps),
    }
    segment = canonical(table_of(tune.segment)).decode()
    metadata = {"format": FORMAT, "version": VERSION, "segment": segment, "steps": str(len(steps)), "result": tune.result}
    if tune.masks:
        metadata["masks"] = canonical([table_of(mask) for mask in tune.masks]).decode()
    digest = blake2b(layout.encode(columns, metadata), digest_size=32, person=b"zo.export").hexdigest()
    return layout.encode(columns, {**metadata, "digest": digest})


def decode(data: bytes) -> FineTune:
    """The inverse of `encode`. Raises ValueError (and nothing else) for other bytes."""
    columns, metadata = layout.decode(data)
    digest = metadata.pop("digest", "")
    if metadata.get("format") != FORMAT or metadata.get("version") != VERSION:
        raise ValueError(f"it says that it is {metadata.get('format')!r:.50} of version {metadata.get('version')!r:.20}")
    if digest != blake2b(layout.encode(columns, metadata), digest_size=32, person=b"zo.export").hexdigest():
        raise ValueError("its contents do not match their digest")
    tune = _tune(columns, metadata)
    if encode(tune) != data:
        raise ValueError("it is not written the way that this library writes it")
    return tune


def _tune(columns: Columns, metadata: dict[str, str]) -> FineTune:
    missing = {"values", "skipped", *_SETTINGS} - columns.keys()
    if missing or "segment" not in metadata:
        raise ValueError(f"{sorted(missing) or 'the segment'} is missing")
    segment = segment_of(parse(metadata["segment"].encode("ascii")))
    if segment.residency == "inplace":
        raise ValueError("its steps were made in place, and their passes are not in it")
    values = columns["values"]
    if values.ndim != 2 or values.dtype != np.dtype("<f8") or not len(values):
        raise ValueError("values are not a table")
    if columns["skipped"].dtype != np.uint8 or columns["skipped"].shape != (-(-len(values) // 8),):
        raise ValueError("skipped has another size")
    skipped = np.unpackbits(columns["skipped"], count=len(values), bitorder="little")
    groups = _unpack(columns, len(values))
    if len(groups[0]) <= max(entry.group for entry in segment.parameters):
        raise ValueError("the settings are of fewer groups than the parameters")
    steps: list[StepRecord] = []
    for index, row in enumerate(values.tolist()):
        step = StepRecord(segment.step + index, tuple(row), groups[index], bool(skipped[index]), 1)
        check(step, steps[-1].settings if steps else None)
        steps.append(step)
    return FineTune(segment, tuple(steps), _checked_result(metadata), _masks(metadata, segment, steps))


def _masks(metadata: dict[str, str], segment: Segment, steps: Sequence[StepRecord]) -> tuple[MaskRecord, ...]:
    if "masks" not in metadata:
        return ()
    entries = parse(metadata["masks"].encode("ascii"))
    if not isinstance(entries, list) or not entries:
        raise ValueError("masks: not a list")
    masks = tuple(mask_of(entry) for entry in entries)
    places = [mask.step for mask in masks]
    if places != sorted(set(places)) or not steps[0].step <= places[0] <= places[-1] <= steps[-1].step:
        raise ValueError("masks are of steps that are not there, or out of order")
    if any(mask.file is not None or len(mask.entries) != len(segment.parameters) for mask in masks):
        raise ValueError("a mask does not fit the parameters")
    return masks


def _checked_result(metadata: dict[str, str]) -> str:
    result = metadata.get("result", "")
    if result:
        check(Mark(0, result))
    return result


def _pack(steps: Sequence[StepRecord]) -> Columns:
    """Settings as one row a step, or, where that is smaller, the rows at which they change and their indices."""
    columns: Columns = {}
    for name in _SETTINGS:
        rows, at, last = [], [], None
        for index, step in enumerate(steps):
            if index == 0 or step.settings is not steps[index - 1].settings:
                row = struct.pack(f"<{len(step.settings)}d", *(getattr(group, name) for group in step.settings))
                if row != last:
                    rows.append(row)
                    at.append(index)
                    last = row
        starts, width = np.array(at, "<u4"), len(rows[0])
        if any(len(row) != width for row in rows):
            raise ValueError("The number of parameter groups changes between the steps; an export has one. Share the log itself.")
        column = np.frombuffer(b"".join(rows), "<f8").reshape(len(rows), width // 8)
        if len(at) * (4 + width) < len(steps) * width:
            columns |= {name: column, f"{name}_at": starts}
        else:
            columns[name] = np.repeat(column, np.diff(np.append(starts, len(steps))), axis=0)
    return columns


def _unpack(columns: Columns, steps: int) -> list[tuple[GroupSettings, ...]]:
    """The settings of each step; steps with the same ones share them, so that a small file can't ask for much memory."""
    tables = [columns[name] for name in _SETTINGS]
    if any(table.ndim != 2 or table.dtype != np.dtype("<f8") or not table.size for table in tables):
        raise ValueError("the settings are not tables")
    if len({table.shape[1] for table in tables}) != 1:
        raise ValueError("the settings are of different numbers of groups")
    moves: dict[int, list[int]] = {}
    for which, (name, table) in enumerate(zip(_SETTINGS, tables, strict=True)):
        for index in _starts(columns, name, len(table), steps):
            moves.setdefault(index, []).append(which)
    rows, settings = [-1] * len(tables), list[tuple[GroupSettings, ...]]()
    for index in range(steps):
        if index in moves:
            for which in moves[index]:
                rows[which] += 1
            now = [table[row].tolist() for table, row in zip(tables, rows, strict=True)]
            settings.append(tuple(GroupSettings(*group) for group in zip(*now, strict=True)))
        else:
            settings.append(settings[-1])
    return settings


def _starts(columns: Columns, name: str, rows: int, steps: int) -> Sequence[int]:
    """The step at which each row of a setting begins to hold."""
    at = columns.get(f"{name}_at")
    if at is None:
        if rows != steps:
            raise ValueError(f"{name} has another number of steps")
        return range(steps)
    starts: list[int] = at.tolist()
    if at.dtype != np.dtype("<u4") or at.shape != (rows,) or starts[0] != 0 or starts[-1] >= steps:
        raise ValueError(f"{name} changes at steps that are not there")
    if any(later <= earlier for earlier, later in pairwise(starts)):
        raise ValueError(f"{name} changes at steps that are out of order")
    return starts
