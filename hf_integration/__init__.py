"""Forward-only training in the Hugging Face Trainer; importing this makes "zo" a valid TrainingArguments(optim=...)."""

from importlib.util import find_spec

_missing = [name for name in ("transformers", "accelerate") if find_spec(name) is None]
if _missing:
    raise ModuleNotFoundError(
        f"zo_lightning.hf_integration needs {' and '.join(_missing)}: pip install 'zo-lightning[hf]'", name=_missing[0]
    )

from zo_lightning.hf_integration.optim_name import register  # noqa: E402

register()

from zo_lightning.hf_integration.config import ZOArguments, ZOConfig  # noqa: E402
from zo_lightning.hf_integration.trainer import ZOTrainerMixin  # noqa: E402
from zo_lightning.hf_integration.trainers import ZOSeq2SeqTrainer, ZOTrainer  # noqa: E402

__all__ = ["ZOArguments", "ZOConfig", "ZOSeq2SeqTrainer", "ZOTrainer", "ZOTrainerMixin"]
