"""Kinds of parameters: what perturbation scale and learning rate suits them, and how they are recognised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from zo_lightning.engine.parameters import Scale, Trained


@dataclass(frozen=True)
class Kind:
    """Where several are trained together, all take the scales of the one that most elements are of.

    `eps` is the perturbation scale, `lr` a learning rate to begin with, `usual` the range that people use (MeZO's tables, arXiv 2305.17333:
    lr goes with the square of eps, so that a step moves weights by as much of eps).
    """

    name: str
    eps: float
    lr: float
    usual: str
    has: Callable[[Trained, list[str]], bool]
    """Whether a parameter, with the parts of its name, belongs to it."""
    source: str = "MeZO"
    """Whose scales they are."""
    clip: float | None = None
    """Bound on the projected gradient where none is given."""
    factors: frozenset[str] = frozenset()
    """Parts of the names of parameters whose noise is a tenth of that of the others, where `eps` is left to the kind."""
    why: str = ""
    """What to say of them."""


SMALLER = 0.1

WEIGHTS = Kind("weights", 1e-3, 1e-6, "", lambda p, parts: True)
LORA = Kind(
    "LoRA",
    1e-2,
    5e-5,
    "5e-5 to 1e-4",
    lambda p, parts: any(part.startswith("lora_") for part in parts),
    factors=frozenset({"lora_A", "lora_embedding_A"}),
    why="LoRA's A gets noise of a tenth of the size: B begins at zero, where the loss says nothing of A (docs/adapters.md).",
)
PREFIX = Kind("prefix and prompt tuning", 1e-1, 1e-3, "1e-3 to 1e-2", lambda p, parts: "prompt_encoder" in parts and "embedding" in parts)
SCALES = Kind(
    "scales of quantized weights",
    1e-2,
    1e-3,
    "1e-3 (models of billions) to 1e-1 (of tens of millions)",
    lambda p, parts: isinstance(p.aliases[0], Scale),
    "QZO",
    100.0,
)
KINDS = (SCALES, LORA, PREFIX, WEIGHTS)

_BY_SIZE = (
    (1e9, "1e-7 to 1e-6 for all weights of a model of billions of parameters"),
    (1e8, "1e-6 to 1e-5 for all weights of a model of hundreds of millions of parameters"),
    (1e7, "1e-5 to 1e-4 for all weights of a model of tens of millions of parameters"),
    (0.0, "1e-4 to 1e-2 for less than ten million parameters"),
)


def kind_of(trained: Sequence[Trained]) -> Kind:
    """The kind that most of the trained elements are of."""
    sizes: Counter[Kind] = Counter()
    for parameter in trained:
        parts = parameter.name.split(".")
        sizes[next(kind for kind in KINDS if kind.has(parameter, parts))] += parameter.numel
    return sizes.most_common(1)[0][0]


def by_factor(factors: frozenset[str], trained: Sequence[Trained]) -> list[Trained]:
    """The parameters, with noise of a tenth of the size for those that have one of `factors` in their names."""
    small = [not factors.isdisjoint(p.name.split(".")) for p in trained]
    return [replace(p, unit=SMALLER * p.unit) if one else p for p, one in zip(trained, small, strict=True)]


def usual_lr(trained: Sequence[Trained]) -> str:
    """The range of learning rates for SPSA on these tensors, in words (MeZO's tables and our own runs)."""
    kind = kind_of(trained)
    if kind.usual:
        return f"{kind.usual} for {kind.name}"
    size = sum(parameter.numel for parameter in trained)
    return next(text for least, text in _BY_SIZE if size >= least)


def check_kinds(trained: Sequence[Trained]) -> None:
    """Raise ValueError for what can't be trained without gradients."""
    for parameter in trained:
        if "lora_E" in parameter.name.split("."):
            raise ValueError(
                f"{parameter.name!r} is AdaLoRA's, which allocates ranks by the gradients of its weights; forward-only training has none. "
                "Use LoraConfig, with the rank that you want."
            )
