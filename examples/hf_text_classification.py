"""Fine-tune any Hub model on any text classification dataset with forward passes only.

With a network:
    python examples/hf_text_classification.py --model distilbert-base-uncased --dataset stanfordnlp/sst2 \
        --text_column sentence --optim zo --learning_rate 1e-5 --max_steps 2000 --output_dir out
Without one:
    python examples/hf_text_classification.py --tiny --optim zo --learning_rate 1e-2 --zo_eps 1e-2 --max_steps 300 \
        --per_device_train_batch_size 32 --output_dir out
First-order: the same with --optim adamw_torch
"""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, load_dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    EvalPrediction,
    HfArgumentParser,
    PreTrainedTokenizerFast,
    set_seed,
)

from zo_lightning.hf_integration import ZOConfig, ZOTrainer


@dataclass
class ScriptArguments:
    """What is trained on what."""

    model: str = field(default="distilbert-base-uncased", metadata={"help": "A model of the Hub, or a local folder."})
    dataset: str = field(default="stanfordnlp/sst2", metadata={"help": "A dataset of the Hub, or a local folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Its configuration, where it has several."})
    train_split: str = field(default="train", metadata={"help": "The split to train on."})
    eval_split: str = field(default="validation", metadata={"help": "The split to evaluate on."})
    text_column: str = field(default="text", metadata={"help": "The column with the text."})
    label_column: str = field(default="label", metadata={"help": "The column with the label."})
    max_length: int = field(default=128, metadata={"help": "Longer texts are cut to this many tokens."})
    tiny: bool = field(default=False, metadata={"help": "A tiny random model and made-up sentences: no network."})


FRUIT = ["apple", "pear", "plum", "cherry", "grape", "melon", "lemon", "peach"]
TOOLS = ["hammer", "saw", "drill", "wrench", "chisel", "pliers", "file", "anvil"]
FILLER = ["the", "a", "one", "some", "near", "under", "with", "and"]


def tiny_data(size: int = 512) -> DatasetDict:
    """Made-up sentences that are about fruit (0) or about tools (1)."""
    draw = random.Random(0)

    def sentence(words: list[str]) -> str:
        return " ".join(draw.choice(words if i % 2 else FILLER) for i in range(8))

    labels = [draw.randrange(2) for _ in range(size)]
    data = Dataset.from_dict({"text": [sentence((FRUIT, TOOLS)[label]) for label in labels], "label": labels})
    halves = data.train_test_split(test_size=0.25, seed=0)
    return DatasetDict({"train": halves["train"], "validation": halves["test"]})


def tiny_model() -> tuple[Any, Any]:
    """A random BERT of one small layer and a tokenizer of whole words."""
    words = ["[PAD]", "[UNK]", *FRUIT, *TOOLS, *FILLER]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64)
    return BertForSequenceClassification(config), fast


def load(script: ScriptArguments) -> tuple[Any, Any, DatasetDict]:
    """Model, tokenizer and the raw dataset."""
    if script.tiny:
        return *tiny_model(), tiny_data()
    data = load_dataset(script.dataset, script.dataset_config)
    count = len(set(data[script.train_split][script.label_column]))
    model = AutoModelForSequenceClassification.from_pretrained(script.model, num_labels=count)
    return model, AutoTokenizer.from_pretrained(script.model), data


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Share of the examples whose largest logit is the label's."""
    return {"accuracy": float((np.argmax(prediction.predictions, axis=-1) == prediction.label_ids).mean())}


def main(arguments: list[str]) -> dict[str, float]:
    """Train; print and return the accuracy before and after."""
    kinds: Any = (ScriptArguments, ZOConfig)
    parser = HfArgumentParser(kinds)
    script, config = parser.parse_args_into_dataclasses(arguments)
    set_seed(config.seed)
    model, tokenizer, data = load(script)

    def tokenize(rows: dict[str, list[str]]) -> Any:
        return tokenizer(rows[script.text_column], truncation=True, max_length=script.max_length)

    data = data.map(tokenize, batched=True).rename_column(script.label_column, "labels")
    trainer = ZOTrainer(
        model,
        config,
        train_dataset=data[script.train_split],
        eval_dataset=data[script.eval_split],
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=accuracy,
    )
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    after = trainer.evaluate()["eval_accuracy"]
    print(f"accuracy before {before:.1%}, after {after:.1%} ({trainer.state.global_step} steps)")
    return {"before": before, "after": after}


if __name__ == "__main__":
    main(sys.argv[1:])
