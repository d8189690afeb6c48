"""Weights and buffers from one process to others."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zo_lightning.engine.shards import is_sharded


def broadcast_parameters(tensors: list[Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Give every rank of the group the tensors of its first. Of DTensors each keeps its own part."""
    with torch.no_grad():
        for tensor in tensors:
            if is_sharded(tensor):
                continue
            if is_traceable_wrapper_subclass(tensor):  # quantized: what is inside
                broadcast_parameters([getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]], group)
                continue
            dense = tensor.detach().contiguous()
            dist.broadcast(dense, group=group, group_src=0)
            tensor.detach().copy_(dense)
