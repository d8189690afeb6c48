"""What feature reuse saves: a step of Coordinatewise with and without it, one coordinate in every weight matrix of a deep net.

python benchmarks/feature_reuse.py --json benchmarks/results/feature_reuse.json
python benchmarks/feature_reuse.py --depths 4 --rounds 2
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import environment, interleaved, stamps, summary, write
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from zo_lightning.engine import Coordinatewise, ZOOptimizer
from zo_lightning.engine.masks import Mask
from zo_lightning.engine.parameters import names_of

WAYS = {
    "plain": Coordinatewise(reuse=False),
    "reuse": Coordinatewise(),
    "batch": Coordinatewise(reuse=False, batch=16),
    "reuse and batch": Coordinatewise(batch=16),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--depths", type=int, nargs="+", default=[4, 12, 24], help="layers of the nets")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2, help="rows of a batch, for GPT-2 sequences of 32 tokens")
    parser.add_argument("--each", type=int, default=4, help="coordinates of each weight matrix")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, default=None, help="write the result to this file")
    return parser.parse_args(arguments)


def residual(depth: int, options: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """A convolutional net with batch normalization, as DeepZero's."""
    channels = options.width // 8
    blocks = [
        nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        for _ in range(depth)
    ]
    images = torch.randn(options.batch, channels, 16, 16)
    return nn.Sequential(*blocks), lambda net: net(images).square().mean()


def gpt2(depth: int, options: argparse.Namespace) -> tuple[nn.Module, Callable[[nn.Module], Tensor]]:
    """Random weights, dropout on."""
    config = GPT2Config(
        vocab_size=1000, n_positions=32, n_embd=options.width, n_layer=depth, n_head=4, bos_token_id=0, eos_token_id=0, use_cache=False
    )
    ids = torch.randint(1000, (options.batch, 32))
    return GPT2LMHeadModel(config), lambda net: net(input_ids=ids, labels=ids).loss


NETS = {"convolutions": residual, "gpt2": gpt2}


def measured(name: str, depth: int, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a step by way, ratios over plain, and the number of points."""
    contenders, optimizers = {}, {}
    for way, estimator in WAYS.items():
        torch.manual_seed(0)
        net, loss = NETS[name](depth, options)
        names = names_of(net)
        for p in net.parameters():
            p.requires_grad_(p.dim() > 1 and names[id(p)] not in ("wte.weight", "wpe.weight"))
        density = {names[id(p)]: min(1.0, options.each / p.numel()) for p in net.parameters() if p.requires_grad}
        optimizers[way] = ZOOptimizer(net, lr=0.0, eps=1e-3, estimator=estimator, mask=Mask("random", density), safeguard=None)
        contenders[way] = stamps(partial(optimizers[way].step, partial(loss, net)), "cpu")
    seconds = interleaved(contenders, options.rounds, 1)
    rows: dict[str, Any] = {way: summary(values) for way, values in seconds.items()}
    for row in rows.values():
        row["over_plain"] = round(row["median_ms"] / rows["plain"]["median_ms"], 3)
    reports = {way: optimizer.report for way, optimizer in optimizers.items()}
    values = {way: report.values for way, report in reports.items() if report is not None}
    equal = values["plain"] == values["reuse"]
    if not equal:
        raise RuntimeError(f"{name} of depth {depth}: reuse changed values.")
    print(f"{name:14s} depth {depth:3d}: " + ", ".join(f"{way} {row['over_plain']:.3f}" for way, row in rows.items()), flush=True)
    return {"net": name, "depth": depth, "points": len(values["plain"]), "equal_bits": equal, "times": rows}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write what was asked for."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    rows = [measured(name, depth, options) for name in NETS for depth in options.depths]
    if options.json is not None:
        kept = {name: value for name, value in vars(options).items() if name != "json"}
        write(options.json, {"options": kept, "environment": environment("cpu"), "rows": rows})


if __name__ == "__main__":
    main()
