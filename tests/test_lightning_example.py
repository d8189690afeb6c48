"""examples/lightning_digits.py in a short form, forward-only and, without its two lines, first-order."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "lightning_digits.py"
EPOCHS = {"zo": 40, "auto": 20}
CHANCE = 0.1


@dataclass
class Trained:
    """What one run of the example printed, and the folder that it left."""

    said: str
    folder: Path

    def accuracy(self) -> float:
        match = re.search(r"^Held-out digits: ([\d.]+)% right$", self.said, re.MULTILINE)
        assert match is not None, self.said
        return float(match[1]) / 100

    def one(self, pattern: str) -> Path:
        (found,) = self.folder.glob(pattern)
        return found


def ordinary(source: str) -> str:
    """The project as it is without us: no import, and Lightning's own strategy."""
    lines = [line for line in source.splitlines() if not line.startswith("import zo_lightning")]
    return "\n".join(lines).replace('strategy="zo"', 'strategy="auto"')


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Trained]:
    """Both projects, trained side by side, each in a process and a folder of its own."""
    sources = {"zo": EXAMPLE.read_text(), "auto": ordinary(EXAMPLE.read_text())}
    started: dict[str, tuple[subprocess.Popen[str], Path]] = {}
    for name, source in sources.items():
        folder = tmp_path_factory.mktemp(name)
        (folder / "digits.py").write_text(source)
        command = [sys.executable, "digits.py", "--epochs", str(EPOCHS[name]), "--lr", "1e-3", "--out", "runs/digits"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started[name] = (subprocess.Popen(command, env=environment, cwd=folder, **pipes), folder)  # type: ignore[call-overload]
    trained = {}
    for name, (process, folder) in started.items():
        said = process.communicate(timeout=900)[0]
        assert process.returncode == 0, said
        trained[name] = Trained(said, folder / "runs" / "digits" / "version_0")
    return trained


def test_it_differs_from_a_first_order_project_in_the_strategy_and_its_import() -> None:
    source = EXAMPLE.read_text().splitlines()
    plain = ordinary(EXAMPLE.read_text())
    changed = [line.strip() for line in source if line not in plain.splitlines()]
    assert [line.split("#")[0].strip() for line in changed] == ["import zo_lightning", 'strategy="zo",']
    code = "\n".join(line.split("  #")[0] for line in plain.split('"""', 2)[2].splitlines())
    assert re.findall(r"(?i)\bzo|\bspsa|forward.only|perturb", code) == []


@pytest.mark.slow
def test_forward_passes_alone_learn_digits(runs: dict[str, Trained]) -> None:
    assert runs["zo"].accuracy() > 2.5 * CHANCE
    assert "forward-only" in runs["zo"].said


@pytest.mark.slow
def test_the_same_project_learns_with_gradients(runs: dict[str, Trained]) -> None:
    assert runs["auto"].accuracy() > 0.8
    assert "forward-only" not in runs["auto"].said


@pytest.mark.slow
def test_it_leaves_tensorboard_logs(runs: dict[str, Trained]) -> None:
    """Losses and accuracies of every epoch, logged once a step, by the module's own code."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(sorted(runs["zo"].folder.glob("events.*"))[0])).Reload()
    scalars = {name: [event.value for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "epoch"} <= scalars.keys()
    assert len(scalars["train_loss"]) == EPOCHS["zo"]
    assert scalars["train_loss"][-1] < 0.95 * scalars["train_loss"][0]
    assert max(scalars["val_accuracy"]) == pytest.approx(runs["zo"].accuracy(), abs=1e-3)


@pytest.mark.slow
def test_it_leaves_a_checkpoint_with_the_state_of_the_optimizer(runs: dict[str, Trained]) -> None:
    checkpoint = torch.load(runs["zo"].one("checkpoints/*.ckpt"), weights_only=True)
    steps = checkpoint["global_step"]
    first_order = torch.load(runs["auto"].one("checkpoints/*.ckpt"), weights_only=True)
    assert checkpoint["state_dict"].keys() == first_order["state_dict"].keys()
    assert all(bool(weight.isfinite().all()) for weight in checkpoint["state_dict"].values())
    counts = {int(value) for name, value in checkpoint["state_dict"].items() if name.endswith("num_batches_tracked")}
    assert counts == {steps}
    assert checkpoint["hyper_parameters"]["lr"] == 1e-3
    assert checkpoint["optimizer_states"][0]["state"] == {}
    assert len(first_order["optimizer_states"][0]["state"]) > 0
    zo = checkpoint["zo_lightning"]["engine"]["zo"]
    assert (zo["steps"], zo["skipped_steps"]) == (steps, 0)
    assert zo["forward_passes"] == 2 * steps
