"""Derivatives along directions: forward-mode automatic differentiation carries a tangent beside every value, in one evaluation.

A weight is shown to the model as a dual tensor, theta + t u with t infinitesimal; what the closure returns then has dL/dt. The
memory is that of the tangents: those of the trained weights, and one beside each activation that is alive.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency.watch import uncompiled
from zo_lightning.engine.shown import SPSA, Place, Read, in_parts, places_of, shown_instead


def check_tables(places: Sequence[Place], why: str = "that has no forward-mode derivative") -> None:
    """ValueError for embeddings that write their weights when they are read."""
    for place in places:
        if getattr(place.owner, "max_norm", None) is not None and isinstance(place.owner, (nn.Embedding, nn.EmbeddingBag)):
            raise ValueError(
                f"{place.parameter.name!r} is a table with max_norm={place.owner.max_norm!r}, whose rows are shortened in place when they "
                f"are read, and {why}. Leave max_norm out, freeze the table, or use the estimator SPSA()."
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
    recurrent = any(isinstance(place.owner, nn.RNNBase) for place in places)
    with uncompiled(trained), forward_ad.dual_level(), in_parts(recurrent):
        duals = {p: forward_ad.make_dual(p.tensor.detach(), tangents[id(p)]) for p in trained if id(p) in tangents}
        shown = {id(dual): p.name for p, dual in duals.items()}
        try:
            with shown_instead([place for place in places if place.parameter in duals], duals), Read(duals, shown):
                yield
        except (NotImplementedError, RuntimeError) as error:
            if not re.search(_MISSING, str(error)):
                raise
            said = str(error).split(chr(10))[0]
            advice = _EAGER if re.search("attention|sdp", said, re.IGNORECASE) else "Use"
            raise RuntimeError(
                f"An operation of the model has no forward-mode derivative: {said} {advice} {SPSA}, which needs no derivative."
            ) from error


@cache
def _prepared() -> None:
    """torch compiles some derivatives by torch.jit, of which it warns, when they are first asked for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        with forward_ad.dual_level():
            forward_ad.make_dual(torch.zeros(1), torch.zeros(1))


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


_MISSING = "forward (mode )?AD|_efficientzerotensor"
"""What errors of torch say of operations without a forward-mode derivative."""
_EAGER = 'Use eager attention (attn_implementation="eager"), or'
