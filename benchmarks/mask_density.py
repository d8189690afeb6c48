"""What masks train of a pretrained MiniLM: the share that was asked for, the share that it is, and whether a step moves exactly that.

python benchmarks/mask_density.py --json benchmarks/results/mask_density.json

For every rule: the largest difference between the asked and the achieved share, over layers and in total; and for every residency, after a
step of Rademacher noise whose update is far above the spacing of the weights, how many weights moved outside the mask, and how many inside
it did not (bits are compared).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from learning import Docstrings
from mask_learning import Losses, vectors
from measure import environment, write
from torch import Tensor

from zo_lightning import ZOOptimizer
from zo_lightning.engine.masks import Mask, NofM, PrincipalWeights, Sensitive, Structured, Where
from zo_lightning.engine.masks.report import shares

MASKS: dict[str, tuple[Callable[[Losses], Mask], float | None]] = {
    "small_weights": (lambda losses: Mask("small_weights", 0.25), 0.25),
    "small_weights, global": (lambda losses: Mask("small_weights", 0.25, budget="global"), None),
    "small_weights, list": (lambda losses: Mask("small_weights", 0.001), 0.001),
    "large_weights": (lambda losses: Mask("large_weights", 0.1), 0.1),
    "random": (lambda losses: Mask("random", 0.1), 0.1),
    "n_of_m": (lambda losses: Mask(NofM(2, 4)), 0.5),
    "sensitive": (lambda losses: Mask(Sensitive(losses), 0.05), 0.05),
    "principal_weights": (lambda losses: Mask(PrincipalWeights(32), 0.05, include="*dense.weight"), 0.05),
    "structured": (lambda losses: Mask(Structured("columns", 32), 0.25, include="*dense.weight"), 0.25),
    "half_layers": (lambda losses: Mask("half_layers"), None),
    "layer_sampling": (lambda losses: Mask("layer_sampling"), None),
    "blockwise": (lambda losses: Mask("blockwise"), None),
    "where": (lambda losses: Mask(Where(vectors)), None),
}
"""With the share of each layer that is asked for; None where that is not one number."""


def measure(name: str, weights: str, dtype: torch.dtype) -> dict[str, Any]:
    """One rule on one residency."""
    make, asked = MASKS[name]
    run = Docstrings(0, 8, dtype)
    few = [run.batch() for _ in range(2)]

    def losses() -> Iterator[Tensor]:
        return (run.loss(batch) for batch in few)

    optimizer = ZOOptimizer(run.model, lr=1.0, eps=1e-2, weights=weights, mask=make(losses), safeguard=None, dropout=False)
    before = {p.name: p.tensor.detach().clone() for p in optimizer.residency.trained}
    optimizer.masks.begin(0, optimizer.residency.trained, 0, optimizer.noise)
    found = shares(optimizer.masks, optimizer.residency.trained)
    kept = {p.name: _whole(optimizer, p.key, before[p.name]) for p in optimizer.residency.trained}
    optimizer.estimate(lambda: run.loss(few[0]))
    perturbed = sum(int((p.tensor != before[p.name]).sum()) for p in optimizer.residency.trained) if weights != "inplace" else None
    optimizer.apply()
    outside = missed = 0
    for p in optimizer.residency.trained:
        moved = p.tensor.detach() != before[p.name]
        outside, missed = outside + int((moved & ~kept[p.name]).sum()), missed + int((~moved & kept[p.name]).sum())
    row: dict[str, Any] = {"rule": name, "weights": weights, "dtype": str(dtype)[6:], "moved_outside": outside, "rested_inside": missed}
    row["changed_by_evaluations"] = perturbed
    if asked is not None:
        own = [share for share in found if share.trained < share.numel or asked == 1.0]
        row["asked"] = asked
        row["largest_difference_of_a_layer_in_weights"] = max(abs(share.trained - asked * share.numel) for share in own)
        row["difference_in_total"] = sum(share.trained for share in own) / sum(share.numel for share in own) - asked
    return row


def _whole(optimizer: ZOOptimizer, key: int, weights: Tensor) -> Tensor:
    if not optimizer.masks.trains(key):
        return torch.zeros(weights.shape, dtype=torch.bool)
    mask = optimizer.masks.of(key)
    return torch.ones(weights.shape, dtype=torch.bool) if mask is None else mask.keep(weights, 0).view(weights.shape)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Print a line a rule and residency; `--json` writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rules", nargs="+", choices=tuple(MASKS), default=list(MASKS))
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    for name in options.rules:
        for weights, dtype in (("exact", torch.float32), ("copy", torch.float32), ("inplace", torch.float32), ("exact", torch.bfloat16)):
            rows.append(measure(name, weights, dtype))
            print(rows[-1], flush=True)
    result = {"environment": environment("cpu"), "options": {"rules": options.rules}, "rows": rows}
    write(options.json, result)
    return result


if __name__ == "__main__":
    main()
