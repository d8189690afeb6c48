"""Derivatives along directions: forward-mode automatic differentiation carries a tangent beside every value, in one evaluation.

A weight is shown to the model as a dual tensor, theta + t u with t infinitesimal; what the closure returns then has dL/dt. The
memory is that of the tangents: those of the trained weights, and one beside each activation that is alive.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency.watch import uncompiled


class Place(NamedTuple):
    """Where a module has a trained weight."""

    owner: nn.Module
    name: str
    parameter: Trained


def places_of(module: nn.Module | None, trained: Sequence[Trained]) -> list[Place]:
    """All places of all trained weights. ValueError where the module has not all of them."""
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
            f"Forward-mode derivatives need the module that reads the weights, and {name!r} is in none. Give the optimizer the module "
            "(ZOOptimizer(module), or module=...), or use the estimator SPSA()."
        )
    return found


def check_tables(places: Sequence[Place]) -> None:
    """ValueError for embeddings that write their weights when they are read."""
    for place in places:
        if getattr(place.owner, "max_norm", None) is not None and isinstance(place.owner, (nn.Embedding, nn.EmbeddingBag)):
            raise ValueError(
                f"{place.parameter.name!r} is a table with max_norm={place.owner.max_norm!r}, whose rows are shortened in place when they "
                "are read, and that has no forward-mode derivative. Leave max_norm out, freeze the table, or use the estimator SPSA()."
            )


@contextmanager
def showing(module: nn.Module | None, trained: Sequence[Trained], tangents: Mapping[int, Tensor]) -> Iterator[None]:
    """Inside it the module has dual weights, with the `tangents` by id of their Trained; those without one are as they are.

    Whole attention, transformer layers and recurrent cells that have no forward-mode derivative run as their parts. RuntimeError that says
    what to do where a weight is read elsewhere than in its module, or where forward mode is off, so that its derivative would be missing,
    and where an operation has no forward-mode derivative.
    """
    _prepared()
    places = places_of(module, trained)
    duals: dict[int, Tensor] = {}
    owners = {id(place.owner): place.owner for place in places}
    recurrent = any(isinstance(owner, nn.RNNBase) for owner in owners.values())
    with uncompiled(trained), forward_ad.dual_level(), in_parts(recurrent):
        for p in trained:
            if id(p) in tangents:
                duals[id(p)] = forward_ad.make_dual(p.tensor.detach(), tangents[id(p)])
        originals = [place.owner._parameters[place.name] for place in places]
        names = {id(alias): p.name for p in trained for alias in p.aliases if id(p) in tangents}
        shown = {id(dual): p.name for p in trained if (dual := duals.get(id(p))) is not None}
        try:
            for place in places:
                if id(place.parameter) in duals:
                    place.owner._parameters[place.name] = duals[id(place.parameter)]  # type: ignore[assignment]
            for owner in owners.values():
                refresh(owner)
            with Read(names, shown):
                yield
        except (NotImplementedError, RuntimeError) as error:
            if not re.search(_MISSING, str(error)):
                raise
            said = str(error).split(chr(10))[0]
            advice = _EAGER if re.search("attention|sdp", said, re.IGNORECASE) else "Use"
            raise RuntimeError(f"An operation of the model has no forward-mode derivative: {said} {advice} {_SPSA}") from error
        finally:
            for place, original in zip(places, originals, strict=True):
                place.owner._parameters[place.name] = original
            for owner in owners.values():
                refresh(owner)


@cache
def _prepared() -> None:
    """torch compiles some derivatives by torch.jit, of which it warns, when they are first asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


@contextmanager
def in_parts(recurrent: bool) -> Iterator[None]:
    """Attention and transformer layers, and `recurrent` ones where there are any, run as operations that have derivatives."""
    fast, onednn = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        if recurrent:  # torch.backends.mkldnn.flags sets precisions as well, of which it warns
            torch._C._set_mkldnn_enabled(False)
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        torch._C._set_mkldnn_enabled(onednn)


def slope_of(loss: Any) -> tuple[Any, Tensor]:
    """(the loss without a tangent, its derivative), inside `showing`. RuntimeError where it has none."""
    if not isinstance(loss, Tensor):
        raise RuntimeError(
            f"The closure returned {type(loss).__name__}, which has no derivative. Return the loss as a tensor, or use SPSA()."
        )
    primal, tangent = forward_ad.unpack_dual(loss)
    if tangent is None:
        raise RuntimeError(
            "The loss has no derivative with respect to the trained weights: it was detached, or computed by a copy of the module. Return "
            "it as the module computed it, or use SPSA()."
        )
    return primal, tangent


def refresh(owner: nn.Module) -> None:
    """Recurrent layers keep a list of their weights."""
    if isinstance(owner, nn.RNNBase):
        owner._flat_weights = [getattr(owner, name, None) for name in owner._flat_weights_names]


class Read(TorchFunctionMode):
    """Raises where an operation makes a tensor of one of the parameters themselves, or of a dual weight where forward mode is off."""

    def __init__(self, names: Mapping[int, str], shown: Mapping[int, str] = MappingProxyType({})) -> None:
        super().__init__()
        self._names, self._shown = names, shown

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, (Tensor, tuple, list)) and getattr(func, "__name__", "") != "__get__":
            off = not torch._C._is_fwd_grad_enabled() or torch.is_inference_mode_enabled()
            for value in _tensors((args, kwargs)):
                if id(value) in self._names:
                    raise RuntimeError(
                        f"{self._names[id(value)]!r} is read by another name than its module's attribute, so that its derivative would be "
                        "missing. Read it from the module that has it, or use the estimator SPSA()."
                    )
                if off and id(value) in self._shown:
                    raise RuntimeError(
                        f"{self._shown[id(value)]!r} is read where forward-mode derivatives are off, so that its own would be missing: "
                        "inside torch.inference_mode() or an autograd.Function, such as checkpoint(use_reentrant=True). Use "
                        "use_reentrant=False, no activation checkpointing (there is no backward pass), or the estimator SPSA()."
                    )
        return result


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in nested arguments of an operation."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


_MISSING = "forward (mode )?AD|_efficientzerotensor"
"""What errors of torch say of operations without a forward-mode derivative."""
_SPSA = "the estimator SPSA(), which needs no derivative."
_EAGER = 'Use eager attention (attn_implementation="eager"), or'
