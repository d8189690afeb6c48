"""Runs of a ZOTrainer that are cut off anywhere and begun again with other weights end as if nothing had happened."""

from __future__ import annotations

import contextlib
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tools import Regression, arguments, bert, llama, numbers, sentences, texts, tokenizer, tokens, trainer, weights
from keeper_tools import equal
from peft import LoraConfig, get_peft_model
from scissors import CutError, Scissors
from transformers import EarlyStoppingCallback

from zo_lightning.callbacks import Run, TrajectoryLog, ZOCallback, ZOMonitor
from zo_lightning.engine import StepReport
from zo_lightning.engine.messages import ZOWarning
from zo_lightning.engine.trajectory import load_base, read_log, verify
from zo_lightning.hf_integration import ZOConfig, ZOTrainerMixin

CHANGED = pytest.mark.filterwarnings(r"ignore:Before step \d+ the trained weights were changed:zo_lightning.engine.messages.ZOWarning")
LORA = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TRL = pytest.mark.filterwarnings("ignore:`gradient_checkpointing(_enable)?`:FutureWarning")
pytestmark = [CHANGED, LORA, pytest.mark.filterwarnings(r"ignore:The run in .* was cut off:zo_lightning.engine.messages.ZOWarning")]
LOG = "trajectory.zolog"
UNLIKE = ("train_runtime", "eval_runtime", "train_loss", "total_flos")
"""What the host measures anew, or takes the mean of over the steps since its last start."""


def lora(seed: int) -> Any:
    """Adapters on a base that every script loads alike."""
    base = llama(0)
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


MODELS: dict[str, Any] = {
    "bert": (lambda seed: bert(seed, dropout=0.2), texts),
    "bfloat16": (lambda seed: llama(seed, torch.bfloat16), tokens),
    "lora": (lora, tokens),
    "norm": (lambda seed: norm(seed), numbers),
}


def norm(seed: int) -> Any:
    model = Regression()
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return model


def train(folder: Path, cut: int | None = None, seed: int = 1, kind: str = "bert", **given: Any) -> dict[str, Any]:
    """An ordinary script; what it ends with."""
    make, data = MODELS[kind]
    callbacks = [given.pop("log", None) or TrajectoryLog(), Scissors(cut, given.pop("error", CutError)), *given.pop("callbacks", [])]
    settings = {
        "max_steps": 11,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": "linear",
        "warmup_steps": 3,
        "weight_decay": 0.01,
        "zo_weight_decay": 0.01,
        "train_sampling_strategy": "random",
        "zo_eps": 1e-2,
    }
    path = given.pop("path", None)
    if "eval_strategy" in given:
        given["eval_dataset"] = data(8, seed=1)
    host = trainer(folder, make(seed), data=data(), callbacks=callbacks, **{**settings, **given})
    result: dict[str, Any] = {}
    try:
        host.train(resume_from_checkpoint=path)
    except CutError:
        result["cut"] = True
    engine = host.zo_optimizer
    result |= {"weights": weights(host.model), "zo": engine.state_dict()["zo"], "lr": [g["lr"] for g in engine.param_groups]}
    result |= {"step": host.state.global_step, "epoch": host.state.epoch, "best": host.state.best_metric}
    result["log"] = [{k: v for k, v in entry.items() if k not in UNLIKE and "per_second" not in k} for entry in host.state.log_history]
    return result


SAVES = {"save_strategy": "steps", "save_steps": 3}
EVALUATES = {"eval_strategy": "steps", "eval_steps": 3}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "saves": SAVES,
    "accumulation": {**SAVES, "gradient_accumulation_steps": 3},
    "accumulation in place": {"gradient_accumulation_steps": 2, "zo_weights": "inplace"},
    "evaluations": {**SAVES, **EVALUATES, "eval_steps": 2},
    "plateau": {
        **SAVES,
        **EVALUATES,
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "lr_scheduler_kwargs": {"patience": 0, "threshold": 0.5},
    },
    "bfloat16": {**SAVES, "kind": "bfloat16"},
    "bfloat16 in place": {"kind": "bfloat16", "zo_weights": "inplace"},
    "lora": {**SAVES, "kind": "lora"},
    "normalization": {**SAVES, "kind": "norm"},
    "normalization in place": {"kind": "norm", "zo_weights": "inplace", "gradient_accumulation_steps": 2},
    "the best at the end": {**SAVES, **EVALUATES, "load_best_model_at_end": True},
    "weights alone": {**SAVES, "save_only_model": True},
    "monitored": {**SAVES, "monitored": True},
}


@pytest.mark.filterwarnings("ignore:.*loss ignores:UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_a_training_that_is_cut_off_ends_as_the_whole_one(case: str, tmp_path: Path) -> None:
    def script(folder: Path, cut: int | None = None, seed: int = 1) -> dict[str, Any]:
        given = dict(CASES[case])
        more = [ZOMonitor()] if given.pop("monitored", False) else []
        return train(folder, cut, seed, callbacks=more, **given)

    whole = script(tmp_path / "whole")
    for cut in random.Random(case).sample(range(1, 12), 3):
        folder = tmp_path / str(cut)
        assert script(folder, cut)["cut"]
        again = script(folder, seed=9)
        if "accumulation" in case or "in place" in case or case in ("monitored", "normalization"):
            again.pop("log"), whole.pop("log", None)
        assert equal(again, whole), (cut, [key for key in whole if not equal(whole[key], again[key])])
        log = read_log(folder / LOG)
        assert (log.end is not None, log.end_step) == (True, 11)
        assert verify(load_base(folder / str(log.segments[-1].base)), log).ok


def test_early_stopping_stops_at_the_same_place(tmp_path: Path) -> None:
    def script(folder: Path, cut: int | None = None, seed: int = 1) -> dict[str, Any]:
        stop = EarlyStoppingCallback(2, 0.01)
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
        return train(folder, cut, seed, callbacks=[stop], max_steps=60, **SAVES, **EVALUATES, **best)

    whole = script(tmp_path / "whole")
    assert 6 <= whole["step"] < 60
    assert script(tmp_path / "run", 5)["cut"]
    assert equal(script(tmp_path / "run", seed=9), whole)


def test_control_c(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", **SAVES)
    for after in (2, 7):
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "run", after, error=KeyboardInterrupt, seed=1 if after == 2 else 4, **SAVES)
    assert equal(train(tmp_path / "run", seed=5, **SAVES), whole)


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", **SAVES)
    assert train(tmp_path / "run", 8, **SAVES)["cut"]
    state = tmp_path / "run" / "checkpoint-6" / "trainer_state.json"
    state.write_bytes(state.read_bytes()[:-100])
    assert equal(train(tmp_path / "run", seed=7, **SAVES), whole)


def test_a_path_that_the_user_gives_wins(tmp_path: Path) -> None:
    whole = train(tmp_path / "run", **SAVES)
    (tmp_path / "run" / LOG).unlink()
    assert train(tmp_path / "run", 8, seed=4, **SAVES)["cut"]
    assert train(tmp_path / "other", **SAVES)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        again = train(tmp_path / "run", seed=7, path=str(tmp_path / "other" / "checkpoint-3"), **SAVES)
    assert any("A new step log begins" in str(entry.message) for entry in record)
    assert equal(again["weights"], whole["weights"])


def test_a_folder_that_was_moved_still_has_its_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(tmp_path / "whole", **SAVES)
    monkeypatch.chdir(tmp_path)
    assert train(Path("run"), 8, **SAVES)["cut"]
    (tmp_path / "run").rename(tmp_path / "moved")
    next((tmp_path / "moved").glob("base-*")).unlink()
    monkeypatch.chdir("/")
    assert equal(train(tmp_path / "moved", seed=7, **SAVES), whole)


def test_a_finished_training_begins_anew_when_it_is_started_again(tmp_path: Path) -> None:
    whole = train(tmp_path, **SAVES)
    with pytest.warns(ZOWarning, match="the run of the old one ended by itself after 11 steps"):
        again = train(tmp_path, **SAVES)
    assert equal(again, whole)


@pytest.mark.parametrize("options", [{}, SAVES, {**SAVES, **EVALUATES}], ids=["plain", "saves", "evaluations"])
def test_a_finished_training_is_made_again_where_that_is_asked_for(options: dict[str, Any], tmp_path: Path) -> None:
    whole = train(tmp_path, **options)
    again = train(tmp_path, seed=7, log=TrajectoryLog(resume=True), **options)
    assert same_end(again, whole)
    assert len(list(tmp_path.glob("*.zolog"))) == 1


def same_end(left: dict[str, Any], right: dict[str, Any]) -> bool:
    keys = ("lr", "step", "epoch", "best")
    return equal(left["weights"], right["weights"]) and [left[key] for key in keys] == [right[key] for key in keys]


@pytest.mark.parametrize("steps", [11, 8])
def test_a_kill_between_the_last_checkpoint_and_the_end_adds_no_step(steps: int, tmp_path: Path) -> None:
    """The host itself makes a step beyond `max_steps` when it resumes at them in the middle of an epoch."""
    options = {**SAVES, "max_steps": steps, "lr_scheduler_type": "constant"}
    whole = train(tmp_path, **options)
    path = tmp_path / LOG
    path.write_bytes(path.read_bytes()[:-3])  # without its last record, which says that the run ended
    assert same_end(train(tmp_path, seed=7, **options), whole)


@pytest.mark.parametrize("save", [{}, SAVES])
@pytest.mark.parametrize("change", [{"zo_seed": 3}, {"zo_eps": 0.5}, {"learning_rate": 1e-4, "warmup_steps": 0}, {"zo_noise": "gaussian"}])
def test_options_that_were_changed_are_not_overruled_in_silence(change: dict[str, Any], save: dict[str, Any], tmp_path: Path) -> None:
    assert train(tmp_path, 8, **save)["cut"]
    if save:
        with pytest.raises(ValueError, match=r"cut off and has checkpoints.*but it was another one: .*resume=False"):
            train(tmp_path, **{**save, **change})
        return
    with pytest.warns(ZOWarning, match="A new step log begins"):
        assert train(tmp_path, **change)["step"] == 11


def test_an_evaluation_leaves_no_trace(tmp_path: Path) -> None:
    host = trainer(tmp_path, bert(), callbacks=[TrajectoryLog()], eval_dataset=texts(8))
    host.evaluate()
    host.predict(texts(8))
    assert not list(tmp_path.glob("*.zolog"))


def test_a_batch_size_that_is_found_begins_again(tmp_path: Path) -> None:
    class Memory(ZOCallback):
        left = 1

        def on_zo_step(self, run: Run, report: StepReport) -> None:
            if self.left:
                self.left -= 1
                raise RuntimeError("CUDA out of memory.")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = train(tmp_path, callbacks=[Memory()], auto_find_batch_size=True)
    assert result["step"] == 11
    log = read_log(tmp_path / LOG)
    assert log.end is not None
    assert verify(load_base(tmp_path / str(log.segments[-1].base)), log).ok


@TRL
@pytest.mark.parametrize("save", [{}, SAVES], ids=["plain", "saves"])
def test_a_supervised_fine_tuning_of_trl_ends_as_the_whole_one(
    save: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    trl = pytest.importorskip("trl")
    kind = type("ZOSFTTrainer", (ZOTrainerMixin, trl.SFTTrainer), {})

    def script(folder: Path, cut: int | None = None, seed: int = 1) -> dict[str, Any]:
        shuffled = {"train_sampling_strategy": "random", "lr_scheduler_type": "linear", "max_steps": 9}
        args = arguments(folder, ZOConfig, per_device_train_batch_size=4, zo_eps=1e-2, **shuffled, **save)
        host = kind(
            model=llama(seed),
            args=args,
            train_dataset=sentences(),
            processing_class=tokenizer(),
            callbacks=[TrajectoryLog(), Scissors(cut)],
        )
        with contextlib.suppress(CutError):
            host.train()
        engine = host.zo_optimizer
        rates = [group["lr"] for group in engine.param_groups]
        return {"weights": weights(host.model), "zo": engine.state_dict()["zo"], "lr": rates, "step": host.state.global_step}

    whole = script(tmp_path / "whole")
    assert whole["step"] == 9
    for cut in (2, 7):
        assert script(tmp_path / str(cut), cut)["step"] == cut - 1  # the host counts a step when it is over
        assert equal(script(tmp_path / str(cut), seed=9), whole)
        assert read_log(tmp_path / str(cut) / LOG).end_step == 9
