"""What a masked step costs beside the dense one and two forward passes, in one run on the same work: time, and memory.

python benchmarks/mask_cost.py --json benchmarks/results/mask_cost_exact.json
python benchmarks/mask_cost.py --weights inplace
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import environment, peak_bytes, write
from transformers import OPTConfig, OPTForCausalLM

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.masks import Mask, NofM, Random, SmallWeights
from zo_lightning.engine.masks.rules import Draw, Layer
from zo_lightning.engine.noise.members import Listed
from zo_lightning.engine.noise.places import put, take

_TOUCHES = 5
_TURN = 4
"""Steps of one kind in a row, as in training."""

MASKS: dict[str, Mask | None] = {
    "dense": None,
    "small_weights, density 0.25": Mask(SmallWeights(), 0.25),
    "random, density 0.25": Mask(Random(), 0.25),
    "n_of_m, 1 of 4": Mask(NofM(1, 4)),
    "small_weights, density 0.001": Mask(SmallWeights(), 0.001),
}


def measure(weights: str, batch: int, length: int, rounds: int) -> list[dict[str, Any]]:
    """Medians in ms, and over the dense step and two forward passes; the kinds of step take turns.

    Also what masks keep between steps in bits a weight, the peak tensor memory of a step in MB, what making a mask takes in ns a weight,
    and for lists what reading or writing one element in memory takes.
    """
    torch.manual_seed(0)
    model = OPTForCausalLM(OPTConfig(dropout=0.0, attention_dropout=0.0)).eval()
    ids = torch.randint(0, 50000, (batch, length))

    def loss() -> torch.Tensor:
        found: torch.Tensor = model(input_ids=ids, labels=ids).loss
        return found

    def forwards() -> None:
        with torch.no_grad():
            loss()
            loss()

    steps: dict[str, Callable[[], object]] = {"two forwards": forwards}
    optimizers: dict[str, ZOOptimizer] = {}
    for name, mask in MASKS.items():
        optimizer = optimizers[name] = ZOOptimizer(model, lr=1e-9, weights=weights, mask=mask, safeguard=None)
        steps[name] = lambda optimizer=optimizer: optimizer.step(loss)  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for index in range(rounds + 1):
        order = order[1:] + order[:1] if index % 2 else order[::-1]  # each is behind each other one now and then
        for name in order:
            for turn in range(_TURN):
                began = time.perf_counter()
                steps[name]()
                if index and turn:  # the first round compiles, the first of a turn finds another one's data in the cache
                    times[name].append(time.perf_counter() - began)
    median = {name: statistics.median(row) for name, row in times.items()}
    count = sum(parameter.numel() for parameter in model.parameters())
    return [
        {
            "step": name,
            "ms": 1e3 * value,
            "over_dense": value / median["dense"],
            "over_two_forwards": value / median["two forwards"],
            "kept_bits_per_weight": 8 * _kept(optimizers[name]) / count if name in optimizers else 0.0,
            "peak_mb": peak_bytes(steps[name], "cpu")[0] / 1e6,
            "making_ns_per_weight": 1e9 * _making(optimizers[name]) / count if name in optimizers else 0.0,
            "touch_ns": _touch(optimizers[name]) if name in optimizers else None,
        }
        for name, value in median.items()
    ]


def _making(optimizer: ZOOptimizer) -> float:
    """Seconds to make the mask of all layers, once."""
    mask, layers = optimizer.masks.mask, [Layer(p.name, p.key, p.tensor, p.group) for p in optimizer.residency.trained]
    if mask is None:
        return 0.0
    began = time.perf_counter()
    with torch.no_grad():
        mask.make(layers, mask.counts(layers, 0), Draw(0, 0))
    return time.perf_counter() - began


def _touch(optimizer: ZOOptimizer) -> dict[str, float] | None:
    """ns to read, and to write, a listed element of the weights that is not in the cache; None without lists."""
    masks = [(p.tensor.detach(), optimizer.masks.of(p.key)) for p in optimizer.residency.trained]
    lists = [(tensor, mask.index) for tensor, mask in masks if isinstance(mask, Listed)]
    if not lists:
        return None
    flush, spent = torch.zeros(1 << 26), {"read": 0.0, "write": 0.0}
    for _ in range(_TOUCHES):
        for kind in spent:
            values = [take(tensor, index) for tensor, index in lists]
            flush.add_(1.0)
            began = time.perf_counter()
            for (tensor, index), value in zip(lists, values, strict=True):
                take(tensor, index) if kind == "read" else put(tensor, index, value)
            spent[kind] += time.perf_counter() - began
    touched = _TOUCHES * sum(len(index) for _, index in lists)
    return {kind: 1e9 * seconds / touched for kind, seconds in spent.items()}


def _kept(optimizer: ZOOptimizer) -> int:
    """Bytes of the tensors that a mask keeps between steps."""
    chosen = optimizer.masks.chosen or {}
    return sum(
        value.nbytes for mask in chosen.values() if mask is not None for value in vars(mask).values() if isinstance(value, torch.Tensor)
    )


def _words(touch: dict[str, float] | None) -> str:
    return "" if touch is None else f"an element read in {touch['read']:.0f} ns, written in {touch['write']:.0f} ns"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Print a line a kind of step; `--json` writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", choices=("exact", "copy", "inplace"), default="exact")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    rows = measure(options.weights, options.batch, options.length, options.rounds)
    for row in rows:
        times = f"{row['ms']:8.0f} ms   over dense {row['over_dense']:5.3f}  over forwards {row['over_two_forwards']:5.3f}"
        print(f"{row['step']:30} {times}   keeps {row['kept_bits_per_weight']:5.3f} bits a weight   peak {row['peak_mb']:6.1f} MB", end="")
        print(f"   made in {row['making_ns_per_weight']:4.1f} ns a weight   {_words(row['touch_ns'])}")
    chosen = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items() if name != "json"}
    result = {"environment": environment("cpu"), "options": chosen, "rows": rows}
    if options.json is not None:
        write(options.json, result)
    return result


if __name__ == "__main__":
    main()
