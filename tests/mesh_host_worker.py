"""One of two processes of test_mesh_hosts, as torchrun starts them: trains each case under a host and saves what it ends with."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hf_tools import bert, texts
from hf_tools import trainer as hf_trainer
from lightning_models import Recorder, lit, loader, rows
from lightning_models import trainer as lightning_trainer
from scissors import Scissors
from torch.utils.data import DistributedSampler

from zo_lightning import ZODDPStrategy, ZOStrategy
from zo_lightning.callbacks import RankEquality, Run, TrajectoryLog, ZOCallback
from zo_lightning.engine import SPSA, StepReport

CASES: dict[str, dict[str, Any]] = {
    "sides": {"parallel": "perturbation=2"},
    "queries": {"parallel": "perturbation=2", "estimator": SPSA(3)},
    "seeds": {"parallel": "seeds=2"},
}
RANK = int(os.environ.get("RANK", "0"))
TOGETHER = "WORLD_SIZE" in os.environ


class Spoiler(ZOCallback):
    """Flips a bit of a weight on rank 1 after the third step."""

    def on_zo_step(self, run: Run, report: StepReport) -> None:
        if RANK and report.step == 2:
            list(run.module.parameters())[-2].detach().view(torch.uint8).numpy()[0, -2] ^= 64


class Logging(lit()):  # type: ignore[misc]
    """Says what it sees; on rank 1 it may fail."""

    fails = False

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.seen: list[float] = []

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(batch[0].double().sum()))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.fails and RANK and batch_idx == 2:
            raise ArithmeticError("what rank 1 says")
        return super().training_step(batch, batch_idx)


def in_lightning(
    case: dict[str, Any], folder: Path, own: bool = False, fails: bool = False, size: int = 4, callbacks: Sequence[Any] = ()
) -> Any:
    module, recorder = Logging(), Recorder()
    module.fails = fails
    strategy = ZODDPStrategy(**case) if TOGETHER else ZOStrategy(**{k: v for k, v in case.items() if k != "parallel"})
    given = {"max_steps": 5, "callbacks": [recorder, *callbacks], "strategy": strategy, "use_distributed_sampler": not own}
    host = lightning_trainer(folder, **given, **({"devices": 2} if TOGETHER else {}))
    if own:
        torch.manual_seed(RANK)
    # Lightning's own, of one stream of data
    sampler = None if TOGETHER else DistributedSampler(rows(), 1, 0, shuffle=True, seed=0)
    host.fit(module, loader(size, sampler=sampler, shuffle=own or None))
    return {"weights": {k: v.clone() for k, v in module.net.state_dict().items()}, "values": recorder.values, "seen": module.seen}


def in_hugging_face(
    case: dict[str, Any],
    folder: Path,
    shuffled: bool = True,
    own: bool = False,
    fails: bool = False,
    size: int = 4,
    callbacks: Sequence[Any] = (),
) -> Any:
    recorder, model = Scissors(), bert(0, dropout=0.1, dtype=torch.float64)
    given: dict[str, Any] = {f"zo_{name}": value for name, value in case.items() if TOGETHER or name != "parallel"}
    given |= {"max_steps": 5, "per_device_train_batch_size": size, "callbacks": [recorder, *callbacks]}
    given |= {"ddp_backend": "gloo"} if TOGETHER else {}
    host = hf_trainer(folder, model, data=texts(), **given)
    seen: list[float] = []
    collate, compute_loss, calls = host.data_collator, host.compute_loss, 0

    def failing(*given: Any, **how: Any) -> Any:
        nonlocal calls
        calls += 1
        if fails and RANK and calls == 4:
            raise ArithmeticError("what rank 1 says")
        return compute_loss(*given, **how)

    def collated(rows: Any) -> Any:
        batch = collate(rows)
        if own and RANK:
            batch["input_ids"] = batch["input_ids"].flip(0)
        seen.append(float(batch["input_ids"].sum()))
        return batch

    host.data_collator, host.compute_loss = collated, failing
    host.train()
    return {"weights": host.model.state_dict(), "values": [report.values for report in recorder.reports], "seen": seen}


HOSTS = {"lightning": in_lightning, "hf": in_hugging_face}


def main(folder: Path, host: str) -> None:
    warnings.simplefilter("ignore")
    train = HOSTS[host]
    found: dict[str, Any] = {name: train(case, folder / name) for name, case in CASES.items()}
    said = {}
    for what in ("own", "fails"):
        try:
            train(CASES["sides"], folder / what, **{what: True})
            said[what] = "nothing"
        except Exception as error:
            said[what] = f"{type(error).__name__}: {error}"
    healing = RankEquality(every=2, heal=True)
    found["healed"] = train(CASES["sides"], folder / "healed", callbacks=[TrajectoryLog(), Spoiler(), healing])
    found["healed"]["healed"] = healing.healed
    try:
        train(CASES["sides"], folder / "apart", callbacks=[Spoiler(), RankEquality(every=3)])
    except Exception as error:
        said["apart"] = f"{type(error).__name__}: {error}"
    torch.save({**found, "said": said}, folder / f"{host}.{RANK}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
