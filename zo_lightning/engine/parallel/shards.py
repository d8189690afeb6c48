"""The exchange between processes of which some share the same data, because they share a model (tensor parallel)."""

from __future__ import annotations

from datetime import timedelta

from zo_lightning.engine.parallel.processes import Processes


class ShardParallel(Processes):
    """All processes evaluate all points, and those of one tensor-parallel group see the same data.

    `stream` is their number among those that see different data: they draw the same dropout masks. Each counts in the mean, which is that
    over the data, for groups have the same size; it also is the same on all ranks where theirs differ by rounding.
    """

    def __init__(self, stream: int, timeout: timedelta = timedelta(minutes=30)) -> None:
        super().__init__(None, timeout=timeout)
        self.stream = stream
