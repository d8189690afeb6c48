"""Training the scales of quantized weights: docs/quantized.md."""

from zo_lightning.quantized.formats import FORMATS, Format
from zo_lightning.quantized.scales import has_scales, load_scales, release_scales, save_scales, train_scales

__all__ = ["FORMATS", "Format", "has_scales", "load_scales", "release_scales", "save_scales", "train_scales"]
