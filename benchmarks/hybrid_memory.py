"""What backpropagation of the last layers costs, in one run on the same batch: peak memory and time of a step.

Forward-only training of all weights, with the last one and two blocks (and norm and head) by backpropagation and AdamW, and AdamW of all.

python benchmarks/hybrid_memory.py --json benchmarks/results/hybrid_memory.json
python benchmarks/hybrid_memory.py --batch 1 --length 32
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measure import environment, interleaved, peak_bytes, stamps, write
from torch import Tensor, nn
from transformers import OPTConfig, OPTForCausalLM

from zo_lightning.engine import Backprop, ZOOptimizer

LAST = (0, 1, 2)
"""Blocks that are trained by backpropagation."""


def build(blocks: int, width: int, vocabulary: int, length: int) -> nn.Module:
    """An OPT with a head of its own and without dropout; the same weights each time."""
    torch.manual_seed(0)
    shape: Any = {"num_hidden_layers": blocks, "hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
    rest: Any = {"vocab_size": vocabulary, "num_attention_heads": max(1, width // 64), "max_position_embeddings": length}
    model: nn.Module = OPTForCausalLM(OPTConfig(**shape, **rest, dropout=0.0, attention_dropout=0.0, tie_word_embeddings=False))
    return model.train()


def patterns(model: nn.Module, last: int) -> list[str]:
    """The last blocks, what comes behind them, and the head."""
    count = len(model.model.decoder.layers)  # type: ignore[union-attr,arg-type]
    blocks = [f"model.decoder.layers.{index}.*" for index in range(count - last, count)]
    return [*blocks, "model.decoder.final_layer_norm.*", "lm_head.*"]


def stepper(model: nn.Module, loss: Callable[[], Tensor], last: int | None) -> Callable[[], object]:
    """One step: forward-only (0), hybrid with so many `last` blocks, or AdamW of everything (None)."""
    if last is not None:
        hybrid = Backprop(patterns(model, last), lr=1e-5) if last else None
        optimizer = ZOOptimizer(model, lr=1e-9, weights="exact", backprop=hybrid, safeguard=None)
        return lambda: optimizer.step(loss)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-7)

    def step() -> None:
        loss().backward()
        adam.step()
        adam.zero_grad()

    return step


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a method: MB above the weights at the peak of a step and kept between steps, and the median time; over forward-only."""
    names = ["forward-only", *(f"hybrid, last {last} and head" for last in LAST[1:]), "AdamW"]
    ids = torch.randint(0, options.vocabulary, (options.batch, options.length), generator=torch.Generator().manual_seed(1))
    steps: dict[str, Callable[[], object]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, last in zip(names, (*LAST, None), strict=True):
        model = build(options.blocks, options.width, options.vocabulary, options.length)

        def loss(model: nn.Module = model) -> Tensor:
            found: Tensor = model(input_ids=ids, labels=ids).loss
            return found

        step = steps[name] = stepper(model, loss, last)
        kept = peak_bytes(lambda step=step: [step() for _ in range(2)], "cpu")[1]  # type: ignore[misc]
        # what the steps before made (moments, scratch) is there from now on
        rows[name] = {"kept_mb": kept / 1e6, "peak_mb": (kept + peak_bytes(step, "cpu")[0]) / 1e6}
        rows[name]["weights_mb"] = sum(p.nbytes for p in model.parameters()) / 1e6
        by_backprop = list(model.parameters()) if last is None else []
        if last:
            tail = patterns(model, last)
            by_backprop = [p for key, p in model.named_parameters() if any(key.startswith(pattern.rstrip("*")) for pattern in tail)]
        rows[name]["backprop_mb"] = sum(p.nbytes for p in by_backprop) / 1e6
    seconds = interleaved({name: stamps(step, "cpu") for name, step in steps.items()}, options.rounds, 3)
    first = rows[names[0]]
    for name, row in rows.items():
        row["ms"] = 1e3 * statistics.median(seconds[name])
        row["peak_over_forward_only"] = (row["weights_mb"] + row["peak_mb"]) / (first["weights_mb"] + first["peak_mb"])
        row["time_over_forward_only"] = row["ms"] / first["ms"]
    return [{"method": name, **row} for name, row in rows.items()]


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Print a line a method; `--json` writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"blocks": 12, "width": 512, "vocabulary": 8192, "batch": 8, "length": 128, "rounds": 4}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=None, help="torch's intra-op threads; default: torch's")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    rows = measure(options)
    for row in rows:
        memory = f"peak {row['peak_mb']:7.1f} MB above {row['weights_mb']:.1f} MB of weights (kept {row['kept_mb']:6.1f})"
        over = f"with weights {row['peak_over_forward_only']:5.2f}   time {row['time_over_forward_only']:5.2f} of forward-only"
        print(f"{row['method']:28} {memory}   {over}   {row['ms']:7.0f} ms   by backpropagation {row['backprop_mb']:6.1f} MB")
    chosen = {name: value for name, value in vars(options).items() if name != "json"}
    result = {"environment": environment("cpu"), "options": chosen, "rows": rows}
    write(options.json, result)
    return result


if __name__ == "__main__":
    main()
