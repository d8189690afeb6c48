"""SparseMask in the Hugging Face trainer: charts, adapters, bfloat16, accumulation, refreshes across a kill."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tools import bert, llama, losses, same, texts, tokens, trainer, weights
from peft import LoraConfig, get_peft_model
from scissors import CutError, Scissors
from transformers import default_data_collator

from zo_lightning.callbacks import Run, SparseMask, TrajectoryLog, ZOCallback
from zo_lightning.engine import StepReport, ZOOptimizer, ZOWarning
from zo_lightning.engine.masks import Mask, PrincipalWeights, Sensitive

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:The run in .* was cut off:zo_lightning.engine.messages.ZOWarning"),
]


class Rates(ZOCallback):
    """Keeps the learning rates of the steps."""

    def __init__(self) -> None:
        self.rates: list[float] = []

    def on_zo_step(self, run: Run, report: StepReport) -> None:
        self.rates.append(report.lr)


def lora(seed: int) -> Any:
    """Adapters on a base that every script loads alike."""
    base = llama(0)
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


MODELS: dict[str, Any] = {"bert": (bert, texts), "bfloat16": (lambda seed: llama(seed, torch.bfloat16), tokens), "lora": (lora, tokens)}
MASKS: dict[str, Any] = {
    "small": lambda: SparseMask("small_weights", 0.3, refresh=3, summary=False),
    "blocks": lambda: SparseMask("random", {"*": 0.4}, refresh=2, exclude="*bias", summary=False),
    "measured": lambda: SparseMask(Sensitive(steps=5), 0.3, refresh=7, summary=False),
    "low rank": lambda: SparseMask(PrincipalWeights(4, vectors="rest"), 0.3, refresh=3, summary=False),
}
MASKS_OF = {
    "lora": {"blocks": lambda: SparseMask("random", 0.4, refresh=2, summary=False)},
    "bfloat16": {"blocks": lambda: SparseMask("random", {"*": 0.4}, refresh=2, exclude="*norm*", summary=False)},
}


def run(folder: Path, kind: str, mask: Any, more: list[Any], seed: int = 0, resume: str | None = None, **given: Any) -> Any:
    make, data = MODELS[kind]
    own = {"max_steps": 8, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1, "zo_eps": 1e-2, **given}
    host = trainer(folder, make(seed), data=data(), callbacks=[mask, *more], **own)
    host.train(resume_from_checkpoint=resume)
    return host


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_masked_run_that_is_killed_goes_on(kind: str, mask: str, save: bool, tmp_path: Path) -> None:
    make = {**MASKS, **MASKS_OF.get(kind, {})}[mask]
    given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2} if save else {"save_strategy": "no"}
    whole = run(tmp_path / "whole", kind, make(), [TrajectoryLog()], **given)
    with pytest.raises(CutError):
        run(tmp_path / "run", kind, make(), [TrajectoryLog(), Scissors(5)], **given)
    again = run(tmp_path / "run", kind, make(), [TrajectoryLog()], seed=9, **given)
    assert same(weights(again.model), weights(whole.model))


@pytest.mark.parametrize("stop", [1, 2, 3, 4, 5, 6])
def test_a_checkpoint_of_steps_that_measure_goes_on(stop: int, tmp_path: Path) -> None:
    """Without a step log, what was measured is in the checkpoint alone."""

    def mask() -> SparseMask:
        return SparseMask(Sensitive(steps=2), 0.3, refresh=4, summary=False)

    given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1}
    whole = run(tmp_path, "bert", mask(), [], **given)
    again = run(tmp_path / "again", "bert", mask(), [], seed=9, resume=str(tmp_path / f"checkpoint-{stop}"))
    assert same(weights(again.model), weights(whole.model))
    for chart in ("zo/mask/density", "zo/mask/overlap", "loss"):
        assert losses(again, chart) == losses(whole, chart)  # the history before is in the checkpoint


@pytest.mark.parametrize("kind", ["bert", "lora"])
def test_the_trainer_measures_as_the_engine_does(kind: str, tmp_path: Path) -> None:
    make, data = MODELS[kind]
    mask = Mask(Sensitive(steps=2), 0.3, refresh=5)
    plain, rows = make(0), data()
    optimizer = ZOOptimizer(plain, lr=1e-3, eps=1e-2, mask=mask)
    plain.train()
    rates = []
    for step in range(8):
        batch = default_data_collator(rows[8 * step % len(rows) :][:8])
        optimizer.estimate(lambda batch=batch: plain(**batch)["loss"])
        report = optimizer.apply()
        assert report is not None
        rates.append(report.lr)
    watch = Rates()
    host = run(
        tmp_path,
        kind,
        SparseMask(Sensitive(steps=2), 0.3, refresh=5, summary=False),
        [watch],
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
    )
    assert same(weights(host.model), weights(plain))
    assert watch.rates == rates
    assert [rate > 0 for rate in rates] == [False, False, True, True, True, False, False, True]
    assert losses(host, "learning_rate") == [1e-3] * 8  # the schedule's


def test_charts_and_what_moves(tmp_path: Path) -> None:
    start = weights(bert(0))
    host = run(tmp_path, "bert", SparseMask("small_weights", 0.25, refresh=4, exclude="*LayerNorm*", frozen="*embeddings.weight"), [])
    shares = losses(host, "zo/mask/density")
    assert len(shares) == 2  # of eight logs, those behind a refresh
    assert len(losses(host, "zo/mask/overlap")) == 1
    end = weights(host.model)
    for name, tensor in end.items():
        moved = (tensor != start[name]).double().mean()
        if "embeddings.weight" in name:
            assert moved == 0
        elif "query.weight" in name:
            assert 0.2 < moved < 0.5
        elif "LayerNorm.bias" in name:
            assert moved > 0.9


@pytest.mark.parametrize("mask", ["small", "measured"])
def test_a_checkpoint_of_weights_alone_lacks_what_16_bit_vectors_are(mask: str, tmp_path: Path) -> None:
    """Vectors that only rested have no float32 value; that is no reason to take one for lost, nor the others for resting."""
    given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    with pytest.raises(CutError):
        run(tmp_path, "bfloat16", MASKS[mask](), [TrajectoryLog(), Scissors(5)], **given)
    with pytest.warns(ZOWarning, match="the checkpoint came without the optimizer's state"):
        run(tmp_path, "bfloat16", MASKS[mask](), [TrajectoryLog()], seed=9, resume=str(tmp_path / "checkpoint-4"))
