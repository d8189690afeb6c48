"""weights=Offload(): "exact" whose base weights live in files; a block is in memory while it runs, and its update is made on its way."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.masks.state import Masks
from zo_lightning.engine.noise import Item, Noise, sweep
from zo_lightning.engine.noise.members import Listed
from zo_lightning.engine.offload import DiskTier, Parcel, parcels_of
from zo_lightning.engine.parameters import Trained, names_of
from zo_lightning.engine.residency.base import Residency
from zo_lightning.engine.residency.scratch import _point, _without_modes
from zo_lightning.engine.residency.stamped import Stamped
from zo_lightning.engine.residency.swap import Swap
from zo_lightning.engine.residency.units import Unit, compiled_part
from zo_lightning.engine.signals import held

Holders = dict[nn.Module | None, list[Parcel]]
"""The parcels that a module uses; under None those that no module owns."""


@dataclass(frozen=True)
class Offload:
    """Where weights live that do not fit where they are computed with, for `weights=`.

    Args:
        folder: of the files; None makes a temporary one, which is removed in the end.
    """

    folder: str | None = None


class _Hook:
    """A hook of a module; copies of the module, which have their weights in memory, have none."""

    def __init__(self, call: Callable[..., None]) -> None:
        self.call = call

    def __call__(self, *args: Any) -> None:
        self.call(*args)

    def __reduce__(self) -> Any:
        return _no_hook, ()


def _no_hook() -> Callable[..., None]:
    return _nothing


def _nothing(*args: Any) -> None:
    """The hook of a copy."""


@dataclass
class Traffic:
    """What was moved since the run began: bytes of parcels that were used and written, seconds that their use waited for the disk."""

    read: int = 0
    written: int = 0
    waited: float = 0.0


class Offloaded(Stamped):
    """Parameters are memory-mapped files, all the time: whoever reads them (a state dict, a fingerprint) finds base weights.

    A block's pages are in memory while it runs; those of the next one are read ahead by the system. What a step changes is made when a
    block is used the next time: out of place, from its slot into a free one, so that a kill at any moment leaves what is valid.
    `settled()`, and everything that saves, loads or compares weights, makes all changes that are due. Vectors and adapters stay in memory.

    Its steps are those of "exact" in every bit, and it has the same name in the step log: either goes on with the other's run.
    """

    keep_after = 1 << 62  # scratch of every unit would be the whole model

    def __init__(
        self, module: nn.Module, trained: Sequence[Trained], noise: Noise, offload: Offload, before: Residency | None = None
    ) -> None:
        """`before` had other tensors to train: its files are kept where the weights are still there."""
        _check(module)
        self.traffic = Traffic()
        self._users: Counter[Parcel] = Counter()
        self._buffers: dict[Parcel, Tensor] = {}
        self._free: dict[int, list[Tensor]] = {}
        self._places: dict[int, int] = {}
        """By id of a parameter the address where it is while nobody uses it."""
        self._follows: dict[tuple[Parcel | None, Parcel], Parcel] = {}
        self._last: tuple[Parcel | None, Parcel | None] = (None, None)
        self._entered: dict[nn.Module, list[ExitStack]] = {}
        super().__init__(module, trained, noise)
        kept = before if isinstance(before, Offloaded) and before._holds_all() else None
        self._holders: Holders = parcels_of(module, self.trained, names_of(module)) if kept is None else kept._holders
        self._parcels = list(dict.fromkeys(parcel for parcels in self._holders.values() for parcel in parcels))
        if not self._parcels:
            raise ValueError("weights=Offload(): the model has no matrices, which are what is kept in files. Use weights='exact'.")
        with held(), _without_modes(), torch.inference_mode(False), torch.no_grad():
            if kept is not None:
                self._tier = kept._tier
                self.traffic, self._place = kept.traffic, kept._place
                for parcel in self._parcels:
                    parcel.renew(self.trained)
            else:
                if isinstance(before, Offloaded):
                    before._tier.close()
                anew = isinstance(before, Offloaded) and not before._tier.undecided
                self._tier = DiskTier(offload.folder, self._parcels, anew)
            for parcel in self._parcels:
                self._move_in(parcel)
        self._of = {id(p): parcel for parcel in self._parcels for p in parcel.tensors}
        self._hooks_of_base = self._hook()

    def _holds_all(self) -> bool:
        """Whether all parameters are still where they were put."""
        return all(self.keeps(alias) for parcel in self._parcels for p in parcel.tensors for alias in p.aliases)

    def _hook(self) -> list[Any]:
        """Modules use their weights wherever they run, and nobody saves weights that lack an update."""
        hooks: list[Any] = []
        for module, parcels in self._holders.items():
            if module is not None:
                enter, leave = (_Hook(torch.compiler.disable(call)) for call in (self._entering(parcels), self._leaving))
                hooks.append(module.register_forward_pre_hook(enter, prepend=True))
                hooks.append(module.register_forward_hook(leave, always_call=True))
        for module in self._root.modules():
            hooks.append(module.register_state_dict_pre_hook(_Hook(self._before_states)))
            hooks.append(module.register_load_state_dict_pre_hook(_Hook(self._before_states)))
        return hooks

    def _before_states(self, *args: Any) -> None:
        """What is loaded is not changed by updates of before, and what is saved has them all."""
        self.flush()

    def steady(self) -> list[Trained]:
        return [p for p in self.trained if id(p) not in self._of]

    def keeps(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() == self._places.get(id(tensor))

    def _move_in(self, parcel: Parcel) -> None:
        for p, home in zip(parcel.tensors, self._tier.home(parcel), strict=True):
            _point(p, [home] * len(p.aliases))
            self._places.update((id(alias), home.data_ptr()) for alias in p.aliases)

    # ---- forward passes

    def _entering(self, parcels: Sequence[Parcel]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            stack = ExitStack()
            stack.enter_context(self._used(parcels))
            self._entered.setdefault(module, []).append(stack)

        return hook

    def _leaving(self, module: nn.Module, args: Any, output: Any) -> None:
        stacks = self._entered.get(module)
        if stacks:
            stacks.pop().close()

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
        try:
            self._bring_up(parcel)
            began = time.perf_counter()
            self._tier.fetch(parcel)
            self.traffic.waited += time.perf_counter() - began
            self.traffic.read += parcel.nbytes
            self._look_ahead(parcel)
            watched = self._point is not None and self._point[0] is None  # views that modules hand out must stay what they are
            if not self._tier.moved_in(parcel) and not watched:
                self._copy(parcel)
        except BaseException:
            self._users[parcel] -= 1
            raise

    def _copy(self, parcel: Parcel) -> None:
        """Matrix kernels may round differently on memory that is not aligned, as tensors in safetensors files are not."""
        free = self._free.setdefault(parcel.nbytes, [])
        memory = free.pop() if free else torch.empty(parcel.nbytes, dtype=torch.uint8)
        views = parcel.views(lambda begin, end: memory[begin:end])
        for p, home, view in zip(parcel.tensors, self._tier.home(parcel), views, strict=True):
            _point(p, [view.copy_(home)] * len(p.aliases))
        self._tier.forget(parcel)
        self._buffers[parcel] = memory

    def _end_use(self, parcel: Parcel) -> None:
        with held(), self._turns.turn(), _without_modes(), torch.inference_mode(False):
            self._users[parcel] -= 1
            if self._users[parcel]:
                return
            memory = self._buffers.pop(parcel, None)
            if memory is not None:
                self._free[parcel.nbytes].append(memory)
                self._move_in(parcel)
            self._tier.forget(parcel)

    def _look_ahead(self, parcel: Parcel) -> None:
        """Announce what came next the last time that these two came one after the other."""
        before, last = self._last
        if last is not None:
            self._follows[before, last] = parcel
        self._last = (last, parcel)
        following = self._follows.get((last, parcel))
        if following is not None and not self._users[following]:
            self._tier.announce(following)

    def _on_scratch(
        self, unit: Unit, point: Displacement | None, eps: Sequence[float], rows: Tensor | None = None
    ) -> AbstractContextManager[None]:
        shown = super()._on_scratch(unit, point, eps, rows)
        here = [p for p in unit.parameters if id(p) in self._of and id(p) not in self._away]
        listed = [(p, mask) for p in here if isinstance(mask := self.masks.of(p.key), Listed)]
        return shown if point is None or not listed else self._with_lists(shown, listed, point, eps)

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
        try:
            with super().session():
                yield
        except BaseException:
            if not self.ahead:  # else the run will be started again, and go on from there
                self.flush()
            raise

    # ---- updates

    def _bring_up(self, parcel: Parcel) -> None:
        """Make the changes that are due: the first on the way to a free slot, others there."""
        if self._late(parcel):
            self._go_back(parcel)
        due = self._due.pop(parcel, None)
        if due is None:
            return
        try:
            first, homes, drafts = due[0], self._tier.home(parcel), self._tier.draft(parcel)
            masks = Masks.fixed(first.masks)
            weights = [replace(p, tensor=draft) for p, draft in zip(parcel.tensors, drafts, strict=True)]
            on_the_way = [first.moves(p) and not isinstance(masks.of(p.key), Listed) for p in weights]
            items = []
            for p, home, there in zip(weights, homes, on_the_way, strict=True):
                if there:
                    items.append(Item(p.tensor, home, p.key, *first.change.steps[p.group], mask=masks.of(p.key)))
                else:
                    p.tensor.copy_(home)
            sweep(items, first.change.seeds, self.noise, rounding=first.change.rounding)
            first.make([p for p, there in zip(weights, on_the_way, strict=True) if not there], self.noise)
            for one in due[1:]:
                one.make(weights, self.noise)
            self._tier.commit(parcel, due[-1].place)
        except BaseException:
            self._due[parcel] = due
            raise
        self.traffic.written += parcel.nbytes
        self._move_in(parcel)

    def flush(self) -> None:
        """Make all changes that are due. OSError where they can't be written."""
        with self._turns.turn():
            for parcel in self._parcels:
                if parcel in self._due or self._late(parcel):
                    with self._used([parcel]):
                        pass

    @contextmanager
    def settled(self) -> Iterator[None]:
        with super().settled():
            self.flush()
            try:
                yield
            finally:
                for parcel in self._parcels:
                    if not self._users[parcel]:
                        self._tier.forget(parcel)

    def close(self) -> None:
        self.flush()
        for hook in self._hooks_of_base:
            hook.remove()


def _check(module: nn.Module) -> None:
    if sys.platform != "linux":
        raise ValueError(f"weights=Offload() streams from files on Linux so far; this is {sys.platform}. Use weights='exact'.")
    compiled = compiled_part(module)
    if compiled is not None:
        raise ValueError(f"weights=Offload() works through hooks, which a compiled module ({compiled}) never runs. Do not compile it.")
    elsewhere = next((p.device for p in module.parameters() if p.device.type != "cpu"), None)
    if elsewhere is not None:
        raise ValueError(f"weights=Offload() streams from files to the CPU so far; this model is on {elsewhere}. Keep it on the CPU.")
