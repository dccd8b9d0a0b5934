"""From a checkpoint to a model: the family's file is named after its ``model_type``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import torch

from presage.core.errors import ConfigError
from presage.layers.ops import Ops
from presage.models.base import Model, Progress
from presage.models.loading.quantized import quantized
from presage.models.pad import padded
from presage.models.params import parse
from presage.models.weights import Checkpoint, Weights

if TYPE_CHECKING:
    from presage.quantize.schemes import Scheme


def family(model_type: str) -> type[Model]:
    """The Model class of a supported model_type (``params.FAMILIES``); each family file calls its class ``Family``."""
    return import_module(f"presage.models.{model_type}").Family


def build_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    ops: Ops,
    progress: Progress | None = None,
    max_len: int | None = None,
    scheme: Scheme | None = None,
) -> Model:
    """Build and pack a model. ``dtype`` must be the ops' own; ``progress(done, layers)`` is called after each layer. ``max_len``: tokens
    served at most (the checkpoint's own by default); it sizes the rotary tables and, for longrope, chooses them. ``scheme``: how dense
    weights are quantised while they are loaded, None = not; weights that are stored quantised stay as they are.

    Raises UnsupportedModel (a type, an option, a quantisation; the message lists what is supported) and CheckpointError (a tensor missing
    or misshapen).
    """
    params, checkpoint = parse(checkpoint.config).limited(max_len), quantized(checkpoint)
    if dtype != ops.dtype:
        raise ConfigError(f"weights of type {dtype} for kernels of type {ops.dtype}", param="dtype")
    cls = family(params.model_type)
    params, weights = padded(params, Weights(checkpoint, cls.names, cls.roots, cls.shapes(params)))
    return cls(params, weights, ops, getattr(checkpoint, "fingerprint", b""), progress, scheme)
