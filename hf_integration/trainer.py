"""ZOTrainerMixin: the Hugging Face Trainer's own training step, evaluated at the points that the engine asks for."""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DynamoBackend
from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from zo_lightning.callbacks.base import engine_of, zo_callbacks
from zo_lightning.engine import ZOOptimizer
from zo_lightning.engine.messages import say_once
from zo_lightning.engine.options import EngineOptions
from zo_lightning.engine.parallel import NOT_SHARDED, UNSET, Exchange, Mesh, Processes, as_mesh, broadcast_parameters
from zo_lightning.engine.residency import Offload
from zo_lightning.hf_integration import knobs
from zo_lightning.hf_integration.bridge import ZOBridge
from zo_lightning.hf_integration.checkpoints import is_complete, newest_complete
from zo_lightning.hf_integration.config import ZOArguments
from zo_lightning.hf_integration.data_order import DataOrder
from zo_lightning.hf_integration.loss_scale import ignores_items, may_ignore_items
from zo_lightning.hf_integration.observed import observed, with_trainers_metrics
from zo_lightning.hf_integration.options import engine_options, read_fields, take_options
from zo_lightning.hf_integration.quantized import QuantizedMixin
from zo_lightning.hf_integration.quiet import NoBackward, rerun, unseen
from zo_lightning.hf_integration.sharded import ShardedMixin, check_sharding
from zo_lightning.hf_integration.shared_data import of_stream


def _as_it_is(loss: Any) -> Any:
    return loss


def from_trl(kind: type) -> bool:
    """Whether `kind` derives from a class of trl, whose trainers rebuild their configuration from ``to_dict()``."""
    return any(base.__module__.partition(".")[0] == "trl" for base in kind.__mro__)


class ZOTrainerMixin(QuantizedMixin, ShardedMixin):
    """Put in front of any ``transformers.Trainer``: ``class MyTrainer(ZOTrainerMixin, trl.SFTTrainer)``.

    Takes the host's arguments and besides them ``optim="zo"`` (or the name of a first-order optimizer, which then is
    used) and every engine option as ``zo_*``; these win over ``optim_args`` and over the fields of a ``ZOConfig``.

    One step evaluates the host's whole ``training_step`` at each point of the estimator, its backward call left out:
    scaling for accumulation, autocast, label smoothing, ``compute_loss_func`` and what a subclass adds stay the
    host's. The loss that the host logs is the mean over the points.

    Raises ``ValueError`` under DeepSpeed, FSDP 1 and tensor, context or sequence parallelism, and for options out of
    range; ``TypeError`` for a ``zo_`` keyword that does not exist.
    """

    model: Any  # upstream: optional until it is resolved, which is before anything here runs
    optimizer: Any

    def __init__(self, *args: Any, optim: str | None = None, **kwargs: Any) -> None:
        self._zo = False
        self._zo_told = optim
        self._zo_keywords = take_options(kwargs)
        self._zo_fields: dict[str, Any] = {}
        self._zo_options: EngineOptions | None = None
        self._zo_prepared: ZOOptimizer | None = None
        self._zo_without_items: bool | None = None
        self._zo_no_backward = NoBackward()
        self._zo_given = [one for value in (*args, *kwargs.values()) if isinstance(value, (list, tuple)) for one in value]
        own = {key: self._zo_arguments(value) for key, value in kwargs.items()}
        super().__init__(*[self._zo_arguments(value) for value in args], **own)
        if self._zo:
            self._zo_check_optimizer()
            self._zo_bridge = ZOBridge(self)
            self.add_callback(self._zo_bridge)
            self._zo_data = DataOrder(self)
            self.add_callback(self._zo_data)

    # ---- Construction ----

    def _zo_arguments(self, value: Any) -> Any:
        """TrainingArguments become the trainer's own copy, adapted before the host reads them; the rest passes."""
        if not isinstance(value, TrainingArguments):
            return value
        if isinstance(value, ZOArguments) and from_trl(type(self)) and not from_trl(type(value)):
            self._zo_fields = read_fields(value)
            self._zo_told = self._zo_told or str(getattr(value.optim, "value", value.optim))
            value = knobs.without_zo_fields(value)
        value = copy.copy(value)
        self._zo_adapt(value)
        return value

    def _zo_adapt(self, args: TrainingArguments) -> None:
        """Decide for `args` and adapt them in place; once more changes nothing (trl and args=None make their own)."""
        self._zo = knobs.decide(args, self._zo_told)
        if self._zo:
            engine_options(args, self._zo_keywords, self._zo_fields)
            knobs.adapt(args)
        elif self._zo_keywords:
            names = ", ".join(f"zo_{name}" for name in self._zo_keywords)
            optim = getattr(args.optim, "value", args.optim)
            say_once("hf.first_order", f"{names}, given to the trainer, do nothing with optim={optim!r}.")

    def create_accelerator_and_postprocess(self) -> None:
        """The host's accelerator without loss scaler and without DistributedDataParallel."""
        self._zo_adapt(self.args)
        super().create_accelerator_and_postprocess()
        if not self._zo:
            return
        if self.is_deepspeed_enabled:
            raise ValueError(
                "optim='zo' does not run under DeepSpeed, which the accelerate launcher has switched on. Start the "
                "script with torchrun, or with an accelerate configuration without it."
            )
        check_sharding(self)
        if self.is_fsdp_enabled:
            self.accelerator.prepare = functools.partial(self._zo_follow, self.accelerator.prepare)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler = torch.amp.GradScaler(self.accelerator.device.type, enabled=False)
        self.accelerator.prepare_model = functools.partial(self._zo_prepare_model, self.accelerator.prepare_model)

    def _zo_prepare_model(self, prepare: Callable[..., Any], model: Any, device_placement: bool | None = None, **_: Any) -> Any:
        """accelerate's, which wraps nothing and leaves weights that are streamed to the device where they are."""
        return prepare(model, device_placement=False if self._zo_streams() else device_placement, evaluation_mode=True)

    def _zo_streams(self) -> bool:
        """Whether weights come to the device block by block; callbacks are asked, some before the host knows them."""
        if not self._zo:
            return False
        engines = filter(None, map(engine_of, (getattr(self, "optimizer", None), *self._zo_given)))
        if any(isinstance(engine.weights, Offload) for engine in engines):
            return True
        handler, options = getattr(self, "callback_handler", None), self.zo_options
        for callback in zo_callbacks(self._zo_given if handler is None else handler.callbacks):
            options = callback.configure(options)
        return isinstance(options.weights, Offload)

    def _move_model_to_device(self, model: Any, device: torch.device) -> None:
        """The host's, unless the weights are streamed: the engine then brings the rest of the model."""
        if not self._zo_streams():
            super()._move_model_to_device(model, device)

    def _zo_check_optimizer(self) -> None:
        """Raise ``ValueError`` for a first-order optimizer object or class given to a forward-only trainer."""
        given = type(self.optimizer) if self.optimizer is not None else (self.optimizer_cls_and_kwargs or (None,))[0]
        if given is not None and not (isinstance(given, type) and issubclass(given, ZOOptimizer)):
            raise ValueError(
                f"{type(self).__name__} got the optimizer {getattr(given, '__name__', given)} and trains forward-only. "
                "Pass a ZOOptimizer, or leave it out; to train first-order with it, say so: optim='adamw_torch' (or "
                "any other first-order name) as an argument of the trainer."
            )

    # ---- The optimizer ----

    @property
    def zo_optimizer(self) -> ZOOptimizer:
        """The engine behind the host's wrappers; ``RuntimeError`` before ``train()`` (or ``create_optimizer()``)."""
        optimizer = engine_of(self.optimizer)
        if optimizer is None:
            raise RuntimeError("This trainer has no ZOOptimizer: train() or create_optimizer() makes it.")
        return optimizer

    @property
    def zo_options(self) -> EngineOptions:
        """The engine's options as they are now, before callbacks configure them."""
        return engine_options(self.args, self._zo_keywords, self._zo_fields)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The host's groups (no decay for biases and norms) in a ZOOptimizer that its callbacks have configured."""
        if not self._zo:
            return super().create_optimizer(*args, **kwargs)
        options = before = self.zo_options
        for callback in zo_callbacks(self.callback_handler.callbacks):
            options = callback.configure(options)
        given = self.optimizer is not None
        if given and self._zo_prepared is None and options is not before:
            raise ValueError(
                "A callback configures the engine, but optimizers=(ZOOptimizer(...), ...) is built already. Leave the "
                "optimizer out, or configure it where it is built."
            )
        if options.weight_decay is not None:
            self.args.weight_decay = options.weight_decay
        self._zo_options = options = with_trainers_metrics(options, self)
        knobs.stop_checkpointing(self.model)
        super().create_optimizer(*args, **kwargs)
        engine = self.zo_optimizer
        if engine is not self._zo_prepared:
            self._zo_prepared, self._zo_without_items = engine, None
            if not given:
                knobs.say_inherited(self.args, options, engine.usual_lr())
            self._zo_bridge.keep_state(engine)
            if self.args.world_size > 1:
                if self.is_fsdp_enabled and as_mesh(options.parallel, self.args.world_size).data < self.args.world_size:
                    raise ValueError(NOT_SHARDED.format(parallel=options.parallel))
                engine.exchange = Processes(options.parallel, timeout=timedelta(seconds=self.args.ddp_timeout))
                if options.parallel is None:
                    say_once("hf.parallel", UNSET.format(world=self.args.world_size, option="zo_parallel"))
                broadcast_parameters([*self.model.parameters(), *self.model.buffers()])
        return self.optimizer

    def get_optimizer_cls_and_kwargs(  # type: ignore[override]  # upstream: a staticmethod, always called through self
        self, args: TrainingArguments, model: Any = None
    ) -> tuple[Any, dict[str, Any]]:
        """ZOOptimizer with the engine's options and the host's learning rate."""
        if not self._zo:
            return super().get_optimizer_cls_and_kwargs(args, model)
        options = self._zo_options or self.zo_options
        if isinstance(options.weights, Offload):
            options = dataclasses.replace(options, weights=self._zo_offload(options.weights))
        if options.weights == "auto" and self.accelerator.state.dynamo_plugin.backend != DynamoBackend.NO:
            # accelerate compiles later, and hooks that are added to a compiled module never run
            options = dataclasses.replace(options, weights="inplace")
        lr = args.learning_rate if options.lr is None else options.lr
        module = self.model if model is None else model
        return ZOOptimizer, {**options.keywords(), "lr": lr, "weight_decay": args.weight_decay, "module": module}

    def _zo_offload(self, offload: Offload) -> Offload:
        """For the device of the host. ``ValueError`` for what would bring the whole model there."""
        full = next((name for name in ("fp16_full_eval", "bf16_full_eval") if getattr(self.args, name)), None)
        if full is not None:
            raise ValueError(f"{full}=True casts and moves the whole model for evaluation, and its weights are streamed. Leave it out.")
        if self.args.world_size > 1 and self.args.device.type != "cpu":
            raise ValueError(f"Weights are streamed to one device so far, and there are {self.args.world_size} processes. Start one.")
        return offload if offload.device is not None else dataclasses.replace(offload, device=str(self.args.device))

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The host's; weights that are streamed are so in an evaluation before training, too."""
        if self.optimizer is None and self._zo_streams():
            self.create_optimizer()
        return super().evaluation_loop(*args, **kwargs)

    # ---- The step ----

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """The host's training step at every point; returns the mean of its losses, which the host logs."""
        if not self._zo:
            return super().training_step(model, inputs, num_items_in_batch)
        if num_items_in_batch is not None and self._zo_loss_ignores_items(inputs, num_items_in_batch):
            num_items_in_batch = None
        step, objective = super().training_step, self.zo_optimizer.objective
        prepared = inputs if objective is None else self._prepare_inputs(inputs)
        state = rerun(self)

        def evaluate() -> Any:
            if objective is not None and not objective.needs_output:
                model.train()  # as the step does that is not made
                return {}
            seen = nullcontext(_as_it_is) if objective is None else observed(self, prepared, objective)
            with self._zo_no_backward(self.accelerator), seen as read:
                detached = step(model, copy.copy(prepared), num_items_in_batch)
                loss = self._zo_no_backward.take()
                return read(loss if self.zo_optimizer.differentiates else detached)

        loss = self.zo_optimizer.estimate(
            state.closure(evaluate),
            muted=functools.partial(unseen, state, self),
            remember=state.remember,
            batch=prepared,
            surroundings=self._zo_precision,
        ).loss
        return torch.as_tensor(loss, dtype=torch.float32).to(self.args.device)

    @contextmanager
    def _zo_precision(self) -> Iterator[None]:
        """What the host puts around its loss."""
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            yield

    def _zo_loss_ignores_items(self, inputs: Any, num_items: Any) -> bool:
        if self._zo_without_items is None:
            with self.zo_optimizer.residency.of_any_step():
                found = may_ignore_items(self) and ignores_items(self, inputs, num_items)
            # all ranks alike: one that has only masked labels at this moment can't tell
            self._zo_without_items = bool(self.zo_optimizer.exchange.mean(torch.tensor([found], dtype=torch.float64)))
        return self._zo_without_items

    # ---- The run ----

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """The host's ``train``; ``resume_from_checkpoint=True`` takes the newest complete checkpoint."""
        if not self._zo:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        self._zo_bridge.resumed = False
        if resume_from_checkpoint is True:
            resume_from_checkpoint = newest_complete(str(self.args.output_dir)) or True
        elif not resume_from_checkpoint:
            known = (path for path in self._zo_bridge.checkpoints() if is_complete(Path(path)))
            resume_from_checkpoint = next(known, resume_from_checkpoint)
            self._zo_bridge.resumed = bool(resume_from_checkpoint)
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            self._zo_exchange.leave()
            return result
        except BaseException as error:
            self._zo_exchange.fail(error)
            raise
        finally:
            self._zo_bridge.close()

    @property
    def _zo_exchange(self) -> Exchange:
        engine = engine_of(self.optimizer)
        return Exchange() if engine is None else engine.exchange

    def get_train_dataloader(self) -> Any:
        """The host's; processes that share the points of a step have the same data."""
        parallel = self._zo_parallel if self._zo else None
        if parallel is None or self.args.world_size == 1:
            return super().get_train_dataloader()
        with of_stream(self.accelerator, as_mesh(parallel, self.args.world_size)):
            return super().get_train_dataloader()

    @property
    def _zo_parallel(self) -> str | Mesh | None:
        return (self._zo_options or self.zo_options).parallel

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """The host's; the callbacks see before what the script has set."""
        if self._zo and checkpoint is not None:
            self._zo_bridge.resume()
        with self._zo_optimizer_files():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _init_training_state(
        self, max_steps: int, num_update_steps_per_epoch: int, num_train_epochs: int, resume_from_checkpoint: str | None, trial: Any
    ) -> tuple[int, int]:
        """The host's; a loader without a length goes on in the epoch of the checkpoint."""
        rest = (num_train_epochs, resume_from_checkpoint, trial)
        begin = super()._init_training_state(max_steps, num_update_steps_per_epoch, *rest)
        return self._zo_data.begin(*begin, resume_from_checkpoint, sized=num_train_epochs < sys.maxsize) if self._zo else begin

    def _load_callback_state(self) -> None:
        """The host's, which knows nothing of ours."""
        if self._zo:
            self._zo_data.take(self.state)
        super()._load_callback_state()

    def _save_rng_state(self, output_dir: str) -> None:
        """The host's, and the generator states of the beginning of the epoch."""
        super()._save_rng_state(output_dir)
        if self._zo:
            self._zo_data.save(output_dir)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The host's; at the beginning of an epoch, also the generators that the user gave to the loader."""
        super()._load_rng_state(checkpoint)
        if self._zo:
            self._zo_data.host_loaded()

    def _save_checkpoint(self, model: Any, trial: Any, *args: Any, **kwargs: Any) -> None:
        """The host's checkpoint; the callbacks are told before and after one that training can be resumed from."""
        folder = Path(self._get_output_dir(trial=trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        whole = self._zo and not self.args.save_only_model
        if self._zo:
            self._zo_data.tell(self.state)
        with self._zo_bridge.checkpoint(str(folder)) if whole else nullcontext():
            super()._save_checkpoint(model, trial, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The host's log without ``grad_norm`` (no gradient exists; it would be 0.0) and with the ``zo/`` values."""
        if self._zo:
            logs.pop("grad_norm", None)
            if "loss" in logs and "learning_rate" in logs:
                logs.update(self._zo_bridge.metrics())
        super().log(logs, *args, **kwargs)
