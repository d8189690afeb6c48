"""Two processes with data of their own train as one process on all of it, and stay bit-equal to each other."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_models import distance, mlp, same, snapshot
from engine_worker import CASES, STEPS, WORLD, Case, run
from ranks import run_ranks

from zo_lightning.engine import DataParallel

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank saved."""
    folder = tmp_path_factory.mktemp("processes")
    run_ranks("engine_worker.py", folder, world=WORLD, options=("-W", "error::UserWarning"))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_end_with_the_same_bits_and_saw_the_same_values(case: str, results: Results) -> None:
    first, second = (rank[case] for rank in results)
    assert same(first["weights"], second["weights"])
    assert str(first["values"]) == str(second["values"])  # NaN equals NaN here
    assert first["counts"] == second["counts"]
    assert not same(first["start"], first["weights"])


@pytest.mark.parametrize(
    "case", ["exact", "copy", "inplace", "queries, decay and Gaussian noise", "accumulated", "measured", "line search"]
)
def test_two_processes_train_what_one_trains_on_the_whole_batch(case: str, results: Results) -> None:
    whole = run(CASES[case], 0, 1)
    assert len(whole["values"]) == STEPS
    for ours, theirs in zip(results[0][case]["values"], whole["values"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-9)
    assert distance(results[0][case]["weights"], whole["weights"]) < 1e-9


@pytest.mark.parametrize("rank", range(WORLD))
def test_every_rank_starts_from_the_weights_of_the_first(rank: int, results: Results) -> None:
    assert not same(snapshot(mlp(seed=10)), snapshot(mlp(seed=11)))
    assert same(results[rank]["exact"]["start"], snapshot(mlp(seed=10)))


def test_a_broadcast_keeps_layouts_dtypes_and_memory(results: Results) -> None:
    for index, (mine, theirs) in enumerate(zip(*(rank["layouts"] for rank in results), strict=True)):
        assert torch.equal(mine, theirs), index
    assert [tensor.dtype for tensor in results[1]["layouts"]] == [torch.float32] * 2 + [torch.bfloat16, torch.float32, torch.int64]


@pytest.mark.parametrize("case", ["not finite on one rank", "infinite on one rank"])
def test_a_value_that_is_not_finite_on_one_rank_skips_the_step_on_both(case: str, results: Results) -> None:
    clean = run(Case(), 0, 1)
    for rank in results:
        assert rank[case]["counts"] == [STEPS, 1]
        assert [all(map(math.isfinite, row)) for row in rank[case]["values"]] == [True, True, False, True, True, True]
        assert rank[case]["values"][:2] == [pytest.approx(row, abs=1e-9) for row in clean["values"][:2]]


def test_a_batch_that_one_rank_skips_is_applied_on_both(results: Results) -> None:
    """What is missing counts as in an accumulation: nothing is added, and the mean is over all ranks."""
    case = "skipped on one rank"
    clean = results[0]["exact"]
    for rank in results:
        assert rank[case]["counts"] == [STEPS, 0]
        assert rank[case]["values"][:2] == clean["values"][:2]
        assert rank[case]["values"][2] != clean["values"][2]


def test_a_batch_that_both_ranks_skip_is_no_step(results: Results) -> None:
    for rank in results:
        assert rank["skipped on both ranks"]["counts"] == [STEPS - 1, 0]
        assert rank["skipped on both ranks"]["values"][2] is None


def test_ranks_have_dropout_masks_of_their_own_and_each_the_same_at_both_points(results: Results) -> None:
    first, second = (rank["dropout"]["masks"] for rank in results)
    assert torch.equal(first[0], first[1])
    assert torch.equal(second[0], second[1])
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("case", ["measured", "gradients of each rank"])
def test_every_rank_has_the_mask_of_the_first(case: str, results: Results) -> None:
    first, second = (rank[case]["chosen"] for rank in results)
    assert all(same(mine, theirs) for mine, theirs in zip(first, second, strict=True))
    alone = [run(replace(CASES[case], mask=lambda model, _, rank=rank: CASES[case].mask(model, rank)), 0, 1) for rank in range(WORLD)]  # type: ignore[misc]
    assert same(first[0], alone[0]["chosen"][0])
    if case == "measured":
        assert [int(mask["0.weight"].sum()) for mask in first] == [160, 160, 32, 32, 160, 160]
        assert same(first[2], alone[0]["chosen"][2])
    else:
        assert not same(first[0], alone[1]["chosen"][0])  # what rank 1 would have


def test_without_a_process_group_there_is_an_error_that_names_a_launcher() -> None:
    with pytest.raises(ValueError, match=r"needs an initialized torch\.distributed process group; launch with torchrun"):
        DataParallel()
