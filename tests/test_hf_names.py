"""The name "zo", ZOConfig, the command line, and who trains first-order."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tools import arguments, bert, texts, trainer
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from zo_lightning.engine import SPSA, ZOOptimizer
from zo_lightning.engine.messages import ZOWarning
from zo_lightning.hf_integration import ZOConfig, ZOTrainer, optim_name


def test_the_name_is_known_and_stays_a_plain_string() -> None:
    optim_name.register()  # a second time changes nothing
    assert [member.value for member in OptimizerNames].count("zo") == 1
    assert type(OptimizerNames("zo")) is str
    assert type(TrainingArguments(output_dir="x", optim="zo", report_to="none").optim) is str
    with pytest.raises(ValueError, match="zoo"):
        OptimizerNames("zoo")


def test_saved_arguments_load_without_this_package(tmp_path: Path) -> None:
    torch.save(arguments(tmp_path), tmp_path / "training_args.bin")
    code = (
        "import sys, torch; args = torch.load(sys.argv[1], weights_only=False);"
        "print(args.optim, any(name.startswith('zo_lightning') for name in sys.modules))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "training_args.bin")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == ["zo", "False"]


def test_a_plain_trainer_names_what_to_use(tmp_path: Path) -> None:
    host = trainer(tmp_path, kind=Trainer)
    with pytest.raises(ValueError, match=r"ZOTrainer.*ZOTrainerMixin"):
        host.train()


@pytest.mark.parametrize("kind", [TrainingArguments, ZOConfig])
def test_command_line(kind: Any, tmp_path: Path) -> None:
    line = ["--output_dir", str(tmp_path), "--optim", "zo", "--report_to", "none"]
    (args,) = HfArgumentParser(kind).parse_args_into_dataclasses(line)
    assert args.optim == "zo"


def test_command_line_options(tmp_path: Path) -> None:
    line = [
        "--output_dir",
        str(tmp_path),
        "--report_to",
        "none",
        "--learning_rate",
        "1e-3",
        "--zo_eps",
        "1e-2",
        "--zo-queries",
        "3",
    ]
    line += ["--no_zo_dropout", "--zo_clip", "5", "--zo_safeguard", "none", "--zo_noise", "gaussian", "--zo_seed", "7"]
    (config,) = HfArgumentParser(ZOConfig).parse_args_into_dataclasses(line)
    host = ZOTrainer(bert(), config, train_dataset=texts())
    options = host.zo_options
    assert (options.eps, options.dropout, options.clip, options.safeguard) == (1e-2, False, 5.0, None)
    assert (options.noise, options.seed, config.optim) == ("gaussian", 7, "zo")
    assert host.create_optimizer().estimator.queries == 3


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("zo_eps", 0.0, "eps"),
        ("zo_queries", 0, "queries"),
        ("zo_noise", "cauchy", "rademacher"),
        ("zo_estimator", "magic", "spsa"),
        ("zo_weights", "elsewhere", "inplace"),
        ("zo_safeguard", "pray", "halve"),
        ("zo_lr", -1.0, "lr"),
        ("zo_clip", -1.0, "clip"),
        ("zo_max_nonfinite", 0, "max_nonfinite"),
    ],
)
def test_bad_values_are_named_before_a_model_is_built(option: str, value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        ZOConfig(output_dir=str(tmp_path), report_to="none", **{option: value})
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **{option: value})


def test_options_of_the_trainer_win_over_optim_args_over_the_config(tmp_path: Path) -> None:
    given = {
        "kind": ZOConfig,
        "zo_eps": 1e-1,
        "zo_seed": 1,
        "zo_clip": 3.0,
        "optim_args": "eps=1e-2, seed=2,dropout=no",
    }
    host = ZOTrainer(bert(), arguments(tmp_path, **given), train_dataset=texts(), zo_eps=1e-4)
    options = host.zo_options
    assert (options.eps, options.seed, options.clip, options.dropout) == (1e-4, 2, 3.0, False)


@pytest.mark.parametrize("text", ["epsilon=1", "eps", "eps=much", "dropout=perhaps"])
def test_bad_optim_args(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optim_args"):
        trainer(tmp_path, optim_args=text)


def test_unknown_option_of_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"zo_epsilon.*zo_eps"):
        trainer(tmp_path, zo_epsilon=1e-3)


def test_estimator_object(tmp_path: Path) -> None:
    host = trainer(tmp_path, zo_estimator=SPSA(queries=2))
    host.train()
    assert host.zo_optimizer.forward_passes == 4 * 2 * 2


def first_order(host: Any) -> bool:
    """Whether the trainer builds something else than a ZOOptimizer."""
    return not isinstance(host.create_optimizer(), ZOOptimizer)


def test_a_zo_trainer_is_forward_only_by_default_and_says_so_once(tmp_path: Path) -> None:
    args = arguments(tmp_path, optim="adamw_torch")
    with pytest.warns(ZOWarning, match=r"adamw_torch.*not used.*optim='zo'"):
        host = ZOTrainer(bert(), args, train_dataset=texts())
    assert not first_order(host)
    assert host.args.optim == "zo"
    assert args.optim == "adamw_torch"  # the user's object still serves an AdamW trainer
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        ZOTrainer(bert(), args, train_dataset=texts())
    assert not any("not used" in str(w.message) for w in said)


def test_without_arguments_forward_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.warns(ZOWarning, match="not used"):
        host = ZOTrainer(bert(), train_dataset=texts())
    with pytest.warns(ZOWarning, match="learning_rate=5e-05 is the default"):
        assert not first_order(host)


def test_first_order_when_the_trainer_is_told(tmp_path: Path) -> None:
    host = ZOTrainer(bert(), arguments(tmp_path), train_dataset=texts(), optim="adamw_torch")
    before = host.model.classifier.weight.detach().clone()
    host.train()
    assert first_order(host)
    assert isinstance(host.optimizer.optimizer, torch.optim.AdamW)
    assert "grad_norm" in host.state.log_history[0]
    assert not torch.equal(before, host.model.classifier.weight)


def test_first_order_when_a_zo_config_is_told(tmp_path: Path) -> None:
    assert first_order(ZOTrainer(bert(), arguments(tmp_path, ZOConfig, optim="sgd"), train_dataset=texts()))


def test_options_that_first_order_training_does_not_use_are_named(tmp_path: Path) -> None:
    with pytest.warns(ZOWarning, match="zo_eps.*do nothing"):
        ZOTrainer(bert(), arguments(tmp_path), train_dataset=texts(), optim="adamw_torch", zo_eps=1e-2)


def test_optim_of_the_trainer_asks_for_zo(tmp_path: Path) -> None:
    host = ZOTrainer(bert(), arguments(tmp_path, optim="adamw_torch"), train_dataset=texts(), optim="zo")
    assert not first_order(host)


def test_unknown_optim_of_the_trainer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="adamw_torsch"):
        ZOTrainer(bert(), arguments(tmp_path), train_dataset=texts(), optim="adamw_torsch")


def test_a_first_order_optimizer_object_is_refused(tmp_path: Path) -> None:
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"AdamW.*ZOOptimizer.*optim='adamw_torch'"):
        trainer(tmp_path, model, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="AdamW"):
        trainer(tmp_path, model, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": 1e-3}))


def test_a_zo_optimizer_object_is_used(tmp_path: Path) -> None:
    model = bert()
    optimizer = ZOOptimizer(model, lr=1e-3, eps=1e-2)
    host = trainer(tmp_path, model, optimizers=(optimizer, None))
    host.train()
    assert host.zo_optimizer is optimizer
    assert optimizer.steps == 4


def test_the_optimizer_before_training(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="create_optimizer"):
        _ = trainer(tmp_path).zo_optimizer
