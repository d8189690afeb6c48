"""Logs that somebody made up, with right checksums: each is an error of its own kind, and costs little."""

from __future__ import annotations

import math
import os
import struct
import tracemalloc
from binascii import crc_hqx
from dataclasses import replace
from pathlib import Path

import pytest
from trajectory_tools import F, made_up_segment, made_up_steps, written

from zo_lightning.engine.trajectory import (
    LogError,
    read_log,
)
from zo_lightning.engine.trajectory import records as records_module
from zo_lightning.engine.trajectory.encoding import canonical, encode
from zo_lightning.engine.trajectory.frames import FIRST_CHAIN, LARGEST, MAGIC, pack


def signed(*frames: tuple[int, int, bytes]) -> bytes:
    """A log of these payloads with right checksums: what somebody could send who means harm."""
    data, chain = MAGIC, FIRST_CHAIN
    for frame in frames:
        body, chain = pack(*frame, chain)
        data += body
    return data


@pytest.mark.parametrize("length", [LARGEST + 1, 1 << 31, (1 << 32) - 1])
def test_a_length_field_does_not_make_the_reader_allocate(length: int, tmp_path: Path) -> None:
    """With a right check of the head: as somebody could send it. A file of that size, all hole, is not read into memory either."""
    data = signed((2, 0, encode(made_up_segment(), ())[2]))
    head = struct.pack("<BBI", 1, 0, length)
    chain = struct.unpack("<I", data[-4:])[0]
    path = tmp_path / "log"
    path.write_bytes(data + head + struct.pack("<H", crc_hqx(head, chain & 0xFFFF)) + b"\1" * 100)
    tracemalloc.start()
    with pytest.raises(LogError, match="larger than any"):
        read_log(path)
    os.truncate(path, len(data))
    os.truncate(path, 1 << 28)
    assert read_log(path).torn_bytes == (1 << 28) - len(data)
    assert tracemalloc.get_traced_memory()[1] < 1 << 23
    tracemalloc.stop()


GOOD = encode(made_up_segment(), ())[2]


def changed(**changes: str) -> bytes:
    """The segment with other JSON for some entries."""
    text = GOOD.decode()
    for name, value in changes.items():
        begin = text.index(f'"{name}":') + len(name) + 3
        depth, end = 0, begin
        while depth or text[end] not in ",}":
            depth += (text[end] in "[{") - (text[end] in "]}")
            end += 1
        text = text[:begin] + value + text[end:]
    return text.encode()


HOSTILE = {
    "not JSON": b"{",
    "no object": b"[]",
    "null": b"null",
    "not ASCII": b'{"a":"\xff"}',
    "nothing": b"",
    "NaN": changed(seed="NaN"),
    "infinity": changed(seed="-Infinity"),
    "a huge integer": changed(seed="9" * 5000),
    "a huge float": changed(seed="1e999"),
    "a float for an integer": changed(seed="7.0"),
    "a truth for an integer": changed(seed="true"),
    "a negative seed": changed(seed="-1"),
    "a text for an integer": changed(step='"0"'),
    "null for a text": changed(noise="null"),
    "a lone surrogate": changed(noise='"\\ud800"'),
    "a space": changed(seed=" 7"),
    "deep nesting": changed(versions="[" * 200_000 + "]" * 200_000),
    "deep nesting of objects": changed(versions='{"a":' * 100_000 + "1" + "}" * 100_000),
    "an unknown key": GOOD.replace(b'{"base"', b'{"also":1,"base"'),
    "a key twice": GOOD.replace(b'{"base":null', b'{"base":null,"base":null'),
    "a missing key": GOOD.replace(b'"frozen":"",', b""),
    "a path for a base": changed(base='"../../etc/passwd"'),
    "the parent folder for a base": changed(base='".."'),
    "no parameters": changed(parameters="[]"),
    "parameters of another type": changed(parameters="{}"),
    "a parameter of another type": changed(parameters="[1]"),
    "a negative size": GOOD.replace(b"[3,4]", b"[-3,4]", 1),
    "a huge size": GOOD.replace(b"[3,4]", b"[3000000000,4000000000]", 1),
    "an unknown dtype": GOOD.replace(b"float32", b"object_", 1),
    "a group out of range": GOOD.replace(b'"group":1', b'"group":70000', 1),
    "a negative group": GOOD.replace(b'"group":1', b'"group":-1', 1),
    "a name twice": GOOD.replace(b"weight.1", b"weight.0"),
    "options of another type": changed(options="[]"),
    "an option that is a table": changed(queries="{}"),
    "an option that is huge": changed(queries="1000000000"),
    "a part of another type": changed(estimator='"spsa"'),
    "an unknown residency": changed(residency='"elsewhere"'),
    "a residency of another type": changed(residency="[]"),
    "an unknown rounding": changed(rounding="{}"),
    "compiled of another type": changed(compiled="1"),
    "versions of another type": changed(versions="[]"),
    "a version of another type": changed(versions='{"torch":2}'),
    "a short fingerprint": changed(fingerprint='"00"'),
    "a fingerprint in capitals": changed(fingerprint=f'"{"A" * 64}"'),
    "frozen of another type": changed(frozen="0"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_segment_with_right_checksums_is_a_log_error(name: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(signed((2, 0, HOSTILE[name])))
    with pytest.raises(LogError, match=r"damaged at byte 10 \(record 0\)"):
        read_log(path)


STEP = encode(made_up_steps(1)[0], ())[2]


@pytest.mark.parametrize(
    ("kind", "flags", "payload"),
    [
        (0, 0, b""),
        (9, 0, b""),
        (1, 4, b""),
        (1, 4, STEP[:-1]),
        (1, 4, STEP + b"\0"),  # a pass of a log that is not in place
        (1, 0, STEP),  # settings that are said not to be there
        (1, 64 | 4, STEP),
        (1, 4, STEP[:8] + b"\xff\xff" + STEP[10:]),  # more values than there are
        (1, 4, STEP[:16] + b"\x0f" + STEP[17:]),
        (1, 4, STEP[:17] + b"\xff\xff" + STEP[19:]),  # more groups than there are
        (1, 4, STEP[:19] + struct.pack("<d", math.nan) + STEP[27:]),
        (1, 4, STEP[:19] + struct.pack("<d", -1.0) + STEP[27:]),
        (1, 4, STEP[:-8] + struct.pack("<d", math.nan)),  # not finite and not skipped
        (1, 4, STEP[:10] + bytes(4) + STEP[14:]),  # no micro-batch
        (1, 4, struct.pack("<Q", 1 << 63) + STEP[8:]),
        (1, 4, struct.pack("<Q", 1) + STEP[8:]),  # a gap
        (3, 0, canonical({"step": 0, "path": "x", "host": 1})),
        (3, 0, canonical({"step": 5, "path": "x", "host": "hf"})),
        (4, 1, canonical({"step": 0, "fingerprint": F})),
        (4, 0, canonical({"step": 1, "fingerprint": F})),
        (5, 0, canonical({"step": 0, "fingerprint": None})),
        (5, 0, b"[" * 100_000),
    ],
)
def test_a_hostile_record_with_right_checksums_is_a_log_error(kind: int, flags: int, payload: bytes, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(signed((2, 0, encode(made_up_segment(), ())[2]), (kind, flags, payload), (4, 0, b"")))
    with pytest.raises(LogError, match=r"\(record 1\)"):
        read_log(path)


def test_the_bad_records_above_are_bad_for_their_own_sake(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(signed((2, 0, encode(made_up_segment(), ())[2]), (1, 4, STEP)))
    assert read_log(path).steps == made_up_steps(1)


def test_many_groups_that_many_steps_share_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a file of a megabyte could keep the reader busy for hours."""
    steps = [replace(step, settings=made_up_steps(1, groups=500)[0].settings) for step in made_up_steps(50)]
    data = written(tmp_path / "log", [made_up_segment(groups=500), *steps])
    assert len(data) < 50_000 + 500 * 8 * 3 + 50 * 60
    looks = []
    plain = records_module._check_settings
    monkeypatch.setattr(records_module, "_check_settings", lambda settings: (looks.append(len(settings)), plain(settings)))
    assert repr(read_log(tmp_path / "log").steps) == repr(steps)
    assert sum(looks) <= 1000
