"""Where a family keeps its tensors: one table of names per family, read through one small view. Matrices may come quantised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from presage.core.errors import CheckpointError
from presage.models.params import Params
from presage.quantize.canonical import Canonical


class Checkpoint(Protocol):
    """What loading hands over: the configuration and named tensors (mapped, not copied). One that has quantised tensors offers
    ``get_weight`` as well, which gives those as Canonical."""

    config: Any

    def names(self) -> Any:
        """All tensor names."""

    def get(self, name: str) -> torch.Tensor:
        """One tensor."""


LLAMA_NAMES: dict[str, str] = {
    "embed": "model.embed_tokens",
    "norm": "model.norm",
    "head": "lm_head",
    "norm1": "model.layers.{i}.input_layernorm",
    "norm2": "model.layers.{i}.post_attention_layernorm",
    "q": "model.layers.{i}.self_attn.q_proj",
    "k": "model.layers.{i}.self_attn.k_proj",
    "v": "model.layers.{i}.self_attn.v_proj",
    "o": "model.layers.{i}.self_attn.o_proj",
    "q_norm": "model.layers.{i}.self_attn.q_norm",
    "k_norm": "model.layers.{i}.self_attn.k_norm",
    "gate": "model.layers.{i}.mlp.gate_proj",
    "up": "model.layers.{i}.mlp.up_proj",
    "down": "model.layers.{i}.mlp.down_proj",
}
"""Our part names -> the module names of most families' checkpoints."""

Shape = tuple[int, ...]


def part_shapes(p: Params) -> dict[str, Shape]:
    """What every part must look like, (outputs, inputs); parts not listed are checked where they are used."""
    norms: dict[str, Shape] = dict.fromkeys(("norm", "norm1", "norm2", "norm1_after", "norm2_after"), (p.d,))
    linears: dict[str, Shape] = {
        "embed": (p.vocab_size, p.d), "head": (p.vocab_size, p.d), "q": (p.q_dim, p.d), "k": (p.kv_dim, p.d), "v": (p.kv_dim, p.d),
        "qkv": (p.q_dim + 2 * p.kv_dim, p.d), "o": (p.d, p.q_dim), "gate": (p.ff, p.d), "up": (p.ff, p.d), "gate_up": (2 * p.ff, p.d),
        "down": (p.d, p.ff),
    }  # fmt: skip
    moe = next((m for m in p.moe if m is not None), None)
    if moe is not None:
        linears |= {"expert_gate": (moe.ff, p.d), "expert_up": (moe.ff, p.d), "expert_down": (p.d, moe.ff)}
    return norms | linears


class Weights:
    """Tensors by part name, their shapes checked against ``shapes``.

    ``roots``: what a checkpoint may put before (or instead of) ``model.``, since some files nest the text model; the first that fits.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Mapping[str, str],
        roots: tuple[str, ...] = ("model.", ""),
        shapes: Mapping[str, Shape] | None = None,
    ) -> None:
        self._get: Callable[[str], torch.Tensor | Canonical] = getattr(checkpoint, "get_weight", checkpoint.get)
        self._names, self._shapes = names, shapes or {}
        self._present = frozenset(checkpoint.names())
        embed = names["embed"]
        self._plain = embed[: embed.index(".") + 1]
        found = [r for r in roots if r + embed.removeprefix(self._plain) + ".weight" in self._present]
        if not found:
            raise CheckpointError(f"no tensor {embed}.weight (or under {', '.join(map(repr, roots))}): not a checkpoint of this family")
        self._root = found[0]

    def name(self, part: str, layer: int = 0, suffix: str = ".weight", expert: int = 0) -> str:
        """The full tensor name of a part."""
        path = self._names[part].format(i=layer, e=expert) + suffix
        return self._root + path.removeprefix(self._plain) if path.startswith(self._plain) else path

    def knows(self, part: str) -> bool:
        """Does the family have such a part?"""
        return part in self._names

    def has(self, part: str, layer: int = 0, suffix: str = ".weight") -> bool:
        """Is the tensor in the checkpoint?"""
        return part in self._names and self.name(part, layer, suffix) in self._present

    def get(self, part: str, layer: int = 0, suffix: str = ".weight", expert: int = 0) -> torch.Tensor | Canonical:
        """One tensor, Canonical if it is quantised. Raises CheckpointError naming it if it is missing or has another shape than the
        configuration says."""
        name = self.name(part, layer, suffix, expert)
        if name not in self._present:
            raise CheckpointError(f"tensor {name} is missing from the checkpoint")
        tensor, wanted = self._get(name), self._shapes.get(part)
        shape = tuple(tensor.shape)
        if wanted is None or shape == wanted or (suffix == ".bias" and len(shape) == 1 and shape[0] in wanted):
            return tensor
        raise CheckpointError(f"tensor {name} has shape {list(shape)}; the configuration says {list(wanted)}")

    def tensor(self, part: str, layer: int = 0, suffix: str = ".weight") -> torch.Tensor:
        """One tensor of a part that is never quantised (a norm, a bias). Raises CheckpointError if it is."""
        found = self.get(part, layer, suffix)
        if isinstance(found, Canonical):
            raise CheckpointError(f"tensor {self.name(part, layer, suffix)} is quantised, which only matrices may be")
        return found

    def maybe(self, part: str, layer: int = 0, suffix: str = ".bias") -> torch.Tensor | None:
        """One tensor, None if the checkpoint has none."""
        return self.tensor(part, layer, suffix) if self.has(part, layer, suffix) else None
