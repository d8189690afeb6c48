"""The bytes of a log: a magic, then frames, each with a checked head and a checksum that continues that of the frame before.

    head     kind u8, flags u8, length of the payload u32, CRC-16 of these six bytes (started with the chain) u16
    payload
    chain    CRC-32 of head and payload, continued from the previous frame, u32

A frame that was moved, repeated or left out breaks the chain. The head has a check of its own so that a damaged length in the middle is
not taken for a last record that was cut off.
"""

from __future__ import annotations

import struct
from binascii import crc32, crc_hqx
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

MAGIC = b"\x89ZOLOG\r\n\x1a\x01"
"""Ends with the version of the format."""
LARGEST = 1 << 26
"""Bytes of a payload: some 500,000 parameters in a segment."""

_HEAD, _CHECK, _CHAIN = struct.Struct("<BBI"), struct.Struct("<H"), struct.Struct("<I")
_OPENING = _HEAD.size + _CHECK.size
FIRST_CHAIN = crc32(MAGIC)


class LogError(ValueError):
    """A log or an export is damaged, or none at all; the message names file, place, and what to do."""


class Frame(NamedTuple):
    """One frame: where it begins and ends in the file, and the chain after it."""

    kind: int
    flags: int
    payload: bytes
    begin: int
    end: int
    chain: int


class Torn(NamedTuple):
    """The frame that begins at `begin` is the last one of the file, and not what was to be written: `problem` says in which way.

    Where its checksum alone is wrong, nothing tells a write that was cut off from damage.
    """

    begin: int
    size: int
    problem: str = "it is incomplete"


class Damage(NamedTuple):
    """Bytes at `begin` that no interrupted append leaves behind."""

    begin: int
    problem: str


def pack(kind: int, flags: int, payload: bytes, chain: int) -> tuple[bytes, int]:
    """(the frame, the chain after it). ValueError for a payload that is too large."""
    if len(payload) > LARGEST:
        raise ValueError(f"A record of {len(payload)} bytes is larger than a log takes ({LARGEST}).")
    head = _HEAD.pack(kind, flags, len(payload))
    body = head + _CHECK.pack(crc_hqx(head, chain & 0xFFFF)) + payload
    chain = crc32(body, chain)
    return body + _CHAIN.pack(chain), chain


def frames(file: BinaryIO, size: int) -> Iterator[Frame | Torn | Damage]:
    """The frames of a file of `size` bytes that stands behind the magic; a `Torn` or a `Damage` ends them.

    Never reads more than the file has, nor more than one payload at a time.
    """
    at, chain = len(MAGIC), FIRST_CHAIN
    while at < size:
        opening = file.read(_OPENING)
        if len(opening) < _OPENING:
            yield Torn(at, size)
            return
        kind, flags, length = _HEAD.unpack_from(opening)
        if _CHECK.unpack_from(opening, _HEAD.size)[0] != crc_hqx(opening[: _HEAD.size], chain & 0xFFFF):
            torn = opening[-1] == 0 and _only_zeros(file)  # the file had grown already, its contents were not on the disk
            yield Torn(at, size) if torn else Damage(at, "the head of a record is damaged")
            return
        if length > LARGEST:
            yield Damage(at, f"a record of {length} bytes is larger than any")
            return
        end = at + _OPENING + length + _CHAIN.size
        if end > size:
            yield Torn(at, size)
            return
        body = opening + file.read(length)
        expected = crc32(body, chain)
        if file.read(_CHAIN.size) != _CHAIN.pack(expected):
            last = _only_zeros(file)
            yield Torn(at, size, "its checksum is wrong") if last else Damage(at, "a record does not match its checksum")
            return
        chain = expected
        yield Frame(kind, flags, body[_OPENING:], at, end, chain)
        at = end


def _only_zeros(file: BinaryIO) -> bool:
    """Whether nothing but zeros follows."""
    while piece := file.read(1 << 20):
        if piece.count(0) != len(piece):
            return False
    return True
