"""WeightOffload under both hosts: the run of weights="exact", also when it is cut off, saved, loaded, evaluated and logged in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning_models
import pytest
import torch
from hf_tools import bert, llama, losses, same, texts, tokens, trainer, weights
from keeper_tools import equal
from lightning_models import HOST_WARNINGS, NAMES, lightning, lit, loader, loss_of, net
from peft import LoraConfig, get_peft_model
from scissors import CutError, Scissors

from zo_lightning.callbacks import SparseMask, TrajectoryLog, WeightOffload
from zo_lightning.engine.offload import DiskTier
from zo_lightning.engine.residency import Offloaded
from zo_lightning.engine.trajectory import read_log
from zo_lightning.strategy import ZOStrategy

pytestmark = [
    pytest.mark.filterwarnings(text) for text in (*HOST_WARNINGS, "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
]
pytestmark += [pytest.mark.filterwarnings(r"ignore:The run in .* was cut off:zo_lightning.engine.messages.ZOWarning")]


def modules(name: str) -> Any:
    class Validated(lit(name)):  # type: ignore[misc]
        """With validation and its losses."""

        seen: list[float]

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.seen.append(float(loss_of(self.net, batch)))

    return Validated


def fit(folder: Path, *callbacks: Any, name: str = NAMES[0], seed: int = 0, path: Any = None, **options: Any) -> Any:
    torch.manual_seed(seed)
    module = modules(name)(net(), lambda m: torch.optim.SGD(m.parameters(), lr=0.01, weight_decay=0.1))
    module.seen = []
    if seed:
        with torch.no_grad():
            for weight in module.parameters():
                weight.normal_()
    torch.manual_seed(0)
    saving = any("ModelCheckpoint" in type(one).__name__ for one in callbacks)
    kept = "auto" if any(isinstance(one, WeightOffload) for one in callbacks) else "exact"
    host = lightning_models.trainer(
        folder,
        name,
        strategy=ZOStrategy(weights=kept, eps=1e-2),
        callbacks=list(callbacks),
        enable_checkpointing=saving,
        **{"max_epochs": 2, "val_check_interval": 3, **options},
    )
    try:
        host.fit(module, loader(shuffle=True), loader(32), ckpt_path=path)
    except CutError:
        return None
    return module


@pytest.mark.parametrize("name", NAMES)
def test_lightning_makes_the_exact_steps(name: str, tmp_path: Path) -> None:
    whole = fit(tmp_path / "exact", TrajectoryLog(), name=name)
    streamed = fit(tmp_path / "streamed", WeightOffload(), TrajectoryLog(), name=name)
    assert equal(streamed.state_dict(), whole.state_dict())
    assert streamed.seen == whole.seen
    exact, offload = (read_log(next((tmp_path / run).glob("**/trajectory.zolog"))) for run in ("exact", "streamed"))
    assert offload.steps == exact.steps
    assert [type(record) for record in offload.records] == [type(record) for record in exact.records]


@pytest.mark.parametrize("save", [None, 2])
@pytest.mark.parametrize("cut", [1, 4, 11])
def test_a_lightning_run_that_is_killed_goes_on(cut: int, save: int | None, tmp_path: Path) -> None:
    def more() -> list[Any]:
        kept = [lightning().callbacks.ModelCheckpoint(every_n_train_steps=save, save_top_k=-1)] if save else []
        return [WeightOffload(), SparseMask("small_weights", 0.3, refresh=3, summary=False), TrajectoryLog(), *kept]

    whole = fit(tmp_path / "whole", *more()[1:])
    assert fit(tmp_path / "run", *more(), Scissors(cut)) is None
    again = fit(tmp_path / "run", *more(), seed=7)
    assert equal(again.state_dict(), whole.state_dict())


@pytest.fixture
def abandoned(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The processes of runs that were cut off are gone, and with them the locks of their folders."""
    tiers: list[DiskTier] = []
    make = DiskTier.__init__
    monkeypatch.setattr(DiskTier, "__init__", lambda self, *given: (tiers.append(self), make(self, *given))[1])
    return lambda: [tier.close() for tier in tiers] and None


@pytest.mark.parametrize("name", NAMES)
def test_a_lightning_run_goes_on_from_its_files(
    name: str, tmp_path: Path, abandoned: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """BatchNorm makes evaluations again, on the weights of their step: stamps are taken, and given up for the base file."""
    taken = []
    adopt = Offloaded.adopt
    monkeypatch.setattr(
        Offloaded, "adopt", lambda self, made, found, origin: (taken.append(len(found)), adopt(self, made, found, origin))[1]
    )

    def more() -> list[Any]:
        return [WeightOffload(tmp_path / "tier"), SparseMask("small_weights", 0.3, refresh=3, summary=False), TrajectoryLog()]

    whole = fit(tmp_path / "whole", *more()[1:], name=name, limit_val_batches=0)
    for seed, cut in ((0, 4), (7, 7), (8, 9)):
        assert fit(tmp_path / "run", *more(), Scissors(cut), name=name, seed=seed, limit_val_batches=0) is None
        abandoned()
    again = fit(tmp_path / "run", *more(), name=name, seed=9, limit_val_batches=0)
    assert equal(again.state_dict(), whole.state_dict())
    assert taken == [4, 4, 4]


def test_lightning_accumulates(tmp_path: Path) -> None:
    whole = fit(tmp_path / "exact", accumulate_grad_batches=4)
    streamed = fit(tmp_path / "streamed", WeightOffload(), accumulate_grad_batches=4)
    assert equal(streamed.state_dict(), whole.state_dict())


# ---- Hugging Face


def lora(seed: int) -> Any:
    base = llama(0)
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))


MODELS: dict[str, Any] = {"bert": (bert, texts), "bfloat16": (lambda seed: llama(seed, torch.bfloat16), tokens), "lora": (lora, tokens)}


def run(folder: Path, kind: str, *callbacks: Any, seed: int = 0, **given: Any) -> Any:
    make, data = MODELS[kind]
    own = {"max_steps": 6, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "logging_steps": 1, "zo_eps": 1e-2, **given}
    kept = {} if any(isinstance(one, WeightOffload) for one in callbacks) else {"zo_weights": "exact"}
    own = {"eval_strategy": "steps", "eval_steps": 2, **own}
    host = trainer(folder, make(seed), data=data(), callbacks=list(callbacks), eval_dataset=data(), **own, **kept)
    host.train()
    return host


@pytest.mark.parametrize("kind", MODELS)
def test_the_trainer_makes_the_exact_steps(kind: str, tmp_path: Path) -> None:
    whole, streamed = run(tmp_path / "exact", kind), run(tmp_path / "streamed", kind, WeightOffload())
    assert isinstance(streamed.zo_optimizer.residency, Offloaded)
    assert losses(streamed) == losses(whole)
    assert losses(streamed, "eval_loss") == losses(whole, "eval_loss")
    assert same(weights(streamed.model), weights(whole.model))
    assert all(value > 0 for value in losses(streamed, "zo/offload/gb_read"))
    written = losses(streamed, "zo/offload/gb_written")
    assert len(written) == 6
    share = max(written) / max(losses(streamed, "zo/offload/gb_read"))
    assert (share > 0.1) is (kind != "lora")  # a base of adapters is only read


@pytest.mark.parametrize("save", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_trainer_that_is_killed_goes_on(kind: str, save: bool, tmp_path: Path) -> None:
    given: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2} if save else {"save_strategy": "no"}
    whole = run(tmp_path / "whole", kind, TrajectoryLog(), **given)
    with pytest.raises(CutError):
        run(tmp_path / "run", kind, WeightOffload(), TrajectoryLog(), Scissors(5), **given)
    here = [WeightOffload()] if save else []  # exact weights go on as well
    again = run(tmp_path / "run", kind, *here, TrajectoryLog(), seed=9, **given)
    assert same(weights(again.model), weights(whole.model))


@pytest.mark.parametrize("kind", MODELS)
def test_a_trainer_goes_on_from_its_files(kind: str, tmp_path: Path, abandoned: Callable[[], None]) -> None:
    given: dict[str, Any] = {"save_strategy": "no", "eval_steps": 100}
    log = {"save_base": False}
    whole = run(tmp_path / "whole", kind, TrajectoryLog(), **given)
    for seed, cut in ((0, 3), (5, 5)):
        with pytest.raises(CutError):
            run(tmp_path / "run", kind, WeightOffload(tmp_path / "tier"), TrajectoryLog(**log), Scissors(cut), seed=seed, **given)
        abandoned()
    again = run(tmp_path / "run", kind, WeightOffload(tmp_path / "tier"), TrajectoryLog(**log), seed=0 if kind == "lora" else 9, **given)
    assert same(weights(again.model), weights(whole.model))


def test_ctrl_c_while_steps_are_made_again(tmp_path: Path, abandoned: Callable[[], None]) -> None:
    """What the folder has stays as it is."""
    given: dict[str, Any] = {"save_strategy": "no", "eval_steps": 100}
    whole = run(tmp_path / "whole", "bert", TrajectoryLog(), **given)
    for cut, error in ((5, CutError), (2, KeyboardInterrupt)):
        before = {path: path.read_bytes() for path in tmp_path.glob("tier/*")}
        with pytest.raises(error):
            run(tmp_path / "run", "bert", WeightOffload(tmp_path / "tier"), TrajectoryLog(save_base=False), Scissors(cut, error), **given)
        abandoned()
    assert before == {path: path.read_bytes() for path in tmp_path.glob("tier/*")}
    again = run(tmp_path / "run", "bert", WeightOffload(tmp_path / "tier"), TrajectoryLog(save_base=False), seed=9, **given)
    assert same(weights(again.model), weights(whole.model))


def test_what_the_trainer_saves_is_loaded_by_a_model_in_memory(tmp_path: Path) -> None:
    host = run(tmp_path, "bert", WeightOffload())
    host.save_model(str(tmp_path / "saved"))
    loaded = type(host.model).from_pretrained(tmp_path / "saved")
    assert same(weights(loaded), weights(host.model))


# ---- a device of its own


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Modules that somebody moves as a whole, but for the way home after a run."""
    found: list[Any] = []
    plain = torch.nn.Module.to

    def to(self: Any, *given: Any, **named: Any) -> Any:
        if any(isinstance(one, torch.device) for one in (*given, *named.values())):
            found.append(type(self).__name__)
        return plain(self, *given, **named)

    monkeypatch.setattr(torch.nn.Module, "to", to)
    return found


IN_MEMORY = {"tier": "memory"}


@pytest.mark.parametrize("name", NAMES)
def test_lightning_leaves_weights_in_memory_where_they_are(name: str, tmp_path: Path, moved: list[Any]) -> None:
    whole = fit(tmp_path / "exact", TrajectoryLog(), name=name)
    assert "Validated" in moved
    moved.clear()
    streamed = fit(tmp_path / "streamed", WeightOffload(**IN_MEMORY), TrajectoryLog(), name=name)
    assert "Validated" not in moved
    assert equal(streamed.state_dict(), whole.state_dict())
    assert streamed.seen == whole.seen
    exact, offload = (read_log(next((tmp_path / run).glob("**/trajectory.zolog"))) for run in ("exact", "streamed"))
    assert offload.steps == exact.steps


def test_lightning_runs_again_on_weights_in_memory(tmp_path: Path, moved: list[Any]) -> None:
    """fit, validate, fit: each sets the module up and tears it down."""
    results = []
    for more in ([], [WeightOffload(**IN_MEMORY)]):
        torch.manual_seed(0)
        module = modules(NAMES[0])(net(), lambda m: torch.optim.SGD(m.parameters(), lr=0.01))
        module.seen = []
        weights = "auto" if more else "exact"
        host = lightning_models.trainer(
            tmp_path, NAMES[0], strategy=ZOStrategy(weights=weights, eps=1e-2), callbacks=more, enable_checkpointing=False, max_epochs=1
        )
        moved.clear()
        host.fit(module, loader(), loader(32))
        host.validate(module, loader(32), verbose=False)
        host.fit_loop.max_epochs = 2
        host.fit(module, loader(), loader(32))
        assert ("Validated" in moved) is not bool(more)
        results.append((module.seen, module.state_dict()))
    assert results[0][0] == results[1][0]
    assert equal(results[0][1], results[1][1])


def test_the_module_knows_its_device() -> None:
    from zo_lightning.strategy.knobs import tell_device

    module = lit(NAMES[0])(net(), lambda m: None)
    tell_device(module, torch.device("cuda", 1))
    assert module.device == torch.device("cuda", 1)
    assert all(weight.device.type == "cpu" for weight in module.parameters())


@pytest.mark.parametrize("kind", MODELS)
def test_the_trainer_leaves_weights_in_memory_where_they_are(kind: str, tmp_path: Path, moved: list[Any]) -> None:
    whole = run(tmp_path / "exact", kind)
    assert type(whole.model).__name__ in moved
    moved.clear()
    streamed = run(tmp_path / "streamed", kind, WeightOffload(**IN_MEMORY))
    assert type(streamed.model).__name__ not in moved
    assert losses(streamed) == losses(whole)
    assert losses(streamed, "eval_loss") == losses(whole, "eval_loss")
    assert same(weights(streamed.model), weights(whole.model))


def test_the_trainer_evaluates_before_it_trains(tmp_path: Path) -> None:
    seen = []
    for more in ([], [WeightOffload(**IN_MEMORY)]):
        given = {} if more else {"zo_weights": "exact"}
        host = trainer(tmp_path, bert(0), data=texts(), eval_dataset=texts(), callbacks=more, max_steps=3, zo_eps=1e-2, **given)
        seen.append([host.evaluate()["eval_loss"]])
        assert isinstance(host.zo_optimizer.residency, Offloaded) if more else host.optimizer is None
        host.train()
        seen[-1] += [host.evaluate()["eval_loss"], *losses(host)]
    assert seen[0] == seen[1]


def test_the_trainer_leaves_the_weights_of_an_optimizer_that_streams(tmp_path: Path, moved: list[Any]) -> None:
    from zo_lightning.engine import ZOOptimizer
    from zo_lightning.engine.residency import Offload

    model = bert(0)
    optimizer = ZOOptimizer(model, lr=1e-3, weights=Offload(**IN_MEMORY))
    trainer(tmp_path, model, data=texts(), optimizers=(optimizer, None), max_steps=2).train()
    assert type(model).__name__ not in moved


def test_an_evaluation_that_would_move_the_model(tmp_path: Path) -> None:
    host = trainer(tmp_path, bert(0), data=texts(), callbacks=[WeightOffload()], bf16_full_eval=True, max_steps=1)
    with pytest.raises(ValueError, match=r"bf16_full_eval=True casts and moves the whole model for evaluation"):
        host.train()


# ---- mistakes


def test_another_weights_option_beside_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights='inplace' beside WeightOffload, which streams exact weights. Leave weights= out"):
        trainer(tmp_path, callbacks=[WeightOffload()], zo_weights="inplace").train()


def test_a_compiled_model(tmp_path: Path) -> None:
    from zo_lightning.engine import ZOOptimizer
    from zo_lightning.engine.residency import Offload

    model = net()
    model[0]._compiled_call_impl = model[0]._call_impl
    with pytest.raises(ValueError, match=r"works through hooks, which a compiled module \('0'\) never runs. Do not compile it"):
        ZOOptimizer(model, weights=Offload())
