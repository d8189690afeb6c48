"""Units of the exact mode: which weights are written to scratch together, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from zo_lightning.engine.parameters import Trained


@dataclass(eq=False)
class Unit:
    """Weights that exist on scratch while `module` runs, or during the whole evaluation where it is None."""

    module: nn.Module | None
    parameters: list[Trained]


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of `module` run a compiled graph, by torch.compile(module) or by module.compile()."""
    return type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None


def compiled_part(module: nn.Module) -> str | None:
    """The name of the first compiled module in `module`, if there is one."""
    return next((f"{name or type(part).__name__!r}" for name, part in module.named_modules() if is_compiled(part)), None)


def hookable(module: nn.Module) -> list[nn.Module]:
    """The modules whose hooks run: all but those inside compiled ones."""
    inside = {id(m) for part in module.modules() if is_compiled(part) for m in part.modules() if m is not part}
    return [m for m in module.modules() if id(m) not in inside]


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The items of the outermost containers that hold several non-leaf modules of one class: a transformer's layers."""
    blocks: list[nn.Module] = []

    def visit(parent: nn.Module) -> None:
        children = list(parent.children())
        if isinstance(parent, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            plain: list[Any] = [child._orig_mod if type(child).__name__ == "OptimizedModule" else child for child in children]
            kinds = [type(child) for child in plain if any(True for _ in child.children()) and _owns(child)]
            if any(kinds.count(kind) > 1 for kind in kinds):
                blocks.extend(child for child in children if _owns(child))
                return
        for child in children:
            if not is_compiled(child):
                visit(child)

    visit(module)
    return list(dict.fromkeys(blocks))


def _owns(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def units_of(module: nn.Module, trained: Sequence[Trained], blocks: Sequence[nn.Module] = ()) -> list[Unit]:
    """Blocks and compiled modules, and every module outside them that owns a trained weight directly; last, weights that no module owns.

    A compiled module is a unit as a whole, whatever blocks it holds, for hooks inside it do not run.
    """
    lookup = {id(alias): p for p in trained for alias in p.aliases}
    outside = hookable(module)
    reachable = {id(m) for m in outside}
    units: list[Unit] = []
    inside: set[int] = set()
    blocks = [block for block in (blocks or repeated_blocks(module)) if id(block) in reachable]
    for block in [*blocks, *(part for part in outside if is_compiled(part))]:
        if id(block) not in inside:
            inside.update(id(m) for m in block.modules())
            units.append(Unit(block, _unique(lookup[id(w)] for w in block.parameters() if id(w) in lookup)))
    for owner in outside:
        if id(owner) not in inside:
            units.append(Unit(owner, _unique(lookup[id(w)] for w in owner.parameters(recurse=False) if id(w) in lookup)))
    owned = {id(p) for unit in units for p in unit.parameters}
    units.append(Unit(None, [p for p in trained if id(p) not in owned]))
    return [unit for unit in units if unit.parameters]


def vectors_of(units: Sequence[Unit]) -> list[Trained]:
    """The biases and gains of all units, which cost less when they are written together; none where they need much memory.

    "Much" is a sixty-fourth of what the largest unit needs. In a transformer of 100 M weights it is a three-hundredth.
    """
    vectors = [p for p in _unique(p for unit in units for p in unit.parameters) if p.tensor.dim() < 2]
    largest = max((_nbytes(unit.parameters) for unit in units), default=0)
    return vectors if 64 * _nbytes(vectors) <= largest else []


def _nbytes(parameters: Sequence[Trained]) -> int:
    return sum(p.tensor.nbytes for p in parameters)


def together(units: Sequence[Unit], without: Sequence[Trained] = ()) -> list[list[Trained]]:
    """For each unit the weights that are on scratch while it runs: its own and those of the units around it, but for some."""
    inside = {unit: None if unit.module is None else set(unit.module.modules()) for unit in units}
    around = {unit: [other for other, modules in inside.items() if modules is None or unit.module in modules] for unit in units}
    apart = {id(p) for p in without}
    return [_unique(p for other in others for p in other.parameters if id(p) not in apart) for others in around.values()]


def rows_read(unit: Unit, args: Any) -> Tensor | None:
    """The rows that a plain nn.Embedding is about to read and nobody else can, where they are few; None: write all of the unit."""
    module = unit.module
    if type(module) is not nn.Embedding or module.max_norm is not None or is_compiled(module) or len(unit.parameters) != 1:
        return None
    if unit.parameters[0].region is not None:
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
