"""The model of scaling: its equations by hand and in their limits; and what is measured for it, at its smallest."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

from delay_line import unavailable  # noqa: E402
from scaling import BUCKET, RANKS, Model, Network, doublings, network_of  # noqa: E402
from scaling_pieces import Pieces  # noqa: E402

PIECES = Pieces(forward=1.0, backward=2.0, adamw=0.5, evaluation=1.25, rest=0.25, term=0.125, gradient=100.0, reduced=0.0, met=0.0)
IDEAL = Network(0.0, math.inf)
TINY = "hidden_size=16 num_hidden_layers=1 intermediate_size=16 num_attention_heads=2 vocab_size=50".split()
SMALL = ("--eager", "--batch", "2", "--length", "8", "--rounds", "2", "--set", *TINY)


def test_steps_by_hand() -> None:
    """2 L + S = 1, 40 bytes at 80 a second are 0.5: a round of the ring takes 1.5."""
    model, network = Model(PIECES, software=0.5, row=0.0), Network(0.25, 80.0)
    assert model.meeting(4, network) == pytest.approx(3 * 1.5)
    assert model.meeting(4, network, tree=True) == pytest.approx(2 * 0.75 + 3 * 0.5)
    assert model.ours("data", 4, network) == pytest.approx(2 * 1.25 + 0.125 + 0.25 + 4.5)
    assert model.ours("perturbation", 4, network) == pytest.approx(1.25 + 0.125 + 0.25 + 4.5)
    assert model.ours("seeds", 4, network) == pytest.approx(2 * 1.25 + 4 * 0.125 + 0.25 + 4.5)
    reduction = 2 * 3 / 4 * 100 / 80
    assert model.adamw(4, network, tree=True) == pytest.approx(1.0 + (reduction + 2 * 2 * 0.25) + 0.5)
    assert model.adamw(4, network, tree=True, overlap=False) == pytest.approx(1.0 + 2.0 + (reduction + 1.0) + 0.5)
    assert model.adamw(4, network) == pytest.approx(1.0 + (reduction + (8 - 2) * 0.5) + 0.5)


def test_large_gradients_wait_for_each_segment() -> None:
    """Full buckets of 25 segments, two of which are underway: 23 x 2 L for 2 ranks, and for 100 as many as ranks need."""
    model = Model(PIECES._replace(gradient=4.0 * BUCKET), 0.0, 0.0)
    assert model.reduction(2, Network(1.0, math.inf)) == pytest.approx(23 * 2)
    assert model.reduction(100, Network(1.0, math.inf)) == pytest.approx(198 * 2)
    assert model.reduction(2, Network(0.0, 2.0**20)) == pytest.approx(100.0)


def test_points_of_more_queries_are_shared_by_more_ranks() -> None:
    model = Model(PIECES._replace(rest=0.0, term=0.0), 0.0, 0.0, queries=3)
    shares = {ranks: model.ours("perturbation", ranks, IDEAL) / PIECES.evaluation for ranks in (1, 2, 4, 6, 8, 600)}
    assert shares == {1: 6, 2: 3, 4: 2, 6: 1, 8: 1, 600: 1}


@pytest.mark.parametrize("scheme", ["data", "perturbation", "seeds"])
@pytest.mark.parametrize("tree", [False, True])
def test_one_rank_meets_nobody(scheme: str, tree: bool) -> None:
    model, slow = Model(PIECES, 1.0, 1.0), Network(1.0, 1.0)
    assert model.step(scheme, 1, slow, tree) == 2 * 1.25 + 0.125 + 0.25
    assert model.step("adamw", 1, slow, tree) == 3.5


@given(st.integers(2, 4096), st.floats(0, 1), st.floats(1e3, 1e12), st.booleans())
def test_limits(ranks: int, latency: float, bandwidth: float, tree: bool) -> None:
    model, network = Model(PIECES, 1e-4, 1e-6), Network(latency, bandwidth)
    data, shared, seeds = (model.step(scheme, ranks, network, tree) for scheme in ("data", "perturbation", "seeds"))
    assert shared < data < seeds
    assert seeds - data == pytest.approx((ranks - 1) * PIECES.term, rel=1e-6, abs=1e-9)
    assert model.meeting(ranks, network, tree=True) <= model.meeting(ranks, network)
    assert model.adamw(ranks, network, tree) >= model.adamw(1, network)
    assert model.adamw(ranks, IDEAL) == model.adamw(1, IDEAL)
    assert 2 ** (doublings(ranks) - 1) < ranks <= 2 ** doublings(ranks)


def test_networks_say_what_they_are() -> None:
    network = network_of("0.01:100000")
    assert (network.latency, network.bandwidth) == pytest.approx((1e-5, 1.25e10))
    assert str(network) == "0.01 ms, 100 Gbit/s"
    assert str(network_of("100:100")) == "100 ms, 100 Mbit/s"


def run(script: str, *arguments: str) -> str:
    command = [sys.executable, str(ROOT / "benchmarks" / script), *SMALL, *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text()))


@pytest.mark.slow
def test_pieces_are_measured_and_compared(tmp_path: Path) -> None:
    run("scaling.py", "--worlds", "1", "2", "--json", str(tmp_path / "s.json"), "--plot", str(tmp_path / "s.png"))
    found = read(tmp_path / "s.json")
    assert set(found["pieces"]) == {"1", "2"}
    assert found["pieces"]["1"]["gradient"] == 4 * found["workload"]["parameters"] == found["workload"]["weight_bytes"]
    assert found["software"] > 0 < found["row"]
    assert [(row["ranks"], row["scheme"]) for row in found["compared"]] == [
        (1, "adamw"), (1, "data"), (2, "adamw"), (2, "data"), (2, "perturbation"), (2, "seeds"),
    ]  # fmt: skip
    assert all(row["error"] == pytest.approx(row["model"] / row["measured"] - 1) for row in found["compared"])
    assert found["ranks"] == RANKS
    assert all(len(row["seconds"]) == len(RANKS) for row in found["curves"])
    assert (tmp_path / "s.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.skipif(unavailable() is not None, reason=f"no slow network here: {unavailable()}")
def test_a_slow_network_is_slow(tmp_path: Path) -> None:
    """A meeting of two waits for word and for numbers; a line that carries 1 Mbit/s takes 80 ms for 10 kB of gradients."""
    run("slow_network.py", "--delays", "30", "--mbits", "1", "--json", str(tmp_path / "n.json"))
    found = read(tmp_path / "n.json")
    rows = {(row["delay_ms"], row["case"]): row for row in found["rows"]}
    assert rows[30, "meeting"]["seconds_a_step"] >= 2 * 0.030
    assert rows[30, "zo, data"]["seconds_a_step"] >= 2 * 0.030
    gradient = found["workload"]["weight_bytes"]
    assert rows[30, "adamw, ddp"]["bytes_a_step_and_rank"] >= gradient > rows[30, "zo, data"]["bytes_a_step_and_rank"]
    assert rows[30, "adamw, ddp"]["seconds_a_step"] >= gradient * 8 / 1e6
    assert rows[30, "adamw, alone"]["bytes_a_step_and_rank"] < 1000
