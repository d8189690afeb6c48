"""Lightning's ModelParallelStrategy and accelerate's FSDP2 over two gloo processes: the steps of the whole model, and their checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import same
from hf_shard_worker import KINDS
from lightning_models import HOST_WARNINGS
from lightning_shard_worker import STEPS, Lit, fit
from ranks import run_launched, run_starter

from zo_lightning.engine.trajectory import replay

IGNORED = (*HOST_WARNINGS, "ignore::zo_lightning.engine.messages.ZOWarning")
pytestmark = [pytest.mark.filterwarnings(text) for text in IGNORED]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where Lightning's processes have saved."""
    folder = tmp_path_factory.mktemp("lightning")
    run_starter("lightning_shard_worker.py", folder)
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One process with the whole model."""
    result: dict[str, Any] = fit(tmp_path_factory.mktemp("alone"), STEPS, False)[1]
    return result


@pytest.mark.parametrize("rank", range(2))
def test_lightning_makes_the_steps_of_the_whole_model(rank: int, folder: Path, alone: dict[str, Any]) -> None:
    shards = torch.load(folder / f"{rank}.pt", weights_only=True)
    assert shards["sharded"] == 14
    assert shards["values"] == alone["values"]
    assert same(shards["weights"], alone["weights"])
    assert shards["val_loss"] == alone["val_loss"]
    assert shards["moments"] == 0


@pytest.mark.parametrize("kind", ["shards", "one file"])
@pytest.mark.parametrize("rank", range(2))
def test_lightning_resumes_from_shards_and_from_one_file(kind: str, rank: int, folder: Path, alone: dict[str, Any]) -> None:
    shards = torch.load(folder / f"{rank}.pt", weights_only=True)
    assert shards[f"{kind} is a folder"] is (kind == "shards")
    assert same(shards[kind]["weights"], alone["weights"])
    assert shards[kind]["values"] == alone["values"][-len(shards[kind]["values"]) :]
    assert shards[kind]["moments"] == 0


def test_the_step_log_of_shards_makes_the_whole_model(folder: Path, alone: dict[str, Any]) -> None:
    module = Lit(False)
    assert replay(module, folder / "log" / "trajectory.zolog") == STEPS
    assert same({name: p.detach() for name, p in module.named_parameters()}, alone["weights"])


@pytest.mark.parametrize("rank", range(2))
def test_a_sharded_run_that_was_cut_off_goes_on_from_its_log(rank: int, folder: Path, alone: dict[str, Any]) -> None:
    continued = torch.load(folder / f"{rank}.pt", weights_only=True)["continued"]
    assert same(continued["weights"], alone["weights"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    """What the Trainer's processes saved, with all weights and with shards, by rank."""
    folder = tmp_path_factory.mktemp("trainer")
    for what in ("whole", "shards"):
        run_launched("hf_shard_worker.py", folder, what, PYTHONWARNINGS="ignore")
    return {(what, rank): torch.load(folder / f"{what}.{rank}.pt") for what in ("whole", "shards") for rank in range(2)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", range(2))
def test_the_trainer_makes_the_steps_of_processes_with_all_weights(kind: str, rank: int, trained: dict[tuple[str, int], Any]) -> None:
    whole, shards = trained["whole", rank]["whole"], trained["shards", rank]
    assert whole["sharded"] == 0
    assert shards[kind]["sharded"] > 0
    assert shards[kind]["residency"] == "Gathered"
    assert shards[kind]["losses"] == whole["losses"]
    assert same(shards[kind]["weights"], whole["weights"])
    assert same(shards[f"{kind}, resumed"]["weights"], whole["weights"])
    assert shards[f"{kind}, resumed"]["values"] == whole["values"]
