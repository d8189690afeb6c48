"""Prompts in whole runs: with LoRA, cut off and resumed, on two processes, under both hosts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tools import StopAt, arguments, losses, same, weights
from lightning_models import HOST_WARNINGS, Recorder, lightning
from lightning_models import trainer as lightning_trainer
from prompt_tools import model, naive_word_scores, tokenizer_of
from prompt_worker import OPTIONS, WORDS, examples, task_of
from scissors import CutError, Scissors
from torch.utils.data import DataLoader

from zo_lightning import ZOOptimizer, ZOStrategy
from zo_lightning.callbacks import TrajectoryLog
from zo_lightning.hf_integration import ZOTrainer
from zo_lightning.prompts import Prompt

pytestmark = [
    *[pytest.mark.filterwarnings(text) for text in HOST_WARNINGS],
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:The run in .* was cut off:zo_lightning.engine.messages.ZOWarning"),
    pytest.mark.filterwarnings(r"ignore:Before step \d+ the trained weights were changed:zo_lightning.engine.messages.ZOWarning"),
]

EPS, LR = 1e-2, 1e-3


def lora(seed: int = 0) -> Any:
    """Adapters of the seed on a base that is always the same."""
    peft = pytest.importorskip("peft")
    base = model("llama")
    torch.manual_seed(seed)
    return peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


def of(kind: str) -> Prompt:
    """For llama's tokenizer."""
    if kind == "options":
        return Prompt(tokenizer_of("llama"), "{text} . it was", options=OPTIONS, kind=kind)
    return Prompt(tokenizer_of("llama"), "{text} . it was", WORDS, kind=kind)


class Wrapped(lightning().LightningModule):  # type: ignore[misc]
    def __init__(self, task: Prompt, net: Any) -> None:
        super().__init__()
        self.task, self.net = task, net

    def training_step(self, batch: Any, index: int) -> Any:
        return self.task.loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=LR)


def hf(folder: Path, task: Prompt, net: Any, *callbacks: Any, **given: Any) -> Any:
    settings = {"per_device_train_batch_size": 4, "learning_rate": LR, "remove_unused_columns": False, **given}
    own = {"train_dataset": examples(), "callbacks": list(callbacks), "zo_eps": EPS}
    return ZOTrainer(net, arguments(folder, **settings), **own, **task.hooks())


def fit(folder: Path, task: Prompt, net: Any, *callbacks: Any, path: Any = None, shuffle: bool = False, **given: Any) -> Any:
    data = DataLoader(examples(), batch_size=4, collate_fn=task, shuffle=shuffle)  # type: ignore[arg-type,var-annotated]
    host = lightning_trainer(folder, strategy=ZOStrategy(eps=EPS), callbacks=list(callbacks), **{"max_steps": 3, **given})
    host.fit(Wrapped(task, net), data, ckpt_path=path, weights_only=None if path is None else True)
    return host


# ---- LoRA


def test_label_words_of_an_adapted_model_score_as_each_text_alone() -> None:
    net, task = lora().eval().requires_grad_(False), of("next")
    found = task.logits(net, task(examples()[:3]))
    for example, row in zip(examples(), found, strict=False):
        torch.testing.assert_close(
            row, naive_word_scores(net, tokenizer_of("llama"), example["text"] + " . it was", WORDS), atol=1e-5, rtol=0
        )
    base = task.logits(model("llama").eval().requires_grad_(False), task(examples()[:3]))
    assert float((base - found).abs().max()) > 1e-2  # the adapter counts


@pytest.mark.parametrize("kind", ["next", "options"])
@pytest.mark.parametrize("host", ["hf", "lightning"])
def test_both_hosts_train_the_adapter_alone_and_make_the_engines_steps(host: str, kind: str, tmp_path: Path) -> None:
    ours, theirs, task = lora(), lora(), of(kind)
    optimizer, values = ZOOptimizer(theirs.train(), lr=LR, eps=EPS), []
    for step in range(3):
        batch = task(examples()[4 * step : 4 * step + 4])
        optimizer.step(lambda batch=batch: task.loss_of(theirs, batch))  # type: ignore[misc]
        assert optimizer.report is not None
        values.append(optimizer.report.values)
    seen = Recorder()
    if host == "hf":
        hf(tmp_path, task, ours, seen, max_steps=3).train()
    else:
        fit(tmp_path, task, ours, seen)
    for mine, other in zip(seen.values, values, strict=True):
        assert mine == pytest.approx(other, abs=1e-5)  # Hugging Face's mean is a sum divided by another number
    start, ended = weights(lora()), weights(ours)
    for name, value in weights(theirs).items():
        torch.testing.assert_close(ended[name], value, atol=1e-5 if host == "hf" else 0, rtol=0)
        assert torch.equal(ended[name], start[name]) == ("lora_" not in name)


# ---- Runs that were cut off


def noise(seed: int) -> None:
    random.seed(seed)
    torch.manual_seed(seed)


MODELS = {"bert": lambda seed: (task_of("mask"), model("bert", seed)), "lora": lambda seed: (of("options"), lora(seed))}


@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpoint_of_the_hf_trainer_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"max_steps": 9, "train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 3}
    given |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 3}  # 6 steps an epoch, the last one smaller
    whole = hf(tmp_path / "whole", *MODELS[kind](0), **given)
    whole.train()
    with pytest.raises(InterruptedError):
        hf(tmp_path / "cut", *MODELS[kind](0), StopAt(5), **given).train()
    noise(99)
    rest = hf(tmp_path / "cut", *MODELS[kind](5), **given)
    rest.train(resume_from_checkpoint=True)
    assert rest.zo_optimizer.steps == 9
    assert losses(rest) == losses(whole)
    assert same(weights(rest.model), weights(whole.model))


@pytest.mark.parametrize("kind", MODELS)
def test_a_checkpoint_of_lightning_goes_on_bit_for_bit(kind: str, tmp_path: Path) -> None:
    def every() -> Any:
        return lightning().callbacks.ModelCheckpoint(tmp_path / "saved", "{step}", every_n_train_steps=3, save_top_k=-1)

    given: dict[str, Any] = {"max_steps": 9, "max_epochs": 3, "accumulate_grad_batches": 2, "shuffle": True, "enable_checkpointing": True}
    task, whole = MODELS[kind](0)
    seen = Recorder()
    noise(0)
    fit(tmp_path, task, whole, seen, **given)
    task, cut = MODELS[kind](0)
    noise(0)
    with pytest.raises(CutError):
        fit(tmp_path, task, cut, every(), Scissors(5), **given)
    noise(99)
    task, rest = MODELS[kind](5)
    again = Recorder()
    fit(tmp_path, task, rest, again, every(), path=tmp_path / "saved" / "step=3.ckpt", **given)
    assert again.values == seen.values[3:]
    assert same(weights(rest), weights(whole))


@pytest.mark.parametrize("host", ["hf", "lightning"])
def test_a_run_with_a_step_log_goes_on_where_it_was_cut_off(host: str, tmp_path: Path) -> None:
    """Without a checkpoint, as after a kill."""

    def run(folder: Path, seed: int, *callbacks: Any) -> Any:
        task, net = MODELS["bert"](seed)
        noise(0)
        if host == "hf":
            hf(folder, task, net, *callbacks, max_steps=8, train_sampling_strategy="random").train()
        else:
            fit(folder, task, net, *callbacks, max_steps=8, shuffle=True)
        return net

    whole = run(tmp_path / "whole", 0)
    with pytest.raises(CutError):
        run(tmp_path / "cut", 0, TrajectoryLog(), Scissors(5))
    rest = Recorder()
    net = run(tmp_path / "cut", 0, TrajectoryLog(), rest)
    assert same(weights(net), weights(whole))


# ---- Two processes


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    from prompt_worker import CASES, start

    folder = tmp_path_factory.mktemp("processes")
    start(folder)
    return {(case, rank): torch.load(folder / f"{case}.{rank}.pt") for case in CASES for rank in range(2)}


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mask", "options", "accuracy"])
def test_two_processes_make_the_steps_of_one_with_the_whole_batch(case: str, results: dict[tuple[str, int], Any], tmp_path: Path) -> None:
    from prompt_worker import run

    first, second, whole = results[case, 0], results[case, 1], run(case, tmp_path, 8)
    assert same(first["weights"], second["weights"])
    assert first["values"] == second["values"]
    assert len({value for row in whole["values"] for value in row}) > 1
    for one, other in zip(first["values"], whole["values"], strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    for name, value in whole["weights"].items():
        torch.testing.assert_close(first["weights"][name], value, atol=1e-6, rtol=0)
