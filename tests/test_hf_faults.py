"""Exceptions between two forward passes and input that cannot be trained on: a clear answer, and weights untouched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tools import bert, llama, losses, same, tokens, trainer, weights

from zo_lightning.hf_integration import ZOTrainer


class BoomError(Exception):
    pass


@pytest.mark.parametrize("mode", ["exact", "copy", "inplace"])
@pytest.mark.parametrize("error", [BoomError, KeyboardInterrupt])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_an_exception_between_forwards_leaves_the_weights(mode: str, error: type, call: int, tmp_path: Path) -> None:
    count = 0

    class Failing(ZOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            loss = super().compute_loss(*args, **kwargs)
            if count == call:
                raise error
            return loss

    model = bert()
    before = weights(model)
    host = trainer(tmp_path, model, Failing, zo_weights=mode, gradient_accumulation_steps=4, max_steps=1)
    host.loss_is_scaled_for_ga = True  # no probe: the calls are the step's own
    backward = host.accelerator.backward
    with pytest.raises(error):
        host.train()
    after = weights(model)
    if mode == "inplace":
        for name, value in before.items():
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-6)
    else:
        assert same(after, before)
    assert host.accelerator.backward == backward
    assert "log" not in vars(host)


def test_a_run_can_go_on_after_an_exception(tmp_path: Path) -> None:
    """The window that the exception left unfinished is not part of the next step."""
    straight = trainer(tmp_path, gradient_accumulation_steps=2, max_steps=2)
    straight.train()
    failing = trainer(tmp_path, gradient_accumulation_steps=2, max_steps=2)
    original, count = failing.compute_loss, 0

    def once(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == 6:  # two of the probe, two of the first micro-batch, one of the second
            raise BoomError
        return original(*args, **kwargs)

    failing.compute_loss = once
    with pytest.raises(BoomError):
        failing.train()
    failing.train()
    assert same(weights(failing.model), weights(straight.model))


def test_an_empty_batch(tmp_path: Path) -> None:
    model = bert()
    before = weights(model)
    with pytest.raises(ValueError, match="batch received was empty"):
        trainer(tmp_path, model, data_collator=lambda rows: {}).train()
    assert same(weights(model), before)


def test_batches_without_any_label_are_skipped_and_counted(tmp_path: Path) -> None:
    model = llama()
    before = weights(model)
    rows = [{**row, "labels": [-100] * len(row["labels"])} for row in tokens()]
    host = trainer(tmp_path, model, data=rows)
    host.train()
    assert same(weights(model), before)
    assert host.zo_optimizer.skipped_steps == host.zo_optimizer.steps == 4
    assert losses(host, "zo/skipped_steps") == [1.0, 2.0, 3.0, 4.0]


def test_non_finite_losses_end_the_run(tmp_path: Path) -> None:
    def nothing(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return outputs.logits.sum() * float("nan")

    with pytest.raises(FloatingPointError):
        trainer(tmp_path, compute_loss_func=nothing, zo_max_nonfinite=2).train()


def test_no_trainable_parameter(tmp_path: Path) -> None:
    model = bert().requires_grad_(False)
    with pytest.raises(ValueError, match="train"):
        trainer(tmp_path, model).train()


def test_a_loss_that_calls_backward_itself_is_refused(tmp_path: Path) -> None:
    class Own(ZOTrainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(*args, **kwargs)
            loss.backward()
            return loss

    model = bert()
    before = weights(model)
    with pytest.raises(RuntimeError, match="backward"):
        trainer(tmp_path, model, Own).train()
    assert same(weights(model), before)
