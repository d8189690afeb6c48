"""The demo: fine-tunes all weights of a pretrained MiniLM with forward passes only, then with AdamW, and compares the two.

    make demo                                          # one seed: some minutes on two CPU cores
    python examples/demo_docstrings.py --lr 1e-3       # try another learning rate
    python examples/demo_docstrings.py --seeds 0 1 2 --json result.json

The task: which of seven topics is a docstring of Python's standard library about? No network, no GPU. `make_trainer` is what you would
write in a project of your own.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when torch and transformers are imported: nothing is downloaded, and the profiler says nothing about itself.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

import docstring_topics
import minilm
import numpy as np
import transformers
from demo_report import Curve, peak_tensor_bytes, plot, table, write_json
from demo_watch import ProgressBar, Watch
from torch.utils.tensorboard import SummaryWriter
from transformers import DataCollatorWithPadding, EvalPrediction, Trainer, TrainingArguments
from transformers.integrations import TensorBoardCallback

from zo_lightning.callbacks import ZOMonitor
from zo_lightning.engine import DivergenceError
from zo_lightning.hf_integration import ZOConfig, ZOTrainer

FORWARD_ONLY, ADAMW = "forward-only", "AdamW"
BATCH = 64
ADAMW_LR = 2e-5


@dataclass(frozen=True)
class Task:
    """Tokenized texts: to train on, held out, and the longest ones, on which memory is measured."""

    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    longest: list[dict[str, Any]]


def make_task(tokenizer: Any, limit: int | None = None) -> Task:
    """The docstring topics; `limit` keeps only so many held-out texts."""
    train, held_out = docstring_topics.split(docstring_topics.collect())

    def encode(examples: Sequence[docstring_topics.Example]) -> list[dict[str, Any]]:
        rows = tokenizer([example.text for example in examples], truncation=True, return_token_type_ids=False)
        encoded = zip(rows["input_ids"], rows["attention_mask"], examples, strict=True)
        return [{"input_ids": ids, "attention_mask": mask, "labels": example.label} for ids, mask, example in encoded]

    def length(row: dict[str, Any]) -> int:
        return len(row["input_ids"])

    rows = encode(train)
    # Held-out texts of like length stand together: less padding to compute.
    return Task(rows, sorted(encode(held_out[:limit]), key=length), sorted(rows, key=length)[-BATCH:])


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the texts whose largest logit is their topic's."""
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def make_trainer(method: str, options: argparse.Namespace, seed: int, steps: int, task: Task, folder: Path) -> Trainer:
    """A ZOTrainer, or for comparison a plain Trainer with AdamW, over a freshly loaded model: all its weights are trained."""
    model, tokenizer = minilm.load(list(docstring_topics.TOPICS))
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": steps,
        "seed": seed,
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": BATCH,
        "lr_scheduler_type": "linear",
        "logging_steps": min(5, steps),
        "save_strategy": "no",
        "report_to": "none",  # the demo brings its own TensorBoard callback, to choose the folder
        "disable_tqdm": True,  # and its own progress bar
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    common: dict[str, Any] = {
        "model": model,
        "train_dataset": task.train,
        "eval_dataset": task.held_out,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": accuracy,
    }
    trainer: Trainer
    if method == FORWARD_ONLY:
        config = ZOConfig(**settings, learning_rate=options.lr, zo_eps=options.eps, zo_dropout=False, zo_seed=seed)
        trainer = ZOTrainer(args=config, callbacks=[ZOMonitor()], **common)
    else:
        arguments = TrainingArguments(**settings, optim="adamw_torch", learning_rate=ADAMW_LR)
        trainer = Trainer(args=arguments, **common)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def measure_memory(method: str, options: argparse.Namespace, task: Task, folder: Path) -> int:
    """Peak tensor memory of two steps on the longest texts, over the loaded model, in bytes."""
    longest = Task(task.longest, task.longest, task.longest)
    trainer = make_trainer(method, options, 0, 2, longest, folder)
    return peak_tensor_bytes(trainer.train)


def measure_inference(options: argparse.Namespace, task: Task, folder: Path) -> int:
    """The same for one forward pass of a batch of the longest texts without training."""
    longest = Task(task.longest, task.longest, task.longest)
    trainer = make_trainer(ADAMW, options, 0, 1, longest, folder)
    return peak_tensor_bytes(trainer.evaluate)


def run(method: str, options: argparse.Namespace, seed: int, steps: int, task: Task, folder: Path) -> Curve:
    """Train once, with a progress bar and TensorBoard logs, and say how it went."""
    peak = measure_memory(method, options, task, folder)
    trainer = make_trainer(method, options, seed, steps, task, folder)
    watch = Watch(every=math.ceil(steps / options.evaluations))
    logs = SummaryWriter(str(folder / "tensorboard" / f"{method}-seed{seed}"))
    for callback in (watch, ProgressBar(f"{method:12}"), TensorBoardCallback(logs)):
        trainer.add_callback(callback)
    trainer.args.eval_on_start = True
    trainer.train()
    history: list[dict[str, Any]] = trainer.state.log_history
    return Curve(
        method=method,
        seed=seed,
        steps=steps,
        seconds_per_step=statistics.median(watch.seconds),
        training_seconds=sum(watch.seconds),
        peak_bytes=peak,
        loss=watch.points(history, "loss"),
        accuracy=watch.points(history, "eval_accuracy"),
    )


def at_least(least: int) -> Callable[[str], int]:
    """An argparse type; its name is what argparse calls it in a message."""

    def number(text: str) -> int:
        if int(text) < least:
            raise ValueError
        return int(text)

    number.__name__ = f"integer >= {least}:"
    return number


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} (must be a finite number > 0)")
    return value


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; argparse exits with a message that names an option that is wrong."""

    parser = argparse.ArgumentParser(
        description="Fine-tune a pretrained MiniLM on docstring topics with forward passes only, and with AdamW for comparison.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--seed", type=at_least(0), default=0, help="of the order of the texts and of the perturbations")
    which.add_argument("--seeds", type=at_least(0), nargs="+", metavar="SEED", help="one whole run for each of several seeds")
    parser.add_argument("--steps", type=at_least(1), default=300, help="forward-only steps")
    parser.add_argument("--adamw-steps", type=at_least(1), default=60, help="AdamW steps")
    parser.add_argument("--lr", type=positive, default=2e-4, help="forward-only learning rate, decayed linearly to 0")
    parser.add_argument("--eps", type=positive, default=1e-2, help="how far the weights are moved to both sides")
    parser.add_argument("--evaluations", type=at_least(1), default=4, help="on the held-out texts, while training")
    parser.add_argument("--held-out", type=at_least(1), metavar="N", help="evaluate on so many held-out texts only")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for logs and plot, a new one inside for every run")
    parser.add_argument("--json", type=Path, metavar="PATH", help="also write all figures, versions and hardware there")
    options = parser.parse_args(arguments)
    options.seeds = options.seeds or [options.seed]
    return options


def demo(options: argparse.Namespace) -> list[Curve]:
    """Everything from the texts to the plot."""
    began = time.perf_counter()
    model, tokenizer = minilm.load(list(docstring_topics.TOPICS))
    task = make_task(tokenizer, options.held_out)
    size = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"MiniLM, {size / 1e6:.1f} M weights, all trained; {len(task.train)} docstrings to train on, {len(task.held_out)} held out.")
    print(f"{FORWARD_ONLY}: {options.steps} steps of {BATCH} texts with ZOTrainer. {ADAMW}: {options.adamw_steps} steps with Trainer.\n")
    folder = options.out / time.strftime("%Y%m%d-%H%M%S")
    inference = measure_inference(options, task, folder)
    curves = []
    for seed in options.seeds:
        curves.append(run(FORWARD_ONLY, options, seed, options.steps, task, folder))
        curves.append(run(ADAMW, options, seed, options.adamw_steps, task, folder))
    print("\n" + table(curves, inference))
    plot(curves, inference, folder / "demo.png")
    if options.json is not None:
        write_json(curves, inference, vars(options), options.json, time.perf_counter() - began)
    print(f"\nPlot          {folder / 'demo.png'}")
    print(f"Logs          tensorboard --logdir {folder / 'tensorboard'}")
    print(f"Took          {time.perf_counter() - began:.0f} s")
    return curves


def main(arguments: Sequence[str]) -> int:
    """The exit status: 0, 1 after an error that has a message, 130 after Ctrl-C."""
    options = parse(arguments)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        demo(options)
    except KeyboardInterrupt:
        print("\nStopped by Ctrl-C. The weights on disk are untouched; logs up to here are in", options.out, file=sys.stderr)
        return 130
    except (minilm.ModelError, DivergenceError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
