"""Other tensors in the places of a module's weights."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from zo_lightning.engine.parameters import Trained

SPSA = "the estimator SPSA()"


class Place(NamedTuple):
    """Where a module has a trained weight."""

    owner: nn.Module
    name: str
    parameter: Trained


def places_of(module: nn.Module | None, trained: Sequence[Trained], otherwise: str = SPSA) -> list[Place]:
    """All places of these weights. ValueError where the module has not all of them, which says what to do `otherwise`."""
    by_id = {id(alias): p for p in trained for alias in p.aliases}
    owners = () if module is None else module.modules()
    found = [
        Place(owner, name, by_id[id(parameter)])
        for owner in owners
        for name, parameter in owner._parameters.items()
        if id(parameter) in by_id
    ]
    lost = {id(p) for p in trained} - {id(place.parameter) for place in found}
    if lost:
        name = next(p.name for p in trained if id(p) in lost)
        raise ValueError(
            f"The module that reads the weights must be known, and {name!r} is in none. Give the optimizer the module "
            f"(ZOOptimizer(module), or module=...), or use {otherwise}."
        )
    return found


class Stack(NamedTuple):
    """The k values of a parameter: tensors, and what makes a value of what is one's own of each.

    Of a tensor one has its part of the first dimension, of size k, or all of it where its place is among the `shared`.
    """

    parameter: Trained
    tensors: Sequence[Tensor]
    made: Callable[..., Tensor]
    shared: frozenset[int] = frozenset()


@contextmanager
def shown_instead(
    places: Sequence[Place], values: Mapping[Trained, Tensor], buffers: Mapping[tuple[nn.Module, str], Tensor] = MappingProxyType({})
) -> Iterator[None]:
    """Inside it, the module has these values in the places of its weights, and these buffers."""
    weights = [place.owner._parameters[place.name] for place in places]
    before = {(owner, name): owner._buffers[name] for owner, name in buffers}
    try:
        for place in places:
            place.owner._parameters[place.name] = values[place.parameter]  # type: ignore[assignment]
            refresh(place.owner)
        for (owner, name), buffer in buffers.items():
            owner._buffers[name] = buffer
        yield
    finally:
        for place, weight in zip(places, weights, strict=True):
            place.owner._parameters[place.name] = weight
            refresh(place.owner)
        for (owner, name), old in before.items():
            owner._buffers[name] = old


@contextmanager
def in_parts(recurrent: bool, attention: bool = True) -> Iterator[None]:
    """Transformer layers, `attention`, and `recurrent` layers where there are any, run as operations that torch.func knows."""
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        if recurrent:  # torch.backends.mkldnn.flags sets precisions as well, of which it warns
            torch._C._set_mkldnn_enabled(False)
        with sdpa_kernel(SDPBackend.MATH) if attention else nullcontext():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)


def refresh(owner: nn.Module) -> None:
    """Recurrent layers keep a list of their weights."""
    if isinstance(owner, nn.RNNBase):
        owner._flat_weights = [getattr(owner, name, None) for name in owner._flat_weights_names]


class Read(TorchFunctionMode):
    """Raises where an operation makes a tensor of a weight in another way than by its module's attribute, or of a `dual` one where forward
    mode is off.

    Seen are the parameters themselves, and what has their memory: views, detached tensors, what state_dict() gave.
    """

    def __init__(
        self,
        parameters: Iterable[Trained],
        duals: Mapping[int, str] = MappingProxyType({}),
        missing: str = "derivative",
        otherwise: str = SPSA,
    ) -> None:
        super().__init__()
        self._duals, self._missing, self._otherwise = duals, missing, otherwise
        places = sorted(
            (alias.data_ptr(), alias.nbytes, p.name) for p in parameters for alias in p.aliases if alias.numel() and _plain(alias)
        )
        self._begins = [begin for begin, _, _ in places]
        self._places = places

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple, list)) and (getattr(func, "__name__", "") != "__get__" or func in _VIEWS):
            off = not torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled()
            for value in _tensors((args, kwargs)):
                if off and id(value) in self._duals:
                    raise RuntimeError(
                        f"{self._duals[id(value)]!r} is read where forward-mode derivatives are off, so that its own would be missing: "
                        "inside torch.inference_mode() or an autograd.Function, such as checkpoint(use_reentrant=True). Use "
                        "use_reentrant=False, no activation checkpointing (there is no backward pass), or the estimator SPSA()."
                    )
                name = self._name_of(value)
                if name is not None:
                    raise RuntimeError(
                        f"{name!r} is read by another name than its module's attribute, so that its {self._missing} "
                        f"would be missing. Read it from the module that has it, or use {self._otherwise}."
                    )
        return result

    def _name_of(self, value: Tensor) -> str | None:
        """The weight whose memory a tensor has; what carries a tangent, or is one of a batch, was read as it should be."""
        if not _plain(value) or not value.numel():
            return None
        at = bisect_right(self._begins, value.data_ptr()) - 1
        if at < 0 or value.data_ptr() >= self._places[at][0] + self._places[at][1]:
            return None
        carries = bool(self._duals) and forward_ad.unpack_dual(value).tangent is not None
        return None if carries else self._places[at][2]


_VIEWS = [getattr(Tensor, name).__get__ for name in ("T", "mT", "H", "mH", "data", "real", "imag")]


def _plain(value: Tensor) -> bool:
    """Whether it has memory of its own, and an address."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(value)
    return not wrapped and type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided and not value.is_meta


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in nested arguments of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
