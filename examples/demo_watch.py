"""Callbacks of the demo: a progress bar of one line, and the time of every step without the evaluations between."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class ProgressBar(TrainerCallback):
    """One line for a whole run, with the training loss and the last held-out accuracy."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._shown: dict[str, str] = {}
        self._bar: tqdm | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        form = "{desc} {percentage:3.0f}%|{bar:24}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}"
        self._bar = tqdm(total=state.max_steps, desc=self._title, bar_format=form)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs.get("logs") or {}
        if "loss" in logs:
            self._shown["loss"] = f"{float(logs['loss']):.2f}"
        if "eval_accuracy" in logs:
            self._shown["held-out"] = f"{logs['eval_accuracy']:.1%}"
        if self._bar is not None:
            self._bar.set_postfix(self._shown)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()


class Watch(TrainerCallback):
    """Times the steps, and asks for an evaluation before the first step, after every `every` steps and after the last."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._began = 0.0
        self.seconds: list[float] = []

    def points(self, history: list[dict[str, Any]], key: str) -> list[tuple[int, float, float]]:
        """What the trainer logged under `key`: (step, seconds of training until then, value)."""
        return [(row["step"], sum(self.seconds[: row["step"]]), row[key]) for row in history if key in row]

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.seconds.append(time.perf_counter() - self._began)
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            control.should_evaluate = True
