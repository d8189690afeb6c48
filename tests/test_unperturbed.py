"""Whoever looks at the weights outside a forward pass sees those before or after a step: every hook of both hosts, signal handlers."""

from __future__ import annotations

import hashlib
import inspect
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning_models import NAMES, lit, loader, net, trainer
from torch import nn

from zo_lightning import ZOStrategy
from zo_lightning.callbacks import Run, ZOCallback
from zo_lightning.engine.report import StepReport
from zo_lightning.hf_integration import ZOConfig, ZOTrainer

STEPS = 6
WEIGHTS = ["exact", "copy"]


def digest(model: nn.Module) -> str:
    state = hashlib.blake2b()
    for parameter in model.parameters():
        state.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return state.hexdigest()


class States(ZOCallback):
    """The weights before the first step and after each."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_run_start(self, run: Run) -> None:
        self.seen.append(digest(run.module))

    def on_zo_step(self, run: Run, report: StepReport) -> None:
        self.seen.append(digest(run.module))


def looking(names: list[str], look: Callable[[str], None]) -> dict[str, Any]:
    """Methods of these names that look at the weights."""

    def method(name: str) -> Callable[..., Any]:
        def looks(self: Any, *args: Any, **kwargs: Any) -> Any:
            look(name)
            return args[0] if "batch_transfer" in name else None

        return looks

    return {name: method(name) for name in names}


def hooks(kind: type) -> list[str]:
    return [name for name, _ in inspect.getmembers(kind, inspect.isfunction) if name.startswith("on_") or name in ("setup", "teardown")]


def lightning_run(folder: Path, name: str, weights: str, more: list[Any], kind: type | None = None) -> nn.Module:
    module = (kind or lit(name))(net())
    if kind is None:
        module.validation_step = lambda batch, batch_idx: None
    pl = __import__(name, fromlist=["callbacks"])
    checkpoints = pl.callbacks.ModelCheckpoint(dirpath=folder / "checkpoints", every_n_train_steps=2, save_top_k=-1)
    fit = trainer(
        folder,
        name,
        strategy=ZOStrategy(lr=0.01, weights=weights),
        max_steps=STEPS,
        val_check_interval=2,
        callbacks=[checkpoints, *more],
        enable_checkpointing=True,
    )
    fit.fit(module, loader(), loader())
    return module.net


@pytest.mark.filterwarnings("ignore:Checkpoint directory", "ignore:Look.*is called, but every parameter")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_hook_of_lightning_sees_weights_between_steps(weights: str, name: str, tmp_path: Path) -> None:
    states = States()
    lightning_run(tmp_path / "a", name, weights, [states])
    seen: dict[str, set[str]] = {}
    pl = __import__(name, fromlist=["callbacks"])
    current: list[nn.Module] = []

    def look(hook: str) -> None:
        seen.setdefault(hook, set()).add(digest(current[0].net))  # type: ignore[attr-defined]

    inside = looking(hooks(pl.LightningModule), lambda hook: look(f"module.{hook}"))

    class Looking(lit(name)):  # type: ignore[misc]
        def __init__(self, model: nn.Module) -> None:
            super().__init__(model)
            current[:] = [self]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            look("module.validation_step")

    for hook in inside:
        setattr(Looking, hook, inside[hook])
    callback = type("Look", (pl.Callback,), looking(hooks(pl.Callback), look))()
    before = signal.signal(signal.SIGALRM, lambda number, frame: look("signal") if current else None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.004, 0.004)
        lightning_run(tmp_path / "b", name, weights, [callback], Looking)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(set(states.seen)) == STEPS + 1
    assert {hook: digests - set(states.seen) for hook, digests in seen.items() if digests - set(states.seen)} == {}
    assert seen["on_train_batch_end"] == set(states.seen[1:])
    assert seen.keys() >= {"signal", "on_before_zero_grad", "on_save_checkpoint", "on_validation_end", "module.on_before_optimizer_step"}
    for path in (tmp_path / "b" / "checkpoints").iterdir():
        state = torch.load(path)["state_dict"]
        model = net()
        model.load_state_dict({key.removeprefix("net."): value for key, value in state.items()})
        assert digest(model) in states.seen


def hf_run(folder: Path, weights: str, more: list[Any], **options: Any) -> ZOTrainer:
    from hf_tools import llama, tokens

    args = ZOConfig(
        str(folder),
        learning_rate=0.01,
        max_steps=STEPS,
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        zo_weights=weights,
        per_device_train_batch_size=4,
    )
    model = llama()
    made = ZOTrainer(model, args, train_dataset=tokens(), eval_dataset=tokens(8), callbacks=more, **options)  # type: ignore[arg-type]
    made.remove_callback(transformers.PrinterCallback)
    made.train()
    return made


@pytest.mark.parametrize("weights", WEIGHTS)
def test_every_hook_of_hugging_face_sees_weights_between_steps(weights: str, tmp_path: Path) -> None:
    states = States()
    hf_run(tmp_path / "a", weights, [states])
    seen: dict[str, set[str]] = {}
    current: list[nn.Module] = []

    def look(hook: str) -> None:
        if current:
            seen.setdefault(hook, set()).add(digest(current[0]))

    kept = looking(hooks(transformers.TrainerCallback), look)
    kind = type("Look", (transformers.TrainerCallback,), kept)
    begin = kept["on_train_begin"]
    kind.on_train_begin = lambda self, args, state, control, model=None, **rest: (current.append(model), begin(self))[1]  # type: ignore[attr-defined]
    before = signal.signal(signal.SIGALRM, lambda number, frame: look("signal") if current else None)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.004, 0.004)
        metrics = {"compute_metrics": lambda prediction: (look("compute_metrics"), {"n": 1.0})[1]}
        hf_run(tmp_path / "b", weights, [kind()], **metrics)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(set(states.seen)) == STEPS + 1
    assert {hook: digests - set(states.seen) for hook, digests in seen.items() if digests - set(states.seen)} == {}
    assert seen["on_step_end"] == set(states.seen[1:])
    assert seen.keys() >= {"signal", "compute_metrics", "on_save", "on_evaluate", "on_pre_optimizer_step", "on_log"}
