"""SVRG under Lightning and Hugging Face: the engine's steps, resumed bit for bit between two anchors, with step logs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hf_tools
import pytest
from hf_tools import bert
from lightning_models import HOST_WARNINGS, Recorder, lit, loader, loss_of, net, same, state, trainer

from zo_lightning import ZOOptimizer, ZOStrategy
from zo_lightning.callbacks import TrajectoryLog
from zo_lightning.engine import SVRG
from zo_lightning.engine.trajectory import load_base, read_log, verify
from zo_lightning.hf_integration import ZOConfig

pytestmark = [pytest.mark.filterwarnings(text) for text in HOST_WARNINGS]
METHOD = SVRG(2, refresh=5, anchor=2)


@pytest.mark.parametrize("half", [1, 4])
def test_lightning_makes_the_steps_of_the_plain_loop_and_goes_on_from_a_checkpoint(half: int, tmp_path: Path) -> None:
    """From behind a step that measures, and from behind one that moves; the epoch has eight steps."""
    model, data = net(), list(loader())
    optimizer = ZOOptimizer(model, lr=1e-3, estimator=METHOD)
    for step in range(12):
        optimizer.step(lambda step=step: loss_of(model, data[step % len(data)]))
    for path, steps in ((None, 12), (None, half), (tmp_path / "half.ckpt", 12)):
        module, recorder = lit()(), Recorder()
        host = trainer(tmp_path, strategy=ZOStrategy(lr=1e-3, estimator=METHOD), max_steps=steps, callbacks=[recorder])
        host.fit(module, loader(), ckpt_path=path)
        if steps == half:
            host.save_checkpoint(tmp_path / "half.ckpt")
            continue
        assert same(state(module.net), state(model))
        measuring = [report.step for report in recorder.reports if report.lr == 0]
        assert measuring == [step for step in (0, 5, 10) if step >= 12 - len(recorder.reports)]


@pytest.mark.parametrize("steps", [3, 6])
def test_hugging_face_goes_on_from_a_checkpoint(steps: int, tmp_path: Path) -> None:
    def run(**given: Any) -> Any:
        saving = {"save_strategy": "steps", "save_steps": steps, "max_steps": 9, "gradient_accumulation_steps": 2}
        host = hf_tools.trainer(tmp_path, bert(), zo_estimator=METHOD, zo_lr=1e-3, **saving)
        host.train(**given)
        return host

    whole = run()
    rest = run(resume_from_checkpoint=str(tmp_path / f"checkpoint-{steps}"))
    assert hf_tools.same(hf_tools.weights(rest.model), hf_tools.weights(whole.model))
    assert hf_tools.losses(whole, "zo/projected_grad") == hf_tools.losses(rest, "zo/projected_grad")


def test_hugging_face_takes_the_name_and_keeps_a_log(tmp_path: Path) -> None:
    model = bert(dropout=0.0)
    args = hf_tools.arguments(tmp_path, ZOConfig, zo_estimator="svrg", zo_queries=2, max_steps=8)
    host = hf_tools.trainer(tmp_path, model, args=args, callbacks=[TrajectoryLog(tmp_path / "log")])
    host.train()
    assert host.zo_optimizer.estimator == SVRG(2)
    log = read_log(tmp_path / "log" / "trajectory.zolog")
    assert [len(step.values) for step in log.steps] == 8 * [8]
    assert verify(load_base(tmp_path / "log" / str(log.segments[0].base)), log).ok


def test_weight_decay_is_refused_where_it_is_given(tmp_path: Path) -> None:
    for make in (
        lambda: ZOStrategy(lr=1e-3, weight_decay=0.1, estimator="svrg"),
        lambda: hf_tools.arguments(tmp_path, ZOConfig, zo_estimator="svrg", zo_weight_decay=0.1),
        lambda: hf_tools.trainer(tmp_path, bert(), zo_estimator="svrg", weight_decay=0.1).create_optimizer(),
    ):
        with pytest.raises(ValueError, match=r"Invalid weight_decay: 0.1 with estimator=SVRG"):
            make()
