"""Plans on the command line: python -m zo_lightning.plan MODEL_OR_CONFIG --device-memory 8GB --batch 16 --length 512."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch

from zo_lightning.planning import Machine, Plan, measured_flops, parse_size, plan
from zo_lightning.planning.machine import ASSUMED_BUS, ASSUMED_DISK, ASSUMED_GPU, ASSUMED_PROCESS, resident_bytes
from zo_lightning.planning.models import DTYPES, TASKS, Planned, build, configuration, quiet
from zo_lightning.planning.modes import LOCKSTEP
from zo_lightning.planning.sizes import gigabytes

NO_ROOM, UNUSABLE = 1, 2
"""Exit codes: no mode fits; the command line, or a configuration that can't be used."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the plan; returns the exit code. Errors are one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        quiet()
        planned, found = planned_of(options)
    except (ValueError, RuntimeError, ImportError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        return UNUSABLE
    print(json.dumps(facts(found, planned, options), indent=2, allow_nan=False) if options.json else table(found, planned, options))
    if found.recommended is None:
        least = found.smallest
        why = f"no mode fits into {gigabytes(found.machine.memory or 0)} GB: the smallest, {least.name}, needs {gigabytes(least.peak)} GB"
        print(f"error: {why}. Plan a smaller --batch or --length, or more --device-memory.", file=sys.stderr)
        return NO_ROOM
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m zo_lightning.plan",
        description="Which mode fits a model and a batch into memory, its peak, the bytes that a step moves, and what it waits for.",
        epilog="Sizes: 8GB (8e9 bytes), 8GiB, 500MB. Rates: the same, a second.",
    )
    add = parser.add_argument
    add("model", metavar="MODEL_OR_CONFIG", help="a folder with config.json, a config.json, a model type of transformers, or a hub model")
    add("--device-memory", type=_size, metavar="SIZE", help="of the device; on a CPU what the process may take; none: modes are compared")
    add("--batch", type=int, default=1, metavar="N", help="rows of a forward pass (default 1)")
    add("--length", type=int, default=512, metavar="N", help="tokens of a row (default 512)")
    add("--queries", type=int, default=1, metavar="N", help="of SPSA: two forward passes each (default 1)")
    add("--update", default="sgd", metavar="RULE", help="what an estimate does to the weights: sgd, sign, momentum, adam, hizoo")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    add("--task", choices=TASKS, help="default: what the configuration's architecture is for")
    add("--dtype", choices=DTYPES, help="of the weights; default: the configuration's, else float32")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change the configuration; may be repeated")
    add("--padded", action="store_true", help="batches have an attention mask")
    add(
        "--lockstep",
        action=argparse.BooleanOptionalAction,
        default=LOCKSTEP,
        help="streamed weights: all forward passes of a step visit a block while it is in memory",
    )
    add(
        "--tflops", type=float, metavar="X", help="1e12 operations a second; default: measured on this machine, assumed for a GPU elsewhere"
    )
    add("--disk", type=_size, metavar="RATE", help=f"of the disk (default {ASSUMED_DISK / 1e9:g}GB, assumed)")
    add("--bus", type=_size, metavar="RATE", help=f"between CPU memory and GPU (default {ASSUMED_BUS / 1e9:g}GB, assumed)")
    add("--process", type=_size, metavar="SIZE", help="of Python and its packages, on a CPU; default: measured on this process")
    add("--json", action="store_true", help="for machines; bytes and seconds")
    return parser


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def planned_of(options: argparse.Namespace) -> tuple[Planned, Plan]:
    """The model and batch of the parsed options, and their plan."""
    if options.queries < 1:
        raise ValueError(f"--queries {options.queries}: must be at least 1.")
    if options.tflops is not None and not 0 < options.tflops < 1e9:
        raise ValueError(f"--tflops {options.tflops}: must be above 0.")
    config = configuration(options.model, options.set)
    planned = build(config, options.batch, options.length, options.task, DTYPES.get(options.dtype), options.padded)
    machine = _machine(options, planned.dtype, resident_bytes())  # what a run imports is imported now, and nothing was traced yet
    asked = {"lockstep": options.lockstep, "update": options.update}
    return planned, plan(planned.model, planned.inputs, planned.forward, machine, options.queries, **asked)


def _machine(options: argparse.Namespace, dtype: torch.dtype, process: int | None) -> Machine:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.tflops is not None:
        flops, source = 1e12 * options.tflops, "given"
    elif device == "cpu" or torch.cuda.is_available():
        flops, source = measured_flops(device, dtype), "measured: matrix products on this machine"
    else:
        flops, source = ASSUMED_GPU, "assumed; say --tflops"
    assumed = "assumed; say"
    own = options.process or process
    return Machine(
        device=device,
        memory=options.device_memory,
        flops=flops,
        flops_source=source,
        disk_bandwidth=options.disk or ASSUMED_DISK,
        disk_source="given" if options.disk else f"{assumed} --disk",
        bus_bandwidth=options.bus or ASSUMED_BUS,
        bus_source="given" if options.bus else f"{assumed} --bus",
        process=own or ASSUMED_PROCESS,
        process_source="given" if options.process else "measured: this process" if process else f"{assumed} --process",
    )


def facts(found: Plan, planned: Planned, options: argparse.Namespace) -> dict[str, Any]:
    """What --json prints; plain types."""
    machine, best = found.machine, found.recommended
    return {
        "model": type(planned.model).__name__,
        "task": planned.task,
        "dtype": str(planned.dtype)[6:],
        "batch": options.batch,
        "length": options.length,
        "weight_bytes": found.weights,
        "trained_bytes": found.trained,
        "largest_unit_bytes": found.largest_unit,
        "activation_bytes": found.activations,
        "forward_flops": found.forward_flops,
        "machine": dict(vars(machine)),
        "recommended": None if best is None else best.name,
        "modes": [
            {**vars(mode), "peak_bytes": mode.peak, "bound": mode.bound, "seconds_per_step": mode.seconds, "memory": dict(mode.memory)}
            for mode in found.modes
        ],
        "assumptions": [*planned.notes, *found.assumptions],
    }


def table(found: Plan, planned: Planned, options: argparse.Namespace) -> str:
    """The plan as aligned text."""
    machine, best = found.machine, found.recommended
    room = "" if machine.memory is None else f", {gigabytes(machine.memory)} GB"
    head = ["mode", "peak", "fits", "host", "disk", "read", "written", "compute", "bus", "bound"]
    units = ["", "GB", "", "GB", "GB", "GB/step", "GB/step", "s/step", "s/step", ""]
    rows = [head, units]
    for mode in found.modes:
        fits = ("yes" if mode.fits else "no") if machine.memory is not None else "-"
        moved = [gigabytes(size) if size else "-" for size in (mode.host, mode.disk, mode.read, mode.written)]
        bus = f"{mode.bus_seconds:.2f}" if mode.bus_seconds else "-"
        rows.append([mode.name, gigabytes(mode.peak), fits, *moved, f"{mode.compute_seconds:.2f}", bus, mode.bound])
    shape = f"batch {options.batch}" if planned.task == "image-classification" else f"batch {options.batch} x {options.length}"
    lines = [
        f"{type(planned.model).__name__}, {gigabytes(found.weights)} GB of weights, {shape}, on {machine.device}{room} (GB = 1e9 bytes)",
        "",
        *_aligned(rows),
    ]
    shown = best or found.smallest
    lines += ["", f"{'Recommended' if best else 'Smallest'}: {shown.name}, weights={_quoted(shown.weights)}. Peak:"]
    lines += [f"  {line}" for line in _aligned([[part, f"{gigabytes(size)} GB"] for part, size in shown.memory.items()])]
    return "\n".join([*lines, "", "Assumed:", *(f"  - {text}" for text in (*planned.notes, *found.assumptions))])


def _quoted(weights: str) -> str:
    return weights.removeprefix("weights=")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) if column else cell.ljust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


if __name__ == "__main__":
    logging.captureWarnings(True)
    sys.exit(main())
