"""Compiling grammars off the loop's thread: cache, timeout, limits.

The engine (xgrammar) releases the interpreter lock while it compiles, so a thread is enough for constraints known to be small. Others
are first compiled and walked in a child process with a memory limit that can be killed (``grammar_taster``): a thread can be neither.
"""

from __future__ import annotations

import contextlib
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import xgrammar as xg

from presage.core.errors import GrammarError
from presage.core.sampling_params import StructuredOutputsParams
from presage.verify.grammar_spec import MAX_WHITESPACE, GrammarSpec, spec_of
from presage.verify.grammar_taster import Taster

_EMPTY_FIRST = re.compile(r"^(\s*[\w-]+\s*::=)\s*\|", re.MULTILINE)  # GBNF allows `rule ::= | ...`, the engine's reader does not
CACHE_BYTES = 256 << 20
CACHE_ENTRIES = 1024


class Vocabulary(Protocol):
    """What is needed of a tokenizer (``presage.tokenize.Tokenizer``)."""

    vocab_size: int
    special_ids: frozenset[int]
    table: Any
    backend: Any

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes that an id adds to the text."""


def tokenizer_info(vocabulary: Vocabulary | list[bytes] | str | Path, vocab_size: int, eos_ids: Sequence[int]) -> xg.TokenizerInfo:
    """The engine's view of a vocabulary: a tokenizer, the path of a ``tokenizer.json``, or the bytes of each id.

    ``vocab_size`` is the width of the logits. Special tokens are blanked: their text never reaches the client, so it must not count.
    """
    if isinstance(vocabulary, str | Path):
        from tokenizers import Tokenizer

        return _backend_info(Tokenizer.from_file(str(vocabulary)), vocab_size, eos_ids)
    if isinstance(vocabulary, list):
        return _raw_info(vocabulary, vocab_size, eos_ids)
    if vocabulary.table is None:
        return _backend_info(vocabulary.backend, vocab_size, eos_ids)
    blank = vocabulary.special_ids
    return _raw_info([b"" if i in blank else vocabulary.token_bytes(i) for i in range(vocabulary.vocab_size)], vocab_size, eos_ids)


def _raw_info(tokens: Sequence[bytes], vocab_size: int, eos_ids: Sequence[int]) -> xg.TokenizerInfo:
    padded = [*tokens[:vocab_size], *[b""] * (vocab_size - len(tokens))]
    return xg.TokenizerInfo(padded, xg.VocabType.RAW, vocab_size=vocab_size, stop_token_ids=list(eos_ids))


def _backend_info(backend: Any, vocab_size: int, eos_ids: Sequence[int]) -> xg.TokenizerInfo:
    """For a ``tokenizers.Tokenizer``: how its tokens spell bytes is found by the engine from the serialised tokenizer."""
    tokens = [""] * vocab_size
    for token, i in backend.get_vocab(with_added_tokens=True).items():
        if i < vocab_size:
            tokens[i] = token
    for i, added in backend.get_added_tokens_decoder().items():
        if added.special and i < vocab_size:
            tokens[i] = ""
    meta = xg.TokenizerInfo._detect_metadata_from_hf(backend.to_str())
    return xg.TokenizerInfo(
        tokens, meta["vocab_type"], vocab_size=vocab_size, stop_token_ids=list(eos_ids), add_prefix_space=meta["add_prefix_space"]
    )


def build(compiler: xg.GrammarCompiler, spec: GrammarSpec) -> xg.CompiledGrammar:
    """Compile one spec here and now. Errors: GrammarError with the engine's words."""
    try:
        if spec.kind == "json":
            return compiler.compile_grammar(_short_numbers(_json_grammar(spec)))
        if spec.kind == "regex":
            return compiler.compile_regex(spec.text)
        return (
            compiler.compile_grammar(_EMPTY_FIRST.sub(r'\1 "" |', spec.text))
            if spec.kind == "grammar"
            else compiler.compile_structural_tag(spec.text)
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise GrammarError(f"the grammar cannot be compiled: {_reason(error)}", param="structured_outputs") from None


def _json_grammar(spec: GrammarSpec) -> xg.Grammar:
    if spec.any_whitespace:
        return xg.Grammar.from_json_schema(spec.text, any_whitespace=True, max_whitespace_cnt=MAX_WHITESPACE)
    return xg.Grammar.from_json_schema(spec.text, any_whitespace=False, separators=(",", ":"))


# The engine's unbounded digit loops, where small models stay for ever. 18 digits and three of exponent still write every double.
SHORTER = (
    ("(basic_integer_1 [1-9] [0-9]*)", "(basic_integer_1 [1-9] [0-9]{0,17})"),
    ('(("0") | ([1-9] [0-9]*))', '(("0") | ([1-9] [0-9]{0,17}))'),
    ('("." basic_number_digits{1, -1})', '("." basic_number_digits{1, 18})'),
    ("([eE] basic_number_4 basic_number_digits{1, -1})", "([eE] basic_number_4 basic_number_digits{1, 3})"),
)


def _short_numbers(grammar: xg.Grammar) -> xg.Grammar:
    """The same JSON with numbers of bounded length; unchanged if the engine words its rules differently one day."""
    text = str(grammar)
    for long, short in SHORTER:
        text = text.replace(long, short)
    return xg.Grammar.from_ebnf(text)


def _reason(error: Exception) -> str:
    """The engine's message without its clock and source position."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    last = lines[-1] if lines else type(error).__name__
    return last.rpartition(".cc:")[2].partition(": ")[2][:300] or last[:300]


Done = Callable[[GrammarError | None], None]


class GrammarCompiler:
    """Compiles constraints for one tokenizer and keeps the results, most recently used first out last.

    ``submit`` calls back from a worker thread. Close it to end threads and the child process.
    """

    def __init__(
        self,
        vocabulary: Vocabulary | list[bytes] | str | Path,
        vocab_size: int,
        eos_ids: Sequence[int],
        *,
        timeout: float = 30.0,
        max_threads: int = 1,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        self.timeout, self.cache_bytes = timeout, cache_bytes
        self.vocab_size, self.eos_ids = vocab_size, [int(i) for i in eos_ids]
        self.info = info = tokenizer_info(vocabulary, vocab_size, self.eos_ids)
        # The engine's own cache is off: it would keep rejected and evicted grammars alive.
        self._engine = xg.GrammarCompiler(info, max_threads=max_threads, cache_enabled=False)
        self._cache: OrderedDict[bytes, xg.CompiledGrammar] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()
        self._waiting: dict[str, Future[None]] = {}
        self._ready: dict[str, xg.CompiledGrammar] = {}
        # A slow constraint must not delay a small one that arrives later, hence two queues.
        self._small = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._large = ThreadPoolExecutor(1, thread_name_prefix="grammar-large")
        self._taster = Taster(info.serialize_json(), timeout)

    def check(self, params: StructuredOutputsParams) -> GrammarSpec:
        """Quick validity, without compiling. Errors: GrammarError naming the keyword or position."""
        return spec_of(params)

    def compile(self, params: StructuredOutputsParams) -> xg.CompiledGrammar:
        """The compiled grammar, from the cache or made now (may take up to twice the timeout). Errors: GrammarError."""
        return self._get(spec_of(params))

    def submit(self, request_id: str, params: StructuredOutputsParams, done: Done) -> None:
        """Compile in the background; ``done`` is called once, with None or the error, unless ``cancel`` comes first."""
        try:
            spec = spec_of(params)
        except GrammarError as error:
            done(error)
            return
        with self._lock:
            hit = self._cache.get(spec.key)
            if hit is not None:
                self._ready[request_id] = hit
            else:
                pool = self._small if spec.tame else self._large
                self._waiting[request_id] = pool.submit(self._work, request_id, spec, done)
        if hit is not None:
            done(None)

    def cancel(self, request_id: str) -> None:
        """The request ended or no longer waits: no event will come, and nothing is kept for it."""
        with self._lock:
            future = self._waiting.pop(request_id, None)
            self._ready.pop(request_id, None)
        if future is not None:
            future.cancel()

    def take(self, request_id: str, params: StructuredOutputsParams) -> xg.CompiledGrammar:
        """What ``submit`` made for a request; compiled now if nothing is there (a resumed or forked request)."""
        with self._lock:
            found = self._ready.pop(request_id, None)
        return found if found is not None else self.compile(params)

    def close(self) -> None:
        """End the worker threads and the child process."""
        self._taster.close()
        for pool in (self._small, self._large):
            pool.shutdown(wait=False, cancel_futures=True)

    def _work(self, request_id: str, spec: GrammarSpec, done: Done) -> None:
        made: xg.CompiledGrammar | None = None
        failure: GrammarError | None = None
        try:
            with self._lock:
                if request_id not in self._waiting:
                    return
            made = self._get(spec)
        except GrammarError as error:
            failure = error
        except Exception as error:  # a request must never wait for ever because its compile broke
            failure = GrammarError(f"the grammar cannot be compiled: {error}", param="structured_outputs")
        with self._lock:
            live = self._waiting.pop(request_id, None) is not None
            if live and made is not None:
                self._ready[request_id] = made
        if live:
            done(failure)

    def _get(self, spec: GrammarSpec) -> xg.CompiledGrammar:
        key = spec.key
        with self._lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
                return found
        if not spec.tame:
            self._taster.taste(spec)
        made = build(self._engine, spec)
        _must_start(made, self.vocab_size)
        self._keep(key, made)
        return made

    def _keep(self, key: bytes, made: xg.CompiledGrammar) -> None:
        with self._lock:
            if key not in self._cache:
                self._cache[key] = made
                self._bytes += made.memory_size_bytes
            while len(self._cache) > 1 and (self._bytes > self.cache_bytes or len(self._cache) > CACHE_ENTRIES):
                self._bytes -= self._cache.popitem(last=False)[1].memory_size_bytes


def _must_start(made: xg.CompiledGrammar, vocab_size: int) -> None:
    """Refuse a grammar that matches no text at all: its request could never be given an id."""
    row = np.zeros((1, (vocab_size + 31) // 32), np.int32)
    with contextlib.suppress(RuntimeError):
        xg.GrammarMatcher(made).fill_next_token_bitmask(row, 0)
    if not row.any():
        raise GrammarError("the grammar matches no text of this model's vocabulary", param="structured_outputs")
