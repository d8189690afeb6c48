"""The Python state of one of several evaluations that take turns: each has a version of its own."""

from __future__ import annotations

import random
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from operator import eq
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from zo_lightning.engine.places import Large, Place, Setting, Table
from zo_lightning.engine.undo import BOUND, TORCH, Undo

_HOSTS = {"accelerate", "datasets", "lightning", "pytorch_lightning", "tokenizers", "torch", "zo_lightning"}


class World(Undo):
    """Begins as it was remembered: attributes of modules, of the objects that they hold and of what these hold, generators, arrays, and
    what a context manager around a forward pass sets for the whole process.

    Objects without attributes (iterators), and tensors that are too large to be copied, can't have versions.
    """

    def __init__(self) -> None:
        super().__init__(metrics=False)
        self.left: str | None = None
        """What `leave` found changed, in words."""
        self.shared: str | None = None
        """What all evaluations share, in words, so that they can't take turns; None where nothing is known."""
        self._deep = False
        for setting in _settings():
            self._keep(setting)
            setting.where = "a setting of the process"

    def changed(self) -> str | None:
        """The first that is not as it was, in words."""
        changed = [place for place in self._places if place.changed()]
        self._note(changed)
        return next((place.where for place in changed if not place.rewound), None)

    def add(self, places: Iterable[Place]) -> None:
        """Remember these as well."""
        self._places += places

    def leave(self) -> list[Place]:
        """What was changed, in the order in which it was remembered; it is put back."""
        changed = [place for place in self._places if place.changed()]
        self._note(changed)
        self.left = next((place.where for place in changed if not place.rewound), None)
        mine = [place.now() for place in changed]
        for place in reversed(changed):
            place.put_back()
        return mine

    def _note(self, changed: Iterable[Place]) -> None:
        fixed = next((place.where for place in changed if place.fixed), None)
        self.shared = self.shared or (None if fixed is None else f"they write to a large tensor ({fixed})")

    def modules(self, root: nn.Module, skip: frozenset[str] = frozenset()) -> None:
        self._deep, followed, self._followed = True, self._followed, (object,)
        super().modules(root, skip)
        self._followed = followed
        for kind in {kind for module in root.modules() for kind in type(module).__mro__} - set(nn.Module.__mro__):
            for name, value in list(vars(kind).items()):
                if isinstance(value, followed) and name not in TORCH:
                    self._where = f"{kind.__name__}.{name}"
                    self._contents(value)
        self._deep = False

    def metrics(self, root: nn.Module) -> None:
        for metric in root.modules() if self._kinds else ():
            if isinstance(metric, self._kinds) and id(metric) not in self._seen:
                self._seen.add(id(metric))
                self.attributes(metric)  # states as well; those of an evaluation that works on copies are its own

    def _contents(self, value: Any) -> None:
        if self._deep and id(value) not in self._seen:
            state = _state(value)
            if state is not None:
                self._keep(state)
            elif isinstance(value, Iterator):
                self.shared = self.shared or f"they may draw from one iterator ({self._where})"
            elif _is_object(value):
                self._seen.add(id(value))
                self._object(value, self._where)
        super()._contents(value)

    def _object(self, value: object, where: str) -> None:
        for own in _attributes(value):
            self._keep(own)
            for entry in own.entries.values() if isinstance(own, Table) else [own.value]:
                self._where = where
                self._contents(entry)

    def _tensor(self, value: Tensor) -> None:
        if value.numel() > BOUND and not (isinstance(value, nn.Parameter) or value.is_meta or value.is_inference()):
            self._keep(Large(value))
        else:
            super()._tensor(value)


def _settings() -> list[Place]:
    cuda = torch.backends.cuda
    flags: list[tuple[Callable[[], Any], Callable[[Any], Any]]] = [
        (torch.get_default_dtype, torch.set_default_dtype),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
        (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
        (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
        (cuda.math_sdp_enabled, cuda.enable_math_sdp),
        (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
        (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    ]
    backends = [(torch.backends.mkldnn, "enabled"), *((torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic"))]
    flags += [(partial(getattr, owner, name), partial(setattr, owner, name)) for owner, name in backends]
    names = [(sys, "stdout"), (sys, "stderr"), (parametrize, "_cache_enabled")]
    bound = [Setting(partial(getattr, owner, name), partial(setattr, owner, name)) for owner, name in names]
    cache = Setting(lambda: dict(parametrize._cache), lambda entries: setattr(parametrize, "_cache", dict(entries)), _same_entries)
    return [*(Setting(*pair, eq) for pair in flags), *bound, cache, Setting(lambda: warnings.filters, _filter)]


def _filter(filters: Any) -> None:
    warnings.filters = filters
    warnings._filters_mutated()  # type: ignore[attr-defined]  # as catch_warnings does


def _state(value: Any) -> Place | None:
    """The state of a generator, or the elements of a small array."""
    if isinstance(value, torch.Generator):
        return Setting(value.get_state, value.set_state, torch.equal)
    if isinstance(value, random.Random):
        return Setting(value.getstate, value.setstate, eq)
    numpy = sys.modules.get("numpy")
    if numpy is None:
        return None
    if isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        return Setting(lambda: bits.state, partial(setattr, bits, "state"), _same)
    if isinstance(value, numpy.random.RandomState):
        return Setting(lambda: value.get_state(legacy=False), value.set_state, _same)
    if isinstance(value, numpy.ndarray) and value.size <= BOUND and value.dtype != object:
        return Setting(value.copy, lambda elements: numpy.copyto(value, elements), lambda a, b: a.tobytes() == b.tobytes())
    return None


def _same_entries(a: dict[Any, Any], b: dict[Any, Any]) -> bool:
    return a.keys() == b.keys() and all(a[key] is b[key] for key in a)


def _same(a: Any, b: Any) -> bool:
    """Of dicts and tuples with arrays."""
    return repr(a) == repr(b)


def _attributes(value: object) -> list[Any]:
    """Places of its attributes, those in slots too."""
    found: list[Any] = [Table(vars(value))] if hasattr(value, "__dict__") else []
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for name in (slots,) if isinstance(slots, str) else slots:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found.append(Setting(partial(getattr, value, name), partial(setattr, value, name)))
    return found


def _is_object(value: object) -> bool:
    """Whether it keeps attributes of its own, and is neither code nor a part of who trains."""
    if isinstance(value, (nn.Module, Tensor, type, FunctionType, ModuleType)) or type(value).__module__.partition(".")[0] in _HOSTS:
        return False
    return isinstance(getattr(value, "__dict__", None), dict) or any("__slots__" in vars(kind) for kind in type(value).__mro__[:-1])
