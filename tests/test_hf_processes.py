"""Two gloo processes train what one process trains on twice the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tools import losses, same, weights
from hf_worker import CASES, Oracle, build
from ranks import run_launched
from scissors import Scissors


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    """What both ranks saved, by case and rank."""
    folder = tmp_path_factory.mktemp("processes")
    run_launched("hf_worker.py", folder)
    return {(name, rank): torch.load(folder / f"{name}.{rank}.pt") for name in [*CASES, "stopped"] for rank in range(2)}


@pytest.mark.parametrize("name", CASES)
def test_ranks_stay_equal_and_match_one_process(name: str, results: dict[tuple[str, int], Any], tmp_path: Path) -> None:
    first, second = results[name, 0], results[name, 1]
    assert same(first["weights"], second["weights"])  # rank 1 began with other weights
    assert first["values"] == second["values"]
    assert same(first["weights"], first["resumed"])
    assert same(first["weights"], second["resumed"])
    host: Any = build(name, tmp_path, 0, 8)
    host.train()
    assert first["losses"] == pytest.approx(losses(host), rel=1e-6)
    for key, value in weights(host.model).items():
        torch.testing.assert_close(first["weights"][key], value, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["f1", "ranked", "generated"])
def test_values_of_two_processes_and_accumulation_are_those_of_the_whole_batch_exactly(
    name: str, results: dict[tuple[str, int], Any], tmp_path: Path
) -> None:
    """The mean of F1 over parts would be another number (test_objectives.py)."""
    seen = Scissors()
    build(name, tmp_path, 0, 8, callbacks=[seen]).train()
    ours = results[name, 0]["values"]
    assert ours == results[name, 1]["values"] == [report.values for report in seen.reports]
    assert len({value for row in ours for value in row}) > 2


def test_one_question_a_step_is_asked_on_the_first_rank_with_the_outputs_of_both(
    results: dict[tuple[str, int], Any], tmp_path: Path
) -> None:
    alone = Oracle()
    build("ranked", tmp_path, 0, 8, oracle=alone).train()
    assert results["ranked", 1]["asked"] == []
    assert len(results["ranked", 0]["asked"]) == len(alone.asked) == 4
    for ours, theirs in zip(results["ranked", 0]["asked"], alone.asked, strict=True):
        assert ours.shape == (4, 8, 2)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_an_oracle_that_fails_on_the_first_rank_ends_both_runs_before_the_update(
    results: dict[tuple[str, int], Any], tmp_path: Path
) -> None:
    first, second = results["stopped", 0], results["stopped", 1]
    assert first["error"] == "RuntimeError: The oracle 'Oracle', asked at step 2, failed with KeyError: 'who?'"
    assert second["error"] == f"RuntimeError: The objective failed on rank 0: {first['error']}"
    host: Any = build("ranked", tmp_path, 0, 8, max_steps=2)
    host.train()
    for result in (first, second):
        assert result["steps"] == 2
        assert same(result["weights"], weights(host.model))


@pytest.mark.parametrize("name", CASES)
def test_values_are_averaged_once_a_step_and_nothing_is_wrapped(name: str, results: dict[tuple[str, int], Any]) -> None:
    for rank in range(2):
        assert results[name, rank]["averaged"] == [4 if name == "ranked" else 2] * 4  # points of each meeting
        assert "DistributedDataParallel" not in results[name, rank]["wrapped"]
