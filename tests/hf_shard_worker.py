"""Run by test_sharded_hosts: one of two gloo processes of a Trainer, with all weights or with shards of accelerate's FSDP2."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import accelerate.state
import torch
from accelerate import DistributedType
from hf_tools import llama, losses, tokens, trainer
from shard_worker import full
from torch import nn

from zo_lightning.engine.shards import is_sharded

KINDS = ("FULL_STATE_DICT", "SHARDED_STATE_DICT")
_begin = accelerate.state.AcceleratorState.__init__


def shard_on_cpus(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    """accelerate shards models on accelerators alone; what it does there works here, too."""
    _begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None:
        self.distributed_type = accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


def fit(folder: Path, kind: str | None, resume: str | None = None, **given: Any) -> tuple[Any, dict[str, Any]]:
    """`kind` is that of the state dict; None does not shard."""
    model: Any = llama(0, torch.float32)
    model.config.tie_word_embeddings = False  # accelerate can't follow tied ones
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    if kind is not None:
        config = {"transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": kind, "fsdp_version": 2}
        given = {"fsdp": "full_shard", "fsdp_config": config, **given}
    host = trainer(folder, model, data=tokens(), per_device_train_batch_size=4, ddp_backend="gloo", **given)
    host.train(resume_from_checkpoint=resume)
    return host, {
        "weights": {name: full(p) for name, p in host.model.state_dict().items()},
        "losses": losses(host),
        "sharded": sum(map(is_sharded, host.model.parameters())),
        "residency": type(host.zo_optimizer.residency).__name__,
        "values": list(host.zo_optimizer.report.values),
    }


def main(folder: Path, sharded: bool) -> None:
    rank = int(os.environ["RANK"])
    results: dict[str, Any] = {}
    if sharded:
        accelerate.state.AcceleratorState.__init__ = shard_on_cpus
        for kind in KINDS:
            own = folder / kind
            _, results[kind] = fit(own, kind, save_strategy="steps", save_steps=2)
            torch.distributed.barrier()
            _, results[f"{kind}, resumed"] = fit(own, kind, str(own / "checkpoint-2"))
    else:
        _, results["whole"] = fit(folder / "whole", None)
    torch.save(results, folder / f"{'shards' if sharded else 'whole'}.{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "shards")
