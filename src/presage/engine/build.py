"""From configuration to a running engine: checkpoint, model, KV cache, policies, loop, driver. The one place that knows every room."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeVar

from presage.cache.content import HashedContent
from presage.cache.geometry import parse_bytes, size_pools
from presage.cache.manager import block_managers
from presage.core.config import EngineConfig
from presage.core.errors import ConfigError
from presage.core.events import Abort, Arrive
from presage.core.kv import KVGeometry, KVGroup
from presage.core.request import Request
from presage.core.table import Table
from presage.core.types import Wait
from presage.draft.lanes import Lanes
from presage.draft.parts import chosen, parts
from presage.engine.cutter import Cutter
from presage.engine.driver import WallDriver
from presage.engine.emitter import Emitter, Sink
from presage.engine.grammars import Grammars, MaskerSlots, grammars
from presage.engine.log import DecisionLog, NamedContent, NullLog
from presage.engine.loop import Loop
from presage.engine.replay import log_header, loop_config
from presage.engine.stats import Stats
from presage.engine.warm import warm_up
from presage.schedule import make_scheduler
from presage.tokenize.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(slots=True)
class ModelInfo:
    """What a front needs to know about the model."""

    name: str
    path: str
    max_model_len: int
    vocab_size: int
    eos_ids: list[int]
    dtype: str
    num_blocks: tuple[int, ...]
    kv_bytes: int


@dataclass(slots=True)
class Engine:
    """A built engine. ``add`` and ``abort`` may be called from any thread; ``driver`` runs the loop."""

    config: EngineConfig
    loop: Loop
    driver: WallDriver
    executor: Any
    tokenizer: Tokenizer
    info: ModelInfo
    grammar: Grammars
    stats: Stats

    def add(self, request: Request) -> None:
        """Queue a request. A grammar compiles meanwhile; the request waits for it in the queue."""
        if request.sampling.structured_outputs is None:
            self.driver.post(Arrive(request))
            return
        self.driver.post(Arrive(request, Wait.GRAMMAR))
        self.grammar.submit(request.id, request.sampling.structured_outputs, self.driver.post)

    def abort(self, request_id: str) -> None:
        """End a request in any state; unknown ids are ignored."""
        self.driver.post(Abort(request_id))

    def close(self) -> None:
        """Stop the executor's thread, let the drafter keep what it learnt, and close the log. Raises what the drafter may raise."""
        self.executor.close()
        try:
            shut = getattr(self.loop.drafter, "shut", None)  # drafters of other packages may have none
            if shut is not None:
                shut()
        finally:
            self.loop.log.shut()
            self.grammar.close()


def build_engine(
    config: EngineConfig, sink: Sink, clock: Callable[[], float] = time.monotonic, progress: bool = False, sampler: Callable[..., Any] | None = None
) -> Engine:
    """Load the model and wire the loop; emissions go to ``sink``. ``sampler``: a class to use instead of ``Sampler``.

    Raises the typed errors of loading and configuration.
    """
    import torch

    from presage.execute.executor import TorchExecutor
    from presage.execute.sampling.sampler import Sampler
    from presage.tokenize.stop_strings import StopStrings

    torch.set_num_threads(1)  # the kernels' team owns the cores; a torch operator must not open a second one
    # In a thread of its own: OpenMP keeps a pool per calling thread, and one left behind here would make the executor's count as
    # oversubscribed, whose workers then sleep between kernels instead of waiting a moment (70 us a kernel instead of 2).
    checkpoint, model, dtype = in_passing_thread(lambda: load_model(config, progress))
    max_len = model.max_len
    lanes = Lanes(model, lambda *draft: _load_draft(config, *draft), config.scheduler.max_num_batched_tokens)
    m = config.model
    tokenizer = Tokenizer.load(m.tokenizer or checkpoint, m.revision if m.tokenizer else None, m.chat_template)
    eos = sorted(tokenizer.eos_ids)
    grammar = grammars(tokenizer, model.vocab_size, eos, config.structured_outputs.compile_timeout)
    drafting = _drafting(config, model, lanes, checkpoint.path, tokenizer, grammar)
    geometry, *others = _geometries(config, [model, *lanes.models], max_len)
    judge = (sampler or Sampler)(model.vocab_size, eos, config.model.seed)
    executor = TorchExecutor(
        model,
        geometry,
        judge,
        pooling="mean" if config.model.pooling == "mean" else "last",
        depth=1,
        kv_cache_dtype=config.cache.kv_cache_dtype,
        lanes=list(zip(lanes.models, others, strict=True)),
    )
    table, requests = Table(), dict[int, Request]()
    log = _log(config, [geometry, *others], executor.layers, eos, max_len)
    content = NamedContent(HashedContent(), log) if isinstance(log, DecisionLog) and log.level == "shape" else HashedContent()
    kv = block_managers(config, [geometry, *others], max_len, content)
    lanes.place(log.caches(kv))
    loop = Loop(
        loop_config(config, max_len),
        executor,
        kv,
        make_scheduler(config.scheduler),
        Cutter(table, requests, eos, StopStrings(tokenizer)),
        Emitter(table, requests, sink),
        table=table,
        requests=requests,
        masker=MaskerSlots(grammar),
        log=log,
        **drafting,
    )
    info = ModelInfo(
        name=config.model.model,
        path=str(checkpoint.path),
        max_model_len=max_len,
        vocab_size=model.vocab_size,
        eos_ids=eos,
        dtype=dtype,
        num_blocks=geometry.num_blocks,
        kv_bytes=sum(_kv_bytes(g) for g in (geometry, *others)),
    )
    driver = WallDriver(loop, clock)
    warm_up(driver, model.vocab_size, max_len, progress)
    return Engine(config, loop, driver, executor, tokenizer, info, grammar, Stats(loop))


def _drafting(config: EngineConfig, model: Any, lanes: Lanes, path: Path, tokenizer: Tokenizer, grammar: Grammars) -> dict[str, Any]:
    """The loop's share of speculation: drafter, length policy, its companion and a model of step times; empty without a drafter."""
    speculative = chosen(config)
    if speculative is None:
        return {}
    from presage.draft.grammar import GrammarDrafter
    from presage.draft.hybrid import HybridDrafter
    from presage.draft.registry import make_drafter

    lanes.rule = speculative.rule
    m = config.model
    drafter = make_drafter(
        speculative.drafter,
        speculative.settings,
        vocab_size=model.vocab_size,
        target=model,
        lanes=lanes,
        tokenizer=tokenizer,
        model_name=(m.served_model_name or [m.model])[0],
        fingerprint=_whose_ids(path, tokenizer),
        masker=grammar,
    )
    if speculative.drafter != "grammar":
        # What a grammar forces costs no guess: it goes before whatever else would be drafted.
        drafter = HybridDrafter([GrammarDrafter(grammar, tokenizer), drafter], combine="threshold", tau=0.5)
    return parts(speculative, drafter)


def _whose_ids(path: Path, tokenizer: Tokenizer) -> str:
    """What model and vocabulary a drafter's ids belong to: a name for people, and a hash that copies of the checkpoint share."""
    from presage.models.loading.fingerprint import identity

    vocabulary = hashlib.sha256("\0".join(t or "" for t in tokenizer.tokens).encode()).hexdigest()
    return f"{path.stem}@{identity(path)}{vocabulary[:24]}"


def _load_draft(config: EngineConfig, path: str, quantization: str | None, max_len: int) -> Any:
    """A draft model of the engine's precision, as long as the target or as its own checkpoint allows."""
    from presage.models.loading import open_checkpoint
    from presage.models.params import parse

    longest = min(max_len, parse(open_checkpoint(path).config).max_len)
    own = {"model": path, "quantization": quantization, "revision": None, "load_format": "auto", "max_model_len": longest}
    settings = config.model_copy(update={"model": config.model.model_copy(update=own)})
    return in_passing_thread(lambda: load_model(settings))[1]


def load_model(config: EngineConfig, progress: bool = False, wrap: Callable[[Any], Any] = lambda ops: ops) -> tuple[Any, Any, str]:
    """The checkpoint, its model and the name of its dtype. ``wrap`` may put something around the operations (to time them).

    Raises what opening, memory and configuration may raise.
    """
    import torch

    from presage.execute.sizing import least_kv_bytes
    from presage.kernels.cpu.pack_store import pack_store
    from presage.layers.ops import build_ops
    from presage.models.loading import available_memory, check_memory, open_checkpoint, stderr_progress
    from presage.models.params import parse
    from presage.models.registry import build_model
    from presage.quantize.planned import planned_bytes
    from presage.quantize.schemes import parse_scheme

    m = config.model
    checkpoint = open_checkpoint(m.model, m.revision, m.load_format)
    stored = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    dtype = m.dtype if m.dtype != "auto" else ("float32" if stored == "float32" else "bfloat16")
    kind = getattr(torch, dtype)
    params = parse(checkpoint.config).limited(m.max_model_len)
    scheme = parse_scheme(m.quantization) if m.quantization else None
    if scheme is not None and scheme.weight_bits == 16 and dtype != "bfloat16":
        raise ConfigError(f"{scheme.name} packs bfloat16 weights, and these are {dtype}", param="quantization")
    need = checkpoint.weight_bytes(kind) if scheme is None else planned_bytes(checkpoint, scheme, kind, params.vocab_size)
    check_memory(need, least_kv_bytes(config, params, dtype), available_memory())
    with pack_store(_packed_file(config, checkpoint, dtype), m.packed_weights_bytes) as store:
        ops = wrap(build_ops(config.executor.kernels, kind, thread_count(config), store))
        if not progress:
            return checkpoint, build_model(checkpoint, kind, ops, None, m.max_model_len, scheme), dtype
        with stderr_progress("loading" if scheme is None or (store and store.ready) else f"loading, quantising to {scheme.name}") as report:

            def layers(done: int, of: int) -> None:
                report(checkpoint.nbytes * done // of, checkpoint.nbytes)

            return checkpoint, build_model(checkpoint, kind, ops, layers, m.max_model_len, scheme), dtype


def _packed_file(config: EngineConfig, checkpoint: Any, dtype: str) -> Path | None:
    """Where the packed weights of this model, scheme, machine and code are kept; None if they are not."""
    m = config.model
    if m.quantization is None or m.load_format == "dummy" or m.packed_weights_bytes == 0 or config.executor.kernels == "reference":
        return None
    from presage.kernels.cpu.cache import cache_directory
    from presage.kernels.cpu.pack_store import SUFFIX, code_stamp
    from presage.models.loading.fingerprint import fingerprint

    return cache_directory("packed") / f"{fingerprint(checkpoint.path)}-{m.quantization}-{dtype}-{code_stamp()}{SUFFIX}"


def in_passing_thread(work: Callable[[], T]) -> T:
    """Run something in a thread that ends with it; what it raises is raised here."""
    with ThreadPoolExecutor(1, thread_name_prefix="presage-load") as pool:
        return pool.submit(work).result()


def thread_count(config: EngineConfig) -> int:
    """Threads of a step: the setting, else OMP_NUM_THREADS, else the cores this process may use."""
    import os

    if config.executor.threads:
        return config.executor.threads
    if (given := os.environ.get("OMP_NUM_THREADS", "")).isdigit() and int(given) > 0:
        return int(given)
    return max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def _geometries(config: EngineConfig, models: list[Any], max_len: int) -> list[KVGeometry]:
    """The KV of each model: memory is divided so that all hold equally many tokens."""
    whole = _geometry(config, [g for m in models for g in m.kv_groups(config.cache.block_size, config.cache.kv_cache_dtype)], max_len)
    ends = accumulate(len(m.kv_groups(config.cache.block_size, config.cache.kv_cache_dtype)) for m in models)
    return [KVGeometry(groups=whole.groups[a:b], num_blocks=whole.num_blocks[a:b]) for a, b in pairwise((0, *ends))]


def _geometry(config: EngineConfig, of: list[KVGroup], max_len: int) -> KVGeometry:
    from presage.models.loading import available_memory

    groups, s = tuple(of), config.scheduler
    if config.cache.num_gpu_blocks_override is not None:
        return KVGeometry(groups=groups, num_blocks=(config.cache.num_gpu_blocks_override,) * len(groups))
    room = (
        parse_bytes(config.cache.kv_cache_memory)
        if config.cache.kv_cache_memory is not None
        else int(available_memory() * config.cache.memory_utilization)
    )
    if config.cache.kv_cache_memory is None:
        # More than every seat at full length can never be used.
        room = min(room, sum(g.block_bytes * (g.blocks(max_len) * s.max_num_seqs + 1) for g in groups))
    return size_pools(groups, room, s.max_num_seqs, s.max_num_batched_tokens, max_len)


def _kv_bytes(geometry: KVGeometry) -> int:
    return sum(g.block_bytes * n for g, n in zip(geometry.groups, geometry.num_blocks))


def _log(config: EngineConfig, lanes: list[KVGeometry], layers: int, eos: list[int], max_len: int) -> NullLog:
    o = config.observability
    if o.decision_log is None or o.decision_log_level == "none":
        return NullLog()
    header = log_header(config, lanes[0], layers, eos, max_len, lanes=lanes[1:])
    return DecisionLog(o.decision_log, o.decision_log_level, o.decision_log_bytes, header)
