"""Loaders for processes that share the points of a step: accelerate gives every process data of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import PartialState

from zo_lightning.engine.parallel import Mesh
from zo_lightning.engine.undo import undoing


@contextmanager
def of_stream(accelerator: Any, mesh: Mesh) -> Iterator[None]:
    """Inside it, loaders are made as if there were as many processes as streams of data: samplers, shards and the seeds of workers.

    A process that reads for all others would hand out slices by the real ranks, so that loaders of iterable datasets shard instead.
    """
    stream = mesh.stream(accelerator.process_index)
    with undoing() as undo:
        for state in (accelerator.state, PartialState()):
            undo.bind(state, num_processes=mesh.streams, process_index=stream)
        undo.bind(accelerator.dataloader_config, dispatch_batches=False)
        yield
