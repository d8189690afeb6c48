"""Watches the operations of one evaluation: when each weight is first read, and what is written that was there before."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zo_lightning.engine.parameters import Trained


class Operations(TorchDispatchMode):
    """A clock that goes on by one at every operation.

    `wrote(since)` is called for what is written in place, with the time when its memory came to exist (-inf: before); running statistics of
    `norms` do not count, for nothing reads them again where each of these modules runs once.
    """

    def __init__(self, trained: Sequence[Trained], norms: Iterable[_NormBase], wrote: Callable[[float], None]) -> None:
        super().__init__()
        self.now = 0
        self.first_read: dict[int, int] = {}
        """By the key of a trained parameter."""
        self._wrote = wrote
        self._made: dict[int, int] = {}
        self._weights: dict[int, list[Trained]] = {}
        for p in trained:
            for alias in (p.tensor, *p.aliases):
                own = self._weights.setdefault(_storage(alias), [])
                if p not in own:
                    own.append(p)
        self._statistics = {_storage(buffer) for norm in norms for buffer in norm._buffers.values() if buffer is not None}

    def tick(self) -> int:
        """The next moment."""
        self.now += 1
        return self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.tick()
        read = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor) and tensor.layout == torch.strided]
        storages = set(map(_storage, read))
        for storage in storages:
            for p in self._weights.get(storage, ()):
                self.first_read.setdefault(p.key, self.now)
        for storage in self._written(func, args, kwargs) - self._statistics:
            self._wrote(self._made.get(storage, -math.inf))
        if kwargs.get("generator") is not None:
            self._wrote(-math.inf)
        out = func(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided and (storage := _storage(tensor)) not in storages:
                self._made[storage] = self.now
        return out

    def _written(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> set[int]:
        found: list[Any] = []
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                found.append(kwargs.get(argument.name) if i >= len(args) else args[i])
        if "batch_norm" in func._schema.name and len(args) > 4:  # kernels that write running statistics without a word of it
            found += args[3:5]
        return {_storage(tensor) for tensor in tree_leaves(found) if isinstance(tensor, Tensor)}


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
