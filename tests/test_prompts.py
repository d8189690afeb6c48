"""Prompts: scores against each text alone, both hosts against the engine, and what can't be a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hf_tools import arguments, losses, same, weights
from lightning_models import HOST_WARNINGS, lightning
from lightning_models import trainer as lightning_trainer
from prompt_tools import model, naive_option_scores, naive_word_scores, tokenizer_of
from torchmetrics.classification import MulticlassAccuracy

from zo_lightning import ZOOptimizer, ZOStrategy
from zo_lightning.callbacks import MetricObjective
from zo_lightning.engine.objectives import Score
from zo_lightning.hf_integration import ZOTrainer
from zo_lightning.prompts import Prompt

pytestmark = [
    *[pytest.mark.filterwarnings(text) for text in HOST_WARNINGS],
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings(r"ignore:The objective had the same value:zo_lightning.engine.messages.ZOWarning"),
]

WORDS = ["great", "terrible", "fine"]
TEXTS = ["a film", "the actors were good and the story was bad", "really good fun", "a waste of time and a bad story"]
EXAMPLES = [{"text": text, "label": i % 3} for i, text in enumerate(TEXTS)]
CAUSAL = ["gpt2", "llama", "opt"]


def prompt(kind: str, **given: Any) -> Prompt:
    if kind in CAUSAL:
        return Prompt(tokenizer_of(kind), "{text} . it was", WORDS, kind="next", **given)
    return Prompt(tokenizer_of(kind), "{text} . it was {mask} .", WORDS, **given)


def option_prompt(kind: str, **given: Any) -> Prompt:
    return Prompt(tokenizer_of(kind), "{text} . it was", options=["great", "a terrible film", "really fine fun"], kind="options", **given)


# ---- Scores


@pytest.mark.parametrize("kind", ["bert", "roberta", *CAUSAL])
def test_label_words_score_as_each_text_alone(kind: str) -> None:
    net, task = model(kind).eval(), prompt(kind)
    batch = task(EXAMPLES)
    mask = " . it was" if kind in CAUSAL else f" . it was {task.tokens.tokenizer.mask_token} ."
    naive = torch.stack([naive_word_scores(net, task.tokens.tokenizer, text + mask, WORDS) for text in TEXTS])
    assert naive.std(0).min() > 0.01
    torch.testing.assert_close(task.logits(net, batch), naive, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(task.loss_of(net, batch), F.cross_entropy(naive, torch.tensor([0, 1, 2, 0])), atol=1e-5, rtol=1e-5)
    assert task.targets(batch).tolist() == [0, 1, 2, 0]


@pytest.mark.parametrize("score", ["mean", "sum"])
@pytest.mark.parametrize("kind", CAUSAL)
def test_options_score_as_each_option_alone(kind: str, score: str) -> None:
    net, task = model(kind).eval(), option_prompt(kind, score=score)
    batch = task(EXAMPLES)
    naive = torch.stack(
        [naive_option_scores(net, task.tokens.tokenizer, f"{text} . it was", task._answers, score == "mean") for text in TEXTS]
    )
    torch.testing.assert_close(task.logits(net, batch), naive, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(task.loss_of(net, batch), F.cross_entropy(naive, torch.tensor([0, 1, 2, 0])), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", CAUSAL)
def test_multiple_choice_with_options_of_each_example(kind: str) -> None:
    net = model(kind).eval()
    task = Prompt(tokenizer_of(kind), "{text} . it was", options="choices", kind="options", max_options=4)
    choices = [["great", "a terrible film"], ["fine"], ["bad", "good", "a great story", "really"]]
    examples = [{"text": TEXTS[i], "choices": own, "label": len(own) - 1} for i, own in enumerate(choices)]
    batch = task(examples)
    scores = task.logits(net, batch)
    assert scores.shape == (3, 4)
    assert len(batch["input_ids"]) == 7
    parts = []
    for row, example in zip(scores, examples, strict=True):
        naive = naive_option_scores(net, task.tokens.tokenizer, f"{example['text']} . it was", example["choices"], True)
        torch.testing.assert_close(row[: len(naive)], naive, atol=1e-5, rtol=1e-5)
        assert bool((row[len(naive) :] == -torch.inf).all())
        parts.append(F.cross_entropy(naive[None], torch.tensor([example["label"]])))
    torch.testing.assert_close(task.loss_of(net, batch), torch.stack(parts).mean(), atol=1e-5, rtol=1e-5)


def test_the_loss_of_options_has_a_gradient_without_nan() -> None:
    task = Prompt(tokenizer_of("gpt2"), "{text} . it was", options="choices", kind="options", max_options=3)
    net = model("gpt2")
    task.loss_of(net, task([{"text": "a", "choices": ["great", "a film"], "label": 1}])).backward()
    assert all(bool(p.grad.isfinite().all()) for p in net.parameters())
    assert float(net.transformer.wte.weight.grad.abs().max()) > 0


def test_accumulated_losses_are_the_mean_over_examples() -> None:
    """num_items_in_batch counts the entries that are not -100, with the first column cut off for causal models or not."""
    net, task = model("gpt2").eval(), option_prompt("gpt2")
    whole, parts = task(EXAMPLES), [task(EXAMPLES[:1]), task(EXAMPLES[1:])]
    for begin in (0, 1):
        items = sum(part["labels"][..., begin:].ne(-100).sum() for part in parts)
        each = [task.loss(net(**task.inputs(part)), part["labels"], items) for part in parts]
        torch.testing.assert_close(torch.stack(each).sum(), task.loss_of(net, whole), atol=1e-5, rtol=1e-5)


def test_bfloat16_logits_are_scored_in_float32() -> None:
    net, task = model("llama").eval().to(torch.bfloat16), option_prompt("llama")
    batch = task(EXAMPLES)
    outputs = net(**task.inputs(batch))
    assert outputs.logits.dtype == torch.bfloat16
    torch.testing.assert_close(task.logits(outputs, batch), task.logits(outputs.logits.float(), batch), atol=0, rtol=0)
    assert task.loss(outputs, batch["labels"]).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:Position ids are not supported for parameter efficient tuning")
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_virtual_tokens_in_front_do_not_shift_the_scores(kind: str) -> None:
    peft = pytest.importorskip("peft")
    net, tasks = model(kind), (prompt(kind), option_prompt(kind))
    tuned = peft.get_peft_model(net, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    for task in tasks:
        batch = task(EXAMPLES)
        together = task.logits(tuned, batch)
        assert tuned(**task.inputs(batch)).logits.shape[1] == batch["input_ids"].shape[1] + 3
        alone = torch.cat([task.logits(tuned, task([example])) for example in EXAMPLES])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        bare = model(kind).eval()
        embedded = bare.get_input_embeddings()(task([EXAMPLES[0]])["input_ids"])
        prefix = tuned.get_prompt(len(embedded))
        logits = bare(inputs_embeds=torch.cat([prefix, embedded], 1)).logits
        torch.testing.assert_close(task.logits(logits[:, 3:], task([EXAMPLES[0]])), together[:1], atol=1e-4, rtol=1e-4)


# ---- Rows


@pytest.mark.parametrize("kind", ["bert", "roberta", "gpt2"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_long_texts_are_cut_and_the_template_stays(kind: str, side: str) -> None:
    task = prompt(kind, max_length=24)
    task.tokens.tokenizer.truncation_side = side
    long = " ".join(f"good{i}" for i in range(300))
    batch = task([{"text": long, "label": 1}, {"text": "a film", "label": 0}])
    ids = batch["input_ids"][0]
    assert int(batch["attention_mask"][0].sum()) <= 24 < len(task.tokens.of(long))
    shown = task.tokens.tokenizer.decode(ids[batch["attention_mask"][0] == 1])
    assert "it was" in shown
    assert ("good0" in shown.replace("##", "").replace(" ", "")) == (side == "right")
    assert ("299" in shown.replace("##", "").replace(" ", "")) == (side == "left")
    if kind != "gpt2":
        position = batch["input_ids"].shape[1] - batch["labels"][:, 2]
        assert (batch["input_ids"].gather(1, position[:, None]) == task.tokens.tokenizer.mask_token_id).all()


def test_of_two_fields_the_longer_is_cut() -> None:
    task = Prompt(tokenizer_of("bert"), "{premise} ? {mask} , {hypothesis}", WORDS, max_length=20)
    ids = task([{"premise": "good " * 50, "hypothesis": "a great film", "label": 0}])["input_ids"][0]
    shown = task.tokens.tokenizer.decode(ids)
    assert "[MASK] , a great film [SEP]" in shown
    assert shown.count("good") > 5


def test_a_text_with_the_masks_name_does_not_move_the_mask() -> None:
    task = prompt("bert")
    batch = task([{"text": "a [MASK] film", "label": 0}])
    where = (batch["input_ids"][0] == task.tokens.tokenizer.mask_token_id).nonzero().flatten()
    assert len(where) == 2
    assert batch["input_ids"].shape[1] - int(batch["labels"][0, 2]) == int(where[1])


def test_words_are_the_tokens_that_they_are_in_their_place() -> None:
    """A byte-level tokenizer has another token for a word behind a space."""
    tokenizer = tokenizer_of("gpt2")
    behind = Prompt(tokenizer, "{text} . it was", WORDS, kind="next")
    assert [tokenizer.convert_ids_to_tokens(word) for word in behind._words] == ["Ġgreat", "Ġterrible", "Ġfine"]
    line = Prompt(tokenizer, "{text}\n", ["a", "b"], kind="next")
    assert [tokenizer.convert_ids_to_tokens(word) for word in line._words] == ["a", "b"]
    roberta = prompt("roberta")
    assert [roberta.tokens.tokenizer.convert_ids_to_tokens(word) for word in roberta._words] == ["Ġgreat", "Ġterrible", "Ġfine"]


def test_labels_by_name_and_examples_without_a_label() -> None:
    task = Prompt(tokenizer_of("bert"), "{text} {mask}", {"pos": "great", "neg": "terrible"}, label="sentiment")
    assert task.targets(task([{"text": "a", "sentiment": "neg"}, {"text": "b", "sentiment": "pos"}])).tolist() == [1, 0]
    net, batch = model("bert").eval(), task([{"text": "a"}, {"text": "b"}])
    assert task.logits(net, batch).shape == (2, 2)
    assert bool(task.loss_of(net, batch).isnan())


# ---- Both hosts


def steps(task: Prompt, net: Any, size: int = 4, count: int = 3, **options: Any) -> tuple[Any, list[tuple[float, ...]]]:
    optimizer, values = ZOOptimizer(net.train(), lr=1e-3, eps=1e-2, **options), []
    for _ in range(count):
        batch = task(EXAMPLES[:size])

        def answers(batch: Any = batch) -> Any:
            if options.get("objective") is not None:
                return {"preds": task.logits(net, batch), "target": task.targets(batch)}
            return task.loss_of(net, batch)

        optimizer.step(answers)
        assert optimizer.report is not None
        values.append(optimizer.report.values)
    return net, values


def hf(folder: Path, task: Prompt, net: Any, compute_metrics: Any = None, callbacks: Any = (), **given: Any) -> Any:
    own = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "remove_unused_columns": False, **given}
    keywords = {"train_dataset": EXAMPLES, "eval_dataset": EXAMPLES, "callbacks": list(callbacks), "zo_eps": 1e-2}
    return ZOTrainer(net, arguments(folder, **own), **keywords, **task.hooks(compute_metrics))


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
@pytest.mark.parametrize("make", [prompt, option_prompt])
def test_the_hf_trainer_makes_the_engines_steps(kind: str, make: Any, tmp_path: Path) -> None:
    if kind == "bert" and make is option_prompt:
        pytest.skip("an encoder")
    host = hf(tmp_path, make(kind), model(kind))
    host.train()
    alone, values = steps(make(kind), model(kind))
    for name, value in weights(alone).items():  # the mean is a sum divided by another number
        torch.testing.assert_close(weights(host.model)[name], value, atol=1e-5, rtol=1e-4)
    assert not same(weights(host.model), weights(model(kind)))
    assert losses(host) == pytest.approx([sum(pair) / 2 for pair in values], rel=1e-3)


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_accumulation_in_the_hf_trainer_is_the_whole_batch(kind: str, tmp_path: Path) -> None:
    whole = hf(tmp_path, prompt(kind), model(kind).double())
    parts = hf(tmp_path, prompt(kind), model(kind).double(), per_device_train_batch_size=1, gradient_accumulation_steps=4)
    whole.train()
    parts.train()
    for name, value in weights(whole.model).items():
        torch.testing.assert_close(weights(parts.model)[name], value, atol=1e-6, rtol=1e-5)
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-3)


@pytest.mark.parametrize("make", [prompt, option_prompt])
def test_evaluation_gives_predictions_and_classes(make: Any, tmp_path: Path) -> None:
    task, seen = make("gpt2"), []

    def accuracy(found: Any) -> dict[str, float]:
        predictions, labels = found
        seen.append((predictions, labels))
        return {"accuracy": float((predictions.argmax(-1) == labels).mean())}

    host = hf(tmp_path, task, model("gpt2"), accuracy, per_device_eval_batch_size=3)
    found = host.evaluate()
    net = model("gpt2").eval().requires_grad_(False)
    expected = task.logits(net, task(EXAMPLES))
    predictions, labels = seen[0]
    np.testing.assert_allclose(predictions, expected.numpy(), atol=1e-5)
    assert labels.tolist() == [0, 1, 2, 0]
    assert found["eval_accuracy"] == float((expected.argmax(-1) == torch.tensor([0, 1, 2, 0])).float().mean())
    assert found["eval_loss"] == pytest.approx(float(task.loss_of(net, task(EXAMPLES))), abs=1e-5)


def test_a_metric_of_examples_without_labels_is_refused() -> None:
    """Their class stands for "none", which no prediction is, so that an accuracy would be 0 wherever it is asked for."""
    task, net = prompt("gpt2"), model("gpt2")
    batch = task([{name: value for name, value in example.items() if name != "label"} for example in EXAMPLES])
    with pytest.raises(
        ValueError, match=r"The examples of this batch have no 'label' to compare with \(label='label'\)\. Name its field\."
    ):
        task.pairs(net(**task.inputs(batch)), batch["labels"])


@pytest.mark.parametrize("own", [False, True])
def test_accuracy_of_a_prompt_as_the_objective(own: bool, tmp_path: Path) -> None:
    task = prompt("gpt2")

    def compute(found: Any) -> dict[str, float]:
        return {"entropy": float(-torch.tensor(found.predictions).softmax(-1)[range(4), found.label_ids].log().mean())}

    def entropy(preds: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(preds, target)

    objective = task.objective(entropy, maximize=False) if own else MetricObjective("compute_metrics", key="entropy", maximize=False)
    host = hf(tmp_path, task, model("gpt2"), compute, [objective])
    host.train()
    alone, _ = steps(task, model("gpt2"), objective=Score(entropy, maximize=False))
    for name, value in weights(alone).items():
        torch.testing.assert_close(weights(host.model)[name], value, atol=1e-5, rtol=1e-4)
    assert not same(weights(host.model), weights(model("gpt2")))


def module(task: Prompt, net: Any, score: bool = False) -> Any:
    class Prompted(lightning().LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, index: int) -> Any:
            if score:
                return {"preds": task.logits(self.net, batch), "target": task.targets(batch)}
            return task.loss_of(self.net, batch)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    return Prompted()


@pytest.mark.parametrize(("kind", "make", "score"), [("bert", prompt, False), ("llama", option_prompt, False), ("gpt2", prompt, True)])
def test_lightning_makes_the_engines_steps(kind: str, make: Any, score: bool, tmp_path: Path) -> None:
    task, metric = make(kind), MulticlassAccuracy(num_classes=3)
    lit = module(task, model(kind), score)
    loader = torch.utils.data.DataLoader(EXAMPLES, batch_size=4, collate_fn=task)  # type: ignore[arg-type,var-annotated]
    host = lightning_trainer(tmp_path, strategy=ZOStrategy(eps=1e-2), max_steps=3, callbacks=[MetricObjective(metric)] if score else [])
    host.fit(lit, loader)
    alone, _ = steps(task, model(kind), objective=Score(metric) if score else None)
    assert same(weights(lit.net), weights(alone))


# ---- What can't be


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"template": "it was {mask}"}, "has no field"),
        ({"template": "{text} it was"}, "has 0 masks"),
        ({"template": "{text} {mask} {mask}"}, "has 2 masks"),
        ({"template": "{text} {} {mask}"}, "not a plain name"),
        ({"template": "{text!r} {mask}"}, "not a plain name"),
        ({"template": "{text} { {mask}"}, "can't be read"),
        ({"labels": ["great", "wonderfully terrible"]}, r"label word 'wonderfully terrible' is \d+ tokens .*'terrible'"),
        ({"labels": ["great", "Great"]}, "'great' and 'Great' are the same token"),
        ({"labels": ["great", "great"]}, "'great' stands there twice"),
        ({"labels": ["great", "\N{SNOWMAN}"]}, "vocabulary"),
        ({"labels": ["great"]}, "two or more"),
        ({"labels": None}, "Invalid labels: None"),
        ({"labels": ["great", 3]}, "3 is not a text"),
        ({"kind": "next"}, "has a mask, which only kind='mask'"),
        ({"kind": "first"}, "'mask', 'next', 'options'"),
        ({"kind": "options"}, "labels= is given, and kind='options' takes options="),
        ({"options": ["a", "b"]}, "options= is given, and kind='mask' takes labels="),
        ({"max_length": 0}, "max_length"),
        ({"separator": " "}, "separator=' ' does nothing"),
        ({"kind": "options", "labels": None, "template": "{text}", "options": []}, "Invalid options"),
        ({"kind": "options", "labels": None, "template": "{text}", "options": ["a", "b"], "score": "max"}, "'mean', 'sum'"),
    ],
)
def test_prompts_that_can_not_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompt(**{"tokenizer": tokenizer_of("bert"), "template": "{text} {mask}", "labels": WORDS, **given})


def test_a_label_word_of_several_tokens_names_what_would_do() -> None:
    with pytest.raises(ValueError, match=r"'film{' is \d tokens behind ' ' .*Choose a word of one token"):
        Prompt(tokenizer_of("gpt2"), "{text} it was", ["great", "film{"], kind="next")


def test_a_decoder_has_no_mask() -> None:
    with pytest.raises(ValueError, match="kind='mask' needs a mask token"):
        Prompt(tokenizer_of("gpt2"), "{text} {mask}", WORDS)


def test_models_of_another_kind_are_refused() -> None:
    of_encoder, of_decoder = prompt("bert"), Prompt(tokenizer_of("bert"), "{text} it was", WORDS, kind="next")
    with pytest.raises(ValueError, match="kind='mask' is for masked language models, and the model returned a CausalLMOutput"):
        of_encoder.loss_of(model("gpt2"), of_encoder(EXAMPLES))
    with pytest.raises(ValueError, match="kind='next' is for causal language models, and the model returned a MaskedLMOutput"):
        of_decoder.loss_of(model("bert"), of_decoder(EXAMPLES))
    with pytest.raises(ValueError, match="language model head"):
        of_encoder.loss_of(lambda **batch: torch.zeros(4, 2), of_encoder(EXAMPLES))
    with pytest.raises(ValueError, match="wrong tokenizer"):
        of_encoder.scores(torch.zeros(4, 30, 5), of_encoder(EXAMPLES)["labels"])


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"text": "a", "label": 7}, "label 7, which is none of 0, 1, 2"),
        ({"text": "a", "label": "great"}, "none of 0, 1, 2"),
        ({"text": "a", "label": True}, "none of 0, 1, 2"),
        ({"label": 0}, "remove_unused_columns=False"),
        ({"text": None, "label": 0}, "of type NoneType"),
        (3, "takes dicts"),
    ],
)
def test_examples_that_do_not_fit(example: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt("bert")([example])


def test_batches_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="others none"):
        prompt("bert")([{"text": "a", "label": 0}, {"text": "b"}])
    with pytest.raises(ValueError, match="no examples"):
        prompt("bert")([])
    with pytest.raises(ValueError, match="max_length=4 is too small: the template alone has 7 tokens"):
        prompt("bert", max_length=4)([{"text": "a film", "label": 0}])
    with pytest.raises(ValueError, match="The Prompt must be the collator"):
        prompt("bert").loss(torch.zeros(2, 5, 400), torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(ValueError, match="no labels in the batch"):
        prompt("bert").loss(torch.zeros(2, 5, 400), None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([], "one or more texts"),
        (None, "one or more texts"),
        (["a", "b", "c"], "more than max_options=2. Say max_options=3"),
        (["a", "a"], "stands there twice"),
        (["a", ""], "not a text"),
        (["a", "good film " * 20], "max_option_tokens=32"),
    ],
)
def test_options_that_do_not_fit(choices: Any, message: str) -> None:
    task = Prompt(tokenizer_of("gpt2"), "{text}", options="choices", kind="options", max_options=2)
    with pytest.raises(ValueError, match=message):
        task([{"text": "a", "choices": choices, "label": 0}])


def test_the_hf_trainer_that_removes_columns_is_told_not_to(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="remove_unused_columns=False"):
        hf(tmp_path, prompt("bert"), model("bert"), remove_unused_columns=True).train()
