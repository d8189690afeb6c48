"""strategy="zo_ddp": two gloo processes train what one process trains on twice the batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_models import HOST_WARNINGS, same
from lightning_worker import CASES, fit
from ranks import run_starter

pytestmark = [pytest.mark.filterwarnings(text) for text in HOST_WARNINGS]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    """What both ranks saved, by case and rank."""
    folder = tmp_path_factory.mktemp("processes")
    run_starter("lightning_worker.py", folder)
    return {(case, rank): torch.load(folder / f"{case}.{rank}.pt", weights_only=True) for case in [*CASES, "stopped"] for rank in range(2)}


@pytest.mark.parametrize("case", [case for case in CASES if case != "buffers"])
def test_ranks_stay_equal_and_match_one_process(case: str, results: dict[tuple[str, int], Any], tmp_path: Path) -> None:
    first, second = results[case, 0], results[case, 1]
    assert [first["rank"], second["rank"]] == [0, 1]
    assert same(first["weights"], second["weights"])  # rank 1 began with other weights
    assert first["values"] == second["values"]
    alone = fit(case, tmp_path)
    assert len(first["values"]) == len(alone["values"]) == 16
    for one, other in zip(first["values"], alone["values"], strict=True):
        assert one == pytest.approx(other, abs=1e-9)
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(first["weights"][name], tensor, rtol=0, atol=1e-9)
    assert first["logged"] == second["logged"] == pytest.approx(alone["logged"], abs=1e-9)


@pytest.mark.parametrize("case", ["f1", "ranked"])
def test_values_of_two_processes_and_accumulation_are_those_of_the_whole_batch_exactly(
    case: str, results: dict[tuple[str, int], Any], tmp_path: Path
) -> None:
    values, alone = results[case, 0]["values"], fit(case, tmp_path)
    assert values == alone["values"]
    assert len({value for row in values for value in row}) > 2
    assert results[case, 0]["asked"] == alone["asked"] == ([[(8, 1)] * 4] * 16 if case == "ranked" else [])
    assert results[case, 1]["asked"] == []


def test_an_oracle_that_fails_on_the_first_rank_ends_both_runs_before_the_update(results: dict[tuple[str, int], Any]) -> None:
    first, second = results["stopped", 0], results["stopped", 1]
    assert first["error"] == "RuntimeError: The oracle 'Oracle', asked at step 2, failed with KeyError: 'who?'"
    assert second["error"] == f"RuntimeError: The objective failed on rank 0: {first['error']}"
    assert [first["steps"], second["steps"]] == [2, 2]
    assert same(first["weights"], second["weights"])


@pytest.mark.parametrize("case", [case for case in CASES if case != "buffers"])
def test_a_resume_on_two_ranks_is_the_uninterrupted_run(case: str, results: dict[tuple[str, int], Any]) -> None:
    for rank in range(2):
        assert same(results[case, rank]["resumed"], results[case, 0]["weights"])


def test_all_ranks_validate_with_the_buffers_of_the_first(results: dict[tuple[str, int], Any]) -> None:
    first, second = results["buffers", 0], results["buffers", 1]
    assert first["values"] == second["values"]
    assert len(first["validated"]) == 2
    for one, other in zip(first["validated"], second["validated"], strict=True):
        assert same(one, other)
        assert one["net.1.num_batches_tracked"] > 0


@pytest.mark.parametrize("case", CASES)
def test_there_is_no_wrapper_with_gradient_buckets(case: str, results: dict[tuple[str, int], Any]) -> None:
    assert results[case, 0]["wrapped"] == results[case, 1]["wrapped"] == [False]
