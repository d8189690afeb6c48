"""Watches one forward pass on the base weights: which are read, also through views, while they would not be on scratch, and by whom."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_map_only

from zo_lightning.engine.noise.compiling import available
from zo_lightning.engine.noise.sweep import compiles
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.shards import is_sharded, local


class ReadWatch(TorchDispatchMode):
    """Notes every operation that reads the memory of a weight while its unit is not running, and which of `modules` are at that moment.

    `expected` says whether a weight may be read now. A view that a unit hands out and others read later counts as a read of the weight.
    What is read unexpectedly where it lies, and not on the `device` that computes, is read from a copy there.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        trained: Sequence[Trained],
        expected: Callable[[Trained], bool],
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self._device = device
        self._lent: dict[int, tuple[StorageWeakRef, list[tuple[int, int, Trained]]]] = {}
        """By identity, which the weak reference keeps from being used again; addresses are."""
        self._expected = expected
        self._modules = modules
        self._storages: dict[int, list[tuple[int, int, Trained]]] = {}
        for p in trained:
            if p.tensor.numel():
                begin, storage = p.tensor.data_ptr(), p.tensor.untyped_storage()
                self._storages.setdefault(storage.data_ptr(), []).append((begin, _end(p.tensor), p))
        self._readers: dict[Trained, list[nn.Module]] = {}
        self._running: list[nn.Module] = []
        self._hooks: list[Any] = []

    @property
    def missed(self) -> dict[Trained, nn.Module | None]:
        """The smallest module that owns the weight and ran around all reads of it; None: there is none."""
        return {p: owners[-1] if owners else None for p, owners in self._readers.items()}

    def __enter__(self) -> ReadWatch:
        # not global hooks: compiled modules warn of those
        for module in self._modules:
            self._hooks.append(module.register_forward_pre_hook(lambda module, args: self._running.append(module), prepend=True))
            self._hooks.append(module.register_forward_hook(lambda module, args, output: self._left(module), always_call=True))
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for hook in self._hooks:
            hook.remove()

    def _left(self, module: nn.Module) -> None:
        while self._running and self._running.pop() is not module:
            pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Tensor, self._read, (args, kwargs or {}))
        return func(*args, **kwargs)

    def placed(self, parameter: Trained, tensor: Tensor) -> None:
        """The weight is here for now."""
        ref = StorageWeakRef(tensor.untyped_storage())
        self._lent.setdefault(ref.cdata, (ref, []))[1].append((tensor.data_ptr(), _end(tensor), parameter))

    def _read(self, tensor: Tensor) -> Tensor:
        """What is read in its place."""
        if is_sharded(tensor):
            self._read(local(tensor))
            return tensor
        if is_traceable_wrapper_subclass(tensor):
            for name in tensor.__tensor_flatten__()[0]:
                self._read(getattr(tensor, name))
            return tensor
        if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel():
            return tensor
        storage = tensor.untyped_storage()
        _, lent = self._lent.get(storage._cdata, (None, ()))
        unexpected = False
        for begin, end, parameter in [*self._storages.get(storage.data_ptr(), ()), *lent]:
            if begin < _end(tensor) and tensor.data_ptr() < end and not self._expected(parameter):
                ids = {id(alias) for alias in parameter.aliases}
                owners = [m for m in self._running if any(id(w) in ids for w in m.parameters())]
                before = self._readers.get(parameter, owners)
                self._readers[parameter] = [m for m, other in zip(before, owners, strict=False) if m is other]
                unexpected = True
        return tensor if not unexpected or self._device is None else tensor.to(self._device)


def _end(tensor: Tensor) -> int:
    """The address behind the last element."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr() + (last + 1) * tensor.element_size()


@contextmanager
def uncompiled(trained: Sequence[Trained]) -> Iterator[None]:
    """Inside it, what was compiled runs eagerly: the operations inside a compiled graph can't be watched."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled
        yield
        return
    for device in {p.tensor.device for p in trained}:
        if compiles([p.tensor for p in trained if p.tensor.device == device]):
            available(device.type)  # whether kernels can be compiled: this can't be found out in there
    with torch.compiler.set_stance("force_eager"):
        yield
