"""Rankings and generated texts on two processes: one question with all outputs, and values of the whole batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import distance, same
from engine_worker import WORLD
from objective_worker import RANKED, STEPS, Player, alone, generated, rows_on
from ranks import run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::zo_lightning.engine.messages.ZOWarning")]

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank saved."""
    folder = tmp_path_factory.mktemp("processes")
    run_ranks("objective_worker.py", folder, world=WORLD, options=("-W", "ignore"))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("case", RANKED)
def test_rankings_make_the_steps_of_one_process_on_the_whole_batch(case: str, results: Results) -> None:
    first, second = (rank[case] for rank in results)
    whole = alone(RANKED[case])
    assert same(first["weights"], second["weights"])  # the second began with other weights
    assert same(first["weights"], whole["weights"])
    assert first["values"] == second["values"] == whole["values"]
    assert len({tuple(row) for row in whole["values"]}) > 1


@pytest.mark.parametrize("case", RANKED)
def test_only_the_first_rank_is_asked_once_with_the_outputs_of_both_in_their_order(case: str, results: Results) -> None:
    whole, spoilt = alone(RANKED[case])["asked"], RANKED[case].spoil is not None
    assert results[1][case]["asked"] == []
    assert len(results[0][case]["asked"]) == len(whole) == STEPS + spoilt
    for ours, theirs in zip(results[0][case]["asked"], whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    sizes = [outputs.shape[1] for outputs in whole]
    assert sizes == ([16, 8, 16, 16] if RANKED[case].absent is not None else [16] * len(sizes))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("an oracle that raises", "RuntimeError: The oracle 'Oracle', asked at step 2, failed with KeyError: 'who?'"),
        ("no order", "ValueError: What 'Oracle' returned at step 2 must be an order of the 4 outputs"),
    ],
)
def test_an_oracle_that_fails_on_the_first_rank_stops_both_before_the_update(case: str, message: str, results: Results) -> None:
    (first,), (second,) = (rank[case]["errors"] for rank in results)
    assert first.startswith(message)
    assert second == f"RuntimeError: The objective failed on rank 0: {first}"
    assert [rank[case]["kept"] for rank in results] == [[True], [True]]
    asked = results[0][case]["asked"]
    assert torch.equal(asked[2], asked[3])  # made again, it is the same question


@pytest.mark.parametrize("name", ["greedy", "rewards"])
def test_values_of_generated_texts_are_those_of_the_whole_batch_exactly(name: str, results: Results) -> None:
    first, second = (rank[name] for rank in results)
    whole = generated(name, [slice(0, 8)])
    assert first["values"] == second["values"] == whole["values"]
    assert len({value for row in whole["values"] for value in row}) > 3
    assert same(first["weights"], second["weights"])
    assert distance(first["weights"], whole["weights"]) < 1e-12
    for ours, theirs in zip(first["seen"], whole["seen"], strict=True):
        assert sorted(ours) == sorted(theirs)
        assert ours == [theirs[i] for rank in range(WORLD) for rows in rows_on(rank) for i in range(rows.start, rows.stop)]
    assert second["seen"] == []


def test_samples_of_a_rank_are_those_of_one_process_in_its_place(results: Results) -> None:
    """They depend on step, micro-batch and rank, and on how many rows there are: not those of the whole batch in one piece."""
    first, second = (rank["sampled"] for rank in results)
    assert first["values"] == second["values"]
    players = [generated("sampled", rows_on(rank), exchange=Player(rank))["seen"] for rank in range(WORLD)]
    assert first["seen"] == [one + other for one, other in zip(*players, strict=True)]
    assert generated("sampled", [slice(0, 8)])["seen"] != first["seen"]


def test_ranks_sample_on_their_own_and_both_sides_alike(results: Results) -> None:
    seen = results[0]["same prompts"]["seen"]
    assert len(seen) == 2 * STEPS
    for plus, minus in zip(seen[::2], seen[1::2], strict=True):
        assert plus == minus
        assert plus[:4] != plus[4:]
    assert seen[0] != seen[2]
