"""Feature reuse: of evaluations that differ in one weight, what runs before it is read is computed once."""

from __future__ import annotations

import copy
import functools
import math
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._pytree import tree_leaves

from zo_lightning.engine.messages import say_once
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.randomness import HostState
from zo_lightning.engine.recording import Operations
from zo_lightning.engine.residency.units import compiled_part
from zo_lightning.engine.undo import TORCH


@dataclass(eq=False)
class Call:
    """One call of a module: when it began and ended on the clock of operations, and what it returned."""

    module: nn.Module
    index: int
    parent: Call | None
    begin: int
    end: float = math.inf
    after: int = 0
    """The number of the first call that began when this one had ended."""
    output: Any = None
    versions: list[int] = field(default_factory=list)
    generators: HostState | None = None
    """The states behind it, where it drew any numbers."""
    pure: bool = True
    """Whether all that it did to what was there before is in its output."""
    known: bool = False
    """Whether its output can be returned again."""

    def spoil(self) -> None:
        """It does something else than to return its output, and so do the calls around it."""
        call: Call | None = self
        while call is not None:
            call.pure = False
            call = call.parent

    def returns(self, limit: float) -> bool:
        """Whether its output stands for it where nothing changes before `limit`."""
        return self.known and self.pure and self.end < limit and self.versions == _versions(self.output)


class Reuse:
    """The recorded calls of one micro-batch, and whether a run's evaluations were the same with them."""

    def __init__(self, module: nn.Module | None) -> None:
        self._module = module
        self._calls: list[Call] = []
        self._open: list[Call] = []
        self._read: dict[int, int] = {}
        """By the key of a parameter, when it was first read."""
        self._clock: Operations | None = None
        self._at: int | None = None
        self._limit = math.inf
        self._devices: set[torch.device] = set()
        self._thread = 0
        self._off = False
        self._proved: set[int] = set()

    @contextmanager
    def session(self, devices: set[torch.device]) -> Iterator[bool]:
        """Around the evaluations of a micro-batch: the calls of modules can be recorded and left out inside it, if it says so."""
        modules = [] if self._off or self._module is None else self._usable(self._module)
        before = [vars(module).get("forward") for module in modules]
        self._devices, self._thread = devices, threading.get_ident()
        try:
            for module in modules:
                module.forward = _Forward(self, module, module.forward)
            yield bool(modules)
        finally:
            for module, forward in zip(modules, before, strict=True):
                if forward is None:
                    vars(module).pop("forward", None)
                else:
                    module.forward = forward
            self._calls, self._read, self._at = [], {}, None

    def _usable(self, root: nn.Module) -> list[nn.Module]:
        compiled = compiled_part(root)
        if compiled is not None:
            say_once("reuse.compiled", f"Features are not reused: {compiled} is compiled, and calls inside it can't be left out.")
            return []
        hooks = nn.modules.module
        if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
            say_once("reuse.hooks", "Features are not reused: there are global hooks on the forward of all modules, which would not run.")
            return []
        return [module for module in root.modules() if not isinstance(module, torch.jit.ScriptModule)]

    # ---- the pass that is recorded

    @contextmanager
    def recording(self, trained: Sequence[Trained], points: Iterable[Trained | None]) -> Iterator[None]:
        """Around one evaluation at the weights as they are, whose calls are kept for evaluations that displace `points`."""
        modules = [] if self._module is None else list(self._module.modules())
        before = {id(module): _attributes(module) for module in modules}
        self._calls, self._open = [], []
        self._clock = Operations(trained, [module for module in modules if isinstance(module, _NormBase)], self._wrote)
        try:
            with self._clock:
                yield
        finally:
            clock, self._clock = self._clock, None
        self._read = clock.first_read
        changed = {id(module) for module in modules if _attributes(module) != before[id(module)]}
        calls = [call.module for call in self._calls]
        for call in self._calls:
            again = isinstance(call.module, _NormBase) and sum(other is call.module for other in calls) > 1
            if again or id(call.module) in changed:
                call.spoil()
        self._keep({p.key for p in points if p is not None})

    def _keep(self, keys: set[int]) -> None:
        """Outputs that no point needs are freed."""
        needed: set[int] = set()
        for limit in {self._read.get(key, math.inf) for key in keys}:
            at = 0
            while at < len(self._calls) and self._calls[at].begin < limit:
                call = self._calls[at]
                if call.returns(limit):
                    needed.add(at)
                at = call.after if call.returns(limit) else at + 1
        for call in self._calls:
            if call.index not in needed:
                call.output, call.known = None, False

    def _wrote(self, since: float) -> None:
        """An operation wrote to what was there at this time: no call that began later may be left out; for others it is their own."""
        for call in self._open:
            call.pure = call.pure and call.begin < since

    def _recorded(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, clock: Operations) -> Any:
        call = Call(module, len(self._calls), self._open[-1] if self._open else None, clock.tick())
        self._calls.append(call)
        self._open.append(call)
        if module._forward_hooks or module._forward_pre_hooks:
            call.spoil()
        sizes, before = _sizes((args, kwargs)), HostState(self._devices)
        try:
            output = forward(*args, **kwargs)
        finally:
            self._open.pop()
        if _sizes((args, kwargs)) != sizes:
            call.spoil()
        after = HostState(self._devices)
        call.generators = None if after == before else after
        call.end, call.after = clock.tick(), len(self._calls)
        call.known = _plain(output)
        if call.known:
            call.output, call.versions = _copied(output), _versions(output)
        return output

    # ---- evaluations that leave calls out

    @contextmanager
    def replaying(self, p: Trained | None) -> Iterator[None]:
        """Around an evaluation that displaces elements of `p` alone."""
        self._limit = math.inf if p is None else self._read.get(p.key, math.inf)
        self._at = 0 if self._calls and p is not None else None
        try:
            yield
        finally:
            self._at = None

    def deepest(self, points: Iterable[Trained | None]) -> Trained | None:
        """Whose displacement leaves most calls out; None where none does."""
        found = max((p for p in points if p is not None), key=lambda p: self._read.get(p.key, math.inf), default=None)
        return found if found is not None and any(call.returns(self._read.get(found.key, math.inf)) for call in self._calls) else None

    def unproved(self, p: Trained | None) -> bool:
        """Whether the next evaluation that displaces `p` leaves calls out, as none in this run has done before."""
        return p is not None and p.key not in self._proved and any(call.returns(self._read.get(p.key, math.inf)) for call in self._calls)

    def prove(self, p: Trained, equal: bool) -> None:
        """Whether an evaluation had the same bits with calls left out."""
        self._proved.add(p.key)
        self.check(p, equal)

    def check(self, p: Trained, equal: bool) -> None:
        """The same of the weights as they are, in every micro-batch."""
        if not equal:
            self._off, self._calls = True, []
            say_once(
                "reuse.differs",
                f"Features are not reused from now on: before {p.name!r} is read, the loss was another one with them than without. The "
                "model keeps something between module calls, or has a generator of its own. Coordinatewise(reuse=False) says nothing.",
            )

    def call(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What `forward` of a module is called through inside a session."""
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        if self._clock is not None:
            return self._recorded(module, forward, args, kwargs, self._clock)
        if self._at is None:
            return forward(*args, **kwargs)
        return self._replayed(module, forward, args, kwargs, self._at)

    def _replayed(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any, at: int) -> Any:
        known = self._calls[at] if at < len(self._calls) else None
        if known is None or known.module is not module or known.begin > self._limit:
            self._at = None  # from here on everything may differ
            return forward(*args, **kwargs)
        if known.returns(self._limit):
            self._at = known.after
            if known.generators is not None:
                known.generators.restore()
            return _copied(known.output)
        self._at = at + 1
        return forward(*args, **kwargs)


class _Forward:
    """The forward of a module inside a session. A copy of the module has its own, outside of it."""

    def __init__(self, reuse: Reuse, module: nn.Module, forward: Callable[..., Any]) -> None:
        functools.update_wrapper(self, forward)
        self._reuse, self._module, self._forward = reuse, module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._reuse.call(self._module, self._forward, args, kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        owner = memo.get(id(self._module), self._module)
        inherited = getattr(self._forward, "__self__", None) is self._module
        return types.MethodType(type(owner).forward, owner) if inherited else copy.deepcopy(self._forward, memo)


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module holds beside parameters and submodules: what a forward may leave there."""
    own = {name: value for name, value in vars(module).items() if name not in TORCH and name != "forward"}
    return {name: (id(value), _size(value)) for name, value in [*own.items(), *module._buffers.items()]}


def _size(value: Any) -> int | None:
    return len(value) if type(value) in (list, dict, set) else None


def _sizes(values: Any) -> list[int | None]:
    """How many entries lists, dicts and sets among the arguments of a call have."""
    args, kwargs = values
    return [_size(value) for value in (*args, *kwargs.values())]


def _plain(output: Any) -> bool:
    """Whether an output is made of tensors, numbers and texts, in tuples, lists and dicts (and classes of these that can be copied)."""
    if output is None or isinstance(output, (bool, int, float, str)):
        return True
    if isinstance(output, Tensor):
        return type(output) in (Tensor, nn.Parameter) and output.layout == torch.strided
    if isinstance(output, (tuple, list)):
        return all(map(_plain, output))
    return isinstance(output, dict) and all(map(_plain, output.values()))


def _copied(output: Any) -> Any:
    """The same tensors in containers of their own."""
    if isinstance(output, tuple):
        parts = [_copied(part) for part in output]
        return type(output)(*parts) if hasattr(output, "_fields") else copy.copy(output) if type(output) is not tuple else tuple(parts)
    if type(output) is list:
        return [_copied(part) for part in output]
    if type(output) is dict:
        return {name: _copied(part) for name, part in output.items()}
    return output if output is None or isinstance(output, (Tensor, bool, int, float, str)) else copy.copy(output)


def _tensors(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts: Iterable[Any] = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _versions(output: Any) -> list[int]:
    return [tensor._version for tensor in _tensors(output)]


def same(a: Any, b: Any) -> bool:
    """Whether two outcomes of an evaluation are equal, tensors bit for bit."""
    ours, theirs = tree_leaves(a), tree_leaves(b)
    return len(ours) == len(theirs) and all(map(_equal, ours, theirs))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    return bool(a == b) or (a != a and b != b)
