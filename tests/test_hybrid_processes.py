"""backprop= on two gloo processes: bit-equal ranks, the gradients of one process, and the bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import distance, mean_square, mlp, regression, same
from hybrid_worker import CASES, ROWS, WORLD, run, tail_of
from ranks import run_ranks
from reference.noise import query_seed, whole

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank saved."""
    folder = tmp_path_factory.mktemp("processes")
    run_ranks("hybrid_worker.py", folder, world=WORLD, options=("-W", "error::UserWarning"))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("case", CASES)
def test_ranks_end_with_the_same_bits(case: str, results: Results) -> None:
    first, second = (rank[case] for rank in results)
    assert same(first["weights"], second["weights"])
    assert all(torch.equal(a, b) for a, b in zip(first["tail"], second["tail"], strict=True))


@pytest.mark.parametrize("case", ["data", "data, one-sided", "data, accumulated", "perturbation", "perturbation, one-sided"])
def test_two_processes_train_what_one_trains_on_the_whole_batch(case: str, results: Results) -> None:
    assert distance(results[0][case]["weights"], run(case, 0, 1)["weights"]) < 1e-9


@pytest.mark.parametrize("case", ["seeds", "seeds, one-sided"])
def test_processes_with_queries_of_their_own_average_their_gradients(case: str, results: Results) -> None:
    expected = [torch.zeros_like(tensor) for tensor in tail_of(mlp(seed=10))]
    count = 0
    for rank in range(WORLD):
        z = torch.from_numpy(whole("rademacher", query_seed(0, 0, rank), "0.weight", 160)).view(16, 10)
        x, y = regression(rows=ROWS)
        own = slice(rank * ROWS // WORLD, (rank + 1) * ROWS // WORLD)
        for sign in (1, -1) if case == "seeds" else (0,):
            twin = mlp(seed=10)
            with torch.no_grad():
                twin[0].weight.add_(sign * 1e-2 * z)
            count += 1
            for total, gradient in zip(
                expected, torch.autograd.grad(mean_square(twin, (x[own], y[own]))(), list(twin[3].parameters())), strict=True
            ):
                total += gradient
    for name, start, total in zip(("3.weight", "3.bias"), tail_of(mlp(seed=10)), expected, strict=True):
        torch.testing.assert_close(results[0][case]["first"]["weights"][name], start - total / count, rtol=0, atol=1e-14)


def test_a_rank_without_a_batch_counts_as_one_with_a_gradient_of_0(results: Results) -> None:
    weights = results[0]["data, no batch on one rank"]["weights"]
    assert 0 < distance(weights, results[0]["data"]["weights"]) < 0.1


def test_a_step_sends_the_gradients_and_some_bytes(results: Results) -> None:
    gradients = 8 * 17  # float64 weights; float32 and less send 4 bytes
    assert 0 < results[0]["data"]["first"]["sent"] - gradients < 500


def test_other_options_are_named(results: Results) -> None:
    for rank in results:
        assert "Rank 1 is not like rank 0: backprop is Backprop(" in rank["disagreeing"]
