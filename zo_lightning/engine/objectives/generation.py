"""Texts that a model generates under each perturbation, and what they are worth."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.engine.messages import check_count, check_number
from zo_lightning.engine.objectives.base import Scheduled
from zo_lightning.engine.objectives.samples import number, short
from zo_lightning.engine.objectives.score import Score
from zo_lightning.engine.objectives.texts import TEXT_METRICS

Reward = Callable[[list[str], list[str], Any], Any]
"""(prompts, completions, batch) -> a number for each completion."""

_OWN_DRAWS = ("assistant_model", "assistant_tokenizer", "prompt_lookup_num_tokens", "assistant_early_exit", "custom_generate")
"""What makes the number of random draws depend on the model's answers, so that rows of the two sides no longer share them."""
_REMOVED = (
    "The Hugging Face Trainer removes columns that the model does not know, and its default collator those of texts: say "
    "TrainingArguments(remove_unused_columns=False), and give a data_collator that keeps them."
)


class Generation:
    """A source for `Score`: (module, batch) -> (completions, references), both lists of texts.

    The module's `generate` is called once with all prompts of the batch, without dropout. Sampling draws from torch's global generator,
    which every evaluation of a step finds in the same state: a row has the same draws at all points (common random numbers).
    They depend on the step, the micro-batch, the rank and the number of rows: sampled values of two processes or of an accumulation are not
    those of the whole batch in one piece, as greedy ones are.

    A batch is a mapping with "input_ids", and "attention_mask" if it pads. For a decoder, tokens whose "labels" are not -100 are the
    reference and are not shown: the prompt is what is before them; prompts are padded on the left, whatever the batch does. An
    encoder-decoder reads all of "input_ids", and its labels are the reference.

    Args:
        tokenizer: of transformers, or what has its batch_decode, pad_token_id and eos_token_id.
        generation_config: a GenerationConfig, a mapping of its options, or None; over the model's own. Greedy unless it says do_sample.
        max_new_tokens: tokens of a completion, where the configuration says nothing of lengths.
        references: the key of the batch that holds them: token ids, or texts (or lists of texts that are all right).
        rewards: instead of references: functions (prompts, completions, batch) -> a number for each completion.
        weights: of the rewards; 1 each.

    With rewards it returns (the weighted sum for each completion, completions). Raises TypeError or ValueError for other arguments, and in
    a step where a batch has no prompt or no reference, or a reward is not one number for each completion. One that is not finite skips
    the step.
    """

    def __init__(
        self,
        tokenizer: Any,
        generation_config: Any = None,
        *,
        max_new_tokens: int = 32,
        references: str = "labels",
        rewards: Reward | Sequence[Reward] = (),
        weights: Sequence[float] | None = None,
    ) -> None:
        if not callable(getattr(tokenizer, "batch_decode", None)):
            raise TypeError(f"tokenizer={short(tokenizer)} is not a tokenizer: it has no batch_decode.")
        check_count("max_new_tokens", max_new_tokens, "tokens of a completion")
        self.rewards: list[Reward] = [rewards] if callable(rewards) else list(rewards)
        for reward in self.rewards:
            if not callable(reward):
                raise TypeError(f"rewards has {short(reward)}, which is not a callable (prompts, completions, batch).")
        self.weights = [1.0] * len(self.rewards) if weights is None else list(weights)
        if len(self.weights) != len(self.rewards):
            raise ValueError(f"There are {len(self.weights)} weights for {len(self.rewards)} rewards. Give one each.")
        for weight in self.weights:
            check_number("weight of a reward", weight, "(reward_weights)", lambda x: True)
        self.given = _options_of(generation_config)
        own = [name for name in _OWN_DRAWS if self.given.get(name)]
        if own:
            raise ValueError(
                f"generation_config has {own[0]}, with which a random draw belongs to another token at each point: the difference of two "
                "sides would be noise. Leave it out."
            )
        if self.given.get("return_dict_in_generate") or self.given.get("streamer"):
            raise ValueError("generation_config must not ask for return_dict_in_generate or a streamer: texts are all that is needed.")
        self.tokenizer, self.max_new_tokens, self.references = tokenizer, max_new_tokens, references

    def __call__(self, module: nn.Module, batch: Any) -> tuple[list[Any], list[Any]]:
        if not isinstance(batch, Mapping) or not isinstance(batch.get("input_ids"), Tensor):
            has = ", ".join(map(repr, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"Generation needs a batch with a tensor 'input_ids', and it has {has or 'nothing'}. For other batches give "
                "MetricObjective a source=callable(module, batch) that generates."
            )
        model = generating(module)
        encodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        rows = self._prompts(batch, encodes)
        config = self._config(model, max(map(len, rows)), encodes)
        ids, mask = self._padded(rows, batch["input_ids"].device, left=not encodes)
        with _without_dropout(model):
            found = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        completions = self._texts(found[:, 1 if encodes else ids.shape[1] :].tolist())
        each = config.num_return_sequences or 1
        if self.rewards:
            prompts = [text for text in self._texts(rows) for _ in range(each)]
            return self._rewarded(prompts, completions, batch), completions
        return completions, [reference for reference in self._references(batch) for _ in range(each)]

    def _prompts(self, batch: Mapping[str, Any], encodes: bool) -> list[list[int]]:
        """Their tokens, without padding; of a decoder, without what the labels answer."""
        ids, mask, labels = batch["input_ids"], batch.get("attention_mask"), batch.get("labels")
        shown = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        if mask is None and self.tokenizer.pad_token_id is not None:
            shown = ids != self.tokenizer.pad_token_id
        if not encodes and isinstance(labels, Tensor) and labels.shape == ids.shape:
            shown = shown & ((labels != -100).cumsum(-1) == 0)
        rows = [row[own].tolist() for row, own in zip(ids, shown, strict=True)]
        if not all(rows):
            where = next(i for i, row in enumerate(rows) if not row)
            raise ValueError(
                f"Row {where} of the batch has no prompt: all its tokens are padding or have labels, which are the reference. Set the "
                "labels of prompts to -100 (completion_only_loss in data collators)."
            )
        return rows

    def _padded(self, rows: Sequence[Sequence[int]], device: torch.device, left: bool) -> tuple[Tensor, Tensor]:
        pad, width = self._pad(), max(map(len, rows))
        ids = [[pad] * (width - len(row)) + list(row) if left else list(row) + [pad] * (width - len(row)) for row in rows]
        mask = [[0] * (width - len(row)) + [1] * len(row) if left else [1] * len(row) + [0] * (width - len(row)) for row in rows]
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _pad(self) -> int:
        found = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.tokenizer.eos_token_id
        return int(found or 0)

    def _config(self, model: Any, longest: int, encodes: bool) -> Any:
        """The model's configuration with what was given."""
        config = copy.deepcopy(model.generation_config)
        config.update(do_sample=False, return_dict_in_generate=False)
        if not self.given.get("do_sample"):
            config.update(temperature=1.0, top_k=50, top_p=1.0)  # what is not warned of without sampling
        unknown = [name for name in config.update(**self.given) if not name.startswith("_")]
        if unknown:
            raise ValueError(
                f"generation_config has {unknown[0]!r}, which is not an option of {type(config).__name__} and would do nothing. Correct "
                "its name, or leave it out."
            )
        if not {"max_new_tokens", "max_length"} & self.given.keys():
            config.update(max_new_tokens=self.max_new_tokens)
        elif "max_new_tokens" not in self.given:
            config.update(max_new_tokens=max(1, config.max_length - (1 if encodes else longest)))  # the model's own would win
        if config.pad_token_id is None:
            config.pad_token_id = self._pad()
        limit = getattr(getattr(model, "config", None), "max_position_embeddings", None)
        total = config.max_new_tokens + (0 if encodes else longest)
        if isinstance(limit, int) and total > limit:
            raise ValueError(
                f"A prompt of {longest} tokens and max_new_tokens={config.max_new_tokens} are more than the {limit} positions of "
                f"{type(model).__name__}. Shorten the prompts, or lower max_new_tokens."
            )
        return config

    def _texts(self, rows: Sequence[Sequence[int]]) -> list[str]:
        decoded: list[str] = self.tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True)
        return decoded

    def _references(self, batch: Mapping[str, Any]) -> list[Any]:
        found = batch.get(self.references)
        if found is None:
            raise ValueError(
                f"The batch has no {self.references!r} to compare with (references={self.references!r}); it has "
                f"{', '.join(map(repr, batch))}. Name the key of the references, or give rewards=. {_REMOVED}"
            )
        if not isinstance(found, Tensor):
            return list(found)
        if found.dim() != 2 or found.is_floating_point():
            raise ValueError(
                f"The batch's {self.references!r} is a tensor of {found.dtype} and shape {tuple(found.shape)}. References are token ids "
                "(rows, length), or a list of texts."
            )
        return self._texts([[token for token in row if token >= 0] for row in found.tolist()])

    def _rewarded(self, prompts: list[str], completions: list[str], batch: Any) -> list[float]:
        total = [0.0] * len(completions)
        for reward, weight in zip(self.rewards, self.weights, strict=True):
            name = getattr(reward, "__name__", type(reward).__name__)
            try:
                found = reward(list(prompts), list(completions), batch)
            except KeyError as error:
                error.add_note(f"The reward {name} was given a batch with {', '.join(map(repr, batch))}. {_REMOVED}")
                raise
            found = found.tolist() if hasattr(found, "tolist") else found
            if isinstance(found, str) or not isinstance(found, Iterable):
                raise ValueError(f"The reward {name} gave {type(found).__name__}: {short(found)}. Give a number for each completion.")
            numbers = [number(value, name) for value in found]
            if len(numbers) != len(completions):
                raise ValueError(f"The reward {name} gave {len(numbers)} numbers for {len(completions)} completions. Give one each.")
            total = [before + weight * value for before, value in zip(total, numbers, strict=True)]
        return total


class Generated(Score):
    """Maximises a metric of generated texts and their references, or the mean reward of generated texts.

    The arguments are those of `Generation` and `Score`; `metric` is a name ("exact_match", "f1"), a callable (completions, references) ->
    number or a torchmetrics Metric of texts, over all completions of the step; None with `rewards`.
    """

    def __init__(
        self,
        metric: Any = None,
        tokenizer: Any = None,
        generation_config: Any = None,
        *,
        key: str | int | None = None,
        maximize: bool | None = None,
        max_new_tokens: int = 32,
        references: str = "labels",
        rewards: Reward | Sequence[Reward] = (),
        reward_weights: Sequence[float] | None = None,
        loss_weight: Scheduled = 0.0,
        weight: Scheduled = 1.0,
    ) -> None:
        source = Generation(
            tokenizer, generation_config, max_new_tokens=max_new_tokens, references=references, rewards=rewards, weights=reward_weights
        )
        if (metric is None) == (not source.rewards):
            raise ValueError(
                f"metric={metric!r} and {len(source.rewards)} rewards: give a metric of completions and references, or rewards of "
                "completions. A metric can be one of several rewards."
            )
        if isinstance(metric, str) and metric not in TEXT_METRICS:
            raise ValueError(f"metric={metric!r} is not known. Use {', '.join(map(repr, TEXT_METRICS))}, a callable or a Metric.")
        chosen = TEXT_METRICS[metric] if isinstance(metric, str) else metric
        super().__init__(
            _mean_reward if chosen is None else chosen,
            key=key,
            maximize=maximize,
            source=source,
            ignore_index=None,
            loss_weight=loss_weight,
            weight=weight,
        )
        if source.rewards:
            self.name = " + ".join(getattr(reward, "__name__", type(reward).__name__) for reward in source.rewards)


def _mean_reward(rewards: Sequence[float], completions: Sequence[str]) -> float:
    return math.fsum(rewards) / len(rewards)


def generating(module: nn.Module) -> Any:
    """The model that generates: the module itself, or the outermost one inside of it that can. ValueError where none can."""
    for part in module.modules():
        kept = getattr(part, "_orig_mod", part)
        can = getattr(kept, "can_generate", None)
        if callable(getattr(kept, "generate", None)) and hasattr(kept, "generation_config") and (can is None or can()):
            return kept
    raise ValueError(
        f"Nothing in {type(module).__name__} can generate: there is no transformers model with a language modelling head. Use a model for "
        "causal or conditional generation, or MetricObjective with a source=callable(module, batch)."
    )


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside it, the model is in evaluation mode; each module is as it was on the way out."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _options_of(config: Any) -> dict[str, Any]:
    """What a GenerationConfig or a mapping says, without what is nothing."""
    if config is None:
        return {}
    plain = isinstance(config, Mapping)
    if not plain and (inspect.isclass(config) or not hasattr(config, "to_diff_dict")):
        raise TypeError(f"generation_config={short(config)} is neither a GenerationConfig, a mapping of its options, nor None.")
    given = config if plain else config.to_diff_dict()
    return {name: value for name, value in given.items() if value is not None and name != "transformers_version"}
