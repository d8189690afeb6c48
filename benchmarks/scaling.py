"""Step time against ranks, latency and bandwidth: DDP of AdamW beside data, perturbation and seed parallel, from measured pieces.

python benchmarks/scaling.py --json benchmarks/results/scaling.json --plot docs/images/scaling.png
python benchmarks/scaling.py --eager --set hidden_size=32 num_hidden_layers=1 --rounds 2 --worlds 1 2

The pieces, in seconds: a forward pass F, a backward pass B, the update of AdamW O; of ours an evaluation E (a forward pass at a
perturbed point), an update by one term U, and the rest of a step R. A network has a latency L (seconds that a packet takes) and a
bandwidth W (bytes a second that a rank can send). Steps of n ranks, with q queries:

    data           2q E + q U + R + M(n)
    perturbation   ceil(2q / p) E + q U + R + M(n)    p = min(n, 2q) ranks share the points; larger n: groups of p, each with its data
    seeds          2q E + n q U + R + M(n)            the update has the terms of all ranks
    adamw          F + max(B, C(n)) + O               all communication is hidden behind the backward pass, the best that DDP can do

Exchanges as gloo makes them are rings, in which a rank waits for word that its neighbour is ready, and then for the data: 2 L a round.

    M(n) = (n-1) (2 L + S + (24 + 16 q) / W) + n P    S: software of a round; P: Python, for the numbers of one rank
    C(n) = 2 (n-1)/n G/W + (max(2 n, s) - 2) 2 L      G bytes of gradients; DDP's buckets of at most 25 MiB are reduced at the same time,
                                                      in s segments of at most 1 MiB, of which two are underway

With `tree=True` they take the fewest rounds there can be, which nobody has built here for ours, and NCCL has for AdamW:

    M(n) = ceil(log2 n) (L + S) + (n-1) (24 + 16 q) / W + n P
    C(n) = 2 (n-1)/n G/W + 2 ceil(log2 n) L

Pieces are measured here, in float32 with one thread, by one, two and four processes at once; what the model makes of them is compared
with measured steps of as many processes and, with `--slow-network FILE`, with those of slow_network.py. The curves are made of the pieces
of one process by itself. A step of AdamW learns more than one of ours: these are times of steps, not of runs. The plot needs matplotlib.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from measure import environment, write
from parallel_steps import add_workload, check_workload
from scaling_pieces import Pieces, measured, row_seconds, worker
from workload import build, describe

RANKS = [2**power for power in range(13)]
SCHEMES = ("adamw", "data", "perturbation", "seeds")
BUCKET, SEGMENT = 25 * 2**20, 2**20
"""Bytes: of DDP's buckets, and of gloo's segments of them."""


class Network(NamedTuple):
    """Seconds that a packet takes, and bytes that a rank can send a second."""

    latency: float
    bandwidth: float

    def __str__(self) -> str:
        milliseconds, megabits = 1e3 * self.latency, 8e-6 * self.bandwidth
        speed = f"{megabits / 1e3:g} Gbit/s" if megabits >= 1e3 else f"{megabits:g} Mbit/s"
        return f"{milliseconds:g} ms, {speed}"


NETWORKS = [(0.01, 1e5), (0.1, 1e4), (1.0, 1e4), (1.0, 1e3), (10.0, 1e3), (100.0, 100.0)]
"""(milliseconds, Mbit/s), from one room to one home beside the other."""


class Model(NamedTuple):
    """Seconds of a step.

    software: of one round of a meeting, without a network.
    row: what one more rank takes of Python in a meeting.
    queries: of each step, for `seeds` of each rank.
    """

    pieces: Pieces
    software: float
    row: float
    queries: int = 1

    def meeting(self, ranks: int, network: Network, tree: bool = False) -> float:
        """M(n): every rank has the numbers of all."""
        if ranks == 1:
            return 0.0
        message = 24 + 16 * self.queries
        sent = (ranks - 1) * message / network.bandwidth + ranks * self.row
        if tree:
            return doublings(ranks) * (network.latency + self.software) + sent
        return (ranks - 1) * (2 * network.latency + self.software) + sent

    def reduction(self, ranks: int, network: Network, tree: bool = False) -> float:
        """C(n): every rank has the mean of all gradients."""
        if ranks == 1:
            return 0.0
        size = self.pieces.gradient
        sent = 2 * (ranks - 1) / ranks * size / network.bandwidth
        if tree:
            return sent + 2 * doublings(ranks) * network.latency
        buckets = math.ceil(size / BUCKET)
        segments = max(2 * ranks, math.ceil(size / buckets / SEGMENT))
        return sent + (segments - 2) * 2 * network.latency

    def adamw(self, ranks: int, network: Network, tree: bool = False, overlap: bool = True) -> float:
        """DDP; without overlap the reduction begins when the backward pass has ended."""
        forward, backward, update = self.pieces[:3]
        exchange = self.reduction(ranks, network, tree)
        return forward + (max(backward, exchange) if overlap else backward + exchange) + update

    def ours(self, scheme: str, ranks: int, network: Network, tree: bool = False) -> float:
        """ "data", "perturbation" or "seeds"."""
        points, terms = 2 * self.queries, self.queries * (ranks if scheme == "seeds" else 1)
        if scheme == "perturbation":
            points = math.ceil(points / min(ranks, points))
        return points * self.pieces.evaluation + terms * self.pieces.term + self.pieces.rest + self.meeting(ranks, network, tree)

    def step(self, scheme: str, ranks: int, network: Network, tree: bool = False) -> float:
        """Of any scheme."""
        return self.adamw(ranks, network, tree) if scheme == "adamw" else self.ours(scheme, ranks, network, tree)


def doublings(ranks: int) -> int:
    """ceil(log2 n): rounds in which everybody can hear of everybody."""
    return (ranks - 1).bit_length()


def compared(model: Model, steps: dict[str, float], ranks: int) -> list[dict[str, Any]]:
    """Measured steps of processes on one machine beside the model's."""
    here = Network(0.0, model.pieces.reduced or math.inf)
    rows = []
    for scheme, seconds in steps.items():
        expected = model.adamw(ranks, here, overlap=False) if scheme == "adamw" else model.ours(scheme, ranks, here)
        row = {"ranks": ranks, "scheme": scheme, "measured": seconds, "model": expected, "error": expected / seconds - 1}
        if scheme == "adamw" and ranks > 1:
            row["model_with_overlap"] = model.adamw(ranks, here)
        rows.append(row)
    return rows


def beside_slow_network(model: Model, rows: Sequence[dict[str, Any]], ranks: int) -> list[dict[str, Any]]:
    """Steps that slow_network.py measured beside the model's."""
    found = []
    for row in rows:
        host, _, scheme = row["case"].partition(", ")
        if row["mbits"] is None or scheme == "alone":
            continue
        network = Network(row["delay_ms"] / 1e3, row["mbits"] * 1e6 / 8)
        name = "adamw" if host == "adamw" else scheme or "meeting"
        expected = model.meeting(ranks, network) if name == "meeting" else model.step(name, ranks, network)
        seconds = row["seconds_a_step"]
        places = {"delay_ms": row["delay_ms"], "mbits": row["mbits"]}
        found.append({**places, "scheme": name, "measured": seconds, "model": expected, "error": expected / seconds - 1})
    return found


def curves(model: Model, networks: Sequence[Network]) -> list[dict[str, Any]]:
    """Step times of all schemes for all numbers of ranks, on each network."""
    return [
        {
            "network": str(network),
            "scheme": scheme,
            "tree": tree,
            "seconds": [float(f"{model.step(scheme, ranks, network, tree):.4g}") for ranks in RANKS],
        }
        for network in networks
        for tree in (False, True)
        for scheme in SCHEMES
    ]


def plot(rows: Sequence[dict[str, Any]], path: str) -> None:
    """One panel a network."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["network"] for row in rows))
    across = min(3, len(names))
    figure = Figure(figsize=(3.7 * across, 3.2 * math.ceil(len(names) / across) + 0.5), layout="constrained")
    axes = figure.subplots(math.ceil(len(names) / across), across, sharex=True, sharey=True, squeeze=False).flat
    colors = {"adamw": "0.3", "data": "C0", "perturbation": "C2", "seeds": "C1"}
    for ax, name in zip(axes, names, strict=False):
        for row in (row for row in rows if row["network"] == name):
            scheme, tree = row["scheme"], row["tree"]
            label = None if tree else {"adamw": "AdamW, DDP"}.get(scheme, scheme)
            style = {"linestyle": ":" if tree else "-", "linewidth": 1.2 if tree else 1.8}
            ax.loglog(RANKS, row["seconds"], color=colors[scheme], label=label, **style)
        ax.set_title(name, fontsize=10)
        ax.grid(alpha=0.25)
        ax.set_xticks([1, 4, 16, 64, 256, 1024, 4096], ["1", "4", "16", "64", "256", "1k", "4k"])
        ax.minorticks_off()
    figure.supxlabel("ranks", fontsize=10)
    figure.supylabel("seconds a step", fontsize=10)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    dots = figure.axes[0].plot([], [], ":", color="0.5")
    figure.legend([*handles, *dots], [*labels, "the same with exchanges in log2 n rounds"], loc="outside upper center", ncols=5, fontsize=9)
    figure.savefig(path, dpi=110)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """A line for each network and scheme."""
    some = [1, 16, 256, 4096]
    print(f"{'seconds a step, ranks':45}" + "".join(f"{ranks:>10}" for ranks in some))
    for row in rows:
        name = f"{row['network']:22} {row['scheme']}{', log2 n rounds' if row['tree'] else ''}"
        print(f"{name:45}" + "".join(f"{row['seconds'][RANKS.index(ranks)]:10.3g}" for ranks in some))


def network_of(text: str) -> Network:
    """MILLISECONDS:MBITS."""
    milliseconds, _, megabits = text.partition(":")
    return Network(float(milliseconds) / 1e3, float(megabits) * 1e6 / 8)


def main(given: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Measure, compare, compute, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_workload(parser)
    parser.add_argument("--queries", type=int, default=1, help="of a step that is computed")
    parser.add_argument("--networks", type=network_of, nargs="+", metavar="MS:MBITS", help="latency and bandwidth of each")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4], help="processes that measure at the same time")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=1, help="of each piece in a round")
    parser.add_argument("--slow-network", type=Path, default=None, help="a JSON file of slow_network.py, to compare with")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--plot", default=None)
    parser.add_argument("--worker", nargs=3, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    check_workload(parser, args)
    if args.worker is not None:
        worker(args, Path(args.worker[0]), int(args.worker[1]), int(args.worker[2]))
        return []
    own = sys.argv[1:] if given is None else list(given)
    found = {ranks: measured(args, own, __file__, ranks) for ranks in sorted({1, *args.worlds})}
    most, row = max(found), row_seconds()
    software = (found[most][0].met - most * row) / (most - 1) if most > 1 else 0.0
    models = {ranks: Model(pieces, software, row) for ranks, (pieces, _) in found.items()}
    checked = [one for ranks, model in models.items() for one in compared(model, found[ranks][1], ranks)]
    for one in checked:
        print(f"{one['ranks']} ranks, {one['scheme']:13} {one['measured']:8.4f} s, model {one['model']:8.4f} ({one['error']:+.1%})")
    if args.slow_network is not None:
        slow = json.loads(args.slow_network.read_text())
        ranks = slow["options"]["ranks"]
        checked_slow = beside_slow_network(models.get(ranks, models[1]), slow["rows"], ranks)
        for one in checked_slow:
            place = f"{one['delay_ms']:g} ms, {one['mbits']:g} Mbit/s, {one['scheme']}"
            print(f"{place:40} {one['measured']:8.4f} s, model {one['model']:8.4f} ({one['error']:+.1%})")
    networks = args.networks or [Network(delay / 1e3, limit * 1e6 / 8) for delay, limit in NETWORKS]
    rows = curves(models[1]._replace(queries=args.queries), networks)
    show(rows)
    if args.json:
        options = {key: value for key, value in vars(args).items() if key not in ("json", "plot", "worker", "networks", "slow_network")}
        pieces = {str(ranks): model.pieces._asdict() for ranks, model in models.items()}
        extra = {"workload": describe(build(args), args), "pieces": pieces, "software": software, "row": row}
        extra |= {"compared": checked, "compared_with_slow_network": checked_slow if args.slow_network else None}
        write(args.json, {"environment": environment("cpu"), "options": options, **extra, "ranks": RANKS, "curves": rows})
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        print("No plot: matplotlib is not installed.")
    elif args.plot:
        plot(rows, args.plot)
    return rows


if __name__ == "__main__":
    main()
