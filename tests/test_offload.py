"""weights=Offload() from files: their slots, models opened from safetensors, and whatever happens between the steps."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_models import TOKENS, LanguageModel, next_token, same, snapshot
from safetensors.torch import save_file
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from zo_lightning.engine import SPSA, ZOOptimizer
from zo_lightning.engine.masks import Mask, Sensitive
from zo_lightning.engine.offload import open_weights, transfers
from zo_lightning.engine.offload.mapped import PAGE
from zo_lightning.engine.offload.stamps import Moment, checksum
from zo_lightning.engine.residency import Offload, Offloaded

IDS = torch.randint(0, 300, (8, 12), generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(8) % 2


def llama(tie: bool = False) -> Any:
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, tie_word_embeddings=tie
    )
    return LlamaForCausalLM(config)


def opt() -> Any:
    sizes: dict[str, Any] = {"ffn_dim": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "word_embed_proj_dim": 32}
    return OPTForCausalLM(OPTConfig(vocab_size=300, hidden_size=64, max_position_embeddings=40, **sizes))


def bert() -> Any:
    return BertForSequenceClassification(
        BertConfig(vocab_size=300, hidden_size=64, num_hidden_layers=3, num_attention_heads=4, intermediate_size=96)
    )


def t5() -> Any:
    return T5ForConditionalGeneration(
        T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def plain() -> Any:
    return LanguageModel("functional")


MODELS: dict[str, Callable[[], Any]] = {
    "opt": opt,
    "llama": llama,
    "llama, tied": lambda: llama(tie=True),
    "bert": bert,
    "t5": t5,
    "a head that reads the embedding": plain,
}


def made(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return MODELS[kind]().to(dtype).train()


def loss_of(model: Any, rows: slice = slice(None)) -> Callable[[], torch.Tensor]:
    if isinstance(model, LanguageModel):
        return lambda: next_token(model, TOKENS)()
    labels = LABELS[rows] if isinstance(model, BertForSequenceClassification) else IDS[rows]
    return lambda: model(input_ids=IDS[rows], labels=labels).loss


def train(model: Any, weights: Any, steps: int = 5, micro: int = 1, **options: Any) -> tuple[list[tuple[float, ...]], ZOOptimizer]:
    optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-2, weights=weights, weight_decay=0.1, **options)
    return values(model, optimizer, steps, micro), optimizer


def values(model: Any, optimizer: ZOOptimizer, steps: int = 5, micro: int = 1) -> list[tuple[float, ...]]:
    found = []
    for _ in range(steps):
        for index in range(micro):
            optimizer.estimate(loss_of(model, slice(index, None, micro)), weight=1 / micro)
        report = optimizer.apply()
        assert report is not None
        found.append(report.values)
    return found


def evaluated(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        found = float(loss_of(model)())
    model.train()
    return found


def offloaded(optimizer: ZOOptimizer) -> Offloaded:
    residency = optimizer.residency
    assert isinstance(residency, Offloaded)
    return residency


OPTIONS: dict[str, dict[str, Any]] = {
    "two queries": {"estimator": SPSA(2)},
    "micro-batches": {"micro": 4},
    "gaussian": {"noise": "gaussian"},
    "small weights": {"mask": Mask("small_weights", 0.3)},
    "lists": {"mask": Mask("small_weights", 0.01, refresh=2)},
    "lots": {"mask": Mask("random", 0.3, refresh=2), "micro": 2},
    "blocks": {"mask": Mask("blockwise", refresh=1)},
    "measured": {"mask": Mask(Sensitive(steps=2), 0.3)},
}


def test_tensors_that_are_frozen_in_between(tmp_path: Path) -> None:
    results = []
    for weights in ("exact", Offload(str(tmp_path))):
        model = made("llama")
        _, optimizer = train(model, weights, 2)
        model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
        model.lm_head.weight.requires_grad_(False)
        found = values(model, optimizer, 2)
        model.lm_head.weight.requires_grad_(True)
        found += values(model, optimizer, 2)
        model.model.layers[2].mlp.up_proj.weight.data = model.model.layers[2].mlp.up_proj.weight.data.clone()  # moved by somebody
        results.append((found + values(model, optimizer, 2), snapshot(model)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


# ---- the files


@pytest.mark.parametrize("refused", ["opened", "tried"])
def test_a_file_system_without_transfers_past_its_cache(refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked = os.open, []

    def opened(path: Any, flags: int, *mode: int) -> int:
        asked.append(bool(flags & os.O_DIRECT))
        if asked[-1] and refused == "opened":
            raise OSError(22, "Invalid argument")
        return plain(path, flags & ~os.O_DIRECT, *mode)

    def cut(call: Any, *given: Any) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(transfers.os, "open", opened)
    if refused == "tried":
        monkeypatch.setattr(transfers, "transfer", cut)
    one, other = made("llama"), made("llama")
    assert train(one, "exact")[0] == train(other, Offload(str(tmp_path)))[0]
    assert any(asked)
    assert same(snapshot(one), snapshot(other))


def test_files_without_a_folder_go_with_whoever_has_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They have no name, so that a kill leaves none behind; memory maps and descriptors go with the model."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count("slot-")

    gc.collect()  # what other tests left
    before = held()
    for _ in range(2):
        model = made("llama")
        _, optimizer = train(model, Offload(), 2)
        assert held()[1] > 0
        assert list(tmp_path.iterdir()) == []
        del optimizer, model
        gc.collect()
        assert held() == before


def test_no_room_on_the_disk_is_known_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for everything is taken then, so that the disk can't fill up in the middle of a run."""

    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = made("llama")
    before = snapshot(model)
    with pytest.raises(OSError, match=r"There is no room for 0.8 MB of weights in .*: No space left"):
        train(model, Offload(str(tmp_path)), 1)
    assert same(snapshot(model), before)


def test_each_update_goes_to_a_free_slot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is valid is never written over: a kill in the middle of an update costs the update alone."""
    model = made("llama")
    _, optimizer = train(model, Offload(str(tmp_path)), 1)
    tier: Any = offloaded(optimizer).tier
    plain, made_so = tier.write_pages, []

    def written(parcel: Any, memory: Any, moment: Moment, sums: str) -> None:
        own = tier._slots[parcel]
        before = own.path.read_bytes()
        plain(parcel, memory, moment, sums)
        there = tier._slots[parcel].path.read_bytes()
        stamp = json.loads(there[-PAGE:].rstrip(b"\0"))
        found = checksum(torch.frombuffer(bytearray(there[:-PAGE]), dtype=torch.uint8))
        right = stamp["step"] == moment.step and stamp["checksum"] == found == sums
        made_so.append((own.path.read_bytes() == before, tier._slots[parcel] is not own, right))

    monkeypatch.setattr(tier, "write_pages", written)
    values(model, optimizer, 3)
    model.state_dict()
    assert made_so == [(True,) * 3] * 4 * len(tier._slots)


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    _, optimizer = train(made("llama"), Offload(str(tmp_path)), 1)
    with pytest.raises(ValueError, match=r"Another run has its weights in .*Give each run a folder of its own"):
        train(made("llama"), Offload(str(tmp_path)), 1)
    assert offloaded(optimizer)


def test_another_system_than_linux(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match=r"streams from files on Linux so far; this is darwin. Use weights='exact'"):
        ZOOptimizer(made("llama"), weights=Offload())


def test_the_package_is_imported_where_files_have_no_locks() -> None:
    """Windows has no fcntl."""
    code = "import sys; sys.modules['fcntl'] = None; import zo_lightning.engine, zo_lightning.offload"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# ---- opened from safetensors files


def opened(folder: Path, files: int = 2) -> Any:
    """A model whose weights stay in two files."""
    state = {name: tensor.clone() for name, tensor in made("llama").state_dict().items()}
    names = sorted(state)
    for index in range(files):
        save_file({name: state[name] for name in names[index::files]}, folder / f"model-{index}.safetensors")
    with torch.device("meta"):
        model = llama()
    model.model.rotary_emb = made("llama").model.rotary_emb
    open_weights(model, folder)
    return model.train()


def test_opened_weights_are_read_in_place_until_the_first_update(tmp_path: Path) -> None:
    one, other = made("llama"), opened(tmp_path)
    assert same(snapshot(one), snapshot(other))
    before = {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}
    expected, _ = train(one, "exact")
    optimizer = ZOOptimizer(other, lr=1e-3, eps=1e-2, weights=Offload(), weight_decay=0.1)
    optimizer.estimate(loss_of(other))
    assert not offloaded(optimizer)._place.tier._slots
    optimizer.discard()
    residency = optimizer.residency
    assert values(other, optimizer) == expected
    assert optimizer.residency is residency
    assert same(snapshot(one), snapshot(other))
    assert before == {path: path.read_bytes() for path in tmp_path.glob("*.safetensors")}


def test_opened_weights_that_were_written_to_are_taken_from_memory(tmp_path: Path) -> None:
    one, other = made("llama"), opened(tmp_path)
    for model in (one, other):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[3, 5] = 2.0
    assert train(one, "exact")[0] == train(other, Offload())[0]


def test_a_checkpoint_that_is_loaded_into_opened_weights_stays(tmp_path: Path) -> None:
    one, other = made("llama"), opened(tmp_path)
    state = {name: torch.randn(tensor.shape) / 10 for name, tensor in one.state_dict().items()}
    optimizers = [ZOOptimizer(model, lr=1e-3, eps=1e-2, weights=weights) for model, weights in ((one, "exact"), (other, Offload()))]
    for model in (one, other):
        model.load_state_dict(state)
    assert evaluated(one) == evaluated(other)
    assert same(snapshot(other), state)
    assert values(one, optimizers[0], 2) == values(other, optimizers[1], 2)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "none": (lambda path: path.unlink(), r"There is no \*.safetensors file in"),
    "damaged": (lambda path: path.write_bytes(b"nothing of that kind"), r"is not a safetensors file"),
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-4000]), r"is cut off: it ends before .* does"),
    "another shape": (lambda path: _edit(path, "model.norm.weight", torch.ones(3)), r"as F32 of shape \(3,\); the model has"),
    "another dtype": (
        lambda path: _edit(path, "model.norm.weight", torch.ones(64).half()),
        r"as F16 of shape .*the model has torch.float32",
    ),
    "more": (lambda path: _edit(path, "more", torch.ones(3)), r"The files have 'more', which the model has not"),
    "less": (lambda path: _edit(path, "model.norm.weight", None), r"The files do not have 'model.norm.weight'; 1 weights are missing"),
}


def _edit(path: Path, name: str, tensor: torch.Tensor | None) -> None:
    state = made("llama").state_dict()
    state.pop(name, None)
    save_file({**state, **({} if tensor is None else {name: tensor})}, path)


@pytest.mark.parametrize("kind", FILES)
def test_files_that_do_not_fit(kind: str, tmp_path: Path) -> None:
    change, message = FILES[kind]
    path = tmp_path / "model.safetensors"
    save_file(made("llama").state_dict(), path)
    change(path)
    with torch.device("meta"):
        model = llama()
    model.model.rotary_emb = made("llama").model.rotary_emb
    with pytest.raises(ValueError, match=message):
        open_weights(model, tmp_path)


def test_buffers_on_the_meta_device(tmp_path: Path) -> None:
    save_file(made("llama").state_dict(), tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = llama()
    with pytest.raises(ValueError, match=r"The buffer 'model.rotary_emb.inv_freq' is on the meta device.*init_empty_weights"):
        open_weights(model, tmp_path)
