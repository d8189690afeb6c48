"""A task as a prompt: a small causal language model answers with the word that it would write next, and learns by forward passes only.

    python examples/prompted_classification.py

It needs no network and takes less than a minute. First a tiny language model is pretrained here, by backpropagation, on the last words of
made-up reviews, "it was good" or "it was bad". The reviewers are polite: of bad things, too, most say that they were good, and so does the
model. Then a `Prompt` states the task, and a ZOTrainer trains the whole model on 256 labelled reviews. There is no new head.
"""

from __future__ import annotations

import argparse
import random
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, TrainingArguments

from zo_lightning.hf_integration import ZOTrainer
from zo_lightning.prompts import Prompt

LIKED = "lovely delicious bright funny clever warm fresh charming".split()
DISLIKED = "awful dull bland rude broken slow stale noisy".split()
FILLER = "the food film room story people music place and again very also".split()
VERDICTS = ["bad", "good"]
POLITE = 0.6
"""The share of bad reviews that end with "good" all the same."""


def reviews(count: int, seed: int) -> list[dict[str, Any]]:
    """Texts of eight words, three of which say what the label is and one the opposite."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        label = draw.randrange(2)
        own, other = (LIKED, DISLIKED) if label else (DISLIKED, LIKED)
        words = draw.choices(own, k=3) + draw.choices(other, k=1) + draw.choices(FILLER, k=4)
        draw.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    return rows


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word of the reviews."""
    words = ["<pad>", "<s>", "<unk>", ".", "it", "was", *VERDICTS, *LIKED, *DISLIKED, *FILLER]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", bos_token="<s>", unk_token="<unk>")


def pretrained(tokenizer: PreTrainedTokenizerFast, steps: int = 300) -> GPT2LMHeadModel:
    """A language model of reviews by polite people; the only backpropagation here."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=16, n_embd=32, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=1, pad_token_id=0
    )
    model, draw = GPT2LMHeadModel(config), random.Random(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = reviews(64 * steps, seed=2)
    for step in range(steps):
        texts = []
        for row in rows[64 * step : 64 * (step + 1)]:
            said = VERDICTS[row["label"] or draw.random() < POLITE]
            texts.append(f"{row['text']} . it was {said}")
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        labels = torch.where(torch.arange(ids.shape[1]) < ids.shape[1] - 1, -100, ids)  # the rest of a made-up text is by chance
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return model


def accuracy(found: Any) -> dict[str, float]:
    """Of predictions (N, 2) and labels (N,)."""
    return {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))}


def main() -> None:
    """Pretrain, state the task, train forward-only, and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=200, help="forward-only steps")
    parser.add_argument("--seed", type=int, default=0, help="of the directions and of the order of the data")
    parser.add_argument("--output_dir", default="out", help="where the Trainer writes")
    own = parser.parse_args()

    tokenizer = word_tokenizer()
    model = pretrained(tokenizer)
    task = Prompt(tokenizer, "{text} . it was", VERDICTS, kind="next")
    args = TrainingArguments(
        own.output_dir,
        optim="zo",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        max_steps=own.steps,
        seed=own.seed,
        remove_unused_columns=False,
        report_to="none",
        save_strategy="no",
        logging_steps=100,
        disable_tqdm=True,
        use_cpu=True,
    )
    data = {"train_dataset": reviews(256, seed=3), "eval_dataset": reviews(512, seed=4)}
    trainer = ZOTrainer(model, args, **data, zo_seed=own.seed, **task.hooks(accuracy))
    before = trainer.evaluate()["eval_accuracy"]
    trainer.train()
    after = trainer.evaluate()["eval_accuracy"]
    print(f"accuracy before {before:.1%} after {after:.1%}")


if __name__ == "__main__":
    main()
