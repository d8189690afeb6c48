"""Saving, resuming bit for bit, the best model, and checkpoints that are not whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tools import arguments, bert, losses, same, texts, trainer, weights

from zo_lightning.engine.messages import ZOWarning
from zo_lightning.hf_integration import ZOConfig, ZOTrainer
from zo_lightning.hf_integration.checkpoints import newest_complete


def run(folder: Path, **given: Any) -> Any:
    """A shuffled run with dropout, a schedule and accumulation: 4 steps an epoch, saved in the middle of one."""
    settings = {
        "max_steps": 10,
        "save_strategy": "steps",
        "save_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "linear",
        "train_sampling_strategy": "random",
    }
    return trainer(folder, bert(dropout=0.2), **{**settings, **given})


@pytest.mark.parametrize("step", [3, 6])
def test_resume_in_the_middle_of_an_epoch_is_bit_equal(step: int, tmp_path: Path) -> None:
    whole = run(tmp_path)
    whole.train()
    torch.manual_seed(99)
    rest = run(tmp_path)
    rest.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert same(weights(rest.model), weights(whole.model))
    assert losses(rest) == losses(whole)
    assert losses(rest, "zo/projected_grad") == losses(whole, "zo/projected_grad")
    assert rest.zo_optimizer.steps == whole.zo_optimizer.steps == 10
    assert rest.zo_optimizer.forward_passes == whole.zo_optimizer.forward_passes


def test_resume_by_true_passes_over_an_incomplete_folder(tmp_path: Path) -> None:
    whole = run(tmp_path)
    whole.train()
    for name in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / name / "trainer_state.json").unlink()
    torch.manual_seed(99)
    rest = run(tmp_path, save_strategy="no")
    with pytest.warns(ZOWarning, match="checkpoint-10 is incomplete.*resuming from checkpoint-6"):
        rest.train(resume_from_checkpoint=True)
    assert same(weights(rest.model), weights(whole.model))


def test_a_state_that_was_cut_off_is_incomplete(tmp_path: Path) -> None:
    for number in (2, 10):
        (tmp_path / f"checkpoint-{number}").mkdir()
        (tmp_path / f"checkpoint-{number}" / "trainer_state.json").write_text(json.dumps({"global_step": number}))
    assert newest_complete(str(tmp_path)) == str(tmp_path / "checkpoint-10")
    (tmp_path / "checkpoint-10" / "trainer_state.json").write_text('{"global_st')
    with pytest.warns(ZOWarning, match="incomplete"):
        assert newest_complete(str(tmp_path)) == str(tmp_path / "checkpoint-2")
    (tmp_path / "checkpoint-2" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint.*complete"):
        newest_complete(str(tmp_path))


def test_resume_by_true_without_any_checkpoint_is_the_hosts_error(tmp_path: Path) -> None:
    assert newest_complete(str(tmp_path / "absent")) is None
    with pytest.raises(ValueError, match="No valid checkpoint"):
        run(tmp_path).train(resume_from_checkpoint=True)


def test_a_checkpoint_without_optimizer_state_does_not_repeat_seeds(tmp_path: Path) -> None:
    first = run(tmp_path, save_only_model=True)
    first.train()
    rest = run(tmp_path, save_strategy="no")
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-9"))
    assert rest.zo_optimizer.steps == 10
    assert losses(rest, "zo/projected_grad")[-1] not in losses(first, "zo/projected_grad")[:1]


def test_resume_from_a_first_order_checkpoint_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, bert(), kind=ZOTrainer, args=first_order_arguments(tmp_path)).train()
    model = bert()
    with pytest.raises(ValueError, match="zo"):
        trainer(tmp_path, model).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def first_order_arguments(folder: Path) -> Any:
    return arguments(folder, ZOConfig, optim="adamw_torch", save_strategy="steps", save_steps=2)


def test_optimizer_state_loads_weights_only(tmp_path: Path) -> None:
    run(tmp_path, max_steps=3).train()
    state = torch.load(tmp_path / "checkpoint-3" / "optimizer.pt", weights_only=True)
    assert state["zo"]


def test_best_model_is_loaded_at_the_end_and_training_goes_on_from_it(tmp_path: Path) -> None:
    kept: dict[int, dict[str, torch.Tensor]] = {}

    class Recording(ZOTrainer):
        def _save_checkpoint(self, *args: Any) -> None:
            kept[self.state.global_step] = weights(self.model)
            super()._save_checkpoint(*args)

    scores = iter([0.1, 0.9, 0.3])
    host = trainer(
        tmp_path,
        kind=Recording,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        eval_dataset=texts(8, seed=1),
        compute_metrics=lambda prediction: {"score": next(scores)},
    )
    host.train()
    assert host.state.best_global_step == 4
    assert same(weights(host.model), kept[4])
    assert not same(kept[4], kept[6])
    host.args.eval_strategy = "no"
    host.args.save_strategy = "no"
    host.args.load_best_model_at_end = False
    host.train()
    reference = bert()
    reference.load_state_dict(kept[4])
    continued = trainer(tmp_path, reference, max_steps=6)
    continued.create_optimizer()
    continued.zo_optimizer.load_state_dict({**continued.zo_optimizer.state_dict(), "zo": state_after(host, 6)})
    continued.train()
    assert same(weights(continued.model), weights(host.model))


def state_after(host: Any, steps: int) -> dict[str, Any]:
    """The engine's state of `host`, set back to `steps`."""
    state = dict(host.zo_optimizer.state_dict()["zo"])
    state["steps"] = steps
    return state


def test_the_saved_model_is_the_unperturbed_one(tmp_path: Path) -> None:
    host = run(tmp_path, max_steps=3)
    host.train()
    loaded = type(host.model).from_pretrained(tmp_path / "checkpoint-3")
    assert same(weights(loaded), weights(host.model))


def test_metrics_of_an_evaluation_in_training(tmp_path: Path) -> None:
    seen = []
    host = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=2,
        eval_dataset=texts(8, seed=1),
        compute_metrics=lambda prediction: seen.append(prediction.predictions.shape) or {"rows": float(len(seen))},
    )
    host.train()
    assert seen == [(8, 2), (8, 2)]
    evaluations = [entry for entry in host.state.log_history if "eval_rows" in entry]
    assert [entry["eval_rows"] for entry in evaluations] == [1.0, 2.0]
    assert not any(key.startswith("zo/") for entry in evaluations for key in entry)


def test_rotated_checkpoints_resume(tmp_path: Path) -> None:
    whole = run(tmp_path, save_total_limit=1)
    whole.train()
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-10"]
    shutil.rmtree(tmp_path / "checkpoint-10")
