"""SIGKILL at random instants of small runs with TrajectoryLog, in both hosts: every continued run must end as the uninterrupted one.

python benchmarks/kill_resume.py --kills 100 --json benchmarks/results/kill_resume.json
python benchmarks/kill_resume.py --hosts hf --kills 5 --weights inplace

python benchmarks/kill_resume.py --weights offload --kills 50 --json benchmarks/results/kill_resume_offload.json

Half of the kills come after a random time. The others come inside something short: in the middle of writing a record, a base file or a
checkpoint, in an update, or in a forward pass, at a random occurrence of it. With --weights offload also in the middle of writing a block
to a slot, around its stamp, and in a flush; each kind of run (VARIANTS) is killed so often, and must end as that with weights="exact".
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("ZO_LIGHTNING_COMPILE", "0")  # a compiler would have to be started again by every process
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import lightning as L
import torch
import transformers
from kill_offload import PLACES as IN_FILES
from kill_offload import count_stamps, die, die_offloaded, stamps_of
from lightning.pytorch.callbacks import ModelCheckpoint
from measure import environment, write
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from zo_lightning import ZOStrategy
from zo_lightning.callbacks import SparseMask, TrajectoryLog, WeightOffload
from zo_lightning.engine.evaluation import Evaluator
from zo_lightning.engine.residency import Residency
from zo_lightning.engine.trajectory import read_log, writer
from zo_lightning.engine.trajectory.comparing import NAME
from zo_lightning.hf_integration import ZOConfig, ZOTrainer

STEPS, EVERY, BATCH = 30, 7, 4
PLACES = {"forward": 2 * STEPS, "update": STEPS, "record": STEPS, "checkpoint": 9}
"""What is interrupted in the middle, and at most how many of it a run has."""
OF_OFFLOAD = dict(zip(IN_FILES, (5 * STEPS, 5 * STEPS, STEPS // 2), strict=True))
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"mask": True, "dtype": "bfloat16"},
    "accumulated": {"logs": True},
    "stamps alone": {"mask": True, "quiet": True},
}
"""With --weights offload. The last one has no checkpoints, no validation and no base file, so that all goes on from stamps."""


class Classifier(L.LightningModule):
    """BatchNorm, dropout, a schedule and, if asked, logged values."""

    def __init__(self, logs: bool) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Dropout(0.1)) for _ in range(3)]
        norm = [nn.BatchNorm1d(12)] if logs else []
        self.net = nn.Sequential(nn.Linear(8, 12), *norm, nn.Sequential(*blocks), nn.Linear(12, 3))
        self.logs = logs

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0].to(self.dtype)).float(), batch[1])
        if self.logs:
            self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0].to(self.dtype)).float(), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-2, weight_decay=1e-3)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-2, STEPS), "interval": "step"}]


def weights_seed(folder: Path) -> int:
    """A run that is started again makes other weights: those that it goes on with are on the disk, or it ends differently."""
    return random.SystemRandom().getrandbits(30) if (folder / NAME).exists() else 0


def callbacks_of(folder: Path, options: argparse.Namespace) -> list[Any]:
    """A run that was killed between its end and the script's own saving is continued as well."""
    found: list[Any] = [TrajectoryLog(resume=True if over(folder) else "auto", save_base=not options.quiet)]
    if options.mask:
        found.append(SparseMask("small_weights", 0.3, refresh=4, summary=False))
    if options.weights == "offload":
        found.append(WeightOffload(folder / "tier"))
    return found


def weights_of(options: argparse.Namespace) -> str:
    """The callback says what "offload" is."""
    return "auto" if options.weights == "offload" else str(options.weights)


def lightning_run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """An ordinary script; the final state."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(44, 8), torch.randint(0, 3, (44,)))
    torch.manual_seed(weights_seed(folder))
    module = Classifier(options.logs)
    torch.manual_seed(1)
    watching = callbacks_of(folder, options)
    if not options.quiet:
        watching.append(ModelCheckpoint(every_n_train_steps=EVERY, save_top_k=2, monitor="step", mode="max"))
    trainer = L.Trainer(
        strategy=ZOStrategy(weights=weights_of(options), eps=1e-2),
        precision="bf16-true" if options.dtype == "bfloat16" else "32-true",
        max_steps=STEPS,
        accumulate_grad_batches=2 if options.logs else 1,
        val_check_interval=5,
        limit_val_batches=0 if options.quiet else 1.0,
        enable_checkpointing=not options.quiet,
        default_root_dir=folder,
        callbacks=watching,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(module, DataLoader(data, batch_size=BATCH, shuffle=True), DataLoader(data, batch_size=22))
    schedule: Any = trainer.lr_scheduler_configs[0].scheduler
    loss = float(trainer.callback_metrics.get("val_loss", 0.0))
    counters = {"step": trainer.global_step, "epoch": trainer.current_epoch, "lr": schedule.get_last_lr(), "loss": loss}
    return {"weights": module.state_dict(), "counters": counters}


def hf_run(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The same with a ZOTrainer over a small GPT-2."""
    transformers.set_seed(weights_seed(folder))
    shape: dict[str, Any] = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 40, "n_positions": 16}
    model: Any = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=0, eos_token_id=0))
    model = model.to(torch.bfloat16 if options.dtype == "bfloat16" else torch.float32)
    transformers.set_seed(1)
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(0, 40, (44, 8))]
    args = ZOConfig(
        str(folder),
        learning_rate=1e-3,
        lr_scheduler_type="linear",
        warmup_steps=4,
        weight_decay=1e-3,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=2 if options.logs else 1,
        save_strategy="no" if options.quiet else "steps",
        save_steps=EVERY,
        save_total_limit=2,
        eval_strategy="no" if options.quiet else "steps",
        eval_steps=5,
        logging_steps=5,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        zo_weights=weights_of(options),
        zo_eps=1e-2,
    )
    trainer = ZOTrainer(model, args, train_dataset=rows, eval_dataset=rows[:8], callbacks=callbacks_of(folder, options))
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train()
    optimizer = trainer.zo_optimizer
    counters = {"step": trainer.state.global_step, "epoch": trainer.state.epoch, "passes": optimizer.forward_passes}
    return {"weights": model.state_dict(), "counters": counters}


RUNS: dict[str, Callable[[Path, argparse.Namespace], dict[str, Any]]] = {"lightning": lightning_run, "hf": hf_run}


def die_inside(place: str, occurrence: int) -> None:
    """Let this process be killed in the middle of the n-th forward pass, update, record or checkpoint."""
    left = [occurrence]

    def now() -> bool:
        left[0] -= 1
        return left[0] == 0

    if place == "forward":
        one = Evaluator._one

        def evaluated(*args: Any) -> Any:
            result = one(*args)
            if now():
                die()
            return result

        Evaluator._one = evaluated  # type: ignore[method-assign,assignment]
    elif place == "update":
        update = Residency.update

        def updated(self: Residency, change: Any) -> None:
            if now():
                half = type(self).__new__(type(self))
                half.__dict__.update(self.__dict__)
                half.trained = half.trained[: len(half.trained) // 2]
                update(half, change)
                die()
            update(self, change)

        Residency.update = updated  # type: ignore[method-assign]
    elif place == "record":
        plain = writer._write

        def written(number: int, data: bytes) -> None:
            if now():
                os.write(number, data[: random.randrange(len(data))])
                die()
            plain(number, data)

        writer._write = written
    elif place in OF_OFFLOAD:
        die_offloaded(place, now)
    else:
        save = torch.save

        def saved(thing: Any, file: Any, *args: Any, **kwargs: Any) -> None:
            save(thing, file, *args, **kwargs)
            if isinstance(file, Path) and file.suffix == ".tmp":  # the result, which comes after the run
                return
            if now():
                if isinstance(file, (str, os.PathLike)):
                    os.truncate(file, os.path.getsize(file) // 2)
                die()

        torch.save = saved  # type: ignore[assignment]


def child(host: str, folder: Path, options: argparse.Namespace, plan: tuple[str, int] | None) -> int:
    """Start the run in a process of its own; its id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        silent = os.open(folder.parent / f"{folder.name}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        warnings.simplefilter("ignore")
        if plan is not None:
            die_inside(*plan)
        count_stamps(folder.parent / f"{folder.name}.stamps")
        result = RUNS[host](folder, options)
        torch.save(result, folder.parent / f"{folder.name}.tmp")
        os.replace(folder.parent / f"{folder.name}.tmp", folder.parent / f"{folder.name}.pt")
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finished(pid: int, within: float) -> int | None:
    """Its wait status, or None where it still runs after so many seconds."""
    until = time.monotonic() + within
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        if time.monotonic() > until:
            return None
        time.sleep(0.002)


def uninterrupted(host: str, folder: Path, options: argparse.Namespace) -> tuple[dict[str, Any], float]:
    """The run as it should be, and how long it takes."""
    began = time.monotonic()
    status = finished(child(host, folder, options, None), 600)
    if status != 0:
        raise RuntimeError(f"The uninterrupted run failed:\n{(folder.parent / f'{folder.name}.out').read_text()}")
    return torch.load(folder.parent / f"{folder.name}.pt"), time.monotonic() - began


def trial(
    host: str, folder: Path, options: argparse.Namespace, seconds: float, dice: random.Random, places: Counter[str]
) -> dict[str, Any]:
    """One run that is killed and started again until it ends; its result. `places` counts the kills that came to pass."""
    kills = 0
    for attempt in range(50):
        aimed = (options.places is not None or dice.random() < 0.5) and attempt < 3
        plan = None
        if aimed:
            places_here = PLACES | (OF_OFFLOAD if options.weights == "offload" else {})
            place = dice.choice(options.places or list(places_here))
            plan = (place, dice.randint(1, places_here[place]))
        pid = child(host, folder, options, plan)
        timed = not aimed and attempt < 3
        status = finished(pid, dice.uniform(0.0, seconds) if timed else 600)
        if status is None:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            places["any time"] += 1
            kills += 1
        elif status == signal.SIGKILL:
            places[plan[0] if plan else "any time"] += 1
            kills += 1
        elif status != 0:
            raise RuntimeError(f"A continued run failed:\n{(folder.parent / f'{folder.name}.out').read_text()[-4000:]}")
        else:
            break
    result: dict[str, Any] = torch.load(folder.parent / f"{folder.name}.pt")
    result["kills"] = kills
    return result


def over(folder: Path) -> bool:
    """Whether the log says that the run ended by itself."""
    return (folder / NAME).exists() and read_log(folder / NAME).end is not None


def differing(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    """What is not the same, bit for bit."""
    names = [name for name, tensor in left["weights"].items() if not torch.equal(tensor, right["weights"][name])]
    return names + [
        f"{key}: {value} / {right['counters'][key]}" for key, value in left["counters"].items() if value != right["counters"][key]
    ]


def measure(host: str, options: argparse.Namespace, root: Path) -> dict[str, Any]:
    """Kill runs of one host until there were enough."""
    dice, places, runs, bad = random.Random(options.seed), Counter[str](), 0, list[str]()
    kept = argparse.Namespace(**{**vars(options), "weights": "exact" if options.weights == "offload" else options.weights})
    right, seconds = uninterrupted(host, root / f"{host}-whole", kept)
    stamps = Counter[str]()
    while sum(places.values()) < options.kills:
        folder = root / f"{host}-{runs}"
        folder.mkdir()
        got = trial(host, folder, options, seconds, dice, places)
        wrong = differing(right, got)
        bad += [f"run {runs}: {', '.join(wrong)}"] if wrong else []
        runs += 1
        stamps += stamps_of(root / f"{folder.name}.stamps")
        if not wrong:
            shutil.rmtree(folder)
    row = {"runs": runs, "kills": dict(places), "steps": STEPS, "different": bad, **({"starts": dict(stamps)} if stamps else {})}
    print(
        f"{host:10} {json.dumps(row.get('starts', {}))} {runs} runs, kills: {json.dumps(row['kills'])}, ended differently: {len(bad)}",
        *bad,
        sep="\n",
        flush=True,
    )
    return row


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hosts", nargs="+", choices=tuple(RUNS), default=list(RUNS))
    parser.add_argument("--kills", type=int, default=100, help="in each host")
    parser.add_argument(
        "--places", nargs="+", choices=(*PLACES, *OF_OFFLOAD), default=None, help="only in the middle of these, at no random time"
    )
    parser.add_argument("--weights", choices=("exact", "copy", "inplace", "auto", "offload"), default="exact")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--logs", action=argparse.BooleanOptionalAction, default=False, help="BatchNorm, logged losses, accumulation")
    parser.add_argument("--mask", action=argparse.BooleanOptionalAction, default=False, help="small weights, chosen anew every 4 steps")
    parser.add_argument("--quiet", action=argparse.BooleanOptionalAction, default=False, help="no checkpoint, validation and base file")
    parser.add_argument("--variants", nargs="+", choices=tuple(VARIANTS), default=list(VARIANTS), help="with --weights offload")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Kill, continue, compare; the exit status of the command is 1 where a run ended differently."""
    options = parse(arguments)
    torch.set_num_threads(1)
    rows = {}
    for host in options.hosts:
        for index, variant in enumerate(options.variants if options.weights == "offload" else [""]):
            own = argparse.Namespace(**{**vars(options), **VARIANTS.get(variant, {}), "seed": options.seed + index})
            with tempfile.TemporaryDirectory() as root:
                rows[f"{host}, {variant}" if variant else host] = measure(host, own, Path(root))
    chosen = {key: value for key, value in vars(options).items() if key != "json"}
    result = {"environment": environment("cpu"), "options": chosen, "hosts": rows}
    write(options.json, result)
    return result


if __name__ == "__main__":
    sys.exit(any(row["different"] for row in main()["hosts"].values()))
