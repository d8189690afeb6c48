"""The snippets of README and docs run, their links lead somewhere, and what they list is what there is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_tools import tokenizer
from ranks import free_port
from torch import nn

from zo_lightning.callbacks import ZOMonitor
from zo_lightning.engine.estimators import ESTIMATORS
from zo_lightning.engine.options import EngineOptions
from zo_lightning.engine.updates import RULES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def snippets(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def readers_project() -> dict[str, Any]:
    """What the snippets take for granted: a model, data, a LightningModule, as a reader has them."""
    lightning = pytest.importorskip("lightning")
    transformers = pytest.importorskip("transformers")

    class LitModel(lightning.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(4, 2)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, y = batch
            loss = nn.functional.cross_entropy(self.net(x), y)
            self.log("loss", loss)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    data = torch.utils.data.TensorDataset(torch.randn(32, 4), torch.randint(0, 2, (32,)))
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=2
    )
    examples = [{"input_ids": torch.randint(0, 50, (6,)), "labels": torch.tensor(i % 2)} for i in range(32)]
    return {
        "L": lightning,
        "LitModel": LitModel,
        "train_loader": torch.utils.data.DataLoader(data, batch_size=8),
        "model": transformers.BertForSequenceClassification(config),
        "train_dataset": examples,
        "tokenizer": tokenizer(),
        "net": nn.Linear(4, 2),
        "loss_fn": nn.functional.cross_entropy,
        "batches": [(torch.randn(8, 4), torch.randint(0, 2, (8,))) for _ in range(3)],
    }


@pytest.fixture
def tables() -> Iterator[None]:
    """A snippet may add a row to a table of methods, which is gone behind the test."""
    before = [(table, dict(table)) for table in (ESTIMATORS, RULES)]
    yield
    for table, rows in before:
        table.clear()
        table.update(rows)  # type: ignore[arg-type]


def test_tests_that_pages_name_are_there() -> None:
    named = {name for page in PAGES for name in re.findall(r"`(tests/[\w/]+\.py::\w+)`", page.read_text())}
    assert len(named) > 15
    for name in named:
        file, _, test = name.partition("::")
        assert f"\ndef {test}(" in (ROOT / file).read_text(), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page)], ids=lambda page: page.name)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RANK": "0", "WORLD_SIZE": "1"}  # of one process
    names = readers_project()
    codes = snippets(page)
    assert codes
    for code in codes:
        with monkeypatch.context() as environment:
            for name, value in torchrun.items() if "init_process_group" in code else ():
                environment.setenv(name, value)
            exec(compile(code, f"{page.name}", "exec"), names)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_lists_every_option_with_its_default() -> None:
    table = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE))
    defaults = {field.name: field.default for field in dataclasses.fields(EngineOptions)}
    assert set(table) == set(defaults)
    for name, default in defaults.items():
        shown = table[name].strip("` ")
        if name in ("lr", "weight_decay"):
            assert shown == "the host's"
        elif name == "estimator":
            assert shown == "SPSA(queries=1)"
        elif isinstance(default, float):
            assert float(shown) == default
        else:
            assert shown.strip('"') == str(default)


def test_metrics_page_lists_every_chart() -> None:
    from zo_lightning import ZOOptimizer
    from zo_lightning.callbacks import Run

    net = nn.Linear(3, 1)
    optimizer = ZOOptimizer(net)
    monitor = ZOMonitor()
    monitor.on_run_start(Run(optimizer, net, "hf", None, True, lambda: optimizer.steps))
    optimizer.step(lambda: net(torch.ones(2, 3)).sum())
    assert optimizer.report is not None
    monitor.on_zo_step(Run(optimizer, net, "hf", None, True, lambda: optimizer.steps), optimizer.report)
    charts = set(monitor.metrics())
    rows = [row for row in (ROOT / "docs" / "metrics.md").read_text().splitlines() if row.startswith("| `zo/")]
    listed = {name for row in rows for name in re.findall(r"`(zo/\w+)`", row.split("|")[1])}
    assert charts == listed


def test_commands_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert commands == ["demo", "test"]
    for command in commands:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE)
