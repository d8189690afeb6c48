"""The benchmarks run, on a tiny shape: their figures are measured by hand and kept under benchmarks/results/."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parent.parent
TINY = "num_hidden_layers=2 hidden_size=32 word_embed_proj_dim=32 ffn_dim=64 vocab_size=100 num_attention_heads=4"


def script(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments, "--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=900)


@pytest.fixture
def mezo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import mezo_loop

    return mezo_loop.MeZO


def test_step_cost_measures_all_contenders(tmp_path: Path) -> None:
    out = tmp_path / "new" / "cost.json"
    done = script("step_cost.py", "--batch", "2", "--length", "8", "--rounds", "2", "--json", str(out), "--set", *TINY.split())
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    engine = {f"engine {weights} {noise}" for weights in ("exact", "inplace") for noise in ("rademacher", "gaussian")}
    hosts = {f"{host} {noise}" for host in ("lightning", "hf") for noise in ("rademacher", "gaussian")}
    apart = {f"engine inplace apart {noise}" for noise in ("rademacher", "gaussian")}
    assert set(result["times"]) == {"two forwards", "mezo loop", "lightning, idle step", "hf, idle step"} | engine | hosts | apart
    assert result["times"]["two forwards"]["over_two_forwards"] == 1
    assert all(row["steps"] >= 6 for row in result["times"].values())
    assert result["environment"]["torch"] == torch.__version__
    assert set(result["memory"]) == {"inference", "mezo loop"} | engine
    exact = result["memory"]["engine exact rademacher"]
    assert exact["kept_bytes"] >= exact["largest_unit_bytes"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "no_such_field=3"], "OPTConfig has no 'no_such_field'"),
        (["--noise", "uniform"], "invalid choice: 'uniform'"),
        (["--weights", "exactly"], "invalid choice: 'exactly'"),
    ],
)
def test_wrong_options_are_named(arguments: list[str], message: str) -> None:
    done = script("step_cost.py", *arguments)
    assert done.returncode != 0
    assert message in done.stderr


def test_step_cost_of_adapters(tmp_path: Path) -> None:
    out = tmp_path / "lora.json"
    given = [
        "--lora",
        "2",
        "--weights",
        "auto",
        "--loops",
        "engine",
        "--noise",
        "rademacher",
        "--batch",
        "2",
        "--length",
        "8",
        "--rounds",
        "2",
    ]
    done = script("step_cost.py", *given, "--json", str(out), "--set", *TINY.split())
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["workload"]["lora"] == 2
    assert set(found["times"]) == {"two forwards", "engine auto rademacher"}


def test_noise_speed_runs_without_a_compiler(tmp_path: Path) -> None:
    out = tmp_path / "noise.json"
    done = script("noise_speed.py", "--width", "316", "--rounds", "2", "--json", str(out), ZO_LIGHTNING_COMPILE="0")
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["compiler"] is False
    assert {"normal_", "normal_ and add_", "rademacher, added", "gaussian, added", "sphere, added"} < set(result["times"])


def test_the_mezo_loop_is_algorithm_1(mezo: Any) -> None:
    """Against z as a whole: one step is theta - lr g z, and the loop comes back to theta in between."""
    torch.manual_seed(0)
    net = nn.Linear(5, 3).double()
    x, before = torch.randn(4, 5, dtype=torch.float64), [p.detach().clone() for p in net.parameters()]
    loop = mezo(net, lr=0.1, eps=1e-3)
    seed = int(torch.randint(2**31, (), generator=torch.Generator().manual_seed(0)))
    torch.manual_seed(seed)
    z = [torch.randn(p.shape, dtype=torch.float64) for p in before]

    def loss() -> torch.Tensor:
        return net(x).square().mean()

    sides = []
    for sign in (1, -1):
        for p, base, direction in zip(net.parameters(), before, z, strict=True):
            p.data = base + sign * 1e-3 * direction
        sides.append(float(loss().detach()))
    for p, base in zip(net.parameters(), before, strict=True):
        p.data = base.clone()
    projected = loop.step(loss)
    assert projected == pytest.approx((sides[0] - sides[1]) / 2e-3, rel=1e-9)
    for p, base, direction in zip(net.parameters(), before, z, strict=True):
        torch.testing.assert_close(p.data, base - 0.1 * projected * direction, rtol=1e-12, atol=1e-12)


def test_plan_accuracy_compares_a_plan_with_a_process(tmp_path: Path) -> None:
    out = tmp_path / "accuracy.json"
    shape = "--only llama --dtypes float32 --layers 1 --large 0 --batch 1 --length 8 --steps 1".split()
    done = script("plan_accuracy.py", *shape, "--modes", "offload (disk)", "--json", str(out))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["measured_traffic"] == row["predicted_traffic"]
    assert row["measured_bytes"] > row["before_training_bytes"] > 100_000_000
    assert abs(row["error"]) < 0.25  # of half a gigabyte, which is mostly Python


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_offload_gpu_runs_on_the_cpu(tier: str, tmp_path: Path) -> None:
    out = tmp_path / "offload.json"
    own = ["--device", "cpu", "--hidden", "64", "--layers", "3", "--vocabulary", "300", "--tier", tier]
    done = script("offload_gpu.py", *own, "--batch", "2", "--length", "8", "--rounds", "1", "--steps", "2", "--json", str(out))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["equal_losses"]
    matrices = row["model_bytes"] * 0.9
    assert 2 * matrices > row["per_step"]["read"] > matrices
    assert row["per_step"]["written"] > matrices
    assert row["over_resident"] > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_offload_gpu_says_that_there_is_none() -> None:
    assert "there is no GPU here. --device cpu" in script("offload_gpu.py").stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("adapter_learning.py", ["--only", "full", "--lr-grid", "1"]),
        ("mask_learning.py", ["--rules", "vectors", "--factors", "1"]),
        ("quantized_learning.py", ["--kinds", "int8, a scale a row", "--factors", "1", "--seeds", "0", "--no-memory"]),
    ],
)
def test_what_is_learned_is_written_and_not_made_again(name: str, arguments: list[str], tmp_path: Path) -> None:
    out = tmp_path / "learned.json"
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments, "--steps", "1", "--every", "1", "--json", str(out)]
    found = []
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr
        found.append(json.loads(out.read_text()))
    (run,) = found[0]["runs"]
    assert run["steps"] == 1
    assert 0.3 < run["accuracy"] < 0.7
    assert found[0]["summary"][0]["accuracy"] == run["accuracy"]
    assert found[1]["runs"] == [run]


def test_hybrid_memory_lies_between_forward_only_and_backpropagation(tmp_path: Path) -> None:
    out = tmp_path / "hybrid.json"
    tiny = "--blocks 6 --width 64 --vocabulary 100 --batch 4 --length 64 --rounds 1".split()
    done = script("hybrid_memory.py", *tiny, "--json", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["method"] for row in rows] == ["forward-only", "hybrid, last 1 and head", "hybrid, last 2 and head", "AdamW"]
    for name in ("peak_mb", "kept_mb", "backprop_mb"):
        values = [row[name] for row in rows]
        assert values == sorted(values), name
        assert len(set(values)) == 4


def test_populations_are_evaluated_as_their_members_are(tmp_path: Path) -> None:
    out = tmp_path / "populations.json"
    tiny = "hidden_size=32 num_hidden_layers=1 ffn_dim=64 word_embed_proj_dim=32 num_attention_heads=2 vocab_size=100".split()
    done = script("populations.py", "--set", *tiny, "--shapes", "1x8", "--queries", "2", "--rounds", "2", "--json", str(out))
    assert done.returncode == 0, done.stderr
    (row,) = json.loads(out.read_text())["rows"]
    assert row["largest_relative_difference_of_losses"] < 1e-5
    for name in ("batched, rank 1: estimate", "batched, rank 4: step", "exact, rademacher: step"):
        assert row[name]["over_two_forwards"] > 0
        assert row[name]["peak_mb"] > 0


def test_feature_reuse_measures_all_ways(tmp_path: Path) -> None:
    out = tmp_path / "reuse.json"
    done = script("feature_reuse.py", "--depths", "2", "--width", "16", "--batch", "2", "--each", "1", "--rounds", "2", "--json", str(out))
    assert done.returncode == 0, done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [row["net"] for row in rows] == ["convolutions", "gpt2"]
    for row in rows:
        assert row["equal_bits"]
        assert row["points"] > 2
        assert set(row["times"]) == {"plain", "reuse", "batch", "reuse and batch"}
