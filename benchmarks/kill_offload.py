"""What kill_resume.py does to weights in files: SIGKILL in the middle of a block's way to its slot, and what the next process takes."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from zo_lightning.engine.offload import disk
from zo_lightning.engine.offload.ahead import Ahead
from zo_lightning.engine.offload.disk import Slot
from zo_lightning.engine.offload.mapped import PAGE
from zo_lightning.engine.offload.stamps import Stamp
from zo_lightning.engine.residency import Offloaded

PLACES = ("slot", "stamp", "flush")
"""What is interrupted in the middle."""


def die() -> None:
    """What a power cut does to this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_offloaded(place: str, now: Callable[[], bool]) -> None:
    """In the middle of what weights in files do beside: writing a block, stamping it, making all updates that are due."""
    if place == "slot":
        transfer: Callable[..., None] = vars(disk)["transfer"]

        def cut(call: Callable[..., int], descriptor: int, memory: Tensor, nbytes: int) -> None:
            if call is os.pwritev and now():
                transfer(call, descriptor, memory, random.randrange(nbytes // PAGE) * PAGE)
                die()
            transfer(call, descriptor, memory, nbytes)

        vars(disk)["transfer"] = cut
    elif place == "stamp":
        plain = Slot.stamp

        def stamped(self: Slot, stamp: Stamp) -> None:
            if not now():
                plain(self, stamp)
                return
            when = random.choice(("before", "within", "after"))
            if when == "within":
                os.pwrite(self.descriptor, stamp.encode()[: random.randrange(80)], self.nbytes)
            elif when == "after":
                plain(self, stamp)
            die()

        Slot.stamp = stamped  # type: ignore[method-assign]
    else:
        flush = Offloaded.flush

        def flushed(self: Offloaded) -> None:
            if now():
                waiting = [parcel for parcel in self.parcels if parcel in self._due]
                with self._used(waiting[: (len(waiting) + 1) // 2]):
                    die()
            flush(self)

        Offloaded.flush = flushed  # type: ignore[method-assign]


def count_stamps(file: Path) -> None:
    """Note in a file what a process that goes on takes from slots, and whether it went back to the weights of the beginning."""

    def noted(kind: str, plain: Callable[..., Any], number: Callable[..., int]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with file.open("a") as lines:
                lines.write(f"{os.getpid()} {kind} {number(*args)}\n")
            return plain(*args)

        return call

    Offloaded.adopt = noted("taken", Offloaded.adopt, lambda self, made, found, origin: len(found))  # type: ignore[method-assign]
    Ahead.back = noted("back", Ahead.back, lambda self, *rest: 1)  # type: ignore[method-assign]


def stamps_of(file: Path) -> Counter[str]:
    """How many processes went on from stamps, and how many of them did not go back."""
    lines = [line.split() for line in file.read_text().splitlines()] if file.exists() else []
    took, back = ({pid for pid, kind, number in lines if kind == one and int(number)} for one in ("taken", "back"))
    return Counter({"from stamps": len(took), "from stamps alone": len(took - back)})
