"""weights=Offload() from files: their slots, models opened from safetensors, and whatever happens between the steps."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import init_empty_weights
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
from zo_lightning.engine.residency import Offload, Offloaded, turns

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


# ---- several optimizers, threads


@pytest.mark.parametrize("weights", [Offload(), Offload(tier="memory")], ids=["files", "memory"])
def test_two_optimizers_that_take_a_model_from_each_other(weights: Offload, tmp_path: Path) -> None:
    one, other = made("llama"), made("llama")
    exact = [ZOOptimizer(one, lr=lr, eps=1e-2, weights="exact") for lr in (1e-3, 1e-2)]
    streamed = [ZOOptimizer(other, lr=lr, eps=1e-2, weights=kept) for lr, kept in ((1e-3, Offload(str(tmp_path))), (1e-2, weights))]
    for turn in (0, 1, 0, 0, 1):
        assert values(one, exact[turn], 2) == values(other, streamed[turn], 2)
    assert same(snapshot(one), snapshot(other))


def test_one_that_can_not_be_made_takes_nothing(tmp_path: Path) -> None:
    one, other = made("llama"), made("llama")
    exact, streamed = (ZOOptimizer(m, lr=1e-3, eps=1e-2, weights=kept) for m, kept in ((one, "exact"), (other, Offload(str(tmp_path)))))
    assert values(one, exact, 2) == values(other, streamed, 2)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        ZOOptimizer(other, weights=Offload(str(tmp_path / "file" / "folder")))
    assert values(one, exact, 2) == values(other, streamed, 2)
    assert same(snapshot(one), snapshot(other))


def test_descriptors_that_were_given_to_other_files_are_not_used(tmp_path: Path) -> None:
    model = made("llama")
    _, optimizer = train(model, Offload(str(tmp_path)), 2)
    tier: Any = offloaded(optimizer).tier
    slot = next(iter(tier._slots.values()))
    tier.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        slot.write(torch.zeros(slot.nbytes, dtype=torch.uint8))


def test_a_folder_can_be_used_again_by_another_model(tmp_path: Path) -> None:
    for _ in range(2):
        model = made("llama")
        train(model, Offload(str(tmp_path)), 2)
        del model  # and not one word to the hooks that hold it
    keeps = made("llama")
    _, optimizer = train(keeps, Offload(str(tmp_path)), 1)
    with pytest.raises(ValueError, match="or a model of this process that is still there"):
        train(made("llama"), Offload(str(tmp_path)), 1)
    assert optimizer.steps == 1


@pytest.mark.parametrize("lockstep", [None, False])
def test_a_thread_that_runs_the_model_inside_settled(lockstep: bool | None) -> None:
    one, other = made("llama"), made("llama")
    expected, _ = train(one, "exact", 30)
    optimizer = ZOOptimizer(other, lr=1e-3, eps=1e-2, weight_decay=0.1, weights=Offload(lockstep=lockstep))
    done, failed = threading.Event(), []

    def reader() -> None:
        try:
            while not done.is_set():
                with optimizer.settled(), torch.no_grad():
                    loss_of(other)()
        except BaseException as error:
            failed.append(error)

    residency = optimizer.residency
    thread = threading.Thread(target=reader)
    thread.start()
    try:
        found = values(other, optimizer, 30)
    finally:
        done.set()
        thread.join()
    assert failed == []
    assert found == expected
    assert optimizer.residency is residency


def test_a_thread_that_waits_for_ever_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "PATIENCE", 0.05)
    model = made("llama")
    optimizer = ZOOptimizer(model, lr=1e-3, weights=Offload(lockstep=False))
    told, said, waiting = threading.Event(), [], []

    def say(key: str, message: str) -> None:
        said.append(message)
        told.set()

    monkeypatch.setattr(turns, "say_once", say)
    with ThreadPoolExecutor(1) as pool:

        def closure() -> torch.Tensor:
            if not waiting:
                waiting.append(pool.submit(loss_of(model)))
                assert told.wait(20)
            return loss_of(model)()

        optimizer.step(closure)
        assert torch.isfinite(waiting[0].result(20))
    assert len(set(said)) == 1  # say_once says it once, however often it waits
    assert "it waits for ever: run the model on the closure's thread" in said[0]


# ---- options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lockstep": "yes"}, r"lockstep='yes'\): it is True, False, or None"),
        ({"folder": 3}, r"folder=3\) is no path"),
    ],
)
def test_options_of_the_wrong_kind(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Offload(**given)
    assert Offload(Path("a")) == Offload("a")


def test_more_files_than_may_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, left = os.posix_fallocate, iter(range(3))

    def limited(*given: Any) -> None:
        if next(left, None) is None:
            raise OSError(24, "Too many open files")
        plain(*given)

    monkeypatch.setattr(os, "posix_fallocate", limited)
    with pytest.raises(OSError, match=r"The weights need \d+ open files \(raise the limit, ulimit -n\)"):
        train(made("llama"), Offload(str(tmp_path)), 1)
    assert not list(tmp_path.glob("slot-*"))


# ---- models from files


def test_buffers_and_a_file_that_is_larger_than_memory(tmp_path: Path) -> None:
    whole = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    with torch.no_grad():
        whole(torch.randn(16, 8))
    path = tmp_path / "model.safetensors"
    save_file(whole.state_dict(), path)
    with path.open("r+b") as file:
        file.truncate(1 << 40)  # nothing reserves memory for it
    with init_empty_weights():
        opened = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    open_weights(opened, path)
    assert same(snapshot(opened), snapshot(whole))


@pytest.mark.parametrize(
    "header",
    [
        b"[]",
        b'{"0.weight": 3, "0.bias": 3}',
        b'{"0.weight": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 8]}}',
    ],
)
def test_damaged_headers(header: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(256))
    with init_empty_weights():
        model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="is not a safetensors file"):
        open_weights(model, path)
