"""Calibration text through the model's own layers: what every linear's input looks like, without a second definition of the model.

The model is built on operations that keep each weight in a ``Cell`` which can be looked at and replaced. Layers run one after the other
over all windows, so that a layer can be quantised before the next one sees its outputs, as GPTQ wants (arXiv 2210.17323).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import torch

from presage.core.errors import CheckpointError, ConfigError
from presage.core.kv import KVGeometry
from presage.execute.batch import Batch, Table
from presage.kernels.reference import linear as linear_twin
from presage.layers.kv.plain import PlainKV
from presage.layers.ops import KERNEL_BLOCK, Maybe, Weight
from presage.layers.ops_reference import ReferenceOps
from presage.layers.state import LayerContext, State, Workspace
from presage.quantize.canonical import Canonical

if TYPE_CHECKING:
    from presage.models.base import Model
    from presage.tokenize import Tokenizer

CHUNK_ROWS = 2048
"""Tokens that go through a layer together."""
CHARS_PER_TOKEN = 16
"""More than a token has on average: a window is cut from this much text."""


class Stats:
    """What one linear saw: ``count`` rows, ``hessian`` float32 [K, K] the mean of x^T x, ``mean`` and ``peak`` [K] of |x|."""

    def __init__(self, k: int) -> None:
        self.count, self.hessian = 0, torch.zeros(k, k)
        self.mean, self.peak = torch.zeros(k), torch.zeros(k)

    def see(self, x: torch.Tensor) -> None:
        """Take rows [t, K] float32 into the means."""
        rows = len(x)
        if not rows:
            return
        keep, self.count = self.count / (self.count + rows), self.count + rows
        self.hessian.mul_(keep).addmm_(x.T, x, alpha=1 / self.count)
        size = x.abs()
        self.mean.mul_(keep).add_(size.sum(0), alpha=1 / self.count)
        self.peak = torch.maximum(self.peak, size.amax(0))

    def scaled(self, s: torch.Tensor) -> None:
        """As if every input had been divided by ``s`` [K]."""
        self.hessian.div_(s[:, None]).div_(s)
        self.mean, self.peak = self.mean / s, self.peak / s


class Cell:
    """A weight [N, K] that can be watched (``stats``) and replaced (``weight``: dense, or Canonical once it is quantised)."""

    def __init__(self, weight: torch.Tensor | Canonical) -> None:
        self.weight = weight
        self.stats: Stats | None = None

    @property
    def k(self) -> int:
        """Inputs."""
        return self.weight.shape[1]

    def watch(self) -> None:
        """Collect statistics from now on."""
        self.stats = Stats(self.k)

    def dense(self) -> torch.Tensor:
        """The weight, float32."""
        return self.weight.unpack() if isinstance(self.weight, Canonical) else self.weight.float()

    def operands(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and weight as the kernel will see them, both float32: rows in 8 bits where the scheme says so."""
        if isinstance(self.weight, Canonical) and self.weight.activations == 8:
            codes, scale = linear_twin.quantise_rows(x)
            x = codes * scale[:, None]
        return x, self.dense()


class ObservingOps(ReferenceOps):
    """The plain twins in float32 with every matrix in a Cell; inputs are shown to the cells that are watched."""

    kind, numerics = "observing", "torch-observing"

    def __init__(self) -> None:
        super().__init__(torch.float32)

    def pack(self, weight: Weight) -> Cell:
        """A weight [N, K], in the type it is stored in: a mapped file stays mapped. Raises CheckpointError for quantised ones."""
        return Cell(_original(weight))

    def pack_gate_up(self, gate: Weight, up: Weight) -> Cell:
        """Two weights [N, K], one below the other. Raises CheckpointError for quantised ones."""
        return Cell(torch.cat([_original(gate), _original(up)]))

    def linear(self, x: torch.Tensor, packed: Cell, out: torch.Tensor, bias: Maybe, residual: Maybe, act: str, softcap: float, norm: Any) -> None:
        """out = epilogue(norm(x) @ W.T), the normed rows shown to the cell."""
        x = x.float() if norm is None else norm_of(norm, x)
        if packed.stats is not None:
            packed.stats.see(x)
        x, w = packed.operands(x)
        out.copy_(linear_twin.linear(x, w, bias=bias, residual=residual, act=act or None, softcap=softcap))

    def grouped_linear(self, x: torch.Tensor, experts: Sequence[Cell], offsets: torch.Tensor, out: torch.Tensor, act: str) -> None:
        """Rows offsets[e] .. offsets[e+1] of x through expert e."""
        edges = offsets.tolist()
        for e, cell in enumerate(experts):
            if edges[e] < edges[e + 1]:
                part = slice(edges[e], edges[e + 1])
                self.linear(x[part], cell, out[part], None, None, act, 0.0, None)


def _original(weight: Weight) -> torch.Tensor:
    if not isinstance(weight, torch.Tensor):
        raise CheckpointError("the checkpoint is quantised already; calibration starts from the original weights")
    return weight


def norm_of(norm: Any, x: torch.Tensor) -> torch.Tensor:
    """Normed rows, float32."""
    out = torch.empty(x.shape)
    norm(x, out)
    return out


class Stream:
    """All calibration windows on their way through the layers. ``ids`` int64 [n, L]; the residual stream of every token is kept.

    One layer's keys and values for ``CHUNK_ROWS`` tokens are all the cache there is: windows are independent and layers run in turn.
    """

    def __init__(self, model: Model, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids
        self.length = ids.shape[1]
        self.per = max(1, CHUNK_ROWS // self.length)
        # Every layer may use the same cache slot, since it is done with it before the next one starts.
        groups = tuple(msgspec.structs.replace(g, layers=tuple((layer, 0) for layer, _ in g.layers)) for g in model.kv_groups(KERNEL_BLOCK))
        blocks = 1 + self.per * -(-self.length // KERNEL_BLOCK)
        self.kv = PlainKV(model, KVGeometry(groups=groups, num_blocks=(blocks,) * len(groups)))
        self.work = Workspace()
        self.h = torch.empty(ids.numel(), model.params.d)
        for chunk in self.chunks():
            batch = self._batch(ids[chunk])
            model.embed(batch.ids, batch.positions, self.h[self._rows(chunk)])

    def chunks(self) -> Iterator[slice]:
        """Windows that go together."""
        for start in range(0, len(self.ids), self.per):
            yield slice(start, min(start + self.per, len(self.ids)))

    def run(self, layer: int, keep: bool = True) -> Iterator[int]:
        """Run a layer over all windows; yields the windows done so far. ``keep`` False leaves the residual stream as it was."""
        for chunk in self.chunks():
            batch, rows = self._batch(self.ids[chunk]), self._rows(chunk)
            state = State(batch.rows, self.h[rows] if keep else self.h[rows].clone())
            context = LayerContext(layer, batch, self.kv.layers[layer], self.model.ops, self.work)
            for stage in self.model.layers[layer].stages:
                stage.fn(state, context)
            if keep:
                self.h[rows] = state.h
            yield chunk.stop

    def _rows(self, chunk: slice) -> slice:
        return slice(chunk.start * self.length, chunk.stop * self.length)

    def _batch(self, ids: torch.Tensor) -> Batch:
        n, length = ids.shape
        per = -(-length // KERNEL_BLOCK)
        span = torch.arange(n, dtype=torch.int32).repeat_interleave(length)
        index = torch.arange(length, dtype=torch.int32).repeat(n)
        # Window w owns blocks 1 + w * per and on; block 0 is nobody's.
        table = Table(
            torch.arange(n + 1, dtype=torch.int32) * per,
            torch.arange(1, 1 + n * per, dtype=torch.int32),
            (KERNEL_BLOCK * (1 + span.long() * per) + index.long()),
        )
        full = torch.full((n,), length, dtype=torch.int32)
        rows = torch.arange(n * length)
        tables = (table,) * len(self.kv.groups)
        return Batch(self.model.ops, rows, ids.reshape(-1).int(), index, index, span, full, full, None, tables, length)


@dataclass(frozen=True, slots=True)
class Text:
    """Calibration text: ``documents`` in the file's order."""

    path: Path
    documents: list[str]


def read_text(path: Path) -> Text:
    """A text file, or JSON lines with ``text`` or a conversation in each row. Raises ConfigError: missing, not text, a line that is no such row."""
    try:
        raw = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"calibration text {path} cannot be read: {error}", param="calibrate") from error
    documents = [raw] if path.suffix not in (".jsonl", ".ndjson") else list(_rows_of(path, raw))
    if not any(d.strip() for d in documents):
        raise ConfigError(f"calibration text {path} is empty", param="calibrate")
    return Text(path, documents)


def _rows_of(path: Path, raw: str) -> Iterator[str]:
    from presage.train.sources import chatml, conversation

    for number, line in enumerate(raw.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            found = row.get("text") or chatml(conversation(row))
        except (json.JSONDecodeError, AttributeError, TypeError, KeyError) as error:
            raise ConfigError(f"{path}, line {number}: no JSON object with a text or a conversation ({error!r})", param="calibrate") from None
        if found:
            yield str(found) + "\n"


def windows(text: Text, tokenizer: Tokenizer, count: int, length: int) -> torch.Tensor:
    """Up to ``count`` windows of ``length`` tokens, spread evenly over the text: int64 [n, length]. The same text gives the same windows.

    Raises ConfigError if there is less text than one window.
    """
    whole = "".join(text.documents)
    share = len(whole) // count
    if share >= CHARS_PER_TOKEN * length:
        pieces = [whole[i * share : i * share + CHARS_PER_TOKEN * length] for i in range(count)]
        found = [ids[:length] for ids in tokenizer.encode_batch(pieces) if len(ids) >= length]
    else:
        ids = tokenizer.encode(whole)
        have = len(ids) // length
        found = [ids[at * length : (at + 1) * length] for at in (i * have // min(count, have) for i in range(min(count, have)))] if have else []
    if not found:
        raise ConfigError(f"calibration text {text.path} has less than one window of {length} tokens", param="calibrate")
    return torch.tensor(found)
