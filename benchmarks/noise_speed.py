"""How fast noise is made: theta <- theta + c z over one large matrix, against torch's own generator.

python benchmarks/noise_speed.py
ZO_LIGHTNING_COMPILE=0 python benchmarks/noise_speed.py             without a compiler
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

import torch
from measure import environment, interleaved, stamps, summary, write

from zo_lightning.engine.noise import Noise, as_noise, sweep
from zo_lightning.engine.noise.compiling import available
from zo_lightning.engine.noise.sweep import Item

NOISES_HERE = (
    "rademacher",
    "gaussian",
    "sphere",
    "low_rank(rank=1)",
    "low_rank(rank=2)",
    "low_rank(rank=4)",
    "low_rank(rank=16, orthogonal=True)",
)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=1 << 12, help="rows and columns of the matrix")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, and write JSON."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    weights = torch.zeros(options.width, options.width, device=options.device)
    z = torch.empty_like(weights)

    def add(noise: Noise) -> object:
        seeds = itertools.count()
        return lambda: sweep([Item(weights, weights, 1, 1.0, (1e-3,))], [next(seeds)], noise)  # so that nothing is kept of the last one

    work: dict[str, Any] = {
        "normal_": lambda: z.normal_(),
        "normal_ and add_": lambda: weights.add_(z.normal_(), alpha=1e-3),
        **{f"{name}, added": add(as_noise(name)) for name in NOISES_HERE},
    }
    seconds = interleaved({name: stamps(step, options.device) for name, step in work.items()}, options.rounds, 3)
    rows: dict[str, Any] = {name: summary(values) for name, values in seconds.items()}
    base = rows["normal_"]["median_ms"]
    compiled = available(options.device)
    for name, row in rows.items():
        row["values_per_second"] = round(weights.numel() / row["median_ms"] * 1e3)
        row["times_as_fast_as_normal_"] = round(base / row["median_ms"], 2)
        print(f"{name:48s} {row['values_per_second'] / 1e9:6.2f} G/s  {row['times_as_fast_as_normal_']:6.2f} x normal_")
    result = {"environment": environment(options.device), "numel": weights.numel(), "compiler": compiled, "times": rows}
    write(options.json, result)
    return result


if __name__ == "__main__":
    main()
