"""A dense weight that is to be quantised when it is packed: nothing of it is read before, and nothing at all if its packed form is on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from presage.quantize.canonical import Canonical, fuse
from presage.quantize.schemes import Scheme, parse_scheme

if TYPE_CHECKING:
    from presage.kernels.cpu.team import Team
    from presage.models.loading.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class Planned:
    """Dense matrices [N_i, K], one below the other, mapped from their file, and the ``scheme`` they will be packed in."""

    parts: tuple[torch.Tensor, ...]
    scheme: Scheme

    @property
    def shape(self) -> torch.Size:
        """(N, K) of the whole."""
        return torch.Size((sum(p.shape[0] for p in self.parts), self.parts[0].shape[1]))

    def alike(self, other: Planned) -> bool:
        """May the two be one weight?"""
        return self.scheme == other.scheme and self.shape[1] == other.shape[1]

    def chunk(self, parts: int) -> tuple[Planned, ...]:
        """Equal parts of the outputs (a fused gate and up)."""
        whole = self.dense() if len(self.parts) > 1 else self.parts[0]
        return tuple(Planned((p,), self.scheme) for p in whole.chunk(parts))

    def dense(self) -> torch.Tensor:
        """The weight [N, K] as the checkpoint has it."""
        return self.parts[0] if len(self.parts) == 1 else torch.cat(self.parts)

    def quantise(self, team: Team | None = None) -> Canonical:
        """The weight as the scheme says, rounded to nearest; ``team`` shares the work. Not for schemes without loss (16 bits)."""
        from presage.quantize.rtn import quantize_rtn

        return fuse([quantize_rtn(p, self.scheme, team) for p in self.parts])


def planned_bytes(checkpoint: Checkpoint, scheme: Scheme, dtype: torch.dtype, vocab_size: int) -> int:
    """Bytes of all weights in memory once every dense matrix is packed as ``scheme`` says; the embedding table stays in ``dtype``."""
    total, head = 0, parse_scheme(scheme.head)
    vocabularies = [n for n in checkpoint.names() if len(s := checkpoint.shape(n)) == 2 and s[0] == vocab_size]
    for name in checkpoint.names():
        stored, shape = checkpoint.stored_bytes(name, dtype), checkpoint.shape(name)
        # Quantised ones stay as they are, and so does what is no matrix.
        if len(shape) != 2 or stored < dtype.itemsize * shape[0] * shape[1]:
            total += stored
        elif name in vocabularies:
            total += head.nbytes(*shape) + (stored if len(vocabularies) == 1 else 0)
        else:
            total += scheme.nbytes(*shape)
    return total if len(vocabularies) < 2 else total + vocab_size * checkpoint.shape(vocabularies[0])[1] * dtype.itemsize
