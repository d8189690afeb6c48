"""GenerationObjective: texts generated under each perturbation, against a reference that generates row by row, and under both hosts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from engine_models import RESIDENCIES, snapshot
from hf_tools import bert, llama, tokenizer, trainer, weights
from lightning_models import HOST_WARNINGS, Recorder
from lightning_models import trainer as lightning_trainer
from reference.spsa import Settings, spsa_step
from torch import Tensor, nn
from transformers import GenerationConfig, T5Config, T5ForConditionalGeneration

from zo_lightning import ZOStrategy
from zo_lightning.callbacks import GenerationObjective
from zo_lightning.engine import SPSA, ZOOptimizer
from zo_lightning.engine.objectives import Generated, Generation, Score
from zo_lightning.engine.objectives.texts import exact_match, word_f1
from zo_lightning.engine.parameters import names_of

pytestmark = [
    *[pytest.mark.filterwarnings(text) for text in HOST_WARNINGS],
    pytest.mark.filterwarnings(r"ignore:.*had equal values on both sides:zo_lightning.engine.messages.ZOWarning"),
    pytest.mark.filterwarnings(r"ignore:The objective had the same value:zo_lightning.engine.messages.ZOWarning"),
]

EPS = 0.05
TOKENS = tokenizer()


def batch(count: int = 8, seed: int = 0, pad: str = "right") -> dict[str, Tensor]:
    """Prompts of 2 to 5 tokens with answers of 1 to 3, padded to 8; the labels of prompts and padding are -100."""
    draw = random.Random(seed)
    ids, mask, labels = [], [], []
    for i in range(count):
        prompt = [draw.randrange(4, 32) for _ in range(2 + i % 4)]
        answer = [draw.randrange(4, 32) for _ in range(1 + i % 3)]
        row, own = prompt + answer, [-100] * len(prompt) + answer
        empty = 8 - len(row)
        before, after = (empty, 0) if pad == "left" else (0, empty)
        ids.append([0] * before + row + [0] * after)
        mask.append([0] * before + [1] * len(row) + [0] * after)
        labels.append([-100] * before + own + [-100] * after)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask), "labels": torch.tensor(labels)}


def rowwise(model: Any, given: dict[str, Tensor], new: int = 3) -> tuple[list[str], list[str]]:
    """(completions, references): each row alone, no padding, the largest logit of a whole forward pass for every token."""
    completions, references = [], []
    model.eval()
    for ids, mask, labels in zip(given["input_ids"], given["attention_mask"], given["labels"], strict=True):
        answered = labels != -100
        row = ids[mask.bool() & ~answered].tolist()
        length = len(row)
        for _ in range(new):
            with torch.no_grad():
                token = int(model(input_ids=torch.tensor([row])).logits[0, -1].argmax())
            row.append(token)
            if token == 2:
                break
        completions.append(" ".join(f"w{t}" for t in row[length:] if t > 3))
        references.append(" ".join(f"w{t}" for t in ids[answered].tolist()))
    model.train()
    return completions, references


def spread(texts: list[str], references: list[str]) -> float:
    """A number that nearly every change of an answer changes."""
    total = 0.0
    for text, reference in zip(texts, references, strict=True):
        ours, theirs = ([int(word[1:]) for word in words.split() if word[1:].isdigit()] for words in (text, reference))
        total += sum((i + 1) * token for i, token in enumerate(ours)) / 100 - sum(theirs) / 100
    return total / len(texts)


def steps(objective: Any, model: Any, count: int = 3, data: Any = None, parts: int = 1, **given: Any) -> list[tuple[float, ...]]:
    optimizer = ZOOptimizer(model, lr=given.pop("lr", 1e-2), eps=EPS, objective=objective, **given)
    seen = []
    for step in range(count):
        whole = batch(seed=step) if data is None else data
        for rows in torch.arange(8).chunk(parts):
            optimizer.estimate(dict, batch={name: value[rows] for name, value in whole.items()}, weight=1 / parts)
        report = optimizer.apply()
        assert report is not None
        seen.append(report.values)
    return seen


@pytest.mark.parametrize("residency", RESIDENCIES)
@pytest.mark.parametrize("parts", [1, 3])
def test_steps_are_those_of_a_reference_that_generates_row_by_row(residency: str, parts: int) -> None:
    ours, theirs = llama(), llama()
    seen = steps(Generated(spread, TOKENS, max_new_tokens=3), ours, parts=parts, weights=residency, estimator=SPSA(2))
    names, values = names_of(theirs), []  # those that noise goes by
    theta = {names[id(p)]: p.detach().clone() for p in theirs.parameters()}
    for step in range(3):
        given = batch(seed=step)

        def value(moved: dict[str, Tensor], given: dict[str, Tensor] = given) -> float:
            for p in theirs.parameters():
                p.data.copy_(moved[names[id(p)]])
            return -spread(*rowwise(theirs, given))

        theta, found = spsa_step(theta, value, Settings(1e-2, eps=EPS, queries=2), step)
        values.append(found)
    assert len({round(value, 6) for row in values for value in row}) > 4, "the answers never changed: nothing was tested"
    for own, expected in zip(seen, values, strict=True):
        assert own == pytest.approx(expected, abs=1e-6)
    for parameter, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(parameter.detach(), theta[names[id(other)]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("mask", [True, False])
def test_padding_on_either_side_makes_no_difference(mask: bool) -> None:
    model = llama()
    source = Generation(TOKENS, max_new_tokens=3)
    found = [source(model, {k: v for k, v in batch(pad=pad).items() if mask or k != "attention_mask"}) for pad in ("left", "right")]
    assert found[0] == found[1] == rowwise(model, batch())
    assert all(module.training for module in model.modules())


def test_sampling_draws_the_same_at_all_points_and_anew_in_each_step() -> None:
    texts: list[list[str]] = []

    def noted(completions: list[str], references: list[str]) -> float:
        texts.append(completions)
        return spread(completions, references)

    objective = Generated(noted, TOKENS, {"do_sample": True, "temperature": 3.0}, max_new_tokens=3)
    model, data = llama(), batch()
    optimizer = ZOOptimizer(model, lr=0.0, eps=1e-7, objective=objective)
    for _ in range(3):
        optimizer.step(dict, batch=data)  # type: ignore[arg-type]
        assert optimizer.report is not None
        assert optimizer.report.zero_difference
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    assert texts[2] == texts[3] != texts[4]


def test_rewards_are_weighted_and_averaged_over_all_completions() -> None:
    asked: list[tuple[list[str], list[str], Any]] = []

    def length(prompts: list[str], completions: list[str], batch: Any) -> list[float]:
        asked.append((prompts, completions, batch))
        return [float(len(text.split())) for text in completions]

    def longest(prompts: list[str], completions: list[str], batch: Any) -> Tensor:
        return torch.tensor([len(text.split()) == 3 for text in completions]).double()

    data = batch()
    objective = Generated(None, TOKENS, rewards=[length, longest], reward_weights=[1.0, -0.5], max_new_tokens=3)
    whole, parts = (steps(objective, llama(), 1, data, parts=parts) for parts in (1, 3))
    assert whole[0] == pytest.approx(parts[0], abs=1e-12)  # a mean of the means of 3, 3 and 2 rows is another number
    prompts, completions, given = asked[0]
    assert set(given) == set(data)
    expected = [
        " ".join(f"w{t}" for t in row[labels.eq(-100) & (row != 0)].tolist())
        for row, labels in zip(data["input_ids"], data["labels"], strict=True)
    ]
    assert prompts == expected
    assert all(not text.startswith(prompt) for text, prompt in zip(completions, prompts, strict=True))
    one = Generated(None, TOKENS, {"num_return_sequences": 2, "do_sample": True}, rewards=length, max_new_tokens=3)
    steps(one, llama(), 1, data)
    assert len(asked[-1][0]) == len(asked[-1][1]) == 16
    assert asked[-1][0][::2] == asked[-1][0][1::2] == expected
    assert one.name == "length"


def t5() -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=2))


def test_an_encoder_decoder_reads_all_of_its_input() -> None:
    data = {**batch(), "labels": batch(seed=1)["labels"]}
    model = t5()
    completions, references = Generation(TOKENS, max_new_tokens=3)(model, data)
    model.eval()
    for i, (ids, mask) in enumerate(zip(data["input_ids"], data["attention_mask"], strict=True)):
        alone = model.generate(input_ids=ids[mask.bool()][None], max_new_tokens=3, do_sample=False)[0]
        assert completions[i] == TOKENS.decode(alone, skip_special_tokens=True)
    assert references == [TOKENS.decode(row[row >= 0]) for row in data["labels"]]
    assert len({value for row in steps(Generated(spread, TOKENS, max_new_tokens=3), model, 3, data, lr=1e-3) for value in row}) > 1


def test_the_token_that_a_decoder_starts_with_is_not_of_its_answer() -> None:
    model, data = t5(), {**batch(), "labels": batch(seed=1)["labels"]}
    model.generation_config.decoder_start_token_id = 7
    found = model.eval().generate(
        input_ids=data["input_ids"], attention_mask=data["attention_mask"], max_new_tokens=3, do_sample=False, pad_token_id=0
    )
    assert (found[:, 0] == 7).all()
    completions, _ = Generation(TOKENS, max_new_tokens=3)(model, data)
    assert completions == TOKENS.batch_decode(found[:, 1:], skip_special_tokens=True)


def test_texts_in_the_batch_are_references_too() -> None:
    data = {**batch(), "answers": ["w5"] * 4 + [["w6", "w7"]] * 4}
    assert Generation(TOKENS, references="answers", max_new_tokens=1)(llama(), data)[1] == data["answers"]


def test_numbers_of_texts() -> None:
    assert exact_match(["The Cat!", "a dog"], ["cat", ["wolf", "Dog."]]) == 1.0
    assert exact_match(["cats", ""], ["cat", "x"]) == 0.0
    assert word_f1(["the black cat"], ["black dog"]) == 0.5
    assert word_f1(["red red blue"], [["red", "red blue"]]) == pytest.approx(0.8)
    assert word_f1([""], ["the"]) == 1.0
    with pytest.raises(ValueError, match="no texts"):
        exact_match([], [])


class Writer(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = llama()

    def training_step(self, given: dict[str, Tensor], index: int) -> Tensor:
        loss: Tensor = self.model(**given).loss
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-2)


@pytest.mark.parametrize("loss_weight", [0.0, 0.5])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_both_hosts_make_the_engines_steps(loss_weight: float, accumulation: int, tmp_path: Path) -> None:
    data = [{name: value[i] for name, value in batch().items()} for i in range(8)]
    sample = {"do_sample": True, "top_k": 5}

    def objective() -> GenerationObjective:
        return GenerationObjective(spread, TOKENS, sample, max_new_tokens=3, loss_weight=loss_weight)

    alone = llama()
    optimizer = ZOOptimizer(alone, lr=1e-2, eps=EPS, objective=objective().objective)
    values = []
    for _ in range(2):
        for rows in torch.arange(8).chunk(accumulation):
            part = {name: value[rows] for name, value in batch().items()}
            optimizer.estimate(lambda part=part: {"loss": alone(**part).loss}, batch=part, weight=1 / accumulation)
        report = optimizer.apply()
        assert report is not None
        values.append(report.values)
    seen = Recorder()
    module = Writer()
    loader = torch.utils.data.DataLoader(data, batch_size=8 // accumulation)  # type: ignore[arg-type]
    host = lightning_trainer(
        tmp_path,
        strategy=ZOStrategy(eps=EPS),
        max_steps=2,
        max_epochs=-1,
        callbacks=[objective(), seen],
        accumulate_grad_batches=accumulation,
    )
    host.fit(module, loader)
    assert [report.values for report in seen.reports] == values
    if loss_weight and accumulation > 1:
        return  # the Trainer's loss of a micro-batch is divided by the labels of the whole window
    other, seen = llama(), Recorder()
    size = {"per_device_train_batch_size": 8 // accumulation, "gradient_accumulation_steps": accumulation}
    hf = trainer(tmp_path, other, data=data, callbacks=[objective(), seen], max_steps=2, zo_eps=EPS, learning_rate=1e-2, **size)
    hf.train()
    assert [report.values for report in seen.reports] == values
    assert all(torch.equal(weights(other)[name], weight) for name, weight in weights(alone).items())


def test_it_learns_to_write_a_word_by_rewards_alone() -> None:
    """Share of w9 among the tokens it samples; nothing tells it which of the tokens was right."""

    def nines(prompts: list[str], completions: list[str], batch: Any) -> list[float]:
        return [text.split().count("w9") / 4 for text in completions]

    objective = Generated(None, TOKENS, {"do_sample": True}, rewards=nines, max_new_tokens=4)
    model, data = llama(), batch()
    optimizer = ZOOptimizer(model, lr=3e-2, eps=EPS, objective=objective, estimator=SPSA(4, fitness="z-scores"), safeguard=None)
    scores = []
    for _ in range(60):
        optimizer.step(dict, batch=data)  # type: ignore[arg-type]
        assert optimizer.report is not None
        scores.append(optimizer.report.score)
    assert sum(scores[:5]) / 5 < 0.15
    assert sum(scores[-5:]) / 5 > 0.5


BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no tokenizer": ({"metric": "f1", "tokenizer": "gpt2"}, TypeError, "tokenizer='gpt2' is not a tokenizer"),
    "an unknown metric": ({"metric": "rouge"}, ValueError, "metric='rouge' is not known. Use 'exact_match', 'f1'"),
    "neither": ({}, ValueError, "metric=None and 0 rewards"),
    "both": ({"metric": "f1", "rewards": [lambda p, c, b: c]}, ValueError, "metric='f1' and 1 rewards"),
    "not a reward": ({"rewards": ["f1"]}, TypeError, "rewards has 'f1'"),
    "weights": ({"rewards": [lambda p, c, b: c], "reward_weights": [1.0, 2.0]}, ValueError, "2 weights for 1 rewards"),
    "a weight": (
        {"rewards": [lambda p, c, b: c], "reward_weights": [float("nan")]},
        ValueError,
        r"Invalid weight of a reward: nan. Must be a finite number \(reward_weights\)",
    ),
    "own draws": (
        {"metric": "f1", "generation_config": {"do_sample": True, "prompt_lookup_num_tokens": 3}},
        ValueError,
        "generation_config has prompt_lookup_num_tokens",
    ),
    "a class": ({"metric": "f1", "generation_config": GenerationConfig}, TypeError, "is neither a GenerationConfig"),
    "tokens": ({"metric": "f1", "max_new_tokens": 0}, ValueError, "Invalid max_new_tokens: 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_arguments_that_make_no_sense(case: str) -> None:
    given, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        GenerationObjective(**{"tokenizer": TOKENS, **given})


def test_errors_in_a_step_leave_the_weights() -> None:
    def fails(prompts: list[str], completions: list[str], batch: Any) -> list[float]:
        raise ArithmeticError("judge")

    def few(prompts: list[str], completions: list[str], batch: Any) -> list[float]:
        return [1.0]

    def words(prompts: list[str], completions: list[str], batch: Any) -> list[str]:
        return completions

    def one(prompts: list[str], completions: list[str], batch: Any) -> float:
        return 1.0

    data = batch()
    every = {**data, "labels": data["input_ids"]}
    cases: list[tuple[Any, Any, Any, str]] = [
        (Generated(None, TOKENS, rewards=fails, max_new_tokens=2), llama(), data, "judge"),
        (Generated(None, TOKENS, rewards=few, max_new_tokens=2), llama(), data, "The reward few gave 1 numbers for 8 completions"),
        (Generated(None, TOKENS, rewards=words, max_new_tokens=2), llama(), data, "words must give one number"),
        (Generated(None, TOKENS, rewards=one, max_new_tokens=2), llama(), data, "The reward one gave float: 1.0. Give a number for each"),
        (Generated("f1", TOKENS, {"max_new_token": 2}), llama(), data, "has 'max_new_token', which is not an option of GenerationConfig"),
        (Generated("f1", TOKENS, {"logits_processor": [1]}), llama(), data, "generation_config has 'logits_processor', which is not"),
        (Generated("f1", TOKENS, max_new_tokens=40), llama(), data, "more than the 32 positions of LlamaForCausalLM"),
        (Generated("f1", TOKENS), bert(), data, "Nothing in BertForSequenceClassification can generate"),
        (Generated("f1", TOKENS), llama(), every, "Row 0 of the batch has no prompt"),
        (
            Generated("f1", TOKENS, references="answer", max_new_tokens=2),
            llama(),
            data,
            "The batch has no 'answer'.*remove_unused_columns=False",
        ),
        (
            Generated("f1", TOKENS, references="n", max_new_tokens=2),
            llama(),
            {**data, "n": torch.ones(8)},
            "'n' is a tensor of .*float32 and",
        ),
        (Generated("f1", TOKENS), llama(), [data["input_ids"]], "needs a batch with a tensor 'input_ids', and it has list"),
    ]
    for objective, model, given, message in cases:
        before = snapshot(model)
        optimizer = ZOOptimizer(model, lr=1e-2, eps=EPS, objective=objective)
        with pytest.raises((ValueError, ArithmeticError), match=message):
            optimizer.step(dict, batch=given)  # type: ignore[arg-type]
        assert all(torch.equal(value, before[name]) for name, value in snapshot(model).items())
        assert all(module.training for module in model.modules())


def test_a_reward_that_misses_a_column_is_told_who_removes_them() -> None:
    def judge(prompts: list[str], completions: list[str], batch: Any) -> list[float]:
        return [float(answer in text) for answer, text in zip(batch["answer"], completions, strict=True)]

    with pytest.raises(KeyError, match="answer") as caught:
        Generation(TOKENS, max_new_tokens=2, rewards=judge)(llama(), batch())
    (note,) = caught.value.__notes__
    assert note.startswith("The reward judge was given a batch with 'input_ids', 'attention_mask', 'labels'.")
    assert "remove_unused_columns=False" in note


def test_a_configuration_object_is_a_mapping_of_its_options() -> None:
    model, data = llama(), batch()
    config = GenerationConfig(max_new_tokens=2)
    assert Generation(TOKENS, config)(model, data) == Generation(TOKENS, {"max_new_tokens": 2})(model, data)
    model.generation_config.max_new_tokens = 3
    found, _ = Generation(TOKENS, {"max_length": 7})(model, data)  # prompts have up to 5 tokens
    assert max(len(text.split()) for text in found) == 2
    assert isinstance(model, nn.Module)
    assert isinstance(Generated("f1", TOKENS), Score)
