"""Resumed runs go on with the batches of the uninterrupted run: streams without a length, and orders drawn from generators."""

from __future__ import annotations

import functools
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_tools import bert, losses, same, texts, trainer, weights
from transformers import TrainerCallback

from zo_lightning.engine.messages import ZOWarning
from zo_lightning.hf_integration import ZOTrainer

FILE = "zo_data_state.pth"
DRAWS: dict[str, Callable[[int], Any]] = {
    "torch": torch.randperm,
    "python": lambda count: random.sample(range(count), count),
    "numpy": np.random.permutation,
    "own": torch.randperm,
    "rows": lambda count, generator: (torch.randint(count, (), generator=generator) for _ in range(count)),
}


class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
    """Rows without a length, in order, or drawn when the pass begins, or one by one from a generator of its own."""

    def __init__(self, count: int = 24, draw: str = "", endless: bool = False) -> None:
        self.rows, self.draw, self.endless = texts(count), draw, endless
        self.generator = torch.Generator().manual_seed(5) if draw in ("own", "rows") else None

    def __iter__(self) -> Iterator[Any]:
        if self.endless:
            return itertools.cycle(self.rows)
        keywords = {"generator": self.generator} if self.generator is not None else {}
        order = DRAWS[self.draw](len(self.rows), **keywords) if self.draw else range(len(self.rows))
        return (self.rows[int(i)] for i in order)


class Saves(TrainerCallback):
    """The steps at which checkpoints were written."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.steps.append(state.global_step)


def run(folder: Path, data: Any = None, **given: Any) -> Any:
    """Six batches an epoch unless `data` has more, saved at every step."""
    settings = {"max_steps": 9, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 4}
    return trainer(folder, bert(), data=Stream() if data is None else data, **{**settings, **given})


def grouped(folder: Path, **given: Any) -> Any:
    return run(folder, texts(24), train_sampling_strategy="group_by_length", **given)


def resume(host: Any, step: int, folder: Path | None = None) -> Any:
    """Train on from a checkpoint in a process whose generators are anywhere."""
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    host.train(resume_from_checkpoint=str((folder or Path(host.args.output_dir)) / f"checkpoint-{step}"))
    return host


def place(checkpoint: Path, value: Any) -> None:
    """Write another place into a checkpoint; None: none, as in older ones."""
    file = checkpoint / "trainer_state.json"
    content = json.loads(file.read_text())
    assert content["stateful_callbacks"].pop("zo_position").keys() == {"epoch", "batches"}
    if value is not None:
        content["stateful_callbacks"]["zo_position"] = value
    file.write_text(json.dumps(content))


def alike(left: Any, right: Any) -> bool:
    return same(weights(left.model), weights(right.model)) and losses(left) == losses(right) and left.state.epoch == right.state.epoch


@pytest.mark.parametrize("step", [4, 6, 8])
def test_a_stream_behind_its_first_pass(step: int, tmp_path: Path) -> None:
    whole = run(tmp_path, max_steps=14)
    whole.train()
    assert alike(resume(run(tmp_path, max_steps=14), step), whole)


@pytest.mark.parametrize("step", [2, 3, 5, 7])
def test_accumulation_that_does_not_divide_the_stream(step: int, tmp_path: Path) -> None:
    given = {"gradient_accumulation_steps": 2, "max_steps": 8}  # seven batches: three updates, and one batch left for the next pass
    whole = run(tmp_path, Stream(28), **given)
    whole.train()
    assert alike(resume(run(tmp_path, Stream(28), **given), step), whole)


@pytest.mark.parametrize(("count", "again"), [(24, [6, 8]), (28, [3, 6, 8])])
def test_checkpoints_between_two_passes(count: int, again: list[int], tmp_path: Path) -> None:
    given = {"gradient_accumulation_steps": 2, "max_steps": 8, "save_strategy": "epoch"}
    whole = run(tmp_path, Stream(count, "own"), **given)
    whole.train()
    saves = Saves()
    rest = resume(run(tmp_path, Stream(count, "own"), callbacks=[saves], **given), 3)
    assert alike(rest, whole)
    assert saves.steps == again  # a batch that is left without update is seen again, and with it the end of the pass


@pytest.mark.parametrize("draw", sorted(DRAWS))
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stream_that_draws_its_order(draw: str, accumulation: int, tmp_path: Path) -> None:
    given = {"gradient_accumulation_steps": accumulation, "max_steps": 16 // accumulation}
    whole = run(tmp_path, Stream(28, draw), **given)
    whole.train()
    for step in (2, 10 // accumulation):
        assert alike(resume(run(tmp_path, Stream(28, draw), **given), step), whole)


def test_another_max_steps_does_not_move_the_place(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", Stream(28, "torch"), max_steps=16)
    whole.train()
    run(tmp_path / "short", Stream(28, "torch"), max_steps=9).train()
    rest = resume(run(tmp_path / "short", Stream(28, "torch"), max_steps=16), 9)
    assert same(weights(rest.model), weights(whole.model))


def test_an_endless_stream(tmp_path: Path) -> None:
    whole = run(tmp_path, Stream(endless=True), gradient_accumulation_steps=2)
    whole.train()
    assert alike(resume(run(tmp_path, Stream(endless=True), gradient_accumulation_steps=2), 5), whole)


def test_ignore_data_skip_still_begins_with_the_first_batch(tmp_path: Path) -> None:
    run(tmp_path, Stream(draw="torch"), max_steps=8).train()
    rest = resume(run(tmp_path / "rest", Stream(draw="torch"), ignore_data_skip=True), 8, tmp_path)
    place(tmp_path / "checkpoint-8", {"epoch": 1, "batches": 0})
    assert same(weights(rest.model), weights(resume(run(tmp_path / "other", Stream(draw="torch")), 8, tmp_path).model))


@pytest.mark.parametrize("step", [3, 6, 8])
def test_group_by_length(step: int, tmp_path: Path) -> None:
    whole = grouped(tmp_path, max_steps=14)
    whole.train()
    assert alike(resume(grouped(tmp_path, max_steps=14), step), whole)


@pytest.mark.parametrize(("first", "second"), [(6, 8), (7, 8)])
def test_a_resumed_run_is_resumed_again(first: int, second: int, tmp_path: Path) -> None:
    whole = grouped(tmp_path / "whole", max_steps=14)
    whole.train()
    resume(grouped(tmp_path / "rest", max_steps=14), first, tmp_path / "whole")
    assert alike(resume(grouped(tmp_path / "rest", max_steps=14), second), whole)


def test_an_older_checkpoint_resumes_as_the_host_does(tmp_path: Path) -> None:
    endless = run(tmp_path / "endless", Stream(endless=True))
    endless.train()
    (tmp_path / "endless" / "checkpoint-7" / FILE).unlink()
    place(tmp_path / "endless" / "checkpoint-7", None)
    assert alike(resume(run(tmp_path / "endless", Stream(endless=True)), 7), endless)
    whole = grouped(tmp_path)
    whole.train()
    (tmp_path / "checkpoint-8" / FILE).unlink()
    place(tmp_path / "checkpoint-8", None)
    rest = resume(grouped(tmp_path), 8)
    assert rest.state.global_step == 9
    assert not same(weights(rest.model), weights(whole.model))


def other_states(file: Path) -> None:
    saved = torch.load(file, weights_only=True)
    torch.save({**saved, "start": {**saved["start"], "torch": torch.zeros(3)}}, file)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda file: file.write_bytes(b""),
        lambda file: file.write_bytes(b"no file of ours"),
        lambda file: file.write_bytes(file.read_bytes()[:3000]),
        lambda file: torch.save({"epoch": 1}, file),
        lambda file: torch.save([1], file),
        other_states,
    ],
)
def test_a_damaged_file_is_named(spoil: Callable[[Path], Any], tmp_path: Path) -> None:
    grouped(tmp_path, max_steps=2).train()
    spoil(tmp_path / "checkpoint-2" / FILE)
    with pytest.raises(ValueError, match=rf"checkpoint-2.{FILE} is damaged.*delete this file"):
        grouped(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_damaged_place_is_named(tmp_path: Path) -> None:
    run(tmp_path, max_steps=2).train()
    place(tmp_path / "checkpoint-2", {"epoch": "one"})
    with pytest.raises(ValueError, match=r"trainer_state.json is damaged: zo_position is .*one"):
        resume(run(tmp_path), 2)


def test_persistent_workers_are_named_when_a_run_is_resumed(tmp_path: Path) -> None:
    given = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "max_steps": 3}
    run(tmp_path, texts(24), **given).train()
    with pytest.warns(ZOWarning, match="dataloader_persistent_workers=False") as said:
        resume(run(tmp_path, texts(24), **given), 2)
    assert len(said) == 1


def test_workers_that_are_not_persistent_draw_the_same(tmp_path: Path) -> None:
    given = {"dataloader_num_workers": 1, "max_steps": 14}
    whole = run(tmp_path, Stream(28, "torch"), **given)
    whole.train()
    assert alike(resume(run(tmp_path, Stream(28, "torch"), **given), 10), whole)


def test_the_states_of_callbacks_are_restored_without_ours(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path).train()
    resume(run(tmp_path, restore_callback_states_from_checkpoint=True), 4)
    assert "zo_position" not in caplog.text


def test_a_first_order_run_has_neither_file_nor_place(tmp_path: Path) -> None:
    def host(steps: int) -> Any:
        return run(tmp_path, kind=functools.partial(ZOTrainer, optim="adamw_torch"), max_steps=steps)

    host(2).train()
    assert not (tmp_path / "checkpoint-2" / FILE).exists()
    assert "zo_position" not in (tmp_path / "checkpoint-2" / "trainer_state.json").read_text()
    assert resume(host(3), 2).state.global_step == 3
