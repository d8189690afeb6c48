"""Several values of one parameter in one evaluation: the closure under torch.vmap, with that parameter shown as a batch of tensors."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.engine.messages import say_once
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.tangents import Read, in_parts, places_of, refresh


class Stacked:
    """Whether a model can be evaluated so, and the evaluation."""

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self._off = False

    @property
    def possible(self) -> bool:
        """False after an operation was found that can't be."""
        return not self._off

    def losses(self, p: Trained, copies: Tensor, evaluate: Callable[[], Any]) -> Tensor | None:
        """The loss for each of k copies of `p`, shape (k,), of what `evaluate` returns for one; None where it can't be done.

        Random numbers are those of one evaluation, the same for all copies.
        """

        def shown(weights: Tensor) -> Any:
            originals = [place.owner._parameters[place.name] for place in places]
            try:
                for place in places:
                    place.owner._parameters[place.name] = weights  # type: ignore[assignment]
                    refresh(place.owner)
                with Read({id(alias): p.name for alias in p.aliases}):
                    return evaluate()
            finally:
                for place, original in zip(places, originals, strict=True):
                    place.owner._parameters[place.name] = original
                    refresh(place.owner)

        try:
            places = places_of(self._module, [p])
            recurrent = any(isinstance(place.owner, nn.RNNBase) for place in places)
            with in_parts(recurrent), warnings.catch_warnings():
                warnings.filterwarnings("error", "There is a performance drop")  # a loop over the copies, which is no batch
                return torch.func.vmap(shown, randomness="same")(copies)  # type: ignore[no-any-return]
        except Exception as error:  # evaluated alone, the closure raises again what is not of vmap's making
            self._off = True
            say_once(
                "coordinates.batch",
                f"batch= of Coordinatewise does nothing here: {p.name!r} can't be evaluated with several values at once "
                f"({str(error).split(chr(10))[0][:300]}). Points are evaluated one at a time.",
            )
            return None
