"""Residencies of models that FSDP2 shards: what a module's forward gathers is displaced there, or the local shards in place."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from zo_lightning.engine.estimators import Displacement
from zo_lightning.engine.malloc import blocks_apart
from zo_lightning.engine.noise import Change, Item, Noise, sweep
from zo_lightning.engine.noise.members import Band
from zo_lightning.engine.parameters import Trained
from zo_lightning.engine.residency.base import Residency, eps_of
from zo_lightning.engine.residency.inplace import InPlace
from zo_lightning.engine.residency.scratch import Copy
from zo_lightning.engine.residency.turns import Turns
from zo_lightning.engine.residency.units import is_compiled
from zo_lightning.engine.shards import device_of, fsdp_modules, local, region_of, reshard
from zo_lightning.engine.signals import held

Place = tuple[nn.Module, str, Trained]
"""Where a trained parameter is registered: under this name of this module."""


@contextmanager
def fresh(modules: Sequence[Any]) -> Iterator[None]:
    """Inside it, whatever is gathered is gathered anew; behind it, nothing is."""
    reshard(modules)
    try:
        yield
    except BaseException:
        reshard(modules, aborted=True)
        raise
    reshard(modules)


class Gathered(Residency):
    """weights="exact" under FSDP2: the gathered copy of a parameter, which is thrown away behind the module's forward, is theta + c z.

    Shards are never written but by the update. Right behind FSDP2's all-gather, what has come is moved in place, with the noise of whole
    parameters, so that every rank sees the same; the copy has the dtype of the MixedPrecisionPolicy. What FSDP2 does not manage (ignored
    parameters) is on scratch copies during an evaluation.
    """

    name = "exact"

    def __init__(self, module: nn.Module, trained: Sequence[Trained], noise: Noise) -> None:
        super().__init__(module, trained, noise)
        self._modules = fsdp_modules(module)
        compiled = next((type(part).__name__ for part in module.modules() if is_compiled(part)), None)
        if compiled is not None:
            raise ValueError(
                f'weights="exact" displaces what FSDP2 has gathered in hooks, which compiled modules ({compiled}) may never run. Use '
                'weights="inplace", which moves the shards themselves.'
            )
        reshard(self._modules)
        self._places = list(_places(module, trained))
        managed = {id(p) for _, _, p in self._places}
        rest = [p for p in trained if id(p) not in managed]
        self._rest = Copy(module, rest, noise) if rest else None
        self._turns = Turns()
        self._shown: set[int] = set()
        self._reached = False
        self._point: tuple[Displacement, Sequence[float]] | None = None

    @contextmanager
    def session(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self._rest is not None:
                self._rest.masks = self.masks
                stack.enter_context(self._rest.session())
            for module in self._modules:  # FSDP2's own hook, which gathers, is between the two
                stack.callback(module.register_forward_pre_hook(self._before, prepend=True).remove)
                stack.callback(module.register_forward_pre_hook(self._behind).remove)
            yield

    @contextmanager
    def at(self, point: Displacement, eps: Sequence[float]) -> Iterator[None]:
        self._check_masks()
        with self._turns.turn(), ExitStack() as stack:
            if self._rest is not None:
                stack.enter_context(self._rest.at(point, eps))
            stack.enter_context(fresh(self._modules))
            self._shown.clear()
            self._reached = bool(self._rest is not None and self._rest.reached())
            self._point = point, eps
            try:
                yield
            finally:
                self._point = None

    def reached(self) -> bool:
        return self._reached

    def still(self) -> Any:
        return self._turns.turn()

    def update(self, change: Change) -> None:
        super().update(change)
        reshard(self._modules)  # what a forward of somebody else has left gathered is of before

    def close(self) -> None:
        if self._rest is not None:
            self._rest.close()

    def _before(self, module: nn.Module, args: Any) -> None:
        """A parameter that is sharded now comes anew when it is gathered next."""
        for owner, name, p in self._places:
            if owner._parameters[name] is p.aliases[0]:
                self._shown.discard(id(p))

    def _behind(self, module: nn.Module, args: Any) -> None:
        """Displace what has come."""
        if self._point is None:
            return
        point, eps = self._point
        items = []
        with held():
            for owner, name, p in self._places:
                found = owner._parameters[name]
                if id(p) in self._shown or found is None or found is p.aliases[0]:
                    continue
                self._shown.add(id(p))
                if self.masks.trains(p.key):
                    items.append(self._item(p, found, point, eps))
            self._reached = self._reached or bool(items)
            sweep(items, [seed for seed, _ in point], self.noise, rounding=point[0][0] if point else None)

    def _item(self, p: Trained, found: Tensor, point: Displacement, eps: Sequence[float]) -> Item:
        weights, region = local(found).detach(), region_of(p.name, found)  # under tensor parallel a part, still
        coefficients = tuple(multiple * eps_of(p, eps) for _, multiple in point)
        mask = self.masks.of(p.key)
        return Item(weights, weights, p.key, 1.0, coefficients, mask=None if mask is None else mask.to(weights.device), region=region)

    def _check_masks(self) -> None:
        """A threshold on weights is not the same on weights that were cast."""
        for module in self._modules if self.masks.chosen is not None else ():
            cast = module._get_fsdp_state()._mp_policy.param_dtype
            for p in self.trained:
                if cast not in (None, p.tensor.dtype) and isinstance(self.masks.of(p.key), Band):
                    raise ValueError(
                        f"The mask of {p.name!r} is a threshold on its {p.tensor.dtype} values, and FSDP2 gathers others "
                        f"(MixedPrecisionPolicy(param_dtype={cast})). "
                        'Use weights="inplace", a mask with stored members (Random, Where), or no param_dtype.'
                    )


class InPlaceShards(InPlace):
    """weights="inplace" under FSDP2: each rank moves its own shards, and forward passes gather them anew at each point."""

    def __init__(self, module: nn.Module, trained: Sequence[Trained], noise: Noise) -> None:
        super().__init__(module, trained, noise)
        self._modules = fsdp_modules(module)
        reshard(self._modules)
        list(_places(module, trained))

    @contextmanager
    def at(self, point: Displacement, eps: Sequence[float]) -> Iterator[None]:
        with super().at(point, eps), fresh(self._modules):
            yield

    def update(self, change: Change) -> None:
        super().update(change)
        reshard(self._modules)


def _places(module: nn.Module, trained: Sequence[Trained]) -> Iterator[Place]:
    """Where FSDP2 registers what it gathers; ValueError where what is trained are not the sharded parameters."""
    known = {id(alias): p for p in trained for alias in p.aliases}
    managed = {id(p) for p in _managed(module)}
    seen: set[int] = set()
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            p = None if parameter is None else known.get(id(parameter))
            if p is not None:
                seen.add(id(p))
                if id(parameter) in managed:
                    yield owner, name, p
    lost = next((p for p in trained if id(p) not in seen), None)
    if lost is not None and managed:
        raise ValueError(
            f"Parameter {lost.name!r} is not registered in the module that FSDP2 shards. The optimizer must be given parameters behind "
            "fully_shard, and not between a forward pass and module.reshard(), when the root's are gathered."
        )


def _managed(module: nn.Module) -> list[Tensor]:
    found = []
    for part in fsdp_modules(module):
        state = part._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        found += [one.sharded_param for group in groups if group is not None for one in group.fsdp_params]
    return found


def residency_of_shards(weights: str, module: nn.Module, trained: Sequence[Trained], noise: Noise) -> Residency:
    """The residency of a model that FSDP2 shards. ValueError for weights="copy"."""
    if weights == "copy":
        raise ValueError(
            'weights="copy" keeps a second copy of all that is trained, which FSDP2 would gather one module after another. Use '
            'weights="exact" (gathered copies are displaced) or "inplace" (shards are moved).'
        )
    if any(device_of(p.aliases[0]).type == "cpu" for p in trained):
        blocks_apart()
    kind: Callable[..., Residency] = Gathered if weights == "exact" else InPlaceShards
    if weights == "auto":
        kind = InPlaceShards if any(is_compiled(part) for part in module.modules()) else Gathered
    return kind(module, trained, noise)
