"""Step logs on the command line: python -m zo_lightning.log inspect|verify|replay|export LOG."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from zo_lightning.engine.journal import StepRecord
from zo_lightning.engine.trajectory.atomic import same_file
from zo_lightning.engine.trajectory.export import export
from zo_lightning.engine.trajectory.log import Log, read_log
from zo_lightning.engine.trajectory.records import Segment
from zo_lightning.engine.trajectory.replay import replay, verify
from zo_lightning.engine.trajectory.weights import load_base, save_tensors

DAMAGED, UNUSABLE = 1, 2
"""Exit codes: the log, or its agreement with the weights; the command line, or files that can't be read or written."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Errors are one line on stderr."""
    options = _parser().parse_args(arguments)
    try:
        code: int = options.command(options)
    except ValueError as error:
        code = _complain(error, DAMAGED)
    except (OSError, RuntimeError) as error:
        code = _complain(error, UNUSABLE)
    return code


def _complain(error: Exception, code: int) -> int:
    print("error:", " ".join(str(error).split()), file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m zo_lightning.log", description="Step logs: what is in them, and what follows from it.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Any, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("log", type=Path, metavar="LOG")
        command.set_defaults(command=function)
        return command

    add("inspect", _inspect, "Show what a log holds.").add_argument("--json", action="store_true", help="as JSON")
    check = add("verify", _verify, "Check a log; with base weights, replay it and compare fingerprints.")
    check.add_argument("--base", type=Path, metavar="FILE", help="safetensors with the weights at the log's beginning")
    again = add("replay", _replay, "Make the fine-tuned weights from the base and the log.")
    again.add_argument("--base", type=Path, metavar="FILE", required=True, help="safetensors with weights that the log knows")
    again.add_argument("--out", type=Path, metavar="FILE", required=True, help="safetensors to write")
    again.add_argument("--to-step", type=int, metavar="N", help="stop after N steps")
    share = add("export", _export, "Write the steps as one small safetensors file.")
    share.add_argument("--out", type=Path, metavar="FILE", required=True, help="safetensors to write")
    share.add_argument("--to-step", type=int, metavar="N", help="stop after N steps")
    return parser


def _inspect(options: argparse.Namespace) -> int:
    facts = summary(read_log(options.log))
    if options.json:
        print(json.dumps(facts, indent=2, allow_nan=False))
        return 0
    for name, value in facts.items():
        rows = value if isinstance(value, list) else [value]
        for index, row in enumerate(rows):
            shown = ", ".join(f"{key} {entry}" for key, entry in row.items()) if isinstance(row, dict) else row
            print(f"{name if index == 0 else '':14s} {_printable(shown)}")
    return 0


def _printable(value: object) -> str:
    """Text of a file can't write to the terminal what it likes."""
    return "".join(letter if letter.isprintable() else "\ufffd" for letter in str(value))


def summary(log: Log) -> dict[str, Any]:
    """What `inspect` shows; plain types, no NaN."""
    steps = log.steps
    losses = [_number(sum(value / len(step.values) for value in step.values)) for step in steps if not step.skipped]
    rates = [step.settings[0].lr for step in steps]
    return {
        "file": str(log.path),
        "bytes": log.path.stat().st_size,
        "torn bytes": log.torn_bytes,
        "torn": log.torn or None,
        "steps": len(steps),
        "first step": steps[0].step if steps else None,
        "last step": steps[-1].step if steps else None,
        "skipped": sum(step.skipped for step in steps),
        "loss": {"first": losses[0] if losses else None, "last": losses[-1] if losses else None},
        "lr": {"least": min(rates, default=None), "most": max(rates, default=None)},
        "masks": _masks(log),
        "segments": [_segment(segment) for segment in log.segments],
        "checkpoints": [{"step": c.step, "host": c.host, "path": c.path} for c in log.checkpoints],
        "ended": log.end is not None,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _masks(log: Log) -> dict[str, Any] | None:
    """What the steps trained, and the files that a replay needs for it."""
    if not log.masks:
        return None
    files = sorted({mask.file for mask in log.masks if mask.file is not None})
    rules = " ".join(sorted({mask.name for mask in log.masks}))
    return {"made": len(log.masks), "rules": rules, "files": len(files), "missing files": sum(not _is_there(log, name) for name in files)}


def _is_there(log: Log, name: str) -> bool:
    """Whether a file lies beside the log."""
    return os.path.isfile(log.path.with_name(name))


def _segment(segment: Segment) -> dict[str, Any]:
    dtypes = Counter(entry.dtype for entry in segment.parameters)
    return {
        "step": segment.step,
        "tensors": len(segment.parameters),
        "weights": sum(math.prod(entry.shape) for entry in segment.parameters),
        "dtypes": " ".join(f"{count} x {dtype}" for dtype, count in sorted(dtypes.items())),
        "groups": 1 + max(entry.group for entry in segment.parameters),
        "noise": segment.noise,
        "estimator": _part(segment.estimator),
        "rule": _part(segment.rule),
        "residency": segment.residency,
        "rounding": segment.rounding,
        "seed": segment.seed,
        "device": segment.device,
        "versions": " ".join(f"{name} {version}" for name, version in sorted(segment.versions.items())),
        "base": segment.base,
        "fingerprint": segment.fingerprint[:16],
    }


def _part(part: Any) -> str:
    return f"{part['name']}({', '.join(f'{name}={value!r}' for name, value in sorted(part['options'].items()))})"


def _verify(options: argparse.Namespace) -> int:
    log = read_log(options.log)
    state = f"; {log.torn}" if log.torn else ", whole"
    print(f"{options.log}: {sum(isinstance(r, StepRecord) for r in log.records)} steps{state}.")
    if options.base is None:
        return 0
    found = verify(load_base(options.base), log)
    if found.problem is not None:
        print(f"error: {options.log}: {found.problem}", file=sys.stderr)
        return DAMAGED
    print(f"Replayed to step {found.step}: {found.checked} fingerprints agree.")
    return 0


def _replay(options: argparse.Namespace) -> int:
    for given in (options.base, options.log):
        if same_file(given, options.out):
            raise OSError(f"Invalid --out: {options.out} is {given}, which would be replaced. Name another file.")
    tensors = load_base(options.base)
    step = replay(tensors, options.log, options.to_step)
    save_tensors(options.out, tensors)
    print(f"Written to {options.out}: the weights after {step} steps.")
    return 0


def _export(options: argparse.Namespace) -> int:
    tune = export(options.log, options.out, options.to_step)
    print(f"Written to {options.out}: {len(tune.steps)} steps, {options.out.stat().st_size} bytes.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
