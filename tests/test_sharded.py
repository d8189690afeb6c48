"""Models that FSDP2 or tensor parallel shard over two processes make the steps of the whole model, bit for bit."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from engine_models import distance, same
from ranks import run_ranks
from shard_worker import CASES, WORLD, run
from torch import Tensor

from zo_lightning.engine.noise import Gaussian, Item, LowRank, Noise, Rademacher, Sphere, sweep
from zo_lightning.engine.noise.large import SMALL
from zo_lightning.engine.noise.members import Band, Bits, Listed, Lot, Members
from zo_lightning.engine.noise.region import Region

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank saved."""
    folder = tmp_path_factory.mktemp("shards")
    run_ranks("shard_worker.py", folder, world=WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


EQUAL = [name for name, case in CASES.items() if not case.own_data and name != "tensor"]


@pytest.mark.parametrize("name", EQUAL)
def test_shards_make_the_steps_of_the_whole_model_bit_for_bit(name: str, results: Results) -> None:
    """On the same data: losses (of 100 steps in the first two cases) and weights; where losses are given, the weights."""
    alone = run(CASES[name], 0, sharded=False)
    for rank in results:
        assert rank[name]["sharded"] > 0
        assert rank[name]["values"] == alone["values"]
        assert same(rank[name]["weights"], alone["weights"])
        assert not same(rank[name]["weights"], rank[name]["start"])
        assert all(math.isfinite(value) for step in rank[name]["values"] for value in step)
        assert len(rank[name]["values"]) == CASES[name].steps


def test_tensor_parallel_sums_in_another_order_and_is_equal_up_to_rounding(results: Results) -> None:
    alone = run(CASES["tensor"], 0, sharded=False)
    for ours, theirs in zip(results[0]["tensor"]["values"], alone["values"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5)
    assert results[0]["tensor"]["values"] != alone["values"]
    assert same(results[0]["tensor"]["weights"], results[1]["tensor"]["weights"])
    moved = distance(alone["start"], alone["weights"])
    assert distance(results[0]["tensor"]["weights"], alone["weights"]) < 1e-2 * moved


def test_shards_on_data_of_their_own_are_data_parallel(results: Results) -> None:
    for rank in results:
        assert rank["data of its own"]["values"] == rank["data of its own, whole"]["values"]
        assert same(rank["data of its own"]["weights"], rank["data of its own, whole"]["weights"])
    assert results[0]["data of its own"]["measured"] != results[1]["data of its own"]["measured"]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("auto", "Gathered"),
        ("inplace", "InPlaceShards"),
        ("partly", "Gathered"),
        ("2 x 1, given", "Gathered"),
        ("tensor, given", "Exact"),
        ("tensor", "Copy"),
    ],
)
def test_what_fits_is_chosen(name: str, kind: str, results: Results) -> None:
    assert results[0][name]["kind"] == kind


def test_an_interrupted_forward_leaves_nothing_gathered_and_every_bit_in_place(results: Results) -> None:
    first = results[0]["auto"]["values"][0]
    for rank in results:
        assert rank["interrupted"]["raised"]
        assert rank["interrupted"]["plain"] == []
        assert same(rank["interrupted"]["before"], rank["interrupted"]["after"])
        assert rank["interrupted"]["values"] == first


def test_what_a_forward_has_left_gathered_is_not_used_behind_an_update(results: Results) -> None:
    for rank in results:
        assert rank["stale"]["gathered"]  # FSDP2 leaves the root so
        assert torch.equal(rank["stale"]["after"], rank["stale"]["expected"])
        assert not torch.equal(rank["stale"]["after"], rank["stale"]["before"])


def test_a_state_has_whole_masters_and_goes_on_bit_for_bit(results: Results) -> None:
    for rank in results:
        assert rank["resumed"]["masters"]
        assert same(rank["resumed"]["masters"], rank["resumed"]["alone"])
        assert same(rank["resumed"]["weights"], rank["resumed"]["again"])


def test_gathered_copies_may_have_another_dtype(results: Results) -> None:
    for rank in results:
        ours, theirs = rank["cast"]["values"]
        assert ours == theirs
        assert set(rank["cast"]["dtype"]) == {"torch.float32"}
        assert same(rank["cast"]["weights"], rank["cast"]["alone"])


def test_a_rank_may_have_all_or_nothing(results: Results) -> None:
    for rank in results:
        assert same(rank["one_row"]["sharded"], rank["one_row"]["alone"])
        assert same(rank["one_row"]["broadcast"], rank["one_row"]["start"])


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("perturbation", 'Invalid parallel: "perturbation=2" with a sharded model'),
        ("seeds", 'Invalid parallel: "seeds=2" with a sharded model'),
        ("copies", "Rank 1 is not like rank 0: what the sharded weights are"),
        ("copy", 'weights="copy" keeps a second copy'),
        ("no module", "the module that gathers it must be known"),
        ("adam", "Invalid update: Adam("),
        ("offload", "CPUOffloadPolicy"),
        ("gathered", "between a forward pass and module.reshard"),
        ("compiled", 'Use weights="inplace"'),
        ("partial", "has the placement Partial"),
        ("replayed", "Replay the step log in a model that is not"),
        ("cast", "threshold on its torch.float32 values"),
        ("differentiated", "Use Sensitive(steps=...)"),
    ],
)
def test_what_makes_no_sense_is_refused(what: str, said: str, results: Results) -> None:
    for rank in results:
        assert said in rank["refused"][what]


# ---- regions


def kept_of(shape: Sequence[int]) -> list[list[list[int]]]:
    """Indices that shards keep: halves, a third, rows and columns at once, two pieces of the first dimension."""
    whole = [list(range(size)) for size in shape]
    found = [[list(range(size // 3, size - size // 4)) for size in shape]]
    for d, size in enumerate(shape):
        for begin, end in ((0, size // 2), (size // 2, size), (size // 3, size // 3 + 1)):
            found.append([*whole[:d], list(range(begin, end)), *whole[d + 1 :]])
    first = shape[0]
    return [*found, [list(range(first // 4)) + list(range(first // 2, 3 * first // 4)), *whole[1:]]]


SHAPES = [(7,), (300,), (33, 17), (6, 5, 7), (700, 900), (3, 300000), (1000003,)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "noise", [Rademacher(), Gaussian(), Sphere(), LowRank(), LowRank(3, orthogonal=True)], ids=lambda noise: noise.name
)
def test_a_pass_over_a_region_gives_the_bits_of_one_over_the_whole(shape: tuple[int, ...], noise: Noise) -> None:
    draw = random.Random(str(shape))
    dtypes: list[tuple[torch.dtype, int | None]] = [(torch.float32, None), (torch.bfloat16, 9), (torch.float16, 9), (torch.float64, None)]
    for kept in kept_of(shape):
        dtype, rounding = draw.choice(dtypes if math.prod(shape) <= SMALL else dtypes[:2])  # each dtype compiles its own kernels
        mask = draw.choice([None, *masks_for(shape)])
        for coefficients, decay in (((0.1,), 1.0), ((0.1, 0.2), 0.9)):
            compare(shape, kept, dtype, noise, coefficients, decay, rounding, mask if dtype == torch.float32 else None)


def masks_for(shape: tuple[int, ...]) -> list[Members]:
    keep = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.3
    keep.view(-1)[::5] = True
    listed = Listed(torch.nonzero(keep.reshape(-1)).reshape(-1))
    return [Bits.of(keep), listed, Lot(3, 4, 0.1), Band(0.5, 10**9, torch.float32)]


def compare(
    shape: tuple[int, ...],
    kept: list[list[int]],
    dtype: torch.dtype,
    noise: Noise,
    coefficients: tuple[float, ...],
    decay: float,
    rounding: int | None,
    mask: Members | None,
) -> None:
    weights = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    index = torch.meshgrid(*[torch.tensor(own) for own in kept], indexing="ij")
    part, region = weights[index].contiguous(), Region.of(shape, kept)
    seeds = list(range(5, 5 + len(coefficients)))
    assert torch.equal(weights.reshape(-1)[region.index(weights.device)], part.reshape(-1))
    whole = weights.clone()
    sweep([Item(whole, whole, 8, decay, coefficients, mask=mask)], seeds, noise, rounding=rounding)
    assert not torch.equal(whole, weights)
    for out in (part.clone(), torch.empty_like(part), transposed(part)):
        base = out if torch.equal(out, part) else part
        sweep([Item(out, base, 8, decay, coefficients, mask=mask, region=region)], seeds, noise, rounding=rounding)
        assert torch.equal(out, whole[index])


def transposed(tensor: Tensor) -> Tensor:
    """The same values in another layout."""
    order = list(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def test_a_region_knows_where_elements_are() -> None:
    region = Region.of((6, 8), [[1, 2, 4], [2, 3, 7]])
    numbers = [10, 11, 15, 18, 19, 23, 34, 35, 39]
    assert region.index(torch.device("cpu")).tolist() == numbers
    found, places = region.locate(torch.tensor([0, 11, 12, 23, 39, 40]))
    assert found.tolist() == [1, 3, 4]
    assert places.tolist() == [1, 5, 8]
    assert Region.of((6, 8), [[2, 3], list(range(8))]).start == 16
    assert Region.of((6, 8), [[], list(range(8))]).strips == ()
