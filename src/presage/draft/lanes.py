"""Where drafters run forward passes: lane 0 is the target's own stack, the others are models that drafters asked for.

A drafter is made before the engine knows how much memory each model's KV gets, so it holds a lane, and the lane gets its cache later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from presage.core.errors import ConfigError
from presage.core.protocols import KVCache
from presage.core.table import LANES

Load = Callable[[str, str | None, int], Any]
"""(checkpoint, quantization, longest sequence) -> model."""


@dataclass(slots=True)
class Lane:
    """``index`` in a plan; passes run layers [0, ``layers``) on sequences up to ``max_len`` tokens; ``chunk``: known tokens of a pass at most.

    ``rule``: the acceptance rule of the engine. ``kv``: the lane's block manager, set by ``Lanes.place``.
    """

    index: int
    layers: int
    max_len: int
    chunk: int
    rule: str
    kv: KVCache | None = None

    @property
    def cache(self) -> Any:
        """The block manager. Raises ConfigError before ``Lanes.place``."""
        if self.kv is None:
            raise ConfigError(f"lane {self.index} has no KV cache yet", param="speculative_config")
        return self.kv


class Lanes:
    """``target``: the served model; ``load``: how to load another; ``models``: those of lanes 1, 2, ... in order; ``rule``: of acceptance."""

    def __init__(self, target: Any, load: Load, chunk: int, rule: str = "keyed") -> None:
        self.target, self.models, self.rule = target, list[Any](), rule
        self._load, self._chunk = load, chunk
        self._lanes: list[Lane] = []

    def own(self, layers: int) -> Lane:
        """The first ``layers`` layers of the target. Raises ConfigError if it has not more than that."""
        depth = len(self.target.layers)
        if not 0 < layers < depth:
            raise ConfigError(f"exit_layer must be between 1 and {depth - 1}, got {layers}", param="exit_layer")
        return self._add(0, layers, self.target.max_len)

    def model(self, path: str, quantization: str | None) -> Lane:
        """A model with KV of its own. Raises ConfigError if its vocabulary is not the target's, and what loading raises."""
        if len(self.models) + 1 >= LANES:
            raise ConfigError(f"at most {LANES - 1} draft models", param="speculative_config")
        model = self._load(path, quantization, self.target.max_len)
        if model.vocab_size != self.target.vocab_size:
            raise ConfigError(
                f"the draft model's vocabulary has {model.vocab_size} ids and the target's {self.target.vocab_size}: they must be the same",
                param="speculative_config",
            )
        self.models.append(model)
        return self._add(len(self.models), len(model.layers), model.max_len)

    def place(self, caches: Sequence[KVCache]) -> None:
        """Give every lane its block manager; ``caches`` [1 + models], the target's first."""
        for lane in self._lanes:
            lane.kv = caches[lane.index]

    def _add(self, index: int, layers: int, max_len: int) -> Lane:
        lane = Lane(index, layers, max_len, self._chunk, self.rule)
        self._lanes.append(lane)
        return lane
