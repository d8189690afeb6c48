"""Teach a language model to answer in the wanted words, by the exact match of what it writes: no loss, no gradient.

    python examples/generated_answers.py --output_dir out

A tiny model is first pretrained by backpropagation on sums that are written in figures or in words ("3 + 4 = 7", "3 + 4 = seven"): it
knows the answers, and writes most of them in words. Then `GenerationObjective` trains it, forward passes only, to give those in figures: it
generates its answers under each perturbation, and all that a step learns from is how many of them were the reference. 30 of the 100
questions are held out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from zo_lightning.callbacks import GenerationObjective
from zo_lightning.engine.objectives import Generation
from zo_lightning.engine.objectives.texts import exact_match
from zo_lightning.hf_integration import ZOConfig, ZOTrainer

WORDS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen".split()
QUESTIONS = [(a, b) for a in range(10) for b in range(10)]
LENGTH = 7  # <s> a + b = answer </s>


@dataclass
class ScriptArguments:
    """Of the pretraining that makes the model."""

    pretraining_steps: int = field(default=400, metadata={"help": "Steps of AdamW."})
    in_figures: float = field(default=0.4, metadata={"help": "Share of the answers that the model is pretrained on in figures."})


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Numbers, words and signs."""
    names = ["<pad>", "<s>", "</s>", "<unk>", "+", "=", *map(str, range(19)), *WORDS]
    built = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=built, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def rows(tokenizer: Any, questions: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Questions with their answers in figures; only answers have labels."""
    made = []
    for a, b in questions:
        ids = tokenizer(f"<s> {a} + {b} = {a + b} </s>")["input_ids"]
        made.append({"input_ids": ids, "attention_mask": [1] * LENGTH, "labels": [-100] * (LENGTH - 2) + ids[-2:]})
    return made


def pretrained(tokenizer: Any, steps: int, in_figures: float, seed: int) -> LlamaForCausalLM:
    """By backpropagation, on sums of which a share is written in figures."""
    draw = random.Random(seed)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": len(tokenizer),
    }
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=16, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        asked = draw.choices(QUESTIONS, k=64)
        said = [str(a + b) if draw.random() < in_figures else WORDS[a + b] for a, b in asked]
        texts = [f"<s> {a} + {b} = {answer} </s>" for (a, b), answer in zip(asked, said, strict=True)]
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def matches(model: Any, tokenizer: Any, data: list[dict[str, Any]]) -> float:
    """Exact match of greedy answers."""
    batch = {name: torch.tensor([row[name] for row in data]) for name in data[0]}
    with torch.no_grad():
        return exact_match(*Generation(tokenizer, max_new_tokens=2)(model, batch))


def run(script: ScriptArguments, args: ZOConfig) -> dict[str, float]:
    """Exact match of held-out and of trained questions, before and after."""
    set_seed(args.seed)
    tokenizer = make_tokenizer()
    model = pretrained(tokenizer, script.pretraining_steps, script.in_figures, args.seed)
    questions = random.Random(args.seed).sample(QUESTIONS, len(QUESTIONS))
    held_out, trained = rows(tokenizer, questions[:30]), rows(tokenizer, questions[30:])
    before = {"held out": matches(model, tokenizer, held_out), "trained": matches(model, tokenizer, trained)}
    objective = GenerationObjective("exact_match", tokenizer, max_new_tokens=2)
    ZOTrainer(model=model, args=args, train_dataset=trained, callbacks=[objective]).train()
    after = {"held out": matches(model, tokenizer, held_out), "trained": matches(model, tokenizer, trained)}
    return {f"{name} {when}": 100 * found[name] for when, found in (("before", before), ("after", after)) for name in found}


DEFAULTS: dict[str, Any] = {
    "max_steps": 150,
    "per_device_train_batch_size": 70,
    "zo_eps": 1e-2,
    "zo_queries": 8,  # 16 forward passes a step,
    "zo_fitness": "z-scores",  # whose scores are standardised
    "learning_rate": 3e-5,
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "logging_steps": 25,
}


def main() -> None:
    """Parse the command line, train, print."""
    parser = HfArgumentParser((ScriptArguments, ZOConfig))  # type: ignore[arg-type]
    parser.set_defaults(output_dir="out", **DEFAULTS)
    script, args = parser.parse_args_into_dataclasses()
    found = run(script, args)
    print("exact match", ", ".join(f"{name} {value:.0f} %" for name, value in found.items()))


if __name__ == "__main__":
    main()
