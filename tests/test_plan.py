"""Plans from a configuration alone: sizes are those of the engine's own counters, activations those of a real forward pass."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_offload import IDS, LABELS, MODELS, loss_of, made, offloaded, train
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, PretrainedConfig

from zo_lightning.engine import TorchOptimizer, UpdateRule, ZOOptimizer
from zo_lightning.engine.offload.buffers import InBuffers
from zo_lightning.engine.residency import Exact, Offload
from zo_lightning.engine.residency.masters import has_master
from zo_lightning.plan import main
from zo_lightning.planning import Machine, Mode, Plan, Weights, parse_size, plan, trace
from zo_lightning.planning.models import build, configuration

HERE = Machine("cpu", None, 1e11, disk_bandwidth=1e9, process=0)
TINY = ["--tflops", "0.1", "--device", "cpu", "--batch", "2", "--length", "8"]
SMALL = "--set hidden_size=64 --set intermediate_size=96 --set num_hidden_layers=3 --set num_attention_heads=4 --set vocab_size=300".split()
HF = ["opt", "llama", "llama, tied", "bert", "t5"]


def forward(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    return model(**inputs).loss


def inputs_of(kind: str, device: str = "meta") -> dict[str, Tensor]:
    return {"input_ids": IDS.to(device), "labels": (LABELS if kind == "bert" else IDS).to(device)}


def planned(kind: str, dtype: torch.dtype = torch.float32, machine: Machine = HERE, **options: Any) -> Plan:
    with torch.device("meta"):
        model = MODELS[kind]().to(dtype).train()
    return plan(model, inputs_of(kind), forward, machine, **options)


def mode(found: Plan, name: str) -> Mode:
    return next(one for one in found.modes if one.name == name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HF)
def test_bytes_are_those_that_the_engine_counts(kind: str, dtype: torch.dtype) -> None:
    found = planned(kind, dtype, Machine("cuda", None, 1e12))
    model = made(kind, dtype)
    assert found.weights == sum(p.nbytes for p in model.parameters())
    _, exact = train(model, "exact", 2)
    assert isinstance(exact.residency, Exact)
    assert mode(found, "exact").memory["scratch"] == exact.residency.scratch_bytes()
    assert mode(found, "exact").memory.get("float32 vectors", 0) == sum(m.nbytes for m in exact.residency.masters._kept.values())
    _, copied = train(made(kind, dtype), "copy", 2)
    found = planned(kind, dtype, Machine("cpu", None, 1e12))  # as much as there is with a compiler here, or without
    assert mode(found, "copy").memory["scratch"] == copied.residency.scratch_bytes()  # type: ignore[attr-defined]


RULES_TO_PLAN = ["sign", "momentum", "adam", "hizoo", TorchOptimizer("Adafactor"), TorchOptimizer("SGD", momentum=0.9)]


@pytest.mark.parametrize("rule", RULES_TO_PLAN, ids=str)
def test_what_a_rule_keeps_is_what_it_has_after_a_step(rule: str | UpdateRule) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        found = planned("opt", dtype, Machine("cuda", None, 1e12), update=rule)
        model = made("opt", dtype)
        optimizer = ZOOptimizer(model, 1e-3, weights="exact", update=rule, noise="gaussian", safeguard=None)
        optimizer.step(loss_of(model))
        state = optimizer.state_dict()["zo"]["progress"]["update"]["state"]
        kept = sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, torch.Tensor))
        memory = mode(found, "exact").memory
        assert memory.get("update rule", 0) == kept
        masters = sum(m.nbytes for m in optimizer.residency.masters._kept.values())
        assert memory.get("float32 weights" if optimizer.rule.dense else "float32 vectors", 0) == masters
        streamed = [one.name for one in found.modes if "offload" in one.name]
        assert streamed == ([] if optimizer.rule.dense else ["offload (CPU memory)", "offload (disk)"])
        assert found.forward_flops * optimizer.forward_passes == pytest.approx(mode(found, "exact").compute_seconds * 1e12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", HF)
def test_traffic_is_what_a_step_moves(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    expected = mode(planned(kind, dtype), "offload (disk)")
    model = made(kind, dtype)
    _, optimizer = train(model, Offload(str(tmp_path)), 2)
    residency = offloaded(optimizer)
    read, written = residency.traffic.read, residency.traffic.written
    optimizer.step(loss_of(model))
    assert (residency.traffic.read - read, residency.traffic.written - written) == (expected.read, expected.written)
    assert expected.disk == sum(path.stat().st_size for path in residency.files.folder.glob("slot-*"))
    in_memory = sum(p.nbytes for p in model.parameters() if id(p) not in residency._places)
    assert expected.memory["resident weights"] == in_memory + sum(b.nbytes for b in model.buffers())


def test_lockstep_reads_a_block_once() -> None:
    alone, together = (mode(planned("llama", lockstep=lockstep), "offload (disk)") for lockstep in (False, True))
    assert together.read * 2 == alone.read
    assert together.written == alone.written
    assert together.peak > alone.peak  # two passes have activations
    assert mode(planned("llama", queries=3), "offload (disk)").read == together.read
    assert mode(planned("llama", queries=3, lockstep=False), "offload (disk)").read == 3 * alone.read


@pytest.mark.parametrize("kind", HF)
def test_activations_are_those_of_a_real_pass(kind: str) -> None:
    with torch.device("meta"):
        shape = MODELS[kind]().train()
    expected = trace(shape, inputs_of(kind), forward)
    model, given = made(kind), inputs_of(kind, "cpu")
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as run:
        forward(model, given)
    events = run.profiler.kineto_results.events()
    now = most = 0
    for _, nbytes in sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"):
        now += nbytes
        most = max(most, now)
    inputs = sum(tensor.nbytes for tensor in given.values())
    assert expected.peak - inputs == pytest.approx(most, rel=0.01, abs=2048)  # scalars of a few bytes are not all seen


def test_operations_of_a_pass() -> None:
    """Against counts by hand: matrix products, and attention's two, of each layer; and the head."""
    with torch.device("meta"):
        model = MODELS["llama"]().train()
    rows, hidden, inner, vocabulary, layers = IDS.numel(), 64, 96, 300, 3
    products = layers * (4 * hidden * hidden + 3 * hidden * inner) + hidden * vocabulary
    attention = layers * 2 * IDS.shape[1] * hidden
    for device in ("cpu", "cuda"):
        assert trace(model, inputs_of("llama"), forward, device=device).flops == 2 * rows * (products + attention)


def test_attention_is_the_kernel_that_runs() -> None:
    """A fused one does not keep the scores of all pairs; with dropout a CPU has none that could do it, and a GPU has."""
    peaks = {}
    for dropout in (0.0, 0.1):
        config = LlamaConfig(
            vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, attention_dropout=dropout
        )
        made = build(config, 1, 512, "causal-lm")
        peaks[dropout] = {device: trace(made.model, made.inputs, made.forward, device=device).peak for device in ("cpu", "cuda")}
    scores = 4 * 512 * 512 * 4
    assert peaks[0.0]["cpu"] < scores
    assert peaks[0.1]["cuda"] < scores
    assert peaks[0.1]["cpu"] > 2 * scores


def test_frozen_weights_are_read_and_not_written() -> None:
    with torch.device("meta"):
        model = MODELS["opt"]()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in model.model.decoder.layers:
        layer.fc2.weight.requires_grad_(True)
    weights = Weights(model)
    found = plan(model, inputs_of("opt"), forward, HERE)
    assert found.trained == sum(layer.fc2.weight.nbytes for layer in model.model.decoder.layers) < found.weights
    moved = mode(found, "offload (disk)")
    assert 0 < moved.written < moved.read / 2
    assert mode(found, "copy").memory["scratch"] == found.trained
    assert weights.masters == 0
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="Nothing in OPTForCausalLM is trained"):
        plan(model, inputs_of("opt"), forward, HERE)


def test_any_module_and_any_forward() -> None:
    """Five matrices of 4 MB: no blocks, each a unit of its own; the output of one is alive while the next one is made."""
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(5)))
        batch = torch.empty(256, 1024)
    found = plan(model, (batch,), lambda module, given: module(given[0]).square().mean(), HERE)
    one = 256 * 1024 * 4
    assert found.activations in (3 * one, 3 * one + 4)
    assert found.forward_flops == 5 * 2 * 256 * 1024 * 1024
    assert found.largest_unit == 1024 * 1025 * 4


def test_buffers_are_those_that_training_makes() -> None:
    for kind in HF:
        model = made(kind)
        found = mode(planned(kind), "offload (disk)").memory["blocks"]
        _, optimizer = train(model, Offload(), 2)
        place = offloaded(optimizer)._place
        assert isinstance(place, InBuffers)
        made_there = sum(size * count for size, count in place.made.items())
        assert made_there <= found <= 1.03 * made_there  # small ones may never be there twice


class Around(nn.Module):
    """Owns a matrix, and calls two others that own theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Parameter(torch.empty(256, 256))
        self.first, self.second = nn.Linear(256, 256), nn.Linear(256, 256)

    def forward(self, rows: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(rows) @ self.own) @ self.own
        return result


def test_what_is_used_around_others_is_read_once() -> None:
    with torch.device("meta"):
        model, batch = Around(), torch.empty(4, 256)
    found = mode(plan(model, batch, lambda module, rows: module(rows).sum(), HERE), "offload (disk)")
    assert found.read == 3 * 256 * 256 * 4
    assert found.memory["blocks"] == 3 * 256 * 256 * 4


def test_a_forward_pass_that_looks_at_values() -> None:
    with torch.device("meta"):
        model = MODELS["llama"]()
    with pytest.raises(ValueError, match="depends on values of tensors"):
        plan(model, inputs_of("llama"), lambda m, i: forward(m, i) if float(i["labels"].sum()) else 0, HERE)


def test_bound() -> None:
    slow = mode(planned("llama", machine=Machine("cpu", None, flops=1e15, disk_bandwidth=1e6)), "offload (disk)")
    assert slow.bound == "bus"
    assert slow.seconds == pytest.approx((slow.read + slow.written) / 1e6)
    fast = mode(planned("llama", machine=Machine("cpu", None, flops=1e6, disk_bandwidth=1e12)), "offload (disk)")
    assert fast.bound == "compute"
    assert fast.seconds == pytest.approx(2 * planned("llama").forward_flops / 1e6)


def test_masters_are_of_16_bit_vectors() -> None:
    with torch.device("meta"):
        model = MODELS["opt"]().to(torch.bfloat16)
    assert Weights(model).masters == sum(4 * p.numel() for p in model.parameters() if has_master(p)) > 0


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("8GiB", 8 * 2**30), ("500 MB", 5 * 10**8), ("1.5e3kb", 1_500_000), ("7", 7)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["8XB", "GB", "", "0GB", "-1GB", "1.2.3GB", "nan", "1e999GB", "8 G B"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(text)


# ---- the command line


def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llama", *SMALL, *TINY, "--device-memory", "8GB"]) == 0
    said = capsys.readouterr().out
    assert "LlamaForCausalLM" in said
    assert 'Recommended: exact, weights="exact"' in said
    lines = said.splitlines()
    table = lines[2 : lines.index("", 2)]
    assert [line.split()[0] for line in table[2:]] == ["exact", "copy", "inplace", "offload"]
    assert len({len(line) for line in table}) == 1


def test_json_has_what_the_table_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bert", *SMALL, *TINY, "--json", "--dtype", "bfloat16", "--task", "classification"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"], found["dtype"], found["machine"]["flops"]) == ("BertForSequenceClassification", "bfloat16", 1e11)
    assert [one["name"] for one in found["modes"]] == ["exact", "copy", "inplace", "offload (disk)"]
    assert all(one["peak_bytes"] == sum(one["memory"].values()) for one in found["modes"])
    assert found["recommended"] == "exact"


def test_what_fits_is_recommended(capsys: pytest.CaptureFixture[str]) -> None:
    """Between the peaks of two modes only the smaller one fits; below all of them none."""
    arguments = ["llama", *TINY, *"--set vocab_size=300 --set num_hidden_layers=8 --process 100MB --json".split()]
    main(arguments)
    peaks = {one["name"]: one["peak_bytes"] for one in json.loads(capsys.readouterr().out)["modes"]}
    assert peaks["offload (disk)"] < peaks["inplace"] < peaks["exact"] < peaks["copy"]
    for memory, best in ((peaks["exact"], "exact"), (peaks["exact"] - 1, "inplace"), (peaks["inplace"] - 1, "offload (disk)")):
        assert main([*arguments, "--device-memory", str(memory)]) == 0
        assert json.loads(capsys.readouterr().out)["recommended"] == best
    assert main([*arguments, "--device-memory", str(peaks["offload (disk)"] - 1)]) == 1
    assert "the smallest, offload (disk), needs" in capsys.readouterr().err


def test_streaming_to_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "llama --device cuda --tflops 50 --dtype bfloat16 --batch 1 --length 8 --device-memory".split()
    assert main([*arguments, "8GB"]) == 0
    assert "offload (CPU memory)" in capsys.readouterr().out
    assert main([*arguments, "1GB"]) == 1
    assert "no mode fits into 1.00 GB: the smallest, offload" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["no-such-type-of-model.json"], "There is no no-such-type"),
        (["llama", "--batch", "0"], "--batch 0: must be at least 1"),
        (["llama", "--length", "-3"], "--length -3: must be at least 1"),
        (["llama", "--queries", "0"], "--queries 0: must be at least 1"),
        (["llama", "--tflops", "0"], "--tflops 0.0: must be above 0"),
        (["llama", "--set", "colour=red"], "LlamaConfig has no 'colour'"),
        (["llama", "--set", "hidden_size"], "write KEY=VALUE"),
        (["llama", "--task", "image-classification"], "Choose another --task"),
        (["llama", "--set", "num_hidden_layers=two"], "num_hidden_layers"),
        (["llama", "--set", "num_hidden_layers=-1"], "num_hidden_layers"),
        (["llama", "--set", "hidden_size=2.5"], "hidden_size"),
        (["llama", "--set", "vocab_size=0"], "can't make a causal-lm model"),
        (["opt", *SMALL[:2], "--set", "num_attention_heads=5"], "can't make a causal-lm model"),
    ],
)
def test_bad_input(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = arguments if "--tflops" in arguments else [*arguments, "--tflops", "1"]
    assert main([*given, "--device", "cpu"]) == 2
    said = capsys.readouterr()
    assert problem in said.err
    assert said.err.count("\n") == 1
    assert not said.out


@pytest.mark.parametrize(("option", "times"), [("--lockstep", 1), ("--no-lockstep", 2)])
def test_lockstep_is_an_option(option: str, times: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llama", *SMALL, *TINY, option, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["modes"][-1]
    layers, head = 3 * (4 * 64 * 64 + 3 * 64 * 96), 2 * 300 * 64
    assert found["read"] == pytest.approx(times * 4 * (layers + head), rel=0.02)


def test_default_configurations_of_encoder_decoders(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["t5", *TINY, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "seq2seq-lm"


def test_a_unit_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["llama", "--device-memory", "8XB"])
    assert "'8XB' is not a size" in capsys.readouterr().err


def test_a_folder_a_file_and_what_they_lack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = LlamaConfig(vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4)
    config.architectures = ["LlamaForSequenceClassification"]
    config.pad_token_id = 0
    config.save_pretrained(tmp_path)
    for given in (tmp_path, tmp_path / "config.json"):
        assert main([str(given), *TINY, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model"] == "LlamaForSequenceClassification"
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    assert main([str(tmp_path), *TINY]) == 2
    assert "unheard-of" in capsys.readouterr().err
    (tmp_path / "config.json").unlink()
    assert main([str(tmp_path), *TINY]) == 2
    assert "There is no config.json" in capsys.readouterr().err


def test_changes_come_before_what_is_derived_from_them() -> None:
    config: PretrainedConfig = configuration("llama", ["hidden_size=64", "num_attention_heads=4"])
    assert config.head_dim == 16


def test_as_a_command() -> None:
    command = [sys.executable, "-m", "zo_lightning.plan", "llama", *SMALL, *TINY]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "Recommended" in done.stdout
