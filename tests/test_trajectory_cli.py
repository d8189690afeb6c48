"""python -m zo_lightning.log: what it shows, what it writes, its exit codes; an error is one line and never a traceback."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_models import mean_square, mlp, regression, same, snapshot
from safetensors.torch import load_file, save_file
from trajectory_tools import Recorder, made_up_segment, made_up_steps, small_log, trained_of, written

from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.trajectory import End, Mark, apply, export, load_base, read_log, trained_fingerprint, verify
from zo_lightning.log import main

FUZZ = Path(__file__).parent.parent / "benchmarks" / "fuzz_log.py"


@pytest.fixture
def run(tmp_path: Path) -> tuple[dict[str, torch.Tensor], Path, Path]:
    """(tuned weights, log, base) of a small run whose base file also has a tensor that is not trained."""
    model = mlp(dtype=torch.float32)
    base = tmp_path / "base.safetensors"
    save_file({**snapshot(model), "buffer": torch.ones(2)}, base)
    optimizer = ZOOptimizer(model, lr=0.05, weights="exact", module=model)
    recorder = Recorder(optimizer, tmp_path / "run.zolog")
    for _ in range(4):
        recorder.step(mean_square(model, regression(torch.float32)))
        recorder.writer.append(Mark(optimizer.steps, trained_fingerprint(trained_of(optimizer))))
    recorder.writer.close()
    return snapshot(model), tmp_path / "run.zolog", base


def test_the_module_runs_in_a_process_of_its_own(run: tuple[dict[str, torch.Tensor], Path, Path], tmp_path: Path) -> None:
    tuned, log, base = run
    out = tmp_path / "tuned.safetensors"

    def command(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "zo_lightning.log", *map(str, arguments)], capture_output=True, text=True)

    done = command("replay", log, "--base", base, "--out", out)
    assert (done.returncode, done.stderr) == (0, "")
    assert "the weights after 4 steps" in done.stdout
    assert same(load_file(out), {**tuned, "buffer": torch.ones(2)})
    data = bytearray(log.read_bytes())
    data[len(data) // 2] ^= 1
    log.write_bytes(data)
    done = command("inspect", log)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert command("nothing", log).returncode == 2


def test_inspect_shows_what_is_in_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = small_log()
    data = written(tmp_path / "log", records)
    (tmp_path / "log").write_bytes(data + b"\x05\x00\x00")
    assert main(["inspect", str(tmp_path / "log"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["steps"], facts["first step"], facts["last step"], facts["skipped"], facts["torn bytes"]) == (3, 0, 2, 1, 3)
    assert facts["loss"] == {"first": 2.0, "last": pytest.approx((2 + 1 / 7 + 2 - 1 / 3) / 2)}
    assert facts["lr"] == {"least": pytest.approx(1e-3 / 3), "most": 1e-3}
    assert facts["checkpoints"] == [{"step": 2, "host": "hf", "path": "checkpoint-2"}]
    assert facts["ended"] is True
    assert facts["segments"][0]["weights"] == 2
    assert main(["inspect", str(tmp_path / "log")]) == 0
    text = capsys.readouterr().out
    assert "torn bytes     3\n" in text
    assert "estimator spsa(queries=1), rule sgd(clip=None)" in text


def test_what_inspect_prints_can_not_drive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path / "log", [made_up_segment(device="\x1b[2J\x07")])
    assert main(["inspect", str(tmp_path / "log")]) == 0
    assert "\x1b" not in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "log"), "--json"]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_inspect_of_a_run_without_a_finite_loss_is_still_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [replace(step, values=(math.nan, 1.0), skipped=True) for step in made_up_steps(2)]
    written(tmp_path / "log", [made_up_segment(), *steps])
    assert main(["inspect", str(tmp_path / "log"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] == {"first": None, "last": None}
    huge = [replace(step, values=(1.7e308, 1.7e308)) for step in made_up_steps(2)]
    written(tmp_path / "huge", [made_up_segment(), *huge])
    assert main(["inspect", str(tmp_path / "huge"), "--json"]) == 0


def test_verify_replays_where_there_is_a_base(
    run: tuple[dict[str, torch.Tensor], Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, log, base = run
    assert main(["verify", str(log)]) == 0
    assert "4 steps, whole." in capsys.readouterr().out
    assert verify(load_base(base), log).torn == ""
    assert main(["verify", str(log), "--base", str(base)]) == 0
    assert "Replayed to step 4: 4 fingerprints agree." in capsys.readouterr().out
    other = tmp_path / "other"
    save_file(snapshot(mlp(dtype=torch.float32, seed=1)), other)
    assert main(["verify", str(log), "--base", str(other)]) == 1
    assert "in none of the states" in capsys.readouterr().err


def test_verify_fails_where_a_fingerprint_disagrees(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = mlp(dtype=torch.float32)
    recorder = Recorder(ZOOptimizer(model, lr=0.05), tmp_path / "log")
    recorder.step(mean_square(model, regression(torch.float32)))
    recorder.writer.append(End(1, "0" * 64))
    recorder.writer.close()
    assert main(["verify", str(tmp_path / "log"), "--base", str(tmp_path / "log.base.safetensors")]) == 1
    assert "after 1 steps the weights are not those" in capsys.readouterr().err


INCOMPLETE, CHECKSUM = "because it is incomplete", "because its checksum is wrong"


@pytest.mark.parametrize(
    ("end", "problem"),
    [
        (lambda data: data[:-3], INCOMPLETE),
        (lambda data: data[:-3] + bytes(3), CHECKSUM),
        (lambda data: data[:-9] + bytes([data[-9] ^ 4]) + data[-8:], CHECKSUM),
        (lambda data: data + bytes(50), INCOMPLETE),
        (lambda data: data + b"\x05\x00", INCOMPLETE),
    ],
    ids=["cut", "without its end", "a flipped bit", "zeros", "a piece"],
)
def test_a_last_record_that_is_left_out_is_told(
    end: Callable[[bytes], bytes],
    problem: str,
    run: tuple[dict[str, torch.Tensor], Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _, log, base = run
    log.write_bytes(end(log.read_bytes()))
    torn = read_log(log).torn
    assert re.fullmatch(
        rf"the last record \(\d+ bytes at byte \d+\) is left out, {problem}: .* or damage. It is cut off when the run goes on", torn
    )
    for arguments in (["verify", str(log)], ["inspect", str(log)], ["verify", str(log), "--base", str(base)]):
        assert main(arguments) == 0
        said = capsys.readouterr().out
        assert torn in said
        assert "whole" not in said
    found = verify(load_base(base), log)
    assert (found.ok, found.torn) == (True, torn)


def test_export_and_replay_up_to_a_step(
    run: tuple[dict[str, torch.Tensor], Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, log, base = run
    assert main(["export", str(log), "--out", str(tmp_path / "export"), "--to-step", "3"]) == 0
    assert "3 steps" in capsys.readouterr().out
    assert main(["replay", str(log), "--base", str(base), "--out", str(tmp_path / "out"), "--to-step", "3"]) == 0
    model = mlp(dtype=torch.float32)
    assert apply(model, tmp_path / "export") == 3
    replayed = load_file(tmp_path / "out")
    replayed.pop("buffer")
    assert same(replayed, snapshot(model))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["inspect", "none"], 2, "No such file or directory: none"),
        (["inspect", "."], 2, "Is a directory"),
        (["inspect", "base.safetensors"], 1, "not a step log"),
        (["inspect", "shared"], 1, "shared is an export (the steps of a log, for sharing), not the log itself. Give its path to `apply`"),
        (["verify", "shared", "--base", "base.safetensors"], 1, "shared is an export"),
        (["replay", "shared", "--base", "base.safetensors", "--out", "out"], 1, "shared is an export"),
        (["verify", "run.zolog", "--base", "run.zolog"], 1, "not a safetensors file"),
        (["verify", "run.zolog", "--base", "none"], 2, "No such file"),
        (["replay", "run.zolog", "--base", "base.safetensors", "--out", "none/out"], 2, "out was not written: No such file or directory"),
        (["replay", "run.zolog", "--base", "base.safetensors", "--out", "out", "--to-step", "9"], 1, "Invalid to_step: 9"),
        (["export", "run.zolog", "--out", "none/out"], 2, "was not written"),
        (["export", "run.zolog", "--out", "out", "--to-step", "0"], 1, "Invalid to_step: 0. An export needs at least one step"),
        (["export", "run.zolog", "--out", "./run.zolog"], 1, "is the step log itself"),
        (["replay", "run.zolog", "--base", "base.safetensors", "--out", "base.safetensors"], 2, "which would be replaced"),
        (["replay", "run.zolog", "--base", "base.safetensors", "--out", "run.zolog"], 2, "which would be replaced"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    code: int,
    message: str,
    run: tuple[dict[str, torch.Tensor], Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    export(run[1], "shared")
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert message in error.replace("'", "")
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


def test_a_short_fuzz_of_logs_and_exports(tmp_path: Path) -> None:
    """The long one is `python benchmarks/fuzz_log.py --count 100000`."""
    out = tmp_path / "fuzz.json"
    command = [sys.executable, str(FUZZ), "--count", "2000", "--masks", "90", "--seed", "1", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads(out.read_text())["outcomes"]
    assert sum(outcomes.values()) == 2090
    assert outcomes["masks, damaged: refused"] >= 25
    assert outcomes["masks, hostile: refused"] > 15
    assert outcomes["log: refused"] > 300
    assert outcomes["log: shortened"] > 10
    assert outcomes["log with right checksums: well-formed"] > 10
    assert outcomes["export: refused"] > 300
