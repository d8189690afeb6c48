"""weights=Offload(): "exact" whose base weights live elsewhere; a block is where it is computed while it runs, updated on its way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from zo_lightning.engine.baton import Baton
from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.malloc import Grown
from zo_lightning.engine.noise import Noise, sweep
from zo_lightning.engine.noise.members import Listed
from zo_lightning.engine.offload import DiskTier, InBuffers, Offload, Parcel, Traffic, parcels_of
from zo_lightning.engine.offload.hooks import Hook
from zo_lightning.engine.offload.parcels import FROZEN
from zo_lightning.engine.parameters import Trained, names_of
from zo_lightning.engine.residency.base import Residency
from zo_lightning.engine.residency.borders import Borders
from zo_lightning.engine.residency.running import Running
from zo_lightning.engine.residency.scratch import _point, _without_modes
from zo_lightning.engine.residency.stamped import Stamped
from zo_lightning.engine.residency.swap import Swap
from zo_lightning.engine.residency.units import Unit, compiled_part
from zo_lightning.engine.signals import held

__all__ = ["Offload", "Offloaded", "Traffic"]

Holders = dict[nn.Module | None, list[Parcel]]
"""The parcels that a module uses; under None those that no module owns."""

_OWNERS: WeakKeyDictionary[nn.Module, ref[Offloaded]] = WeakKeyDictionary()
"""Who has the weights of a module; another optimizer takes them over with all updates."""

KEPT = 1 << 26
"""Bytes of freed memory that stay with the process from one block to the next."""
AHEAD = 4
"""How many parcels are announced; how many of them are fetched ahead is for their place to say."""


class Offloaded(Stamped):
    """Between uses, parameters are where their parcels are at rest, in mapped files or CPU memory: whoever reads them finds base weights.

    While a block runs, its parcels are used: their pages are in memory, or they are in buffers of the device that computes, and what
    follows is fetched meanwhile. What a step changes is made when a parcel is used the next time. `settled()`, and everything that saves,
    loads or compares weights, makes all changes that are due. Vectors and adapters stay on the device that computes, as do buffers.

    Its steps are those of "exact" in every bit, and it has the same name in the step log: either goes on with the other's run.
    """

    device: torch.device
    places_weights = True
    keep_after = 1 << 62  # scratch of every unit would be the whole model

    def __init__(
        self, module: nn.Module, trained: Sequence[Trained], noise: Noise, offload: Offload, before: Residency | None = None
    ) -> None:
        """`before` had other tensors to train: its parcels are kept where the weights are still there."""
        _check(module)
        self.device = offload.device_of(module)
        self._users: Counter[Parcel] = Counter()
        self._lent: dict[Parcel, list[Trained]] = {}
        """The tensors that are in a buffer now."""
        self._homes: dict[Parcel, list[Tensor]] = {}
        self._places: dict[int, int] = {}
        """By id of a parameter the address where it is while nobody uses it."""
        self._follows: dict[tuple[Parcel | None, Parcel], Parcel] = {}
        self._last: tuple[Parcel | None, Parcel | None] = (None, None)
        self._running = Running()
        self._borders = Borders(self._used)
        self._kind: type[nn.Module] | None = None
        """Of the module that ran last."""
        self._grown = Grown()
        self.lockstep = offload.lockstep
        super().__init__(module, trained, noise)
        kept = before if isinstance(before, Offloaded) and before.device == self.device and before._holds_all() else None
        self._holders: Holders = parcels_of(module, self.trained, names_of(module)) if kept is None else kept._holders
        self._parcels = list(dict.fromkeys(parcel for parcels in self._holders.values() for parcel in parcels))
        if not self._parcels:
            raise ValueError("weights=Offload(): the model has no matrices, which are what is kept elsewhere. Use weights='exact'.")
        with held(), _without_modes(), torch.inference_mode(False), torch.no_grad():
            if kept is not None:
                self._place = kept._place
                self._moment = kept._moment
                for parcel in self._parcels:
                    parcel.renew(self.trained)
            else:
                self._place = self._taken_over(offload)
            self._due = self._place.due
            for parcel in self._parcels:
                self._move_in(parcel)
            self._of = {id(p): parcel for parcel in self._parcels for p in parcel.tensors}
            self.bring_rest()
        self._hooks_of_base: list[Any] = []
        self._hook()
        _OWNERS.update((module, ref(self)) for module in self._holders if module is not None)

    def _taken_over(self, offload: Offload) -> InBuffers:
        """A place of its own for what may be in that of another optimizer until now, which then makes itself anew if it is used again."""
        others = [other for module in self._root.modules() if module in _OWNERS and (other := _OWNERS[module]()) is not None]
        others = [other for other in dict.fromkeys(others) if not other.retired]
        anew = any(not other.tier.undecided for other in others)
        for other in others:
            other.flush()
            if isinstance(other.tier, DiskTier) and other.tier.is_in(offload.folder):
                other.retire()
        place = offload.place(self._parcels, self.device, anew)
        for other in others:
            other.retire()
        return place

    def retire(self) -> None:
        """Others have the model from now on. Weights stay where they are until those move them."""
        self.retired = True
        self._unhook()
        self._place.tier.close()

    @property
    def traffic(self) -> Traffic:
        """What was moved since the run began."""
        return self._place.traffic

    def bring_rest(self) -> None:
        """All of the model that is in no parcel is on the device from now on: vectors, adapters, buffers."""
        here = {id(alias) for parcel in self._parcels for p in parcel.tensors for alias in p.aliases}
        rest = [p for p in self.trained if id(p) not in self._of]
        elsewhere = [t for t in [*self._root.parameters(), *self._root.buffers(), *(p.tensor for p in rest)] if t.device != self.device]
        if any(id(t) not in here and not t.is_meta for t in elsewhere):
            self._root._apply(lambda t: t if id(t) in here or t.is_meta else t.to(self.device))
            for p in rest:  # ties between parameters, and what belongs to no module
                _point(p, [p.tensor.detach().to(self.device)] * len(p.aliases))

    def devices(self) -> set[torch.device]:
        return super().devices() | {self.device}

    def _holds_all(self) -> bool:
        """Whether all parameters are still where they were put."""
        return not self.retired and all(self.keeps(alias) for parcel in self._parcels for p in parcel.tensors for alias in p.aliases)

    def _hook(self) -> None:
        """Modules use their weights wherever they run, and nobody saves weights that lack an update."""
        for module, parcels in self._holders.items():
            self._hook_user(module, parcels)
        for module in self._root.modules():
            self._hooks_of_base.append(module.register_state_dict_pre_hook(Hook(self._before_states)))
            self._hooks_of_base.append(module.register_load_state_dict_pre_hook(Hook(self._before_states)))

    def _hook_user(self, module: nn.Module | None, parcels: Sequence[Parcel]) -> None:
        if module is not None:
            enter, leave = (Hook(torch.compiler.disable(call)) for call in (self._entering(parcels), self._leaving))
            self._hooks_of_base.append(module.register_forward_pre_hook(enter, prepend=True))
            self._hooks_of_base.append(module.register_forward_hook(leave, always_call=True))

    def _before_states(self, *args: Any) -> None:
        """What is loaded is not changed by updates of before, and what is saved has them all."""
        self.flush()

    def steady(self) -> list[Trained]:
        return [p for p in self.trained if id(p) not in self._of]

    def keeps(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() == self._places.get(id(tensor))

    def _move_in(self, parcel: Parcel) -> None:
        """Parameters are at home, wherever that is now."""
        self._homes[parcel] = self._place.tier.home(parcel)
        for p, home in zip(parcel.tensors, self._homes[parcel], strict=True):
            _point(p, [home] * len(p.aliases))
            self._places.update((id(alias), home.data_ptr()) for alias in p.aliases)

    def _follow(self, parcel: Parcel) -> None:
        """The first update of what was in the files of others goes to a place of its own."""
        if self._place.tier.home(parcel) is not self._homes[parcel]:
            self._move_in(parcel)

    # ---- forward passes

    def _entering(self, parcels: Sequence[Parcel]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if self.device.type == "cpu":  # what the last kind of module has freed would stay beside what this one needs
                self._grown.give_back(KEPT if type(module) is self._kind else 0)
            self._kind = type(module)
            stack = ExitStack()
            stack.enter_context(self._used(parcels))
            self._borders.keep(parcels)
            self._running.entered(module, stack)

        return hook

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        self._running.left(module)

    def end_interrupted(self) -> None:
        self._running.end_interrupted()

    @contextmanager
    def taking_turns(self, baton: Baton) -> Iterator[None]:
        """Around evaluations of which one runs at a time: they hand over where a module begins that uses files."""
        users = [module for module in self._holders if module is not None]
        with self._turns.turn(), self._borders.between(users, baton):
            try:
                yield
            finally:
                self._running.end_interrupted()

    def hand_to(self, thread: int | None) -> None:
        """The evaluation of another thread goes on."""
        if thread is not None:
            self._turns.hand_to(thread)

    def _based(self, parameters: Sequence[Trained]) -> AbstractContextManager[None]:
        return self._used(list(dict.fromkeys(self._of[id(p)] for p in parameters if id(p) in self._of)))

    @contextmanager
    def _used(self, parcels: Sequence[Parcel]) -> Iterator[None]:
        """Inside it, the parameters of these parcels are in memory, with all updates."""
        with ExitStack() as stack:
            for parcel in parcels:
                with held(), self._turns.turn(), _without_modes(), torch.inference_mode(False), torch.no_grad():
                    self._begin_use(parcel)
                stack.callback(self._end_use, parcel)
            yield

    def _begin_use(self, parcel: Parcel) -> None:
        self._users[parcel] += 1
        if self._users[parcel] > 1:
            return
        # before the first watched pass, nobody knows which views outlive their module
        watched = self._watch is not None or not self._paths.watched
        try:
            if self._late(parcel):
                self._go_back(parcel)
            late = parcel in self._due
            views = self._place.begin(parcel, self.noise, watched)
        except BaseException:
            self._users[parcel] -= 1
            raise
        try:
            if late:  # also where somebody put a parameter elsewhere who did not know of the update
                self._move_in(parcel)
            if views is not self._homes[parcel]:
                self._show(parcel, views)
            self._look_ahead(parcel, announce=not watched)
        except BaseException:
            self._end_use(parcel)
            raise

    def _show(self, parcel: Parcel, views: Sequence[Tensor]) -> None:
        """Parameters are in a buffer; not those that were replaced since, nor any where the whole model was moved to another device."""
        shown = self._lent[parcel] = []
        for p, view in zip(parcel.tensors, views, strict=True):
            if self.keeps(p.tensor) and not self._moved_away():
                _point(p, [view] * len(p.aliases))
                shown.append(p)
                if self._watch is not None:
                    self._watch.placed(p, view)

    def _moved_away(self) -> bool:
        """Whether somebody took the model from the device, as Lightning does after a run; then it computes where it is."""
        rest = next((p.tensor for p in self.trained if id(p) not in self._of), None)
        rest = next(self._root.buffers(), None) if rest is None else rest
        return rest is not None and rest.device != self.device

    def _end_use(self, parcel: Parcel) -> None:
        with held(), self._turns.turn(), _without_modes(), torch.inference_mode(False):
            self._users[parcel] -= 1
            if self._users[parcel]:
                return
            homes = {id(p): home for p, home in zip(parcel.tensors, self._homes[parcel], strict=True)}
            for p in self._lent.pop(parcel, ()):
                _point(p, [homes[id(p)]] * len(p.aliases))
            torch.clear_autocast_cache()  # or the casts of all blocks would stay on the device until the evaluation ends
            self._place.end(parcel)
            self._follow(parcel)

    def _look_ahead(self, parcel: Parcel, announce: bool = True) -> None:
        """Learn what follows what, and announce what came next the last time that these two came one after the other."""
        before, last = self._last
        if last is not None:
            self._follows[before, last] = parcel
        self._last = pair = (last, parcel)
        chain: list[Parcel] = []
        while len(chain) < AHEAD and (following := self._follows.get(pair)) is not None and following not in chain:
            chain.append(following)
            pair = (pair[1], following)
        if announce:
            self._place.announce([following for following in chain if not self._users[following]])

    # ---- what reads weights of others

    def _watched(self) -> list[Trained]:
        return [*self.trained, *(p for parcel in self._parcels for p in parcel.tensors if p.group == FROZEN)]

    def _may_read(self, p: Trained) -> bool:
        return super()._may_read(p) or (p.group == FROZEN and self._users[self._of[id(p)]] > 0)

    def _cover(self, missed: dict[Trained, nn.Module | None]) -> None:
        """Those who read weights of others use them from now on, in every forward pass."""
        super()._cover({p: module for p, module in missed.items() if p.group != FROZEN})
        for p, module in missed.items():
            parcel = self._of.get(id(p))
            if parcel is None:
                continue
            if module not in self._holders:
                self._holders[module] = []
                self._hook_user(module, self._holders[module])
            if parcel not in self._holders[module]:
                self._holders[module].append(parcel)

    @contextmanager
    def _displaced(self, point: Displacement | None, eps: Sequence[float]) -> Iterator[None]:
        with self._used(self._holders.get(None, ())), super()._displaced(point, eps):
            yield

    def _on_scratch(
        self, unit: Unit, point: Displacement | None, eps: Sequence[float], rows: Tensor | None = None
    ) -> AbstractContextManager[None]:
        shown = super()._on_scratch(unit, point, eps, rows)
        here = [p for p in unit.parameters if id(p) in self._of and id(p) not in self._lane.away]
        listed = [(p, mask) for p in here if isinstance(mask := self.mask_of(p), Listed)]
        return shown if not point or not listed else self._with_lists(shown, listed, point, eps)

    @contextmanager
    def _with_lists(
        self, shown: AbstractContextManager[None], listed: Sequence[tuple[Trained, Listed]], point: Displacement, eps: Sequence[float]
    ) -> Iterator[None]:
        """Listed elements are displaced in a copy: what is in the files is never written by an evaluation."""
        parameters = [p for p, _ in listed]
        with shown:
            outs, give_back = self._scratch.take(parameters)
            try:
                with _without_modes():
                    for p, out in zip(parameters, outs, strict=True):
                        out.copy_(p.tensor.detach())
                    swap = Swap([(replace(p, tensor=out), mask) for (p, mask), out in zip(listed, outs, strict=True)])
                    items = swap.compact(self.displaced(parameters, swap.displaced, point, eps))
                    sweep(items, [seed for seed, _ in point], self.noise, rounding=point[0][0])
                    swap.leave()
                with self._pointed(parameters, outs):
                    yield
            finally:
                give_back()

    @contextmanager
    def session(self) -> Iterator[None]:
        self.end_interrupted()
        try:
            with super().session():
                yield
        except BaseException:
            if not self.ahead:  # else the run will be started again, and go on from there
                self.flush()
            raise

    # ---- updates

    def flush(self) -> None:
        """Make all changes that are due. OSError where they can't be written."""
        with self._turns.turn():
            self.end_interrupted()
            for parcel in self._parcels:
                if parcel in self._due or self._late(parcel):
                    with self._used([parcel]):
                        pass
            self._place.settle()
            with _without_modes(), torch.inference_mode(False):
                for parcel in self._parcels:
                    if not self._users[parcel]:
                        self._follow(parcel)

    @contextmanager
    def settled(self) -> Iterator[None]:
        with super().settled():
            self.flush()
            try:
                yield
            finally:
                for parcel in self._parcels:
                    if not self._users[parcel]:
                        self._place.tier.forget(parcel)

    def close(self) -> None:
        self.flush()
        self._unhook()

    def _unhook(self) -> None:
        for hook in self._hooks_of_base:
            hook.remove()


def _check(module: nn.Module) -> None:
    compiled = compiled_part(module)
    if compiled is not None:
        raise ValueError(f"weights=Offload() works through hooks, which a compiled module ({compiled}) never runs. Do not compile it.")
