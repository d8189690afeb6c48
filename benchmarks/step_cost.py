"""What a step costs: over two forward passes, through the hosts, against MeZO's loop; and its peak memory over inference.

python benchmarks/step_cost.py                                     OPT-125M's shape, float32, 8 x 64
python benchmarks/step_cost.py --batch 1 --length 32 --rounds 20
python benchmarks/step_cost.py --config gpt2 --dtype bfloat16 --device cuda
python benchmarks/step_cost.py --lora 8 --weights auto --loops engine      adapters on the same shape
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from host_loops import hf_loop, lightning_loop
from measure import Contender, environment, interleaved, peak_bytes, stamps, summary, write
from mezo_loop import MeZO
from workload import Workload, add_options, build, describe

from zo_lightning import ZOOptimizer
from zo_lightning.engine.noise.compiling import available

LOOPS = ("engine", "lightning", "hf", "mezo")
APART = "apart"
"""In place with the way back on its own, as hosts and accumulation need it: `step` does it together with the update."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add_options(parser)
    parser.add_argument("--noise", nargs="+", choices=("rademacher", "gaussian"), default=["rademacher", "gaussian"])
    parser.add_argument("--weights", nargs="+", choices=("exact", "copy", "inplace", "auto"), default=["exact", "inplace"])
    parser.add_argument("--loops", nargs="*", choices=LOOPS, default=list(LOOPS), help="what runs beside the two forward passes")
    parser.add_argument("--rounds", type=int, default=8, help="every contender runs once a round")
    parser.add_argument("--steps", type=int, default=3, help="steps of a contender in a round")
    parser.add_argument("--times", action=argparse.BooleanOptionalAction, default=True, help="measure times")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="also measure peak tensor memory")
    parser.add_argument("--json", type=Path, default=None, help="write the result to this file")
    return parser.parse_args(arguments)


def two_forwards(workload: Workload) -> None:
    """The yardstick: what two measurements of the loss cost at the least."""
    with torch.no_grad():
        for _ in range(2):
            float(workload.loss())


def engine_step(workload: Workload, weights: str, noise: str) -> Any:
    """A function that makes one step of the engine."""
    optimizer = ZOOptimizer(workload.model, lr=1e-6, weights=weights.partition(" ")[0], noise=noise, safeguard=None)
    if weights.endswith(APART):
        return lambda: (optimizer.estimate(workload.loss), optimizer.apply())
    return lambda: optimizer.step(workload.loss)


def contenders(workload: Workload, options: argparse.Namespace) -> dict[str, Contender]:
    """What takes part, by name; "two forwards" is the first."""
    device, chosen = options.device, options.loops
    found = {"two forwards": stamps(lambda: two_forwards(workload), device)}
    for noise in options.noise:
        if "engine" in chosen:
            for weights in [*options.weights, *([f"inplace {APART}"] if "inplace" in options.weights else [])]:
                found[f"engine {weights} {noise}"] = stamps(engine_step(workload, weights, noise), device)
        if "lightning" in chosen:
            found[f"lightning {noise}"] = lightning_loop(workload, device, noise)
        if "hf" in chosen:
            found[f"hf {noise}"] = hf_loop(workload, device, noise)
    if "lightning" in chosen:
        found["lightning, idle step"] = lightning_loop(workload, device, None)
    if "hf" in chosen:
        found["hf, idle step"] = hf_loop(workload, device, None)
    if "mezo" in chosen:
        loop = MeZO(workload.model)
        found["mezo loop"] = stamps(lambda: loop.step(workload.loss), device)
    return found


def times(workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Median milliseconds by contender, and ratios over the two forward passes."""
    seconds = interleaved(contenders(workload, options), options.rounds, options.steps)
    rows: dict[str, Any] = {name: summary(values) for name, values in seconds.items()}
    base = rows["two forwards"]["median_ms"]
    for name, row in rows.items():
        row["over_two_forwards"] = round(row["median_ms"] / base, 3)
        print(f"{name:32s} {row['median_ms']:10.2f} ms  {row['over_two_forwards']:6.3f} x two forwards", flush=True)
    return rows


def memory(workload: Workload, options: argparse.Namespace) -> dict[str, Any]:
    """Bytes of tensors at the peak of a step over the peak of inference, and the largest unit that "exact" materialises."""
    two_forwards(workload)
    inference, _ = peak_bytes(lambda: two_forwards(workload), options.device)
    rows: dict[str, Any] = {"inference": {"peak_bytes": inference}}
    for weights in options.weights:
        for noise in options.noise:
            rows[f"engine {weights} {noise}"] = _memory_of_step(workload, weights, noise, inference, options.device)
    if "mezo" in options.loops:
        loop = MeZO(workload.model)
        loop.step(workload.loss)
        peak, _ = peak_bytes(lambda: loop.step(workload.loss), options.device)
        rows["mezo loop"] = {"peak_bytes": peak, "over_inference_bytes": peak - inference}
    for name, row in rows.items():
        print(f"{name:32s} peak {row['peak_bytes'] / 1e6:9.2f} MB  {_over(row)}", flush=True)
    return rows


def _over(row: dict[str, Any]) -> str:
    if "over_inference_bytes" not in row:
        return ""
    unit = f" (largest unit {row['largest_unit_bytes'] / 1e6:.2f} MB)" if "largest_unit_bytes" in row else ""
    return f"over inference {row['over_inference_bytes'] / 1e6:9.3f} MB{unit}"


def _memory_of_step(workload: Workload, weights: str, noise: str, inference: int, device: str) -> dict[str, Any]:
    optimizer = ZOOptimizer(workload.model, lr=1e-6, weights=weights, noise=noise, safeguard=None)

    def warm_up() -> None:
        for _ in range(2):
            optimizer.step(workload.loss)

    _, kept = peak_bytes(warm_up, device)  # scratch memory stays between steps, and counts
    peak, _ = peak_bytes(lambda: optimizer.step(workload.loss), device)
    row = {"peak_bytes": kept + peak, "kept_bytes": kept, "over_inference_bytes": kept + peak - inference}
    units = getattr(optimizer.residency, "units", None)
    if units is not None:
        row["largest_unit_bytes"] = max(sum(p.tensor.numel() * p.tensor.element_size() for p in unit.parameters) for unit in units)
    return row


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print a table, and write JSON."""
    options = parse(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    workload = build(options)
    result = {"environment": environment(options.device), "workload": describe(workload, options), "compiler": available(options.device)}
    if options.times:
        result["times"] = times(workload, options)
    if options.memory:
        result["memory"] = memory(workload, options)
    write(options.json, result)
    return result


if __name__ == "__main__":
    main()
