"""parallel= under both hosts: processes that share the points of a step see the same data and train what one process trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import same
from lightning_models import HOST_WARNINGS
from mesh_host_worker import CASES, HOSTS
from ranks import run_launched

from zo_lightning import ZOStrategy
from zo_lightning.hf_integration import ZOConfig

pytestmark = [pytest.mark.slow, *(pytest.mark.filterwarnings(text) for text in [*HOST_WARNINGS, "ignore"])]


@pytest.fixture(scope="module", params=HOSTS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Any]]:
    """What both ranks of a host saved."""
    folder = tmp_path_factory.mktemp(request.param)
    run_launched("mesh_host_worker.py", folder, request.param, TORCHELASTIC_RUN_ID="1", GROUP_RANK="0")
    return request.param, [torch.load(folder / f"{request.param}.{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", ["sides", "queries"])
def test_shared_points_are_the_single_process_bit_for_bit(case: str, results: tuple[str, list[Any]], tmp_path: Path) -> None:
    host, (first, second) = results
    alone = HOSTS[host](CASES[case], tmp_path)
    assert len(alone["values"]) == 5
    assert first[case]["seen"] == second[case]["seen"]
    for rank in (first, second):
        assert rank[case]["values"] == alone["values"]
        assert same(rank[case]["weights"], alone["weights"])


def test_seeds_have_data_of_their_own_and_weights_in_common(results: tuple[str, list[Any]]) -> None:
    _, (first, second) = results
    of_data = ("running", "tracked")  # buffers of normalization are those of the data, as under DDP
    one, other = ({k: v for k, v in rank["seeds"]["weights"].items() if not any(word in k for word in of_data)} for rank in (first, second))
    assert same(one, other)
    assert [len(values) for values in first["seeds"]["values"]] == [4] * 5
    assert first["seeds"]["values"] == second["seeds"]["values"]
    assert first["seeds"]["seen"] != second["seeds"]["seen"]


def test_other_data_and_errors_of_one_rank_stop_both(results: tuple[str, list[Any]]) -> None:
    _, (first, second) = results
    for rank in (first, second):
        assert rank["said"]["own"].startswith("ValueError: Rank 1 had another batch than rank 0")
    assert "Rank 1 stopped, and so do all: ArithmeticError: what rank 1 says" in first["said"]["fails"]
    assert second["said"]["fails"] == "ArithmeticError: what rank 1 says"


def test_a_rank_that_came_apart_is_made_equal_from_the_log_or_named(results: tuple[str, list[Any]], tmp_path: Path) -> None:
    host, ranks = results
    for rank in ranks:
        assert rank["healed"]["healed"] == [(4, [0, 1])]  # of two, none is known to be right
        assert same(rank["healed"]["weights"], ranks[0]["healed"]["weights"])
        assert rank["healed"]["values"] == ranks[0]["healed"]["values"]
        assert rank["said"]["apart"].startswith("UnequalRanksError: The weights of ranks 0, 1 came apart between steps 0 and 3,")
    whole = HOSTS[host](CASES["sides"], tmp_path)
    assert whole["values"][:3] == ranks[0]["healed"]["values"][:3]
    assert whole["values"][3] != ranks[0]["healed"]["values"][3]


def test_bad_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Invalid parallel: 'both'"):
        ZOConfig(output_dir=str(tmp_path), zo_parallel="both")
    with pytest.raises(ValueError, match="is a mesh of 2 processes, and there are 1"):
        ZOStrategy(parallel="perturbation=2")
