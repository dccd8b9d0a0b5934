"""Perplexity of a text by strided windows, through the steps that serve requests: ``presage eval perplexity``.

A window puts up to ``context`` tokens in and scores what each says of the next; windows start ``stride`` tokens apart, and only what the
one before did not score counts, so every token is scored once, with at least ``context - stride`` tokens before it (the sliding window
of Baevski and Auli, arXiv 1809.10853, section 6). Steps are filled with rows of as many windows as fit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from presage.core.config import EngineConfig
from presage.core.errors import ConfigError, NotEnoughMemory
from presage.core.plan import BlockTable, Draft, StepPlan
from presage.core.types import Floats, Ints, Longs
from presage.engine.build import build_engine
from presage.execute.batch import Batch
from presage.execute.executor import LOGIT_ROWS, TorchExecutor
from presage.execute.walk import walk
from presage.models.loading import open_checkpoint
from presage.models.params import parse
from presage.tokenize.tokenizer import Tokenizer

SEATS = 64
"""Windows in one step at most."""
RESAMPLES = 2000

Cut = tuple[int, int, int]
"""(window, first token, tokens): the part of a window that a step computes."""


@dataclass(frozen=True, slots=True)
class Settings:
    """``context`` tokens go into a window, windows start ``stride`` tokens apart, ``rows`` tokens go into a step; ``max_tokens`` of the
    text are used (None: all). Raises ConfigError for numbers that make no windows."""

    context: int = 1024
    stride: int = 512
    max_tokens: int | None = None
    rows: int = 1024

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.context:
            raise ConfigError(f"stride {self.stride} must be between 1 and the context of {self.context}", param="stride")
        if self.rows < 1 or (self.max_tokens is not None and self.max_tokens < 2):
            raise ConfigError("a step needs at least one row and a text at least two tokens", param="max_tokens")


@dataclass(frozen=True, slots=True)
class Window:
    """``ids`` int32 [n + 1]: the first n go in; ``ids[first:]`` are scored, each by the row before it."""

    ids: Ints
    first: int


def cut_windows(ids: Ints, settings: Settings, prefix: Sequence[int] = ()) -> Iterator[Window]:
    """Windows of one document in order. ``prefix``: what the model expects in front of a text (BOS); it opens every window.

    Without one nothing can score a document's first token.
    """
    front = np.array(prefix, np.int32)
    inner = settings.context - len(front)
    scored = 0 if len(front) else 1
    begin = 0
    while scored < len(ids):
        end = min(len(ids), begin + inner + 1)
        yield Window(np.concatenate([front, ids[begin:end]]), scored - begin + len(front))
        scored, begin = end, begin + settings.stride


def pack(lengths: Sequence[int], rows: int, seats: int = SEATS) -> Iterator[list[Cut]]:
    """Steps of at most ``rows`` rows and ``seats`` windows that run windows of these lengths in order; one that is cut opens the next step."""
    step: list[Cut] = []
    left = rows
    for w, length in enumerate(lengths):
        at = 0
        while at < length:
            take = min(left, length - at)
            step.append((w, at, take))
            at, left = at + take, left - take
            if not left or len(step) == seats:
                yield step
                step, left = [], rows
    if step:
        yield step


def blocks_needed(settings: Settings, block_tokens: int) -> int:
    """KV blocks that suffice for any texts: full steps, a window cut at either end, and block 0."""
    return 1 + -(-settings.rows // block_tokens) + SEATS + 2 * -(-settings.context // block_tokens)


class WindowSteps:
    """Runs windows on an executor that nobody else uses; its thread must not be running, and all calls come from one thread.

    Windows take a pool's blocks in a ring: they end in the order in which they begin. Raises ConfigError for ids or lengths that the
    model does not have.
    """

    def __init__(self, executor: TorchExecutor, windows: Sequence[Window]) -> None:
        self.executor, self.windows = executor, windows
        torch.set_num_threads(1)  # as the executor's own thread does: torch's operators must not open a second team
        lengths = np.array([len(w.ids) - 1 for w in windows], np.int64)
        if max(int(w.ids.max()) for w in windows) >= executor.model.vocab_size or lengths.max() > executor.model.max_len:
            raise ConfigError(f"the windows do not fit a model of {executor.model.vocab_size} ids and {executor.model.max_len} positions")
        self.lengths: list[int] = lengths.tolist()
        self.first_block = [np.concatenate([[0], np.cumsum(-(-lengths // g.block_tokens))]) for g in executor.geometry.groups]

    def nll(self, rows: int) -> Iterator[float]:
        """Minus the summed log-probability (nats) of each window's scored tokens, in order. Raises NotEnoughMemory if a step's windows
        have more blocks than a pool."""
        done, totals = 0, np.zeros(len(self.windows))
        for step in pack(self.lengths, rows):
            self._add(step, totals)
            last, start, count = step[-1]
            ended = last + (start + count == self.lengths[last])
            yield from totals[done:ended].tolist()
            done = ended

    def plan(self, step: list[Cut]) -> StepPlan:
        """The plan of a step that computes these cuts and wants nothing back."""
        n = len(step)
        start, count = np.array([s for _, s, _ in step], np.int32), np.array([c for _, _, c in step], np.int32)
        index = np.concatenate([np.arange(s, s + c, dtype=np.int32) for _, s, c in step])
        return StepPlan(
            id=0, lane=0, slot=np.arange(n, dtype=np.int32), start=start, count=count, nodes=np.zeros(n, np.int32),
            layer0=np.zeros(n, np.int32), layer1=np.full(n, self.executor.layers, np.int32), want=np.zeros(n, np.uint8),
            rows=np.concatenate([[0], np.cumsum(count)]).astype(np.int32),
            ids=np.concatenate([self.windows[w].ids[s : s + c] for w, s, c in step]), position=index, index=index,
            tables=tuple(self._table(g, step) for g in range(len(self.first_block))), draft=Draft.none(n),
        )  # fmt: skip

    def _table(self, g: int, step: list[Cut]) -> BlockTable:
        first, size, have = self.first_block[g], self.executor.geometry.groups[g].block_tokens, self.executor.geometry.num_blocks[g] - 1
        if (need := int(first[step[-1][0] + 1] - first[step[0][0]])) > have:
            raise NotEnoughMemory(f"the windows of a step need {need} KV blocks, a pool has {have}; use fewer rows or a shorter context")
        blocks = [(1 + (first[w] + np.arange(-(-(s + c) // size))) % have).astype(np.int32) for w, s, c in step]
        places = [np.arange(s, s + c) for _, s, c in step]
        slots = [b[p // size].astype(np.int64) * size + p % size for b, p in zip(blocks, places, strict=True)]
        return BlockTable(np.cumsum([0, *map(len, blocks)]).astype(np.int32), np.concatenate(blocks), np.concatenate(slots))

    def _add(self, step: list[Cut], totals: Floats) -> None:
        executor, plan = self.executor, self.plan(step)
        row, target, owner = self._scored(step)
        with torch.inference_mode():
            h = walk(executor.run, plan, Batch.of(plan, plan.ids, executor.geometry, executor.run.ops))
            for at in range(0, len(row), LOGIT_ROWS):
                logits = executor.model.head(h[torch.from_numpy(row[at : at + LOGIT_ROWS])], executor.run.work).float()
                chosen = logits.gather(1, torch.from_numpy(target[at : at + LOGIT_ROWS, None]))
                # Float32 within a row; sums over a text of a million rows need float64.
                lost = (torch.logsumexp(logits, 1) - chosen[:, 0]).double()
                np.add.at(totals, owner[at : at + LOGIT_ROWS], lost.numpy())

    def _scored(self, step: list[Cut]) -> tuple[Longs, Longs, Longs]:
        """Rows of a step that are scored, the ids they are scored on, and their windows."""
        row, target, owner, base = [], [], [], 0
        for w, start, count in step:
            low = max(self.windows[w].first - 1 - start, 0)
            row.append(np.arange(base + low, base + count))
            target.append(self.windows[w].ids[start + low + 1 : start + count + 1])
            owner.append(np.full(max(count - low, 0), w))
            base += count
        return np.concatenate(row).astype(np.int64), np.concatenate(target).astype(np.int64), np.concatenate(owner).astype(np.int64)


@dataclass(slots=True)
class Perplexity:
    """What was found under ``label``: by window ``nll`` (nats, float64), ``tokens`` scored and their ``nbytes`` of text, int64 [w], of the
    windows scored so far out of ``windows``; ``seconds`` of scoring."""

    label: str
    windows: int
    nll: Floats
    tokens: Longs
    nbytes: Longs
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        """Nothing was interrupted."""
        return len(self.nll) == self.windows

    @property
    def loss(self) -> float:
        """Nats per token; nan before the first window."""
        return float(self.nll.sum() / self.tokens.sum()) if len(self.nll) else math.nan

    @property
    def value(self) -> float:
        """Perplexity per token."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text: comparable between tokenizers."""
        return float(self.nll.sum() / math.log(2) / self.nbytes.sum()) if len(self.nll) else math.nan


@dataclass(frozen=True, slots=True)
class Change:
    """Relative change of perplexity (0.01 = 1 % more) and the ends of its 95 % interval, nan with fewer than two windows."""

    relative: float
    low: float
    high: float


def compare(base: Perplexity, other: Perplexity, resamples: int = RESAMPLES, seed: int = 0) -> Change:
    """Change from ``base`` to ``other`` over the windows both have scored, with a paired percentile bootstrap over windows.

    Raises ConfigError if they were not cut from the same text by the same tokenizer.
    """
    n = min(len(base.nll), len(other.nll))
    tokens, gap = base.tokens[:n], other.nll[:n] - base.nll[:n]
    if base.windows != other.windows or not np.array_equal(tokens, other.tokens[:n]):
        raise ConfigError(f"{base.label} and {other.label} did not score the same tokens", param="against")
    if n < 2:
        return Change(math.expm1(gap.sum() / tokens.sum()) if n else math.nan, math.nan, math.nan)
    rng = np.random.default_rng(seed)
    draws = (rng.multinomial(n, np.full(n, 1 / n)) for _ in range(resamples))
    low, high = np.percentile([(d @ gap) / (d @ tokens) for d in draws], (2.5, 97.5))
    return Change(math.expm1(gap.sum() / tokens.sum()), math.expm1(low), math.expm1(high))


def tokenise(tokenizer: Tokenizer, documents: Sequence[str], max_tokens: int | None = None) -> tuple[list[Ints], list[int]]:
    """Ids of each document (``max_tokens`` in all), and the BOS that goes in front of each window if this tokenizer sets one."""
    found: list[Ints] = []
    left = max_tokens if max_tokens is not None else 1 << 62
    for text in documents:
        if left < 1:
            break
        found.append(np.array(tokenizer.encode(text, add_special_tokens=False)[:left], np.int32))
        left -= len(found[-1])
    bos = tokenizer.bos_id
    return found, [bos] if bos is not None and tokenizer.encode("a")[:1] == [bos] else []


def evaluate(
    config: EngineConfig,
    documents: Sequence[str],
    settings: Settings,
    label: str = "",
    watch: Callable[[Perplexity], None] | None = None,
    progress: bool = False,
) -> Perplexity:
    """Load a model and score documents, none of which sees another. ``label``: the quantization or type by default; ``watch`` is called
    after every window; Ctrl-C while scoring returns what there is so far (``complete`` tells).

    Raises ConfigError (a context beyond the model's length, nothing to score) and the typed errors of loading.
    """
    check_context(config, settings)
    cache = config.cache
    if cache.num_gpu_blocks_override is None and cache.kv_cache_memory is None:
        cache = cache.model_copy(update={"num_gpu_blocks_override": blocks_needed(settings, cache.block_size)})
    engine = build_engine(config.model_copy(update={"cache": cache}), lambda _: None, progress=progress)
    engine.close()  # its thread; from here on its executor is ours
    ids, prefix = tokenise(engine.tokenizer, documents, settings.max_tokens)
    windows = [w for document in ids for w in cut_windows(document, settings, prefix)]
    if not windows:
        raise ConfigError("the text has no token to score", param="data")
    return score(engine.executor, windows, settings.rows, engine.tokenizer, label or config.model.quantization or engine.info.dtype, watch)


def check_context(config: EngineConfig, settings: Settings) -> None:
    """Raises ConfigError for a context that the model does not have, before anything is loaded."""
    m = config.model
    length = m.max_model_len or parse(open_checkpoint(m.model, m.revision, m.load_format).config).max_len
    if settings.context > length:
        raise ConfigError(f"a context of {settings.context} tokens is more than the model's length of {length}", param="context")


def score(
    executor: TorchExecutor,
    windows: Sequence[Window],
    rows: int,
    tokenizer: Tokenizer,
    label: str,
    watch: Callable[[Perplexity], None] | None = None,
) -> Perplexity:
    """Score windows on an executor whose thread is not running; Ctrl-C returns what there is so far. Raises what ``WindowSteps`` raises."""
    steps = WindowSteps(executor, windows)
    size = np.array([len(tokenizer.token_bytes(i)) for i in range(executor.model.vocab_size)], np.int64)
    tokens = np.array([len(w.ids) - w.first for w in windows], np.int64)
    nbytes = np.array([size[w.ids[w.first :]].sum() for w in windows], np.int64)
    found, began = np.zeros(len(windows)), time.monotonic()

    def result(n: int) -> Perplexity:
        return Perplexity(label, len(windows), found[:n], tokens[:n], nbytes[:n], time.monotonic() - began)

    done = 0
    try:
        for value in steps.nll(rows):
            found[done] = value
            done += 1
            if watch is not None:
                watch(result(done))
    except KeyboardInterrupt:
        pass
    return result(done)
