"""PrefixInit: virtual tokens of peft's prefix and prompt tuning begin as what real tokens produce."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zo_lightning.callbacks.base import Run, ZOCallback
from zo_lightning.engine.parallel import broadcast_parameters


class PrefixInit(ZOCallback):
    """Gives the virtual tokens of peft's prefix tuning the keys and values that real tokens have in the model, and those of prompt tuning
    their embeddings: the model then begins as it is behind these tokens, and not behind noise (MeZO's recipe, arXiv 2305.17333).

    It happens once, before the first step of a run; a run that is resumed keeps what it has. Works for decoders, encoder-decoders (from the
    decoder's own attention) and encoders, with grouped queries as well, through peft's own interfaces.

    Args:
        text: what the first virtual tokens are the tokens of, begun again where it is too short; needs `tokenizer`. None: tokens of the
            vocabulary by chance, none of the special ones.
        tokenizer: the model's.
        tokens: token ids instead of a text, as many as there are virtual tokens.
        seed: of the chance; None is the optimizer's seed.

    Raises ValueError without such an adapter, for one whose virtual tokens go through a network of their own (prefix_projection, p-tuning),
    and for a text without tokens or a wrong number of tokens. peft 0.19 or later.
    """

    changes_weights = True

    def __init__(
        self, text: str | None = None, tokenizer: Any = None, *, tokens: Sequence[int] | None = None, seed: int | None = None
    ) -> None:
        if text is not None and tokens is not None:
            raise ValueError(f"PrefixInit(text={text!r}, tokens={list(tokens)!r}): both say what to begin with. Leave one of them out.")
        if text is not None and tokenizer is None:
            raise ValueError(f"PrefixInit(text={text!r}) needs the model's tokenizer: PrefixInit(text, tokenizer).")
        self.text, self.tokenizer, self.seed = text, tokenizer, seed
        self.tokens = None if tokens is None else list(tokens)

    def on_run_start(self, run: Run) -> None:
        if run.optimizer.steps > 0:
            return
        model = _peft_model(run.module)
        with run.optimizer.settled():
            changed = self.initialize(model, run.optimizer.seed)
        if run.optimizer.exchange.world_size > 1:
            broadcast_parameters([changed])

    @torch.no_grad()
    def initialize(self, model: Any, seed: int = 0) -> Tensor:
        """Do it to a `peft.PeftModel`; the parameter that was written to."""
        adapter = model.active_adapter
        config = model.peft_config[adapter]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        if kind not in ("PREFIX_TUNING", "PROMPT_TUNING") or getattr(config, "prefix_projection", False):
            through = " with prefix_projection=True" if getattr(config, "prefix_projection", False) else ""
            raise ValueError(
                f"PrefixInit: the adapter {adapter!r} is of the type {kind}{through}. Only virtual tokens that are parameters themselves "
                "can begin as real ones: those of PrefixTuningConfig (without projection) and PromptTuningConfig."
            )
        weight: Tensor = model.prompt_encoder[adapter].embedding.weight
        base = model.get_base_model()
        ids = torch.tensor([self._tokens(base, weight.shape[0], seed)], device=weight.device)
        if kind == "PROMPT_TUNING":
            weight.copy_(base.get_input_embeddings()(ids)[0])
        else:
            from peft import initialize_kv_prefix_from_past_key_values

            initialize_kv_prefix_from_past_key_values(model, adapter_name=adapter, past_key_values=_keys_and_values(base, ids))
        return weight

    def _tokens(self, base: Any, count: int, seed: int) -> list[int]:
        if self.tokens is not None:
            if len(self.tokens) != count:
                raise ValueError(f"PrefixInit(tokens=...) has {len(self.tokens)} tokens, and the adapter {count} virtual tokens.")
            return self.tokens
        if self.text is not None:
            found = list(self.tokenizer(self.text, add_special_tokens=False)["input_ids"])
            if not found:
                raise ValueError(f"PrefixInit(text={self.text!r}): the text has no tokens.")
            return (found * -(-count // len(found)))[:count]
        ordinary = torch.ones(base.get_input_embeddings().weight.shape[0])
        ordinary[sorted(_special(base, self.tokenizer))] = 0
        generator = torch.Generator().manual_seed(seed if self.seed is None else self.seed)
        chosen: list[int] = torch.multinomial(ordinary, count, replacement=True, generator=generator).tolist()
        return chosen


def _special(base: Any, tokenizer: Any) -> set[int]:
    """Ids of tokens that are no text, as far as they are known."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id", "unk_token_id", "cls_token_id", "sep_token_id")
    values = [getattr(base.config, name, None) for name in names] + list(getattr(tokenizer, "all_special_ids", ()))
    flat = [one for value in values for one in (value if isinstance(value, (list, tuple)) else [value])]
    size = base.get_input_embeddings().weight.shape[0]
    return {one for one in flat if isinstance(one, int) and 0 <= one < size}


def _keys_and_values(base: Any, ids: Tensor) -> Any:
    """Of every layer that attends to what comes before, (batch, heads, tokens, head_dim) each."""
    from transformers import DynamicCache

    training = [module for module in base.modules() if module.training]
    base.eval()
    try:
        if base.config.is_encoder_decoder:
            cache = base(input_ids=ids, decoder_input_ids=ids, use_cache=True).past_key_values
            return cache.self_attention_cache
        cache = DynamicCache(config=base.config)
        base(input_ids=ids, past_key_values=cache, use_cache=True)
        return cache
    finally:
        for module in training:
            module.training = True


def _peft_model(module: nn.Module) -> Any:
    for part in module.modules():
        if hasattr(part, "peft_config") and hasattr(part, "active_adapter") and hasattr(part, "get_base_model"):
            return part
    raise ValueError(
        f"PrefixInit: {type(module).__name__} has no virtual tokens. Put them on with peft.get_peft_model(model, PrefixTuningConfig(...)) "
        "or PromptTuningConfig(...)."
    )
