"""Which modules a quantisation config means: by exact name, by ``re:`` pattern (from the name's start) or by class."""

from __future__ import annotations

import re
from collections.abc import Iterable

from presage.core.errors import CheckpointError

_EMBEDDINGS = frozenset({"embed_tokens", "wte", "wpe", "word_embeddings", "embed_in"})


def module_of(tensor: str) -> str:
    """``model.layers.0.mlp.up_proj`` of ``model.layers.0.mlp.up_proj.weight``."""
    return tensor.rpartition(".")[0]


def module_class(module: str) -> str:
    """Torch's class of a module that holds a matrix. Files do not say; all that are no embedding are Linear."""
    return "Embedding" if module.rpartition(".")[2] in _EMBEDDINGS else "Linear"


def targeted(module: str, targets: Iterable[str]) -> str | None:
    """The target that fits a module best: its name before a pattern before its class; None if there is none."""
    fitting = [(rank, t) for t in targets if (rank := _rank(module, t)) is not None]
    return min(fitting)[1] if fitting else None


def _rank(module: str, target: str) -> int | None:
    if target.startswith("re:"):
        try:
            return 1 if re.match(target.removeprefix("re:"), module) else None
        except re.error as error:
            raise CheckpointError(f"quantization_config: target {target!r} is no regular expression ({error})") from None
    if target == module:
        return 0
    return 2 if target == module_class(module) else None
