"""weights=Offload(): "exact" whose base weights live in files; a block is in memory while it runs, and its update is made on its way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.masks.rules import Chosen
from zo_lightning.engine.masks.state import Masks
from zo_lightning.engine.noise import Change, Noise, sweep
from zo_lightning.engine.noise.changes import apply_changes
from zo_lightning.engine.noise.members import Listed
from zo_lightning.engine.offload import DiskTier, Parcel, Stream, Traffic, Update, parcels_of
from zo_lightning.engine.offload.parcels import FROZEN
from zo_lightning.engine.parameters import Trained, names_of
from zo_lightning.engine.residency.exact import Exact
from zo_lightning.engine.residency.scratch import _point, _without_modes
from zo_lightning.engine.residency.swap import Swap
from zo_lightning.engine.residency.units import Unit, compiled_part
from zo_lightning.engine.signals import held


@dataclass(frozen=True)
class Offload:
    """Where weights live that do not fit where they are computed with, for `weights=`.

    Args:
        folder: of the files; None makes a temporary one, which is removed in the end.
    """

    folder: str | None = None


@dataclass
class Due:
    """A change that a parcel still lacks, with the masks it was made for."""

    change: Change
    masks: Chosen | None
    step: int


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


class Offloaded(Exact):
    """While nobody uses them, parameters are memory-mapped files: whoever reads them (a state dict, a fingerprint) finds base weights.

    A forward pass reads a block from its file before the block runs, ahead of time, and points the parameters there; what steps have
    changed since is applied then, once, and written back. `settled()` and everything that saves or compares weights makes all changes that
    are due. Vectors and adapters stay in memory.

    Its steps are those of "exact" in every bit, and it has the same name in the step log: either goes on with the other's run.
    """

    keep_after = 1 << 62  # scratch of every unit would be the whole model

    def __init__(self, module: nn.Module, trained: Sequence[Trained], noise: Noise, offload: Offload) -> None:
        _check(module)
        self._steps = 0
        self._users: Counter[Parcel] = Counter()
        self._due: dict[Parcel, list[Due]] = {}
        self._fetched: dict[nn.Module, list[ExitStack]] = {}
        super().__init__(module, trained, noise)
        self._holders = parcels_of(module, self.trained, names_of(module))
        self._parcels = list(dict.fromkeys(parcel for parcels in self._holders.values() for parcel in parcels))
        if not self._parcels:
            raise ValueError("weights=Offload(): the model has no matrices, which are what is kept in files. Use weights='exact'.")
        self._of = {id(p): parcel for parcel in self._parcels for p in parcel.tensors}
        self._tier = DiskTier(offload.folder, self._parcels)
        self._stream = Stream(self._tier, self._update)
        self._places: dict[int, int] = {}
        """By id of a parameter the address where it is while nobody uses it."""
        for parcel in self._parcels:
            self._go_to_files(parcel)
        self._hooks_of_base = self._hook()

    def _go_to_files(self, parcel: Parcel) -> None:
        with _without_modes():
            for p, home in zip(parcel.tensors, self._tier.home(parcel), strict=True):
                _point(p, [home] * len(p.aliases))
                self._places.update((id(alias), home.data_ptr()) for alias in p.aliases)

    def keeps(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() == self._places.get(id(tensor))

    def _hook(self) -> list[Any]:
        """Modules fetch their weights wherever they run, and nobody saves weights that lack an update."""
        hooks: list[Any] = []
        for module, parcels in self._holders.items():
            if module is not None:
                fetch, release = (_Hook(torch.compiler.disable(call)) for call in (self._fetch(parcels), self._release))
                hooks.append(module.register_forward_pre_hook(fetch, prepend=True))
                hooks.append(module.register_forward_hook(release, always_call=True))
        for module in self._root.modules():
            hooks.append(module.register_state_dict_pre_hook(_Hook(self._before_states)))
            hooks.append(module.register_load_state_dict_pre_hook(_Hook(self._before_states)))
        return hooks

    def _before_states(self, *args: Any) -> None:
        """What is loaded is not changed by updates of before, and what is saved has them all."""
        self.flush()

    @property
    def traffic(self) -> Traffic:
        """What was moved so far."""
        return self._stream.traffic

    def steady(self) -> list[Trained]:
        return [p for p in self.trained if id(p) not in self._of]

    # ---- forward passes

    def _fetch(self, parcels: Sequence[Parcel]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            stack = ExitStack()
            stack.enter_context(self._lent(parcels))
            self._fetched.setdefault(module, []).append(stack)

        return hook

    def _release(self, module: nn.Module, args: Any, output: Any) -> None:
        stacks = self._fetched.get(module)
        if stacks:
            stacks.pop().close()

    def _based(self, parameters: Sequence[Trained]) -> AbstractContextManager[None]:
        return self._lent(list(dict.fromkeys(self._of[id(p)] for p in parameters if id(p) in self._of)))

    @contextmanager
    def _lent(self, parcels: Sequence[Parcel]) -> Iterator[None]:
        """Inside it, the parameters of these parcels are in memory.

        A pass that is watched reads the files themselves: a view that a module hands out must stay what it is.
        """
        watched = self._point is not None and self._point[0] is None
        with ExitStack() as stack:
            for parcel in parcels:
                if watched:
                    stack.callback(self._tier.forget, parcel)
                else:
                    with held():
                        self._take(parcel)
                        stack.callback(self._give, parcel)
            yield

    @torch.inference_mode(False)
    @torch.no_grad()
    def _take(self, parcel: Parcel) -> None:
        if not self._users[parcel]:
            with _without_modes():
                memory = self._stream.take(parcel)
                for p, view in zip(parcel.tensors, parcel.views(lambda begin, end: memory[begin:end]), strict=True):
                    _point(p, [view] * len(p.aliases))
        self._users[parcel] += 1

    @torch.inference_mode(False)
    def _give(self, parcel: Parcel) -> None:
        self._users[parcel] -= 1
        if not self._users[parcel]:
            self._go_to_files(parcel)
            self._stream.give(parcel)

    def _shown(self, unit: Unit, args: Any, point: Displacement | None, eps: Sequence[float]) -> AbstractContextManager[None]:
        shown = super()._shown(unit, args, point, eps)
        listed = [(p, mask) for p in unit.parameters if id(p) in self._of and isinstance(mask := self.masks.of(p.key), Listed)]
        listed = [(p, mask) for p, mask in listed if id(p) not in self._away]
        return shown if point is None or not listed else self._with_lists(shown, listed, point, eps)

    @contextmanager
    def _with_lists(
        self, shown: AbstractContextManager[None], listed: Sequence[tuple[Trained, Listed]], point: Displacement, eps: Sequence[float]
    ) -> Iterator[None]:
        """Listed elements are displaced in a copy: the writer may still read what was lent."""
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
            self.flush()
            raise

    # ---- updates

    def update(self, change: Change) -> None:
        super().update(change)
        self._steps += 1
        for parcel in self._parcels:
            if any(self._moves(p, change) for p in parcel.tensors):
                self._due.setdefault(parcel, []).append(Due(change, self.masks.chosen, self._steps))

    def _moves(self, p: Trained, change: Change) -> bool:
        return p.group != FROZEN and self.masks.trains(p.key) and (change.steps[p.group][0] != 1.0 or any(change.steps[p.group][1]))

    def _update(self, parcel: Parcel, memory: Tensor) -> Update | None:
        """Make the changes that are due in memory that has the parcel."""
        due = self._due.pop(parcel, None)
        if due is None:
            return None
        views = parcel.views(lambda begin, end: memory[begin:end])
        weights = [replace(p, tensor=view) for p, view in zip(parcel.tensors, views, strict=True) if p.group != FROZEN]
        for chosen, some in groupby(due, key=lambda one: one.masks):
            masks = Masks.fixed(chosen)
            moving = [p for p in weights if masks.trains(p.key)]
            known = {p.key: mask for p in moving if (mask := masks.of(p.key)) is not None}
            apply_changes(moving, [one.change for one in some], self.noise, known)
        return Update(due[-1].step, lambda: self._go_to_files(parcel), lambda: self._due.update({parcel: due}))

    def flush(self) -> None:
        """Make all changes that are due. OSError where they can't be written."""
        with held(), _without_modes(), torch.inference_mode(False), torch.no_grad():
            for parcel in self._parcels:
                if parcel in self._due:
                    self._stream.take(parcel)
                    self._stream.give(parcel)

    @contextmanager
    def settled(self) -> Iterator[None]:
        with super().settled():
            self.flush()
            try:
                yield
            finally:
                for parcel in self._parcels:
                    self._tier.forget(parcel)

    def close(self) -> None:
        self.flush()
        for hook in self._hooks_of_base:
            hook.remove()


def _check(module: nn.Module) -> None:
    compiled = compiled_part(module)
    if compiled is not None:
        raise ValueError(f"weights=Offload() works through hooks, which a compiled module ({compiled}) never runs. Do not compile it.")
    elsewhere = next((p.device for p in module.parameters() if p.device.type != "cpu"), None)
    if elsewhere is not None:
        raise ValueError(f"weights=Offload() streams from files to the CPU so far; this model is on {elsewhere}. Keep it on the CPU.")
