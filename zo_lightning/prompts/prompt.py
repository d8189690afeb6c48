"""Prompt: a classification task as the language modelling that a model was pretrained for; collator, loss and scores in one object."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from zo_lightning.engine.messages import check_count, choose
from zo_lightning.prompts.template import Template, cut
from zo_lightning.prompts.tokens import Tokens, shared

KINDS = {"mask": "masked", "next": "causal", "options": "causal"}
IGNORED = -100
UNKNOWN = -1
"""The class of an example without a label."""


class Prompt:
    """Turns examples into a batch, and a language model's outputs into scores of classes and their cross entropy.

        loss = mean over examples of  -log softmax(scores)[label],   scores: (batch, classes), float32

    kind="mask" (LM-BFF, arXiv 2012.15723): the logits of the label words at the mask. kind="next" (MeZO, arXiv 2305.17333): those of the
    token that follows the prompt. kind="options": each option is appended to the prompt, and its score is the mean (or the sum) of the
    log-probabilities of its tokens; options are the same for all examples, or a field of the example (multiple choice).

    The instance is the collator: `prompt(examples)` gives input_ids, attention_mask and labels. `loss` is Hugging Face's compute_loss_func,
    `scores` its preprocess_logits_for_metrics; `hooks()` has all that its Trainer takes. Elsewhere: `loss_of(model, batch)`,
    `logits(model, batch)`, `targets(batch)`. Rows are padded at their ends whatever the tokenizer's side: no token attends to padding then,
    and positions are those of the text alone. Virtual tokens of adapters may stand in front.

    Args:
        tokenizer: the model's.
        template: a text with fields of the example, "{premise} {hypothesis}", and with {mask} for kind="mask".
        labels: label words of one token each: a list, whose indices the examples' labels are, or a dict from label to word.
        options: for kind="options": texts, as a list or a dict, or the name of the field with an example's own list of them.
        kind: "mask", "next" or "options".
        max_length: of a row, special tokens and option included; None is the tokenizer's. The fields are cut, the longest first, never the
            template, the mask or the options; at their ends, unless tokenizer.truncation_side is "left".
        label: the field with the label; examples without it get scores and no loss.
        separator: what stands between the prompt and the answer, a space unless the template ends with a line break.
        score: "mean" or "sum", of the log-probabilities of an option's tokens.
        max_options, max_option_tokens: the most that an example of its own options may have.

    Labels of a batch are (batch, width) integers that also say where the scores are to be read: a prompt's own, `targets` reads them. Each
    row has width - 1 entries that are not -100, so that a host's num_items_in_batch counts examples.

    Raises ValueError for label words of several tokens, equal or unknown ones, templates without a field, and, from the collator, for
    labels and options that don't fit, and prompts that can't be cut to max_length.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: str,
        labels: Sequence[str] | Mapping[Any, str] | None = None,
        *,
        options: str | Sequence[str] | Mapping[Any, str] | None = None,
        kind: str = "mask",
        max_length: int | None = None,
        label: str = "label",
        separator: str | None = None,
        score: str = "mean",
        max_options: int = 8,
        max_option_tokens: int = 32,
    ) -> None:
        choose("kind", kind, dict(KINDS))
        choose("score", score, {"mean": 0, "sum": 0})
        for name, value in (("max_options", max_options), ("max_option_tokens", max_option_tokens)):
            check_count(name, value)
        given, other = ("options", "labels") if kind == "options" else ("labels", "options")
        if (labels if kind == "options" else options) is not None:
            raise ValueError(f"{other}= is given, and kind={kind!r} takes {given}=.")
        self.kind, self.label, self.score = kind, label, score
        self.template = Template(template, masked=kind == "mask")
        self.tokens = Tokens(tokenizer)
        self.max_length = self.tokens.limit if max_length is None else max_length
        if self.max_length is not None:
            check_count("max_length", self.max_length, "tokens of a row")
        self.separator = self._separator(separator)
        if kind == "mask" and getattr(tokenizer, "mask_token_id", None) is None:
            raise ValueError(
                f"kind='mask' needs a mask token, and {type(tokenizer).__name__} has none (decoders). Use kind='next' or 'options'."
            )
        self.field = options if isinstance(options, str) else None
        self.names: list[Any] = []
        self._words: list[int] = []
        self._answers: list[str] = []
        self._most, self._longest = max_options, max_option_tokens
        if self.field is None:
            self._set_answers(given, options if kind == "options" else labels)
        self.width = 3 if kind != "options" else 2 + self._most * (2 + self._longest)

    def _separator(self, given: str | None) -> str:
        before = self.template.before_slot(self.kind == "mask")
        if self.kind == "mask":
            if given is not None:
                raise ValueError(f"separator={given!r} does nothing with kind='mask': the template says what stands before the mask.")
            return before[len(before.rstrip()) :]
        if given is not None:
            return given
        return "" if before.rstrip(" ")[-1:].isspace() else " "

    def _set_answers(self, given: str, answers: Any) -> None:
        if not isinstance(answers, (Sequence, Mapping)) or isinstance(answers, str) or len(answers) < 2:
            raise ValueError(f"Invalid {given}: {answers!r}. Must be two or more texts, as a list or as a dict from label to text.")
        self.names = list(answers) if isinstance(answers, Mapping) else list(range(len(answers)))
        texts = list(answers.values()) if isinstance(answers, Mapping) else list(answers)
        self._check_texts(given, texts)
        self._answers, self._most = texts, len(texts)
        if self.kind == "options":
            self._longest = max(len(self.tokens.of(self.separator + text)) for text in texts) + 1
            return
        anchor = self.template.before_slot(self.kind == "mask").rstrip(" ")
        anchor = anchor.rstrip() if self.kind == "mask" else anchor
        self._words = [self.tokens.word(text, anchor, self.separator) for text in texts]
        for i, token in enumerate(self._words):
            if token in self._words[:i]:
                first = texts[self._words.index(token)]
                raise ValueError(f"The label words {first!r} and {texts[i]!r} are the same token ({self.tokens.shown([token])}).")

    def _check_texts(self, name: str, texts: Sequence[Any]) -> None:
        for i, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{name}: {text!r} is not a text.")
            if text in texts[:i]:
                raise ValueError(f"{name}: {text!r} stands there twice.")

    # ---- Examples -> batch

    def __call__(self, examples: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
        """The batch: labels (batch, width), input_ids and attention_mask, (batch, length), or (all options of all examples, length)."""
        rows: list[list[int]] = []
        where: list[list[tuple[int, list[int]]]] = []
        targets = []
        for example in examples:
            if not isinstance(example, Mapping):
                raise ValueError(f"An example is of type {type(example).__name__}. A prompt takes dicts with the fields of its template.")
            own = self._rows(example)
            rows += [row for row, _, _ in own]
            where.append([(start - len(row), answer) for row, start, answer in own])
            targets.append(self._target(example, len(own)))
        if not rows:
            raise ValueError("There are no examples in this batch.")
        if len({target == UNKNOWN for target in targets}) > 1:
            raise ValueError(f"Some examples of a batch have a {self.label!r}, others none.")
        length = max(map(len, rows))
        ids = torch.full((len(rows), length), self.tokens.pad)
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        counted = iter(rows)
        packed = [
            self._packed(target, [(length - len(next(counted)) - start, answer) for start, answer in places])
            for target, places in zip(targets, where, strict=True)
        ]
        return {"labels": torch.tensor(packed), "input_ids": ids, "attention_mask": mask}  # hosts take the first for the batch's size

    def _packed(self, target: int, places: list[tuple[int, list[int]]]) -> list[int]:
        """-100, the class, and for each answer: how far from the row's end its scores are read, how many tokens it has, and which."""
        row = [IGNORED, target]
        if self.kind != "options":
            return [*row, places[0][0]]
        for i in range(self._most):
            from_end, answer = places[i] if i < len(places) else (0, [])
            row += [from_end, len(answer), *answer, *[0] * (self._longest - len(answer))]
        return row

    def _target(self, example: Mapping[str, Any], count: int) -> int:
        value = example.get(self.label)
        if value is None:
            return UNKNOWN
        value = value.item() if hasattr(value, "item") else value
        allowed = self.names or list(range(count))
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[allowed.index(value)], bool):
            raise ValueError(f"An example has the {self.label} {value!r}, which is none of {', '.join(map(repr, allowed))}.")
        return allowed.index(value)

    def _rows(self, example: Mapping[str, Any]) -> list[tuple[list[int], int, list[int]]]:
        """(row, position whose logits are read first, tokens of the answer) for each row of an example."""
        answers = self._options(example) if self.kind == "options" else []
        values = self.template.values(example)
        if self.max_length is not None:
            limit = self.max_length
            fitting = cut(values, lambda tried: self._size(tried, answers) <= limit, self.tokens.tokenizer.truncation_side == "left")
            if fitting is None:
                needed = self._size(dict.fromkeys(values, ""), answers)
                raise ValueError(
                    f"max_length={limit} is too small: the template{' with an option' if answers else ''} alone has {needed} tokens."
                )
            values = fitting
        prompt, rows = self._prompt(values), []
        if self.kind == "mask":
            before = self.template.render(values)[0]
            ids = [*self.tokens.before, *self.tokens.of(prompt), *self.tokens.after]
            masks = [i for i, token in enumerate(ids) if token == self.tokens.tokenizer.mask_token_id]
            return [(ids, masks[before.count(self.tokens.tokenizer.mask_token)], [])]  # a text may have the mask's name in it
        known = self.tokens.of(prompt)
        for answer in answers or [""]:
            whole = self.tokens.of(prompt + self.separator + answer) if answer else known
            start = len(self.tokens.before) + (shared(known, whole) if answer else len(whole))
            ids = [*self.tokens.before, *whole]
            if not start:
                raise ValueError(f"The prompt of an example is empty, so nothing says what follows: {dict(example)!r}.")
            tokens = ids[start:]
            if answer and not 0 < len(tokens) <= self._longest:
                raise ValueError(
                    f"The option {answer!r} has {len(tokens)} tokens behind its prompt. Must be 1 to max_option_tokens={self._longest}."
                )
            rows.append((ids, start - 1, tokens))
        return rows

    def _options(self, example: Mapping[str, Any]) -> list[str]:
        if self.field is None:
            return self._answers
        found = example.get(self.field)
        if not isinstance(found, (list, tuple)) or not found:
            raise ValueError(f"options={self.field!r}: an example has {found!r} there. Must be a list of one or more texts.")
        self._check_texts(f"options={self.field!r}", found)
        if len(found) > self._most:
            raise ValueError(f"An example has {len(found)} options, more than max_options={self._most}. Say max_options={len(found)}.")
        return list(found)

    def _prompt(self, values: Mapping[str, str]) -> str:
        if self.kind == "mask":
            return "".join(self.template.render(values, self.tokens.tokenizer.mask_token))
        return self.template.render(values)[0].rstrip(" ")

    def _size(self, values: Mapping[str, str], answers: Sequence[str]) -> int:
        prompt = self._prompt(values)
        if self.kind == "mask":
            return len(self.tokens.before) + len(self.tokens.of(prompt)) + len(self.tokens.after)
        tails = [self.separator + answer for answer in answers] or [""]
        return len(self.tokens.before) + max(len(self.tokens.of(prompt + tail)) for tail in tails)

    # ---- Outputs -> scores and loss

    def scores(self, outputs: Any, labels: Tensor) -> Tensor:
        """(batch, classes) of what a language model returned; -inf for options that an example does not have."""
        logits, labels = self._read(outputs), self._checked(labels)
        if self.kind != "options":
            self._check_rows(len(logits), len(labels))
            rows = torch.arange(len(logits), device=logits.device)
            here = logits[rows, logits.shape[1] - labels[:, 2]]
            if max(self._words) >= here.shape[-1]:
                raise ValueError(f"The model has {here.shape[-1]} tokens, and a label word is number {max(self._words)}: wrong tokenizer?")
            return here[:, self._words].float()
        places = labels[:, 2:].view(len(labels), self._most, 2 + self._longest)
        present = places[..., 1] > 0
        from_end, count, tokens = places[present].split([1, 1, self._longest], dim=1)
        self._check_rows(len(logits), len(count))
        step = torch.arange(self._longest, device=labels.device)
        valid = step < count
        row, column = valid.nonzero(as_tuple=True)
        read = logits[row, logits.shape[1] - from_end[row, 0] + column].float()
        each = read.gather(1, tokens[row, column, None])[:, 0] - read.logsumexp(-1)
        total = torch.zeros(len(count), device=logits.device).index_add(0, row, each)
        if self.score == "mean":
            total = total / count[:, 0]
        return torch.full(present.shape, -torch.inf, device=logits.device).masked_scatter(present, total)

    def loss(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        """Cross entropy, the mean over examples; over all of an accumulated batch where num_items_in_batch counts its label entries."""
        if labels is None:
            raise ValueError("There are no labels in the batch. Is the Prompt the data_collator (Hugging Face) or collate_fn?")
        scores, target = self.scores(outputs, labels), self.targets({"labels": labels})
        if bool((target == UNKNOWN).any()):
            return scores.new_full((), torch.nan)
        if num_items_in_batch is None:
            return F.cross_entropy(scores, target)
        total: Tensor = F.cross_entropy(scores, target, reduction="sum")
        return total * (self.width - 1) / torch.as_tensor(num_items_in_batch, device=total.device, dtype=total.dtype)

    def loss_of(self, model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of a batch: a training_step, or a closure."""
        return self.loss(model(**self.inputs(batch)), batch["labels"])

    def logits(self, model_or_outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """(batch, classes) scores, by a model or of what it returned for this batch."""
        callable_ = callable(model_or_outputs) and not isinstance(model_or_outputs, (Tensor, Mapping))
        return self.scores(model_or_outputs(**self.inputs(batch)) if callable_ else model_or_outputs, batch["labels"])

    def targets(self, batch: Mapping[str, Tensor]) -> Tensor:
        """(batch,) classes; -1 where an example has no label."""
        return self._checked(batch["labels"])[:, 1]

    def inputs(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What of a batch the model gets."""
        return {name: value for name, value in batch.items() if name != "labels"}

    # ---- What hosts take

    def pairs(self, outputs: Any, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(scores, classes), for metrics: `Score(preprocess=prompt.pairs)`."""
        target = self.targets({"labels": labels})
        if bool((target == UNKNOWN).any()):
            raise ValueError(f"The examples of this batch have no {self.label!r} to compare with (label={self.label!r}). Name its field.")
        return self.scores(outputs, labels), target

    def objective(self, metric: Any, **options: Any) -> Any:
        """A MetricObjective on (scores, classes) for the Hugging Face Trainer; under Lightning let training_step return them."""
        from zo_lightning.callbacks import MetricObjective

        return MetricObjective(metric, preprocess=self.pairs, shift=False, ignore_index=None, **options)

    def hooks(self, compute_metrics: Callable[[Any], dict[str, float]] | None = None) -> dict[str, Any]:
        """For `Trainer(..., **prompt.hooks(compute_metrics))`, with TrainingArguments(remove_unused_columns=False).

        compute_metrics gets predictions (N, classes) and label_ids (N,).
        """
        found: dict[str, Any] = {"data_collator": self, "compute_loss_func": self.loss, "preprocess_logits_for_metrics": self.scores}
        if compute_metrics is not None:
            own = compute_metrics

            def of_classes(prediction: Any, **how: Any) -> dict[str, float]:
                rest = {"inputs": prediction.inputs, "losses": getattr(prediction, "losses", None)}
                return own(type(prediction)(prediction.predictions, prediction.label_ids[:, 1], **rest), **how)

            found["compute_metrics"] = of_classes
        return found

    def _read(self, outputs: Any) -> Tensor:
        """The logits (rows, length, vocabulary). ValueError for another kind of model."""
        name = type(outputs).__name__
        wrong = {"mask": ("CausalLMOutput",), "next": ("MaskedLMOutput",), "options": ("MaskedLMOutput",)}[self.kind]
        if name.startswith((*wrong, "Seq2Seq")):
            use = "kind='mask'" if name.startswith("Masked") else "kind='next' or kind='options'"
            what = f"Use {use} for it." if not name.startswith("Seq2Seq") else "Encoder-decoder models have no prompts here."
            raise ValueError(f"kind={self.kind!r} is for {KINDS[self.kind]} language models, and the model returned a {name}. {what}")
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else getattr(outputs, "logits", outputs)
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        if not isinstance(logits, Tensor) or logits.dim() != 3:
            shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
            raise ValueError(
                f"A prompt reads logits (batch, length, vocabulary) of a language model, and got {type(outputs).__name__}{shape}. Use a "
                f"model with its language model head (AutoModelFor{'MaskedLM' if self.kind == 'mask' else 'CausalLM'})."
            )
        return logits

    def _checked(self, labels: Any) -> Tensor:
        if not isinstance(labels, Tensor) or labels.dim() != 2 or labels.shape[1] != self.width:
            got = f"shape {tuple(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ValueError(
                f"Labels of this prompt have the shape (batch, {self.width}), and these are {got}. The Prompt must be the collator."
            )
        return labels

    def _check_rows(self, found: int, expected: int) -> None:
        if found != expected:
            raise ValueError(f"The model returned {found} rows of logits for {expected} of the batch.")
