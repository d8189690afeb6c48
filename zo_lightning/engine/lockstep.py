"""Evaluations abreast: each on a thread of its own, they take turns at the borders of blocks, so that a block comes once for all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _len_torch_dispatch_stack

from zo_lightning.engine.baton import Baton
from zo_lightning.engine.malloc import one_arena
from zo_lightning.engine.messages import say_once, tell_once
from zo_lightning.engine.places import Place
from zo_lightning.engine.randomness import HostState
from zo_lightning.engine.residency import Lane, Offloaded, Residency
from zo_lightning.engine.undo import Undo
from zo_lightning.engine.world import World

Remember = Callable[[Undo], None]


_SURE = 3
"""Passes in a row that leave state behind."""


class Lockstep:
    """Whether evaluations run abreast, and why not: where it would not be sure that each computes what it computes alone."""

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self._passes = 0
        self._moved = 0
        self._what: str | None = None
        self._shared: str | None = None
        self._crew: ThreadPoolExecutor | None = None
        self._hired = (0, 0)

    def crew(self, count: int) -> ThreadPoolExecutor:
        """So many threads to run evaluations on, the same ones for all steps: libraries keep what they prepare by thread."""
        hired = (os.getpid(), count)  # a fork has none of them
        if self._crew is None or hired != self._hired:
            if self._crew is not None and self._hired[0] == hired[0]:
                self._crew.shutdown()
            one_arena()
            self._crew, self._hired = ThreadPoolExecutor(count, "zo-evaluation"), hired
        return self._crew

    def world(self, remember: Remember | None) -> World:
        """The Python state of the moment: what `remember` tells, or that of the modules."""
        world = World()
        if remember is not None:
            remember(world)
        elif self._module is not None:
            world.modules(self._module)
        return world

    @contextmanager
    def watched(self, residency: Residency, remember: Remember | None) -> Iterator[None]:
        """Around a pass: whether it leaves Python state behind that nobody rewinds, where it matters."""
        if isinstance(residency, Offloaded) and (self._passes < 2 or 0 < self._moved < _SURE):
            world = self.world(remember)
            yield
            self.left_behind(world.changed(), world.shared)
        else:
            yield

    def left_behind(self, what: str | None, shared: str | None = None) -> None:
        """What the last pass left, and what of it evaluations can't have versions of."""
        self._passes += 1
        self._shared = self._shared or shared
        self._moved, self._what = (self._moved + 1, what) if what is not None else (0, None)

    def chosen(self, residency: Residency, points: int) -> Offloaded | None:
        """The residency where to do it, which is said once; else None. ValueError where it was asked for and is not possible."""
        if not isinstance(residency, Offloaded) or residency.lockstep is False or points < 2:
            return None
        against = _against_now() or self._shared
        if against is None and self._moved:
            if self._moved < _SURE:  # the first pass often sets what stays so from then on
                return None
            against = f"forward passes change Python attributes of the model, each after the one before ({self._what})"
        if against is None:
            tell_once("lockstep", _ABREAST)
            return residency
        if residency.lockstep:
            raise ValueError(f"lockstep=True: the evaluations of this model can't take turns: {against}. Leave lockstep= out.")
        say_once("no lockstep", f"weights=Offload(): the evaluations of a step run one after another, each reads every block: {against}.")
        return None


def abreast(
    residency: Offloaded, jobs: Sequence[Callable[[], Any]], devices: set[torch.device], world: World, crew: Executor
) -> tuple[list[Any], str | None]:
    """(What the jobs return, what Python state the first one changed.) Then that state is as the first one left it."""
    lanes = [Lane() for _ in jobs]
    left: list[str | None] = [None for _ in jobs]
    generators: list[HostState | None] = [None] * len(jobs)
    states: list[list[Place]] = [[] for _ in jobs]

    def switch(old: int | None, new: int | None) -> None:
        torch.clear_autocast_cache()  # it keeps weights cast, by address of the parameter
        if old is not None:
            generators[old], states[old] = HostState(devices), world.leave()
            left[old] = world.left
        residency.go_on(Lane() if new is None else lanes[new])
        residency.hand_to(baton.threads[new or 0])
        if new is not None:
            if (generator := generators[new]) is not None:
                generator.restore()
            _put_back(states[new])

    baton = Baton(switch, crew)
    inside = _like_this_thread(devices)
    with residency.taking_turns(baton):
        try:
            outputs = baton.run([jobs[0], *(inside(job) for job in jobs[1:])])
        finally:
            _put_back(states[0])
    return outputs, left[0]


def _put_back(places: Sequence[Place]) -> None:
    for place in reversed(places):
        place.put_back()


def _like_this_thread(devices: set[torch.device]) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Gives a job what torch keeps by thread, as it is here: autocast, the CUDA device and its stream; and no gradients."""
    kinds = {"cpu", *(device.type for device in devices)}
    casts = [(kind, torch.get_autocast_dtype(kind)) for kind in sorted(kinds) if torch.is_autocast_enabled(kind)]
    cache = torch.is_autocast_cache_enabled()
    streams = [torch.cuda.current_stream(device) for device in devices if device.type == "cuda"]

    @contextmanager
    def same() -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            for kind, dtype in casts:
                stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cache))
            for stream in streams:
                stack.enter_context(torch.cuda.stream(stream))
            yield

    def inside(job: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> Any:
            with same():
                return job()

        return run

    return inside


def _against_now() -> str | None:
    if _len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a torch mode is active (torch.set_default_device, for instance), which other threads do not have"
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        return "several processes take part, which may wait for each other in a forward pass"
    return None


_ABREAST = (
    "weights=Offload(): the evaluations of a step run in lockstep, so that each block is read once for all of them. Where forward passes "
    "share state that is neither in modules nor in the trainer, pass lockstep=False: one after another."
)
