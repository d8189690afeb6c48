"""Weights and buffers from one process to others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zo_lightning.engine.shards import is_sharded


def broadcast_parameters(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Give every rank of the group the tensors of its first. Of DTensors each keeps its own part.

    ValueError on all ranks, before anything is sent, where tensors have other shapes or dtypes than those of the first rank: gloo would
    end the process.
    """
    own = [_described(tensor) for tensor in tensors]
    every: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(every, own, group=group)
    for rank, other in enumerate(every):
        if len(other) != len(every[0]):
            raise ValueError(f"Rank {rank} is not like rank 0: its model has {len(other)} tensors, and that of rank 0 has {len(every[0])}.")
        for index, (there, here) in enumerate(zip(other, every[0], strict=True)):
            if there != here:
                raise ValueError(
                    f"Rank {rank} is not like rank 0: tensor {index} of its model is {there}, and that of rank 0 is {here}. All processes "
                    "need the same script and model."
                )
    send(tensors, group)


def send(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """The same, for tensors that are known to be alike."""
    with torch.no_grad():
        for tensor in tensors:
            if is_sharded(tensor):
                continue
            if is_traceable_wrapper_subclass(tensor):  # quantized: what is inside
                send([getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]], group)
                continue
            dense = tensor.detach().contiguous()
            dist.broadcast(dense, group=group, group_src=0)
            tensor.detach().copy_(dense)


def _described(tensor: Tensor) -> str:
    return f"{type(tensor).__name__ if is_sharded(tensor) else ''}{tuple(tensor.shape)} of {str(tensor.dtype).removeprefix('torch.')}"
