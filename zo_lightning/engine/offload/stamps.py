"""What a slot says about itself: which parcel it has, after how many steps of which log, and the checksum of its bytes."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import torch
from torch import Tensor

VERSION = 2
_PIECE = 1 << 20
"""Words that are summed up together."""


class Moment(NamedTuple):
    """A moment of a run: so many steps made, and the chain of its step log there (frames.py), None where no log has them.

    Equal chains after equally many steps are logs with the same records, so that weights of the one are weights of the other.
    """

    step: int
    chain: int | None = None


class Stamp(NamedTuple):
    """What stands behind the bytes of a slot."""

    parcel: str
    moment: Moment
    checksum: str

    def encode(self) -> bytes:
        """As it is written."""
        words = {"version": VERSION, "parcel": self.parcel, "step": self.moment.step, "log": self.moment.chain, "checksum": self.checksum}
        return json.dumps(words).encode()


def decode(page: bytes) -> Stamp | None:
    """The stamp of a page; None where there is none, or no whole one."""
    try:
        words: Any = json.loads(page.rstrip(b"\0"))
    except ValueError:
        return None
    if not isinstance(words, dict) or words.get("version") != VERSION:
        return None
    parcel, step, chain, sums = (words.get(name) for name in ("parcel", "step", "log", "checksum"))
    if not (isinstance(parcel, str) and isinstance(step, int) and isinstance(chain, int | None) and isinstance(sums, str)):
        return None
    return Stamp(parcel, Moment(step, chain), sums)


def checksum(memory: Tensor) -> str:
    """The sum and the weighted sum of all 64-bit words, modulo 2**64: other ones where an older piece stands among the rest."""
    words = memory.view(torch.int64)
    total, weighted = 0, 0
    for number, piece in enumerate(words.split(_PIECE), 1):
        some = int(piece.sum())
        total, weighted = total + some, weighted + number * some
    return f"{total % 2**64:016x}{weighted % 2**64:016x}"
