"""Several values of parameters in one evaluation: the closure under torch.vmap, with batches of tensors in their places."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.engine.messages import say_once
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency.watch import uncompiled
from zo_lightning.engine.shown import Read, Stack, in_parts, places_of, shown_instead


def copies_of(parameter: Trained, copies: Tensor) -> Stack:
    """k values as they are, of shape (k, *shape)."""
    return Stack(parameter, [copies], lambda copy: copy)


class Stacked:
    """Whether a model can be evaluated so, and the evaluation.

    `option` is what asks for it, in words. Where operations may loop over the values (`loops`), attention that has no batches is taken as
    it is; else that counts as impossible, for nothing would be gained.
    """

    def __init__(self, module: nn.Module | None, option: str, loops: bool) -> None:
        self._module, self._option, self._loops = module, option, loops
        self._off = False

    @property
    def possible(self) -> bool:
        """False after an operation was found that can't be."""
        return not self._off

    @contextmanager
    def alike(self, parameters: Sequence[Trained]) -> Iterator[None]:
        """Around evaluations of one value: they take the operations that those of several take, which may be another function of weights.

        Padded positions are zeros behind torch's fast path of transformer layers, and not behind the other one.
        """
        recurrent = any(isinstance(place.owner, nn.RNNBase) for place in places_of(self._module, parameters))
        with uncompiled(parameters), in_parts(recurrent, attention=not self._loops):
            yield

    def run(self, stacks: Sequence[Stack], evaluate: Callable[[], Any], buffers: Sequence[tuple[nn.Module, str]] = ()) -> Any:
        """What `evaluate` returns for one value of each, tensors in tuples or lists, for all of them: with a first dimension of k.

        None where that can't be done. Random numbers are those of one evaluation, the same for all; each has `buffers` of its own.
        """
        try:
            return self._run(stacks, evaluate, buffers)
        except Exception as error:  # evaluated alone, the closure raises again what is not of vmap's making
            self._off = True
            reason, name = str(error).split(chr(10))[0][:300], stacks[0].parameter.name
            say_once(
                self._option,
                f"{self._option} does nothing here: {name!r} can't be evaluated with several values at once ({reason}). Points are "
                "evaluated one at a time.",
            )
            return None

    def _run(self, stacks: Sequence[Stack], evaluate: Callable[[], Any], buffers: Sequence[tuple[nn.Module, str]]) -> Any:
        parameters = [stack.parameter for stack in stacks]
        places = places_of(self._module, parameters)
        flat = [tensor for stack in stacks for tensor in stack.tensors]
        dims = [None if i in stack.shared else 0 for stack in stacks for i in range(len(stack.tensors))]
        count = next(len(tensor) for tensor, dim in zip(flat, dims, strict=True) if dim is not None)
        for owner, name in buffers:
            buffer = owner.get_buffer(name)
            flat.append(buffer.expand(count, *buffer.shape).clone())
            dims.append(0)

        def one(*parts: Tensor) -> Any:
            taken = iter(parts)
            values = {stack.parameter: stack.made(*(next(taken) for _ in stack.tensors)) for stack in stacks}
            with (
                shown_instead(places, values, dict(zip(buffers, taken, strict=True))),
                Read(parameters, missing="displacement", otherwise="one evaluation for each value"),
            ):
                return evaluate()

        with self.alike(parameters), warnings.catch_warnings():
            warnings.filterwarnings("ignore" if self._loops else "error", "There is a performance drop")
            return torch.func.vmap(one, tuple(dims), randomness="same")(*flat)
