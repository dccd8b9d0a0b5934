"""From a checkpoint to a model: the family's file is named after its ``model_type``."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import torch

from presage.core.errors import ConfigError, UnsupportedModel
from presage.layers.ops import Ops
from presage.models.base import Model, Progress
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
    weights are quantised while they are loaded, None = not.

    Raises UnsupportedModel (a type or option; the message lists what is supported) and CheckpointError (a tensor missing or misshapen).
    """
    params = parse(checkpoint.config).limited(max_len)
    if found := checkpoint.config.get("quantization_config"):
        raise UnsupportedModel(f"weights quantised by {found.get('quant_method', 'an unknown method')} are not supported", param="model")
    if dtype != ops.dtype:
        raise ConfigError(f"weights of type {dtype} for kernels of type {ops.dtype}", param="dtype")
    cls = family(params.model_type)
    params, weights = padded(params, Weights(checkpoint, cls.names, cls.roots, cls.shapes(params)))
    return cls(params, weights, ops, getattr(checkpoint, "fingerprint", b""), progress, scheme)
