"""What both strategies do: evaluate in training_step, run the hooks in backward, update in optimizer_step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zo_lightning.callbacks.base import zo_callbacks
from zo_lightning.engine.messages import say_once
from zo_lightning.engine.optimizer import ZOOptimizer
from zo_lightning.engine.options import EngineOptions
from zo_lightning.engine.parallel import Exchange
from zo_lightning.engine.residency import Offload, Offloaded
from zo_lightning.engine.shards import is_sharded
from zo_lightning.engine.state import of_all_ranks
from zo_lightning.engine.undo import nothing, undoing
from zo_lightning.prompts.heads import say_new_heads
from zo_lightning.strategy.data_order import DataOrder
from zo_lightning.strategy.events import Events
from zo_lightning.strategy.host_optimizer import HostOptimizer
from zo_lightning.strategy.knobs import check_run, disable_checkpointing, say_idle, tell_device
from zo_lightning.strategy.namespace import Bindable
from zo_lightning.strategy.quiet import quiet, rerun, world
from zo_lightning.strategy.resume import loses_nothing, resume_by_itself

STATE = "zo_lightning"
"""Our key in a Lightning checkpoint."""


class ForwardOnly(Bindable):
    """Lightning's loop calls training_step once a micro-batch, backward for its hooks, and optimizer_step once an accumulation window."""

    def __init__(self, options: EngineOptions, host: dict[str, Any]) -> None:
        options.validate()
        super().__init__(host)
        self._zo_options = options
        self._zo_host: HostOptimizer | None = None
        self._zo_data: DataOrder | None = None
        self._zo_events: Events | None = None
        self._zo_loop: Any = None
        self._zo_metrics: dict[str, Any] = {}
        self._zo_resumed = False
        """By itself, not by a path that the user gave."""

    @property
    def zo_optimizer(self) -> ZOOptimizer | None:
        """The engine; None before the first fit."""
        return None if self._zo_host is None else self._zo_host.engine

    def setup_environment(self) -> None:
        """Lightning is about to load a checkpoint; where the user named none, a callback may know one of a run that was killed."""
        super().setup_environment()
        trainer = self._zo_trainer
        if trainer.state.fn == "fit":
            self._zo_resumed = False
            resume_by_itself(trainer, self.broadcast, lambda: setattr(self, "_zo_resumed", True))

    def setup(self, trainer: Any) -> None:
        """Check what can't work, then let Lightning set up, and build the engine on the user's optimizer."""
        fitting = trainer.state.fn == "fit"
        if fitting:
            check_run(trainer, self.lightning_module, self.namespace)
        super().setup(trainer)
        if fitting:
            self._zo_build(trainer)

    def setup_optimizers(self, trainer: Any) -> None:
        """Lightning advises manual optimization where there are several optimizers, which does not help here."""
        try:
            super().setup_optimizers(trainer)
        except RuntimeError as error:
            if "multiple optimizers" not in str(error):
                raise
            raise self.namespace.misconfiguration(
                "configure_optimizers returned several optimizers. Forward-only training makes one update a step: return one optimizer, "
                "with parameter groups where their lr or weight_decay differ."
            ) from error

    def model_to_device(self) -> None:
        """Lightning's, unless weights are streamed to the device: the engine then brings the rest of the model."""
        engine, fitting = self.zo_optimizer, self._zo_trainer.state.fn == "fit"
        streamed = isinstance(self._zo_configured(self._zo_trainer).weights, Offload) and (fitting or engine is not None)
        if not streamed:
            super().model_to_device()  # type: ignore[safe-super]  # upstream: the bound class has one
            return
        if self.world_size > 1 and self.root_device.type != "cpu":
            raise self.namespace.misconfiguration(
                f"Weights are streamed to one device so far, and the Trainer has {self.world_size}. Use Trainer(devices=1)."
            )
        tell_device(self.lightning_module, self.root_device)
        if engine is not None and isinstance(engine.residency, Offloaded):
            engine.residency.bring_rest()  # Lightning took it back to the CPU after the run before

    def _zo_configured(self, trainer: Any) -> EngineOptions:
        """The options with what callbacks make of them."""
        options = self._zo_options
        for callback in zo_callbacks(trainer.callbacks):
            options = callback.configure(options)
        if isinstance(options.weights, Offload) and options.weights.device is None:
            options = replace(options, weights=replace(options.weights, device=str(self.root_device)))
        return options

    def _zo_build(self, trainer: Any) -> None:
        module, ns = self.lightning_module, self.namespace
        options = self._zo_configured(trainer)
        options = replace(options, seed=self.broadcast(options.seed))
        if getattr(module, "_compiler_ctx", None) is not None and options.weights in ("auto", "exact"):
            if options.weights == "exact":
                raise ns.misconfiguration('weights="exact" works through hooks, which a compiled module never runs. Use weights="inplace".')
            options = replace(options, weights="inplace")
        disable_checkpointing(module, self._zo_say)
        self._zo_loop = trainer.fit_loop
        self._zo_host = HostOptimizer(self.optimizers[0], options, module, ns)
        self._zo_host.engine.exchange = self._zo_exchange()
        if self._zo_data is not None:
            self._zo_data.detach()
        self._zo_data = DataOrder(trainer, self._zo_say)
        say_idle(trainer, module, ns, self._zo_say)
        inherited = self._zo_host.inherited()
        if inherited:
            self._zo_say("lightning.optimizer", inherited)

    def _zo_say(self, key: str, message: str) -> None:
        if self.is_global_zero:
            say_once(key, message)

    def _zo_exchange(self) -> Exchange:
        return Exchange()

    def _zo_gather(self, value: Any) -> list[Any]:
        """`value` of every rank."""
        return [value]

    # ---- a step

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Where Lightning would zero the gradients of a window that was never applied."""
        super().on_train_batch_start(batch, batch_idx)
        if self._zo_host is not None and batch_idx % self._zo_trainer.accumulate_grad_batches == 0:
            self._zo_host.engine.discard()

    @property
    def _zo_trainer(self) -> Any:
        return self.lightning_module.trainer

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """All evaluations of one micro-batch; the output of the first one is what the loop, loggers and callbacks see."""
        evaluate = super().training_step
        if self._zo_host is None or self._zo_loop._skip_backward:  # weight averaging updates the buffers of the averaged model
            with torch.no_grad():
                return evaluate(*args, **kwargs)
        module, trainer, ns = self.lightning_module, self._zo_trainer, self.namespace
        silent_logger, state = ns.get("loggers.logger", "DummyLogger"), rerun(module)

        def muted() -> AbstractContextManager[None]:
            return quiet(state, module, trainer, silent_logger)

        engine = self._zo_host.engine
        asked = engine.objective is None or engine.objective.needs_output
        closure = state.closure(lambda: evaluate(*args, **kwargs) if asked else {})
        weight = 1.0 / trainer.accumulate_grad_batches
        estimate = engine.estimate(
            closure,
            weight=weight,
            muted=muted,
            loss_of=ns.loss_of,
            remember=world(state, trainer),
            batch=args[0] if args else None,
            surroundings=self.precision_plugin.train_step_context,
        )
        if trainer._results or not isinstance(estimate.output, torch.Tensor):
            self._zo_host.engine.leaves_traces()
        if isinstance(estimate.output, Mapping) and "loss" not in estimate.output:
            return {**estimate.output, "loss": torch.zeros(())}  # the loop wants one
        return estimate.output

    def backward(self, closure_loss: Any, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """on_before_backward and on_after_backward; the base class of the precision plugins calls them without a loss scaler."""
        precision, module = self.namespace.precision, self.lightning_module
        closure_loss = precision.pre_backward(self.precision_plugin, closure_loss, module)
        return precision.post_backward(self.precision_plugin, closure_loss, module)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """The last micro-batch of the window, the hooks before a step, the update."""
        result = closure()
        with undoing() as undo:  # clipping gradients by value fails where there are none
            undo.bind(self.precision_plugin, clip_gradients=nothing)
            self.precision_plugin._after_closure(model or self.lightning_module, optimizer)
        if self._zo_host is not None:
            report = self._zo_host.step(**kwargs)
            if report is not None and self._zo_events is not None:
                self._zo_events.step(report)
        return result

    # ---- a run

    def on_train_start(self) -> None:
        """The weights are those of the start or of the checkpoint, the loader is ready."""
        super().on_train_start()
        trainer, engine = self._zo_trainer, self.zo_optimizer
        if engine is None or self._zo_data is None:
            return
        if engine.steps == 0 and trainer.global_step > 0:
            engine.steps = trainer.global_step  # weights of another run: the seeds of its first steps are used up
        self._zo_give_metrics()
        self._zo_data.finish_epoch()
        self._zo_data.attach()
        if self._zo_host is not None:
            self._zo_host.sync()
        self._zo_events = Events(trainer, engine)
        if self.is_global_zero:
            say_new_heads(self.lightning_module)

    def _zo_give_metrics(self) -> None:
        """Those of the checkpoint's last validation, which monitors look at before the next."""
        if self._zo_metrics:
            self._zo_trainer._logger_connector._callback_metrics.update(self._zo_metrics)
            self._zo_metrics = {}

    def on_train_end(self) -> None:
        """Log what is left, close the run."""
        super().on_train_end()
        if self._zo_events is not None:
            self._zo_events.log()
            self._zo_events.complete()
        if self._zo_host is not None:
            self._zo_host.engine.exchange.leave()
        self._zo_close()

    def on_exception(self, exception: BaseException) -> None:
        """A run that ends by an exception ends for the callbacks, too."""
        super().on_exception(exception)
        if self._zo_host is not None:
            self._zo_host.engine.exchange.fail(exception)
        self._zo_close()

    def teardown(self) -> None:
        """Lightning tears down after every run, whatever happened."""
        self._zo_give_metrics()  # it starts no training where nothing is left to do
        self._zo_close()
        super().teardown()

    def _zo_close(self) -> None:
        events, self._zo_events = self._zo_events, None
        if self._zo_data is not None:
            self._zo_data.detach()
        if self._zo_host is not None:
            self._zo_host.engine.discard()
        if events is not None:
            events.close()

    # ---- data and checkpoints

    def process_dataloader(self, dataloader: Any) -> Any:
        """Called for each loader, just before the fit loop makes the iterator."""
        if self._zo_data is not None and self._zo_trainer.training:
            self._zo_data.loader_ready(dataloader)
        return super().process_dataloader(dataloader)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Add the engine's state and the order of the data, unless only weights are saved."""
        events: AbstractContextManager[None] | None = None
        if self._zo_host is not None and self._zo_data is not None and "optimizer_states" in checkpoint:
            metrics = {key: torch.as_tensor(value).detach().cpu().clone() for key, value in self._zo_trainer.callback_metrics.items()}
            data = self._zo_gather(self._zo_data.state())
            state = self._zo_host.engine.state_dict()
            if self.world_size > 1:
                state = of_all_ranks(state, self._zo_gather(state["zo"]["window"]))
            checkpoint[STATE] = {"engine": state, "data": data, "metrics": metrics}
            if self._zo_events is not None and loses_nothing(self._zo_trainer):
                events = self._zo_events.checkpoint(str(filepath))
        if events is None and self._zo_events is not None:
            self._zo_events.lose(str(filepath))
        with events or nullcontext():
            super().save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        """The host's; it names the device by a function, for which torch can't load quantized weights."""
        wrapped = () if self.lightning_module is None else self.lightning_module.parameters()
        if not any(is_traceable_wrapper_subclass(p) for p in wrapped if not is_sharded(p)):
            return super().load_checkpoint(checkpoint_path, weights_only=weights_only)
        return self.checkpoint_io.load_checkpoint(checkpoint_path, map_location="cpu", weights_only=weights_only)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """The user's optimizer gets its groups back; moments of first-order steps would only take memory."""
        if self._zo_resumed and self._zo_host is not None:
            for callback in zo_callbacks(self._zo_trainer.callbacks):
                callback.on_resume(self._zo_host.engine, self._zo_trainer.default_root_dir)
        states = [{**state, "state": {}} if "param_groups" in state else state for state in checkpoint["optimizer_states"]]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})
        if self._zo_host is None or self._zo_data is None:
            return
        self._zo_host.sync()
        saved = checkpoint.get(STATE)
        if saved is not None:
            self._zo_host.engine.load_state_dict(saved["engine"])
        self._zo_metrics = {} if saved is None else saved.get("metrics", {})
        ranks = [] if saved is None else saved["data"]
        self._zo_data.load(ranks[self.global_rank] if len(ranks) == self.world_size else None)
