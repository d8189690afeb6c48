"""Records as bytes: steps as packed numbers, the others as canonical JSON; what comes back encodes to the same bytes again."""

from __future__ import annotations

import json
import struct
from dataclasses import asdict
from typing import Any

from zo_lightning.engine.journal import StepRecord
from zo_lightning.engine.trajectory.records import (
    LARGEST_GROUPS,
    Checkpoint,
    End,
    Mark,
    MaskEntry,
    MaskRecord,
    ParameterEntry,
    Record,
    Segment,
    check,
    names,
)
from zo_lightning.engine.updates import GroupSettings

STEP = 1
KINDS: dict[int, type[Any]] = {STEP: StepRecord, 2: Segment, 3: Checkpoint, 4: Mark, 5: End, 6: MaskRecord}
_KIND_OF = {kind: number for number, kind in KINDS.items()}
_SKIPPED, _TRACES, _SETTINGS = 1, 2, 4
_HEAD = struct.Struct("<QHIH")
_CHANGED = struct.Struct("<BH")
_SCALE = {"unit": 1.0, "least": None}
_FIELDS = ("lr", "eps", "weight_decay")

Last = tuple[GroupSettings, ...]
"""Settings of the step before, empty at the beginning of a segment: they are stored where they change."""


def encode(record: Record, last: Last) -> tuple[int, int, bytes]:
    """(kind, flags, payload). Raises ValueError for a record that `check` refuses."""
    check(record, last)
    if isinstance(record, StepRecord):
        return STEP, *_encode_step(record, last)
    return _KIND_OF[type(record)], 0, canonical(table_of(record))


def decode(kind: int, flags: int, payload: bytes, last: Last) -> Record:
    """The record. Raises ValueError (and nothing else) for bytes that `encode` would not have written."""
    if kind not in KINDS:
        raise ValueError(f"there is no kind {kind} of record")
    record: Record = _decode_step(flags, payload, last) if kind == STEP else _decode_json(KINDS[kind], payload)
    if encode(record, last) != (kind, flags, payload):
        raise ValueError("it is not written the way that this library writes it")
    return record


def table_of(record: Any) -> dict[str, Any]:
    """A record other than a step as plain types, which `segment_of` and its like make a record again."""
    table: dict[str, Any] = asdict(record)
    for entry in table["parameters"] if isinstance(record, Segment) else ():
        for name, usual in _SCALE.items():
            if entry[name] == usual:
                del entry[name]  # most have neither, and logs of before had none
    return table


def canonical(value: Any) -> bytes:
    """JSON with sorted keys and without spaces. ValueError for NaN and infinities."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse(payload: bytes) -> Any:
    """Whatever JSON `payload` is; repeated keys, NaN and spaces are for the caller to find, by writing it again.

    Raises ValueError (and nothing else) for anything else: numbers of thousands of digits, endless nesting.
    """
    try:
        return json.loads(payload.decode("ascii"))
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None


def segment_of(value: Any) -> Segment:
    """The Segment that `asdict` made `value` of. ValueError for missing, unknown and ill-typed entries."""
    _exact(value, names(Segment))
    if not isinstance(value["parameters"], list):
        raise ValueError("parameters: not a list")
    entries = []
    for entry in value["parameters"]:
        _exact({**_SCALE, **entry} if isinstance(entry, dict) else entry, names(ParameterEntry))
        if not isinstance(entry["shape"], list):
            raise ValueError("shape: not a list")
        entries.append(ParameterEntry(**{**entry, "shape": tuple(entry["shape"])}))
    segment = Segment(**{**value, "parameters": tuple(entries)})
    check(segment)
    return segment


def mask_of(value: Any) -> MaskRecord:
    """The MaskRecord that `asdict` made `value` of. ValueError for missing, unknown and ill-typed entries."""
    _exact(value, names(MaskRecord))
    if not isinstance(value["entries"], list):
        raise ValueError("entries: not a list")
    for entry in value["entries"]:
        _exact(entry, names(MaskEntry))
    record = MaskRecord(**{**value, "entries": tuple(MaskEntry(**entry) for entry in value["entries"])})
    check(record)
    return record


def _decode_json(kind: type[Any], payload: bytes) -> Record:
    value = parse(payload)
    if kind is Segment:
        return segment_of(value)
    if kind is MaskRecord:
        return mask_of(value)
    _exact(value, names(kind))
    record: Record = kind(**value)
    check(record)
    return record


def _exact(value: Any, keys: set[str]) -> None:
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    if value.keys() != keys:
        raise ValueError(f"entries {sorted(value.keys() ^ keys)[:5]} are missing or unknown"[:300])


def _columns(settings: Last) -> list[bytes]:
    return [struct.pack(f"<{len(settings)}d", *(getattr(group, name) for group in settings)) for name in _FIELDS]


def _encode_step(record: StepRecord, last: Last) -> tuple[int, bytes]:
    flags = _SKIPPED * record.skipped | _TRACES * record.traces
    parts = [_HEAD.pack(record.step, len(record.values), record.micro_batches, record.idle)]
    now, before = ([], []) if record.settings is last else (_columns(record.settings), _columns(last))
    changed = [i for i in range(len(now)) if now[i] != before[i]]
    if changed:
        flags |= _SETTINGS
        parts += [_CHANGED.pack(sum(1 << i for i in changed), len(record.settings)), *(now[i] for i in changed)]
    parts += [struct.pack(f"<{len(record.values)}d", *record.values), record.passes]
    return flags, b"".join(parts)


def _decode_step(flags: int, payload: bytes, last: Last) -> StepRecord:
    if flags & ~(_SKIPPED | _TRACES | _SETTINGS):
        raise ValueError(f"unknown flags {flags}")
    (step, points, micro_batches, idle), at = _take(_HEAD, payload, 0)
    settings = last
    if flags & _SETTINGS:
        (mask, groups), at = _take(_CHANGED, payload, at)
        if mask > 7 or groups > LARGEST_GROUPS or (groups != len(last) and mask != 7):
            raise ValueError("settings of another number of groups")
        columns = [[getattr(group, name) for group in last] for name in _FIELDS]
        for i in range(len(_FIELDS)):
            if mask >> i & 1:
                column, at = _take(struct.Struct(f"<{groups}d"), payload, at)
                columns[i] = list(column)
        settings = tuple(GroupSettings(*numbers) for numbers in zip(*columns, strict=True))
    values, at = _take(struct.Struct(f"<{points}d"), payload, at)
    return StepRecord(step, values, settings, bool(flags & _SKIPPED), micro_batches, payload[at:], bool(flags & _TRACES), idle)


def _take(layout: struct.Struct, payload: bytes, at: int) -> tuple[tuple[Any, ...], int]:
    if at + layout.size > len(payload):
        raise ValueError("the record is too short")
    return layout.unpack_from(payload, at), at + layout.size
