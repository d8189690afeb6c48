"""examples/metric_objective.py and its Lightning one: short runs that train on the metric alone; the learning benchmark's bookkeeping."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


def start(script: str, folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def numbers(said: str) -> tuple[float, float]:
    match = re.search(r"before ([\d.]+)%, after ([\d.]+)%", said)
    assert match is not None, said
    return float(match[1]), float(match[2])


@pytest.mark.slow
def test_hugging_face_trains_on_accuracy_alone(tmp_path: Path) -> None:
    said = start("examples/metric_objective.py", tmp_path, *"--steps 1 --held-out 32 --eps 0.05".split())
    before, _ = numbers(said)
    assert before > 30
    assert "trained on MulticlassAccuracy (1 steps)" in said
    logged = {name: float(value) for name, value in re.findall(r"'(zo/[a-z_]+)': '?([-\d.e]+)", said)}
    assert logged["zo/objective"] * 64 == pytest.approx(round(logged["zo/objective"] * 64), abs=0.01)
    difference = logged["zo/projected_grad"] * 2 * 0.05 * 32  # in texts of the batch: a loss has no such steps
    assert difference == pytest.approx(round(difference), abs=0.01)
    assert logged["zo/equal_values"] == (round(difference) == 0)


@pytest.mark.slow
def test_lightning_trains_on_f1_alone(tmp_path: Path) -> None:
    before, after = numbers(start("examples/metric_objective_lightning.py", tmp_path, *"--epochs 60".split()))
    assert after > before + 20


@pytest.fixture
def learning(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import objective_learning

    return objective_learning


def run(objective: str, lr: float, seed: int, accuracy: float | None, f1: float = 0.5) -> dict[str, Any]:
    end = None if accuracy is None else {"accuracy": accuracy, "macro_f1": f1}
    setting = {"eps": 0.03, "steps": 4, "every": 2, "batch": 8, "train": "vectors", "queries": 1, "fitness": "values"}
    measured = {"equal_values": 0.25, "mean_difference": 0.1, "seconds_per_step": 1.0, "start": {"accuracy": 0.5, "macro_f1": 0.4}}
    return {"objective": objective, "lr": lr, "seed": seed, "end": end, **setting, **measured}


def test_the_first_seed_chooses_and_the_others_are_averaged(learning: Any) -> None:
    runs = [run("accuracy", 1e-3, 0, 0.55), run("accuracy", 1e-2, 0, 0.6), run("accuracy", 1e-2, 1, 0.52)]
    runs += [run("accuracy", 1e-3, 1, 0.9), run("accuracy", 1e-1, 0, None)]
    (row,) = learning.summary(runs, 0)
    assert (row["lr"], row["seeds"]) == (1e-2, [0, 1])
    assert row["accuracy"]["of_seeds"] == [0.6, 0.52]
    assert row["accuracy"]["gain"] == pytest.approx(0.06)
    assert row["accuracy"]["least_gain"] == pytest.approx(0.02)
    assert row["macro_f1"]["gain"] == pytest.approx(0.1)
    assert "50.0% ->  56.0% (+6.0, least +2.0)" in learning.line(row)


def test_settings_have_rows_of_their_own(learning: Any) -> None:
    other = [{**run("accuracy", 1e-2, 0, 0.7), **changed} for changed in ({"queries": 4}, {"fitness": "ranks"}, {"batch": 16})]
    rows = learning.summary([run("accuracy", 1e-3, 0, 0.55), *other], 0)
    assert [(row["queries"], row["fitness"], row["batch"]) for row in rows] == [
        (1, "values", 8),
        (4, "values", 8),
        (1, "ranks", 8),
        (1, "values", 16),
    ]
    assert [row["lr"] for row in rows] == [1e-3, 1e-2, 1e-2, 1e-2]
    assert "4 x 4 x 8 values" in learning.line(rows[1])


class Mean(torch.nn.Module):
    """Logits from the mean of a text's embeddings over what is not padding; it keeps the shape of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.seen = torch.nn.Embedding(50, 7), list[tuple[int, ...]]()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, Any]:
        self.seen.append(tuple(input_ids.shape))
        logits = (self.embedding(input_ids) * attention_mask[..., None]).sum(1) / attention_mask.sum(1, keepdim=True)
        return {"logits": logits} | ({} if labels is None else {"loss": torch.nn.functional.cross_entropy(logits, labels)})


def test_a_large_batch_is_passed_in_pieces_of_like_length(learning: Any) -> None:
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 25, (80,), generator=draw)
    shown = (torch.arange(24) < lengths[:, None]).long()
    ids = torch.randint(1, 50, (80, 24), generator=draw) * shown
    batch = {"input_ids": ids, "attention_mask": shown, "labels": torch.randint(0, 7, (80,), generator=draw)}
    model = Mean()
    whole = model(**batch)
    model.seen.clear()
    found = learning.passed(model, batch)
    ordered = lengths.sort().values
    assert model.seen == [(32, ordered[31]), (32, ordered[63]), (16, ordered[79])]
    torch.testing.assert_close(found["loss"], whole["loss"])
    right = (found["preds"].argmax(-1) == found["target"]).sum()
    assert right == (whole["logits"].argmax(-1) == batch["labels"]).sum()
    torch.testing.assert_close(found["preds"].sum(0), whole["logits"].sum(0))
    model.seen.clear()
    small = learning.passed(model, {name: value[:32] for name, value in batch.items()})
    assert model.seen == [(32, 24)]
    assert torch.equal(small["preds"], whole["logits"][:32])


def test_f1_is_chosen_by_f1(learning: Any) -> None:
    runs = [run("macro F1", 1e-3, 0, 0.7, f1=0.5), run("macro F1", 1e-2, 0, 0.6, f1=0.6)]
    assert learning.best(runs, 0) == (1e-2, 0.03)
    assert learning.best([{**one, "objective": "loss"} for one in runs], 0) == (1e-3, 0.03)


def test_a_run_that_was_given_up_is_never_the_best(learning: Any) -> None:
    assert learning.best([run("loss", 1.0, 0, None)], 0) is None
    (row,) = learning.summary([run("loss", 1.0, 0, None)], 0)
    assert "given up with every lr and eps" in learning.line(row)


class Toy:
    """A task of one number, which every step of SGD lowers by 1, and an optimizer for it."""

    def __init__(self) -> None:
        self.value, self.param_groups = torch.tensor(10.0), [{"lr": 1.0}]

    def batch(self) -> int:
        return 1

    def loss(self, batch: int) -> torch.Tensor:
        return self.value

    def step(self, closure: Any) -> None:
        if float(closure()) < 4:
            raise FloatingPointError
        self.value -= 1


def test_a_run_is_measured_on_its_way_and_given_up(learning: Any) -> None:
    def follow(steps: int, least: float) -> Any:
        toy = Toy()
        return learning.follow(toy, toy, steps, 2, lambda: float(toy.value), lambda start, now: now < least * start)

    whole = follow(5, 0.0)
    assert (whole.start, whole.curve, whole.ended) == (10.0, [8.0, 6.0, 5.0], True)
    lost = follow(5, 0.7)
    assert (lost.curve, lost.ended) == ([8.0, 6.0], False)
    broken = follow(9, 0.0)
    assert (broken.curve, broken.ended) == ([8.0, 6.0, 4.0], False)


@pytest.mark.slow
def test_the_benchmark_runs_and_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "learning.json"
    options = f"--only accuracy --points 1e-2:3e-2 --steps 2 --every 2 --batch 8 --queries 2 --json {out}".split()
    start("benchmarks/objective_learning.py", tmp_path, *options)
    (first,) = json.loads(out.read_text())["runs"]
    assert first["forward_passes"] == 2 * 2 * 2
    assert first["start"] != first["curve"][0]
    assert 0 <= first["equal_values"] <= 1
    said = start("benchmarks/objective_learning.py", tmp_path, *options, "--seeds", "0")
    assert json.loads(out.read_text())["runs"] == [first]  # it was not made again
    assert "'forward_passes'" not in said
    assert "accuracy" in said
