"""Processes that share data, points and queries: bit-equal to each other, and to one process that does all of it."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from engine_models import same, snapshot
from mesh_worker import CASES, STEPS, Case, answer, build, model_of, part, run
from ranks import run_ranks

from zo_lightning.engine import SPSA, Mesh, Processes, RankSGD, ZOOptimizer
from zo_lightning.engine.parallel import as_mesh

Results = dict[int, list[dict[str, Any]]]
ROUNDED = ["points in one pass on two"]
"""Fewer points are in a pass of each rank, whose products are rounded otherwise."""
SAME_DATA = [name for name, case in CASES.items() if as_mesh(case.parallel, case.world).streams == 1 and name not in ROUNDED]
OTHER_DATA = ["data and sides", "data and sides, SVRG", "data and sides, a metric", "data and coordinates", "data and points in one pass"]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank of two and of four saved."""
    found: Results = {}
    for world in (2, 4):
        folder = tmp_path_factory.mktemp(f"mesh{world}")
        run_ranks("mesh_worker.py", folder, world, world=world, options=("-W", "error::UserWarning"))
        found[world] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]
    return found


@cache
def alone(name: str) -> dict[str, Any]:
    """One process that does all of it."""
    return run(CASES[name], None)


@pytest.mark.parametrize("name", CASES)
def test_ranks_end_with_the_same_bits(name: str, results: Results) -> None:
    first, *others = (rank[name] for rank in results[CASES[name].world])
    assert len(first["values"]) == STEPS
    for other in others:
        if not CASES[name].norm or as_mesh(CASES[name].parallel, CASES[name].world).streams == 1:
            assert same(first["weights"], other["weights"])
        assert first["values"] == other["values"]


@pytest.mark.parametrize("name", SAME_DATA)
def test_shared_points_are_the_single_process_bit_for_bit(name: str, results: Results) -> None:
    whole, ranks = alone(name), [rank[name] for rank in results[CASES[name].world]]
    assert ranks[0]["values"] == whole["values"]
    assert same(ranks[0]["weights"], whole["weights"])
    assert not same(whole["weights"], snapshot(model_of(CASES[name])))
    assert sum(rank["counts"][0] for rank in ranks) == whole["counts"][0]
    for losses in zip(whole["losses"], *(rank["losses"] for rank in ranks), strict=True):
        assert min(losses[1:]) - 1e-9 <= losses[0] <= max(losses[1:]) + 1e-9  # each rank returns the mean of its own


@pytest.mark.parametrize("name", [*OTHER_DATA, *ROUNDED])
def test_shared_data_are_the_whole_batch(name: str, results: Results) -> None:
    whole, rank = alone(name), results[CASES[name].world][0][name]
    if CASES[name].metric:
        assert rank["values"] == whole["values"]
    else:
        assert torch.tensor(rank["values"]).allclose(torch.tensor(whole["values"]), atol=1e-6)
    for key, tensor in whole["weights"].items():
        assert torch.allclose(rank["weights"][key], tensor, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["seeds", "seeds of two queries, and sides", "seeds and data", "one-sided seeds", "SVRG of two seeds, and sides"]
)
def test_seeds_are_the_mean_over_queries_each_on_its_data(name: str, results: Results) -> None:
    """One process, which evaluates the points of each query on the rows of that query."""
    case = CASES[name]
    mesh = as_mesh(case.parallel, case.world)
    model = model_of(case)
    estimator = case.options.get("estimator") or SPSA()
    each = len(estimator.points(lambda query: query))
    optimizer = ZOOptimizer(model, lr=0.02, eps=0.05, estimator=estimator.times(mesh.seeds))
    calls = 0

    def loss() -> Any:
        nonlocal calls
        copy = calls // each
        calls += 1
        rows = [answer(model, part(data * mesh.seeds + copy, mesh.streams, 0, 1), False) for data in range(mesh.data)]
        return sum(one.double() for one in rows) / mesh.data

    for step in range(STEPS):
        if step == 0:
            optimizer.weights = "copy"  # whose first evaluation is not watched
        calls = 0
        optimizer.step(loss)
        assert calls == each * mesh.seeds
        assert optimizer.report is not None
        assert torch.tensor(results[4][0][name]["values"][step]).allclose(torch.tensor(optimizer.report.values), atol=1e-6)
    for key, tensor in snapshot(model).items():
        assert torch.allclose(results[4][0][name]["weights"][key], tensor, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_a_step_sends_few_bytes(name: str, results: Results) -> None:
    """At most 64 for two evaluations of a rank, and no more meetings than there are questions."""
    case = CASES[name]
    _, sent, meetings = results[case.world][0][name]["counts"]
    estimator = case.options.get("estimator") or SPSA()
    queries = getattr(estimator, "queries", getattr(estimator, "samples", 0) / 2) + len(estimator.along) / 2
    if estimator.coordinates:
        queries = len(results[case.world][0][name]["values"][0]) / 2
    a_step = 2 if estimator.along else 1
    extra = 2 * STEPS if case.metric else 0  # samples to rank 0, values from it
    assert meetings == 1 + a_step * STEPS + extra
    assert sent / meetings * a_step <= 64 * queries


def test_what_goes_wrong_on_one_rank_is_said_on_all(results: Results) -> None:
    first, second = (rank["said"] for rank in results[2])
    assert first["raises_in_a_forward"].startswith("PeerError: Rank 1 stopped, and so do all: ArithmeticError: what rank 1 says")
    assert second["raises_in_a_forward"] == "ArithmeticError: what rank 1 says"
    for said in (first, second):
        assert said["data_end_early"].startswith("PeerError: The run of rank 1 has come to its end, and that of others has not")
        assert said["other_eps"].startswith("ValueError: Rank 1 is not like rank 0: the settings of groups is [{'lr': 0.02, 'eps': 0.1")
        assert said["other_weights"].startswith("ValueError: Rank 1 is not like rank 0: what the trained weights are is")
        assert said["broadcasts_another_dtype"] == (
            "ValueError: Rank 1 is not like rank 0: tensor 0 of its model is (8, 10) of bfloat16, and that of rank 0 is (8, 10) of "
            "float32. All processes need the same script and model."
        )
        assert said["broadcasts_fewer_tensors"].startswith(
            "ValueError: Rank 1 is not like rank 0: its model has 3 tensors, and that of rank 0"
        )
        assert said["in_place"].startswith('ValueError: Invalid weights: "inplace" with parallel="perturbation=2"')
        assert said["goes_on_after_an_error"] == "ValueError: made 1 step"
    assert first["window_of_another_rank"] == "ValueError: rank 0 may"
    assert second["window_of_another_rank"].startswith("ValueError: The state was saved inside an accumulation window, by rank 0 with")
    assert first["dies"].startswith("PeerError: Rank 0 did not get the losses of the other 1: one of them died")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=2", r'"data=2" is a mesh of 2 processes, and there are 4'),
        ("data=2,data=2", "Invalid parallel: 'data=2,data=2'"),
        ("sides=4", "Invalid parallel: 'sides=4'. Must be a Mesh, or text such as"),
        ("data=-4", "Invalid parallel"),
        ("", "Invalid parallel: ''"),
        (4, "Invalid parallel: 4"),
        ("data=0,seeds=4", "Invalid data of the mesh: 0"),
    ],
)
def test_meshes_that_do_not_fit(text: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_mesh(text, 4)


def test_a_mesh_gives_everybody_something_to_do_and_nothing_twice() -> None:
    for mesh in (Mesh(3), Mesh(1, 3), Mesh(2, 3, 2), Mesh(perturbation=2, seeds=3)):
        points = 8 * mesh.seeds
        for data in range(mesh.data):
            ranks = [rank for rank in range(mesh.size) if mesh.place(rank).data == data]
            assert [point for rank in ranks for point in mesh.mine(rank, points)] == list(range(points))
        assert [mesh.stream(rank) for rank in range(mesh.size)] == [rank // mesh.perturbation for rank in range(mesh.size)]
    assert as_mesh(None, 3) == Mesh(data=3)
    assert as_mesh("data=2, perturbation = 2", 4) == Mesh(2, 2)
    assert str(Mesh(2, 2)) == "data=2,perturbation=2"
    assert str(Mesh()) == "data=1"


class Pretended(Processes):
    def __init__(self, mesh: Mesh) -> None:
        self.mesh, self.world_size, self.rank = mesh, mesh.size, 0


def test_what_an_estimator_can_not_be_shared_for() -> None:
    with pytest.raises(ValueError, match=r'"perturbation=4" shares the 2 points of SPSA.*Use more queries'):
        Pretended(Mesh(perturbation=4)).widened(SPSA())
    with pytest.raises(ValueError, match=r"shares the 3 lengths of its line search of"):
        Pretended(Mesh(perturbation=4)).widened(RankSGD(5, search=2))
    for estimator in (RankSGD(4), SPSA(2, fitness="ranks")):
        with pytest.raises(ValueError, match="compares all points of a step with each other"):
            Pretended(Mesh(seeds=2)).widened(estimator)


def test_one_process_is_a_mesh_too() -> None:
    case = Case("")
    model = model_of(case)
    optimizer = build(case, model)
    assert optimizer.exchange.mesh == Mesh()
    assert optimizer.exchange.mine(4) == range(4)
