"""Units of the exact mode: which weights are written to scratch together, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from zo_lightning.engine.parameters import Trained


@dataclass(eq=False)
class Unit:
    """Weights that exist on scratch while `module` runs, or during the whole evaluation where it is None."""

    module: nn.Module | None
    parameters: list[Trained]


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The items of the outermost containers that hold several non-leaf modules of one class: a transformer's layers."""
    blocks: list[nn.Module] = []

    def visit(parent: nn.Module) -> None:
        children = list(parent.children())
        if isinstance(parent, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            kinds = [type(child) for child in children if any(True for _ in child.children()) and _owns(child)]
            if any(kinds.count(kind) > 1 for kind in kinds):
                blocks.extend(child for child in children if _owns(child))
                return
        for child in children:
            visit(child)

    visit(module)
    return list(dict.fromkeys(blocks))


def _owns(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def units_of(module: nn.Module, trained: Sequence[Trained], blocks: Sequence[nn.Module] = ()) -> list[Unit]:
    """Blocks, and every module outside them that owns a trained weight directly; weights that no module owns count as the last unit."""
    lookup = {id(alias): p for p in trained for alias in p.aliases}
    blocks = list(blocks) or repeated_blocks(module)
    units: list[Unit] = []
    inside: set[int] = set()
    owned: set[int] = set()
    for block in blocks:
        inside.update(id(m) for m in block.modules())
        units.append(Unit(block, _unique(lookup[id(w)] for w in block.parameters() if id(w) in lookup)))
    for owner in module.modules():
        if id(owner) not in inside:
            units.append(Unit(owner, _unique(lookup[id(w)] for w in owner.parameters(recurse=False) if id(w) in lookup)))
    for unit in units:
        owned.update(id(p) for p in unit.parameters)
    units.append(Unit(None, [p for p in trained if id(p) not in owned]))
    return [unit for unit in units if unit.parameters]


def rows_read(unit: Unit, args: Any) -> Tensor | None:
    """The rows that a plain nn.Embedding is about to read and nobody else can, where they are few; None: write all of the unit."""
    module = unit.module
    if type(module) is not nn.Embedding or module.max_norm is not None or len(unit.parameters) != 1:
        return None
    if len(module._forward_hooks) > 1 or len(module._forward_pre_hooks) > 1:  # one of each is ours
        return None
    if len(args) != 1 or not isinstance(args[0], Tensor) or 2 * args[0].numel() > module.num_embeddings:
        return None
    return args[0].long()


def _unique(parameters: Any) -> list[Trained]:
    return list({id(p): p for p in parameters}.values())


def cover(units: Sequence[Unit], missed: dict[Trained, nn.Module | None]) -> list[Unit]:
    """Units in which every missed weight also exists while the module it was read under runs (None: the whole evaluation)."""
    result = list(units)
    for parameter, module in missed.items():
        existing = next((unit for unit in result if unit.module is module), None)
        if existing is None:
            existing = Unit(module, [])
            result.append(existing)
        if parameter not in existing.parameters:
            existing.parameters = [*existing.parameters, parameter]
    return result


class ReadWatch(TorchDispatchMode):
    """Notes every operation that reads a base weight instead of its scratch copy, and the modules running at that moment."""

    def __init__(self, root: nn.Module, trained: Sequence[Trained]) -> None:
        super().__init__()
        self.missed: dict[Trained, nn.Module | None] = {}
        self._root = root
        self._storages = {p.tensor.untyped_storage().data_ptr(): p for p in trained if p.tensor.numel()}
        self._running: list[nn.Module] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> ReadWatch:
        self._hooks = [
            register_module_forward_pre_hook(lambda module, args: self._running.append(module)),
            register_module_forward_hook(lambda module, args, output: self._left(module), always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        for hook in self._hooks:
            hook.remove()

    def _left(self, module: nn.Module) -> None:
        while self._running and self._running.pop() is not module:
            pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for value in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._read(value)
        return func(*args, **kwargs)

    def _read(self, tensor: Tensor) -> None:
        if tensor.layout != torch.strided or tensor.is_meta:
            return
        parameter = self._storages.get(tensor.untyped_storage().data_ptr())
        if parameter is None:
            return
        ids = {id(alias) for alias in parameter.aliases}
        owner = next((m for m in reversed(self._running) if any(id(w) in ids for w in m.parameters())), None)
        if parameter in self.missed and self.missed[parameter] is not owner:
            owner = None
        self.missed[parameter] = owner
