"""What a step log holds: plain records, and what must be true of each."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from zo_lightning.engine.journal import StepRecord
from zo_lightning.engine.updates import GroupSettings

LOST = "lost"
"""`Checkpoint.host` of a path that no longer holds anything to resume from."""
BACK, SESSION = 255, 254
"""Bytes of `StepRecord.passes`: moved back to the origin; a micro-batch begins."""
MAX_POINTS = 250
"""Points of an estimator that `passes` can tell apart."""
LARGEST_VALUES, LARGEST_GROUPS, LARGEST_BATCHES, LARGEST_OPTION = (1 << 16) - 1, (1 << 16) - 1, (1 << 32) - 1, (1 << 15) - 1
LARGEST_IDLE = (1 << 16) - 1
DTYPES = ("float16", "bfloat16", "float32", "float64")
MASKS = ("all", "none", "small", "large", "lot", "bits", "list")
RESIDENCIES, ROUNDINGS = ("exact", "copy", "inplace", "batched"), ("stochastic", "nearest")

Options = Mapping[str, Any]
"""{"name": ..., "options": {...}}: a part of the engine by its name, and its dataclass fields (numbers, strings, None)."""


@dataclass(frozen=True)
class ParameterEntry:
    """One trained tensor; its key is `parameter_key(name)`."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int
    unit: float = 1.0
    """The size of its noise, and the least value that updates leave; both are in a record only where they are not these."""
    least: float | None = None


@dataclass(frozen=True)
class Segment:
    """What replay needs: the first record of every log, and again whenever the weights were changed by something else than a step."""

    step: int
    """The first step that follows."""
    seed: int
    noise: str
    estimator: Options
    rule: Options
    residency: str
    rounding: str
    compiled: bool
    device: str
    versions: Mapping[str, str]
    parameters: tuple[ParameterEntry, ...]
    fingerprint: str
    """Of the trained weights at `step`."""
    frozen: str = ""
    """Of everything else in the module, "" where it is not known."""
    within: bool = False
    """Whether the weights were changed after evaluations of `step`: only its update was made on these."""
    base: str | None = None
    """Name of a safetensors file beside the log with the trained weights at `step`."""


@dataclass(frozen=True)
class Checkpoint:
    """The host wrote a complete checkpoint of the state after `step` steps; or, with LOST as `host`, over one that was there."""

    step: int
    path: str
    host: str


@dataclass(frozen=True)
class Mark:
    """The fingerprint of the trained weights after `step` steps."""

    step: int
    fingerprint: str


@dataclass(frozen=True)
class End:
    """The run ended by itself after `step` steps."""

    step: int
    fingerprint: str


@dataclass(frozen=True)
class MaskEntry:
    """Which elements of one parameter are trained from now on (noise/members.py): "all", "none", by size, by lot, or stored in the file."""

    kind: str
    number: int = 0
    """"small" and "large": the last element of those that equal the bound; "lot": the seed; "bits" and "list": how many are trained."""
    bound: float = 0.0
    """"small", "large" and "lot": the largest (smallest) value that is in."""


@dataclass(frozen=True)
class MaskRecord:
    """From `step` on these elements are trained; one entry for each parameter of the segment."""

    step: int
    name: str
    """Of the rule that chose them."""
    entries: tuple[MaskEntry, ...]
    file: str | None = None
    """Name of a safetensors file beside the log with the stored bits and lists."""
    digest: str = ""
    """Of the contents of the file."""


Record = StepRecord | Segment | Checkpoint | Mark | End | MaskRecord


def check(record: Record, checked: object = None) -> None:
    """Raise ValueError that names the field unless every field has its type and is in range. Fields may hold anything.

    `checked` are settings that were looked at before: many steps of a hostile file could share very many of them.
    """
    _integer(record.step, "step", 0, (1 << 63) - 1)
    if isinstance(record, StepRecord):
        _check_step(record)
        if record.settings is not checked:
            _check_settings(record.settings)
    elif isinstance(record, Segment):
        _check_segment(record)
    elif isinstance(record, Checkpoint):
        _text(record.path, "path", 4096)
        _text(record.host, "host", 100)
    elif isinstance(record, MaskRecord):
        _check_mask(record)
    elif isinstance(record, (Mark, End)):
        _fingerprint(record.fingerprint, "fingerprint")


def _check_step(record: StepRecord) -> None:
    _require(1 <= len(record.values) <= LARGEST_VALUES, f"values: there are {len(record.values)}")
    _require(1 <= len(record.settings) <= LARGEST_GROUPS, f"settings: there are {len(record.settings)}")
    _require(all(isinstance(value, float) for value in record.values), "values: not all of them are float")
    _integer(record.micro_batches, "micro_batches", 1, LARGEST_BATCHES)
    _integer(record.idle, "idle", 0, LARGEST_IDLE)
    _require(isinstance(record.skipped, bool) and isinstance(record.traces, bool), "skipped, traces: not True or False")
    _require(record.skipped or all(map(math.isfinite, record.values)), "values: one is not finite, and the step was not skipped")
    _require(isinstance(record.passes, bytes), "passes: not bytes")
    known = bytes([*range(min(len(record.values), MAX_POINTS)), SESSION, BACK])
    _require(not record.passes.translate(None, known), "passes: a move to a point that the estimator does not have")
    at_origin = record.passes.rstrip(bytes([SESSION]))[-1:] in (b"", bytes([BACK]))
    _require(at_origin or not record.skipped, "passes: a skipped step ends away from the origin")


def _check_settings(settings: tuple[GroupSettings, ...]) -> None:
    for group in settings:
        numbers = (group.lr, group.eps, group.weight_decay)
        good = all(isinstance(number, float) and math.isfinite(number) for number in numbers)
        _require(good and group.lr >= 0 and group.eps > 0 and group.weight_decay >= 0, f"settings: {group}")


def _check_segment(record: Segment) -> None:
    _integer(record.seed, "seed", 0, (1 << 64) - 1)
    for name, text in (("noise", record.noise), ("device", record.device)):
        _text(text, name, 100)
    _part(record.estimator, "estimator")
    _part(record.rule, "rule")
    _require(record.residency in RESIDENCIES, f"residency: {record.residency!r:.100}, none of {', '.join(RESIDENCIES)}")
    _require(record.rounding in ROUNDINGS, f"rounding: {record.rounding!r:.100}, none of {', '.join(ROUNDINGS)}")
    _require(isinstance(record.compiled, bool), "compiled: not True or False")
    _require(isinstance(record.versions, Mapping), "versions: not a table")
    for name, version in record.versions.items():
        _text(name, "versions", 100)
        _text(version, "versions", 100)
    _require(isinstance(record.parameters, tuple) and len(record.parameters) >= 1, "parameters: there are none")
    for entry in record.parameters:
        _check_parameter(entry)
    _require(len({entry.name for entry in record.parameters}) == len(record.parameters), "parameters: a name comes twice")
    _require(isinstance(record.within, bool), "within: not True or False")
    _fingerprint(record.fingerprint, "fingerprint")
    if record.frozen != "":
        _fingerprint(record.frozen, "frozen")
    if record.base is not None:
        _file_name(record.base, "base")


def _check_mask(record: MaskRecord) -> None:
    _text(record.name, "name", 100)
    _require(isinstance(record.entries, tuple) and len(record.entries) >= 1, "entries: there are none")
    for entry in record.entries:
        _check_mask_entry(entry)
    stored = any(entry.kind in ("bits", "list") for entry in record.entries)
    _require(stored == (record.file is not None), "file: named where nothing is stored, or the other way round")
    if record.file is not None:
        _file_name(record.file, "file")
        _fingerprint(record.digest, "digest")
    else:
        _require(record.digest == "", "digest: of no file")


def _check_mask_entry(entry: MaskEntry) -> None:
    _require(entry.kind in MASKS, f"entries: {entry.kind!r:.100}, none of {', '.join(MASKS)}")
    by_size = entry.kind in ("small", "large")
    most = 0 if entry.kind in ("all", "none") else (1 << 63) - 1
    _integer(entry.number, f'number of a mask "{entry.kind}"', -1 if by_size else 0, most)
    _require(isinstance(entry.bound, float) and math.isfinite(entry.bound), "bound of a mask: not a finite number")
    if by_size:
        _require(entry.bound >= 0, f"bound of a mask by size: {entry.bound}, no absolute value")
    elif entry.kind == "lot":
        _require(-0.5 <= entry.bound <= 0.5, f"bound of a mask by lot: {entry.bound}, none between -1/2 and 1/2")
    else:
        _require(entry.bound == 0, f'bound of a mask "{entry.kind}": {entry.bound}, where there is none')


def _file_name(name: object, field: str) -> None:
    _text(name, field, 255)
    plain = re.fullmatch(r"[^/\\:\0]+", str(name)) is not None and name not in (".", "..")
    _require(plain, f"{field}: {name!r} is not the plain name of a file beside the log")


def _check_parameter(entry: ParameterEntry) -> None:
    _text(entry.name, "parameters", 4096)
    _require(isinstance(entry.shape, tuple) and len(entry.shape) <= 64, f"parameters: shape of {entry.name!r:.100}")
    for size in entry.shape:
        _integer(size, f"shape of {entry.name!r:.100}", 0, 1 << 62)
    _require(math.prod(entry.shape) < 1 << 62, f"parameters: {entry.name!r:.100} is too large")
    _require(entry.dtype in DTYPES, f"parameters: dtype {entry.dtype!r:.100} of {entry.name!r:.100}")
    _integer(entry.group, f"group of {entry.name!r:.100}", 0, LARGEST_GROUPS - 1)
    _require(_positive(entry.unit), f"unit of {entry.name!r:.100}: no finite number above 0")
    _require(entry.least is None or _positive(entry.least), f"least of {entry.name!r:.100}: no finite number above 0")


def _positive(number: object) -> bool:
    return isinstance(number, float) and math.isfinite(number) and number > 0


def _part(part: object, name: str) -> None:
    _require(isinstance(part, Mapping) and part.keys() == {"name", "options"}, f"{name}: not a name and options")
    entries: Mapping[str, Any] = part  # type: ignore[assignment]
    _text(entries["name"], name, 100)
    _require(isinstance(entries["options"], Mapping), f"{name}: options are not a table")
    for option, value in entries["options"].items():
        _text(option, name, 100)
        if isinstance(value, str):
            _text(value, f"{name}: {option}", 1000, 0)
        elif isinstance(value, float):
            _require(math.isfinite(value), f"{name}: {option} is not finite")
        elif value is not None and not isinstance(value, bool):
            _integer(value, f"{name}: {option}", -LARGEST_OPTION, LARGEST_OPTION)


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def _integer(value: object, name: str, least: int, most: int) -> None:
    good = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
    _require(good, f"{name}: not an integer from {least} to {most}")


def _text(value: object, name: str, most: int, least: int = 1) -> None:
    good = isinstance(value, str) and least <= len(value) <= most
    _require(good, f"{name}: not a text of {least} to {most} characters")
    str(value).encode()  # lone surrogates raise UnicodeEncodeError, a ValueError


def _fingerprint(value: object, name: str) -> None:
    _require(isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None, f"{name}: not 64 hexadecimal digits")


def names(kind: type[Any]) -> set[str]:
    """The fields of a dataclass."""
    return {field.name for field in fields(kind)}
