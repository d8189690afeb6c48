"""What every residency does: show a displaced point to forward passes, put the weights back, apply an update."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.masks.state import Masks
from zo_lightning.engine.noise import Change, Item, Noise, sweep
from zo_lightning.engine.noise.changes import apply_through, hold, materialized, moves, step_of
from zo_lightning.engine.noise.members import Members
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency.masters import Masters
from zo_lightning.engine.residency.swap import Swap
from zo_lightning.engine.shards import device_of
from zo_lightning.engine.signals import held


def eps_of(p: Trained, eps: Sequence[float]) -> float:
    """The perturbation scale of a tensor."""
    return eps[p.group] * p.unit


class Residency(ABC):
    """The trained tensors of a model and the noise; `eps` is read anew from the groups for each step."""

    name: str
    places_weights = False
    """Whether it places weights, also frozen ones, itself: `keeps` then tells which of them are where it put them."""
    lasts = True
    """Whether what forward passes see inside `at` stays where they found it until its end."""
    retired = False
    """Whether another residency has taken the weights over, so that this one can't be used any more."""

    def __init__(self, module: nn.Module | None, trained: Sequence[Trained], noise: Noise) -> None:
        self.module = module
        self.trained = list(trained)
        self.noise = noise
        self.masters = Masters()
        self.masks = Masks()

    @contextmanager
    def session(self) -> Iterator[None]:
        """Around the evaluations of one micro-batch; the weights are the unperturbed ones on the way out, whatever happened."""
        yield

    @abstractmethod
    def at(self, point: Displacement, eps: Sequence[float]) -> AbstractContextManager[None]:
        """Inside it, forward passes see theta + sum_j m_j eps z(s_j); `eps` has one value a group."""

    @contextmanager
    def swapped(self, swap: Swap) -> Iterator[None]:
        """Inside it, forward passes see the elements of `swap` displaced, in the weights themselves."""
        with self.still():
            try:
                with held():
                    swap.leave()
                yield
            finally:
                with held():
                    swap.home()

    def expect(self, points: Sequence[Displacement]) -> None:  # noqa: B027
        """In the session that has begun, `at` will be called for these, in this order."""

    def reached(self) -> bool:
        """Whether the evaluations so far could see a perturbation at all."""
        return True

    def needs_probe(self) -> bool:
        """Whether the next evaluation must be preceded by one inside `probe()`."""
        return False

    def probe(self) -> AbstractContextManager[None]:
        """Around one forward pass that is thrown away, in which the residency learns how the model reads its weights."""
        return self.session()

    def update(self, change: Change) -> None:
        """theta <- decay theta + sum_j c_j z(s_j), with (decay, c) of each group; not interrupted by signals."""
        moving = [p for p in self.moving(self.steady()) if moves(change, p.group)]
        with self.still(), held():
            moved = self.masters.instead_of(moving)
            if change.through is not None:
                apply_through(moved, change, self.noise, {p.key: mask for p in moved if (mask := self.mask_of(p)) is not None})
            else:
                self._sweep(moved, change)
            self.masters.write_back()

    def _sweep(self, moved: Sequence[Trained], change: Change) -> None:
        items = []
        for p in moved:
            weights = p.tensor.detach()
            items.append(Item(weights, weights, p.key, *step_of(change, p), mask=self.mask_of(p), region=p.region))
        sweep(items, change.seeds, self.noise, rounding=change.rounding)
        hold(moved)

    def tangents(self, point: Displacement, eps: Sequence[float]) -> dict[int, Tensor]:
        """sum_j m_j eps z(s_j) of what the mask trains, in the dtype of the weights, by id of the Trained."""
        seeds = [seed for seed, _ in point]
        found = {}
        for p in self.moving(self.trained):
            multiples = [multiple * eps_of(p, eps) for _, multiple in point]
            found[id(p)] = materialized(p, seeds, multiples, self.noise, self.mask_of(p))[0].to(p.tensor.dtype)
        return found

    def moving(self, parameters: Sequence[Trained]) -> list[Trained]:
        """Those of which the mask trains anything."""
        return [p for p in parameters if self.masks.trains(p.key)]

    def mask_of(self, p: Trained) -> Members | None:
        """The mask of a parameter, where the parameter is now; None where all of it is trained."""
        mask = self.masks.of(p.key)
        return None if mask is None else mask.to(p.tensor.device)

    def devices(self) -> set[torch.device]:
        """Those that forward passes use."""
        return {device_of(p.aliases[0]) for p in self.trained}

    def steady(self) -> list[Trained]:
        """Those to which updates are made at once."""
        return self.trained

    def keeps(self, tensor: Tensor) -> bool:
        """Whether it was the residency that put a parameter where it is now, so that it has not been replaced (if it `places_weights`)."""
        return False

    def settled(self) -> AbstractContextManager[None]:
        """Inside it, on any thread, parameters are the base weights: it waits for evaluations and updates of another thread."""
        return self.still()

    def still(self) -> AbstractContextManager[None]:
        """The same, but for updates that are still to be made."""
        return nullcontext()

    def of_any_step(self) -> AbstractContextManager[None]:
        """Inside it, forward passes may find weights of any step: what is looked for does not depend on them."""
        return nullcontext()

    def end_interrupted(self) -> None:  # noqa: B027
        """Close what forward passes left open that ended without a word (Ctrl-C), where this residency opens anything."""

    def close(self) -> None:  # noqa: B027
        """Another residency takes its place, or the run ends: make the updates that are still to be made."""

    def restore(self) -> None:  # noqa: B027
        """Undo a perturbation that was left in place, where this residency leaves any."""

    def take_passes(self) -> bytes:
        """The moves of the base weights since the last time, where this residency makes any (inplace.py)."""
        return b""

    def ended(self) -> None:
        """A step ended, applied or skipped."""
        self.take_passes()

    def reenact(self, passes: bytes, points: Sequence[Displacement], eps: Sequence[float]) -> None:  # noqa: B027
        """Make the moves that `take_passes` told."""

    @contextmanager
    def fused(self) -> Iterator[None]:
        """Around the evaluations of a whole step and its update: what follows the last evaluation may wait for the update."""
        yield

    def displaced(
        self,
        parameters: Sequence[Trained],
        outs: Sequence[Tensor],
        point: Displacement,
        eps: Sequence[float],
        rows: Tensor | None = None,
    ) -> list[Item]:
        """Items that write theta + sum_j m_j eps z(s_j) into `outs`, into some rows of them where `rows` is given."""
        mask_of = (lambda p: None) if self.masks.chosen is None else self.mask_of
        multiples = [multiple for _, multiple in point]
        return [
            Item(
                out,
                p.tensor.detach(),
                p.key,
                1.0,
                tuple([multiple * eps_of(p, eps) for multiple in multiples]),
                rows,
                mask_of(p),
                region=p.region,
            )
            for p, out in zip(parameters, outs, strict=True)
        ]
