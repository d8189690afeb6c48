"""Ranks whose weights come apart are named, and healed from the step log: weights, masters and masks as the log has them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_models import same
from equality_worker import CASES, STEPS, WORLD
from ranks import run_ranks

from zo_lightning.callbacks import RankEquality
from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.parallel import Equality, Exchange
from zo_lightning.engine.parallel.alike import digest
from zo_lightning.engine.parallel.equality import strangers

HEALED = [name for name, case in CASES.items() if case.heal and case.log]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank saved."""
    folder = tmp_path_factory.mktemp("equality")
    run_ranks("equality_worker.py", folder, world=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("name", HEALED)
def test_healed_ranks_are_what_the_log_says(name: str, results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert rank[name]["said"] == ""
        assert rank[name]["steps"] == STEPS
        assert same(rank[name]["weights"], results[0][name]["weights"])
        assert same(rank[name]["masters"], results[0][name]["masters"])
        if CASES[name].ranks != (0,):  # whose base another file has
            assert same(rank[name]["weights"], rank[name]["replayed"])


def test_who_is_healed(results: list[dict[str, Any]]) -> None:
    healed = {name: [rank[name]["healed"] for rank in results] for name in HEALED}
    assert all(ranks == [ranks[0]] * WORLD for ranks in healed.values())
    assert healed["one of three"][0] == healed["masked"][0] == healed["in place"][0] == [(8, [1])]
    assert healed["no two alike"][0] == [(8, [0, 1, 2])]
    assert healed["all but the log's"][0] == [(8, [0, 1, 2])]


def test_ranks_are_named_on_all_of_them(results: list[dict[str, Any]]) -> None:
    for rank in results:
        named = "UnequalRanksError: The weights of rank 1 came apart from those of the 2 others between steps 4 and 8."
        assert rank["not healed"]["said"].startswith(f"{named} What changes weights")
        assert rank["no log"]["said"] == f"{named} heal=True needs a step log: add TrajectoryLog."
        assert rank["not healed"]["steps"] == 8


def test_the_first_steps_were_equal_and_are_not_reported(results: list[dict[str, Any]]) -> None:
    assert "between steps 4" in results[0]["not healed"]["said"]  # the comparison at step 4 found nothing


@pytest.mark.parametrize(
    ("numbers", "others"),
    [([1, 1, 1], []), ([1, 2, 1], [1]), ([2, 1, 1], [0]), ([1, 2], [0, 1]), ([1, 2, 3], [0, 1, 2]), ([1, 1, 2, 2], [0, 1, 2, 3])],
)
def test_most_decide(numbers: list[float], others: list[int]) -> None:
    assert strangers(numbers) == others


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_bit_of_any_weight_shows(dtype: torch.dtype) -> None:
    tensors = [torch.randn(33, 40).to(dtype), torch.randn(3).to(dtype)]
    before = digest(tensors)
    for tensor in tensors:
        words = tensor.view(torch.uint8).view(-1)
        for place in (0, len(words) // 2, len(words) - 1):
            for bit in (0, 7):
                words[place] ^= 1 << bit
                assert digest(tensors) != before
                words[place] ^= 1 << bit
    assert digest(tensors) == before


def test_parts_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [torch.randn(1000), torch.randn(0)]
    whole = digest(tensors)
    monkeypatch.setattr("zo_lightning.engine.parallel.alike._PART", 7)
    assert digest(tensors) == whole


def test_one_process_compares_nothing() -> None:
    met: list[float] = []

    class Recording(Exchange):
        def everywhere(self, number: float) -> list[float]:
            met.append(number)
            return [number]

    optimizer = ZOOptimizer(torch.nn.Linear(2, 2))
    optimizer.exchange = Recording()
    Equality(every=1).stepped(optimizer)
    assert not met


@pytest.mark.parametrize("kind", [Equality, RankEquality])
def test_bad_options(kind: Any) -> None:
    with pytest.raises(ValueError, match="Invalid every: 0"):
        kind(every=0)
    with pytest.raises(ValueError, match="Invalid heal: 'yes'"):
        kind(heal="yes")
