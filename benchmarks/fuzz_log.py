"""Fuzz the step log's files: no mutation of a log or an export may crash or hang the reader, make it allocate, or be taken for another run.

python benchmarks/fuzz_log.py --count 100000

Half of the mutations damage the bytes as they are; a log may then only be refused, or lose records at its end and say so, an export may
only be refused. The other half also get right checksums, as somebody would send them who means harm: what is then accepted must be
exactly what the library itself would have written. Of masked runs the files of the masks are damaged and forged, too, and the runs are
replayed (fuzz_masks.py). Exit code 1 where anything else happened.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_masks import fuzz_masks, made_up

from zo_lightning.engine.trajectory import Checkpoint, End, LogError, LogWriter, Mark, ParameterEntry, Segment, Settings, StepRecord
from zo_lightning.engine.trajectory import columns as layout
from zo_lightning.engine.trajectory.encoding import decode as decode_record
from zo_lightning.engine.trajectory.encoding import encode as encode_record
from zo_lightning.engine.trajectory.export import FineTune, decode, encode
from zo_lightning.engine.trajectory.frames import FIRST_CHAIN, MAGIC, Frame, frames, pack
from zo_lightning.engine.trajectory.log import Log, read_log

MEMORY = 1 << 30
"""Bytes of address space over what the process has when it begins."""
SECONDS = 5
FINGERPRINT = "5e" * 32
Frames = list[tuple[int, int, bytes]]


class Hang(BaseException):
    """An input took longer than SECONDS."""


def segment(step: int, residency: str, rng: random.Random) -> Segment:
    """Two tensors in two groups."""
    return Segment(
        step=step,
        seed=rng.getrandbits(64),
        noise="rademacher",
        estimator={"name": "spsa", "options": {"queries": 1}},
        rule={"name": "sgd", "options": {"clip": 100.0}},
        residency=residency,
        rounding="stochastic",
        compiled=True,
        device="cpu",
        versions={"torch": "2.13.0", "zo_lightning": "0.3"},
        parameters=(ParameterEntry("a.weight", (3, 4), "bfloat16", 0), ParameterEntry("a.bias", (3,), "float32", 1)),
        fingerprint=FINGERPRINT,
        base=f"base-{step}.safetensors",
    )


def steps(first: int, count: int, residency: str, rng: random.Random) -> list[StepRecord]:
    """Steps of a schedule, one of them skipped."""
    made = []
    for step in range(first, first + count):
        settings = tuple(Settings(1e-3 / (1 + step // 2), 1e-3, 0.01 * group) for group in range(2))
        moves = b"\xfe\x00\x01\xff" if residency == "inplace" else b""
        made.append(StepRecord(step, (rng.gauss(2, 1), rng.gauss(2, 1)), settings, False, 1 + step % 3, moves, step % 5 == 0))
    return [*made[:-1], replace(made[-1], values=(math.inf, 1.0), skipped=True)]


def log_bytes(residency: str, rng: random.Random) -> bytes:
    """A log with every kind of record."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        with LogWriter.create(path, segment(0, residency, rng)) as writer:
            writer.append(made_up(0, False, rng))
            for record in steps(0, 5, residency, rng):
                writer.append(record)
            writer.append(Mark(5, FINGERPRINT))
            writer.append(Checkpoint(5, "checkpoint-5", "hf"))
            writer.append(segment(5, residency, rng))
            writer.append(made_up(5, True, rng))
            for record in steps(5, 4, residency, rng):
                writer.append(record)
            writer.append(End(9, FINGERPRINT))
        return path.read_bytes()


def export_bytes(rng: random.Random) -> bytes:
    """An export of a dozen steps."""
    made = tuple(replace(step, micro_batches=1, traces=False) for step in steps(3, 12, "exact", rng))
    chosen = tuple(made_up(step, False, rng) for step in (3, 9))
    return encode(FineTune(replace(segment(3, "exact", rng), base=None), made, FINGERPRINT, chosen))


# ---- mutations


def mutate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """One to four changes: flip, overwrite, insert, delete, swap, splice, truncate, fields that look like lengths, digits."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(MUTATIONS)(data, other, rng)
    return data


def _piece(data: bytes, rng: random.Random, most: int = 64) -> tuple[int, int]:
    begin = rng.randrange(len(data) + 1)
    return begin, min(len(data), begin + rng.randint(1, most))


def _flip(data: bytes, other: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data)) if data else 0
    return data[:place] + bytes(b ^ 1 << rng.randrange(8) for b in data[place : place + 1]) + data[place + 1 :]


def _overwrite(data: bytes, other: bytes, rng: random.Random) -> bytes:
    begin, end = _piece(data, rng)
    return data[:begin] + rng.choice((rng.randbytes(end - begin), bytes(end - begin), b"\xff" * (end - begin))) + data[end:]


def _insert(data: bytes, other: bytes, rng: random.Random) -> bytes:
    begin, end = _piece(data, rng)
    return data[:begin] + rng.choice((rng.randbytes(end - begin), data[begin:end], b"[" * 2000, b"9" * 5000)) + data[begin:]


def _delete(data: bytes, other: bytes, rng: random.Random) -> bytes:
    begin, end = _piece(data, rng)
    return data[:begin] + data[end:]


def _swap(data: bytes, other: bytes, rng: random.Random) -> bytes:
    a, b, c, d = sorted(rng.randrange(len(data) + 1) for _ in range(4))
    return data[:a] + data[c:d] + data[b:c] + data[a:b] + data[d:]


def _splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def _truncate(data: bytes, other: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)] + bytes(rng.choice((0, 0, 1, 7, 5000)))


def _length(data: bytes, other: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    value = rng.choice((0, 1, 1 << 16, 1 << 26, (1 << 26) + 1, 1 << 31, (1 << 32) - 1, rng.getrandbits(32)))
    return data[:place] + struct.pack(rng.choice(("<I", "<Q", ">I")), value) + data[place + 4 :]


def _digits(data: bytes, other: bytes, rng: random.Random) -> bytes:
    places = [i for i, b in enumerate(data) if 0x30 <= b <= 0x39]
    if not places:
        return data
    place = rng.choice(places)
    new = rng.choice((b"-1", b"1e999", b"NaN", b"null", b"true", b"{}", b"[]", b'""', b"1.5", b"99999999999999999999", b"7"))
    return data[:place] + new + data[place + 1 :]


MUTATIONS: tuple[Callable[[bytes, bytes, random.Random], bytes], ...] = (
    *(_flip, _overwrite, _insert, _delete, _swap, _splice, _truncate, _length, _digits),
)


def split(data: bytes, folder: Path) -> Frames:
    """The frames of a log that is whole."""
    path = folder / "whole"
    path.write_bytes(data)
    with path.open("rb") as file:
        file.read(len(MAGIC))
        return [(frame.kind, frame.flags, frame.payload) for frame in frames(file, len(data)) if isinstance(frame, Frame)]


def signed_log(parts: Frames) -> bytes:
    """A log of these payloads, with right checksums."""
    data, chain = [MAGIC], FIRST_CHAIN
    for part in parts:
        frame, chain = pack(*part, chain)
        data.append(frame)
    return b"".join(data)


def forge_log(parts: Frames, other: Frames, rng: random.Random) -> bytes:
    """Payloads that are mutated, moved, repeated, left out or taken from another log, with right checksums."""
    parts = list(parts)
    place = rng.randrange(len(parts))
    kind, flags, payload = parts[place]
    what = rng.randrange(6)
    if what <= 2:
        parts[place] = (kind, flags, mutate(payload, rng.choice(other)[2], rng))
    elif what == 3:
        parts[place] = (rng.choice((kind, rng.randrange(256))), flags ^ 1 << rng.randrange(8), payload)
    elif what == 4:
        parts[place] = rng.choice(parts + other)
    else:
        parts[place : place + 1] = rng.choice(([], [parts[place]] * 2, parts[place : place + 2][::-1]))
    return signed_log(parts)


def forge_export(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """An export with mutated columns or metadata and a right digest."""
    columns, metadata = layout.decode(data)
    if rng.random() < 0.4:
        name = rng.choice(sorted(metadata))
        metadata[name] = mutate(metadata[name].encode(), other, rng).decode("latin-1")
    else:
        name = rng.choice(sorted(columns))
        column = columns.pop(name)
        raw = mutate(column.tobytes(), other[-200:], rng)
        if rng.random() < 0.9:
            whole = np.frombuffer(raw[: len(raw) // column.itemsize * column.itemsize], column.dtype)
            wide = column.shape[-1] if column.ndim == 2 else 1
            columns[name] = whole[: len(whole) // wide * wide].reshape(-1, *column.shape[1:])
    metadata.pop("digest", None)
    digest = blake2b(layout.encode(columns, metadata), digest_size=32, person=b"zo.export").hexdigest()
    return layout.encode(columns, {**metadata, "digest": digest})


# ---- verdicts


def judge_log(path: Path, original: Log, data: bytes, whole: bytes, is_signed: bool) -> str:
    """What happened, in one word; "accepted" is bad."""
    try:
        log = read_log(path)
    except LogError:
        return "refused"
    if is_signed:
        again = signed_log(_encoded(log))
        return "well-formed" if data[: len(data) - log.torn_bytes] == again else "accepted"
    if data == whole:
        return "unchanged"
    beginning = repr(log.records) == repr(original.records[: len(log.records)])
    rest = data[: len(data) - log.torn_bytes]
    return "shortened" if beginning and rest == whole[: len(rest)] and len(log.records) < len(original.records) + 1 else "accepted"


def _encoded(log: Log) -> Frames:
    last: tuple[Settings, ...] = ()
    parts: Frames = []
    for record in log.records:
        parts.append(encode_record(record, last))
        if repr(decode_record(*parts[-1], last)) != repr(record):
            return []
        last = record.settings if isinstance(record, StepRecord) else () if isinstance(record, Segment) else last
    return parts


def judge_export(data: bytes, whole: bytes, is_signed: bool) -> str:
    """The same for an export."""
    try:
        tune = decode(data)
    except ValueError:
        return "refused"
    if data == whole:
        return "unchanged"
    return "well-formed" if is_signed and encode(tune) == data else "accepted"


def fuzz(count: int, seed: int, folder: Path) -> Counter[str]:
    """Outcomes of `count` mutated files. Raises what the reader should not have raised."""
    rng = random.Random(seed)
    logs = [log_bytes(residency, rng) for residency in ("exact", "inplace")]
    parts = [split(log, folder) for log in logs]
    originals = []
    for log in logs:
        (folder / "original").write_bytes(log)
        originals.append(read_log(folder / "original"))
    exports = [export_bytes(rng) for _ in range(2)]
    outcomes: Counter[str] = Counter()
    path = folder / "mutated"
    for index in range(count):
        which, is_signed = rng.randrange(2), rng.random() < 0.5
        if index % 2:
            data = (forge_export if is_signed else mutate)(exports[which], exports[1 - which], rng)
        elif is_signed:
            data = forge_log(parts[which], parts[1 - which], rng)
        else:
            data = mutate(logs[which], logs[1 - which], rng)
        path.write_bytes(data)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        verdict = (
            judge_export(data, exports[which], is_signed) if index % 2 else judge_log(path, originals[which], data, logs[which], is_signed)
        )
        signal.setitimer(signal.ITIMER_REAL, 0)
        outcomes[f"{'export' if index % 2 else 'log'}{' with right checksums' if is_signed else ''}: {verdict}"] += 1
        if verdict == "accepted":
            (Path(tempfile.gettempdir()) / f"accepted-{index}").write_bytes(data)
    return outcomes


def limit() -> None:
    """An alarm for inputs that take too long, and an end to allocations."""

    def rang(number: int, frame: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, rang)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if Path("/proc/self/statm").exists() else 8 << 30
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))


def main(arguments: list[str] | None = None) -> int:
    """Fuzz, print what happened; 1 where something was accepted, crashed, hung or ran out of memory."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--masks", type=int, default=3000, help="mutated masked runs, in addition")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    limit()
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            outcomes = fuzz(options.count, options.seed, Path(folder))
            outcomes += fuzz_masks(options.masks, Path(folder), random.Random(options.seed), mutate, signed_log)
        except (Exception, Hang):  # whatever it is: this is what is looked for
            traceback.print_exc()
            kept = Path(tempfile.gettempdir()) / "fuzz_log_found"
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            print(f"The files are kept in {kept}.", file=sys.stderr)
            return 1
    seconds = time.perf_counter() - began
    for name, number in sorted(outcomes.items()):
        print(f"{number:8d}  {name}")
    print(f"{options.count} files and {options.masks} masked runs in {seconds:.0f} s; none crashed, hung or ran out of memory")
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        given = {"count": options.count, "masks": options.masks, "seed": options.seed}
        result = {**given, "seconds": round(seconds, 1), "outcomes": dict(sorted(outcomes.items()))}
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return int(any(name.endswith(": accepted") for name in outcomes))


if __name__ == "__main__":
    sys.exit(main())
