"""Prompts as users write them, turned into requests: text, ids, chat messages; defaults from the model and the engine."""

from __future__ import annotations

import itertools
import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np

from presage.core.errors import RequestError
from presage.core.request import Request
from presage.core.sampling_params import SamplingParams
from presage.engine.assemble import prepare
from presage.tokenize.tokenizer import Tokenizer

Prompt = str | Sequence[int] | dict[str, Any]


def prompt_ids(prompt: Prompt, tokenizer: Tokenizer) -> tuple[np.ndarray, str | None]:
    """(int32 ids, text or None) of a prompt: a string, a list of ids, or vLLM's {"prompt": ...} / {"prompt_token_ids": ...}."""
    if isinstance(prompt, dict):
        prompt = prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt.get("prompt", "")
    if isinstance(prompt, str):
        return np.array(tokenizer.encode(prompt), np.int32), prompt
    ids = np.array(list(prompt), np.int64)
    if len(ids) and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size):
        raise RequestError(f"prompt ids must be between 0 and {tokenizer.vocab_size - 1}", param="prompt")
    return ids.astype(np.int32), None


def make_request(ids: np.ndarray, params: SamplingParams, tokenizer: Tokenizer, request_id: str | None = None, **fields: Any) -> Request:
    """A request with an id and an arrival time."""
    return Request(
        id=request_id or f"req-{uuid.uuid4().hex[:16]}", prompt=ids, sampling=prepare(params, tokenizer), arrival=time.monotonic(), **fields
    )


def expand(prompts: Any, params: SamplingParams | Sequence[SamplingParams] | None) -> Iterator[tuple[Prompt, SamplingParams]]:
    """Pairs of prompt and parameters, as ``LLM.generate`` takes them: one or many of either."""
    single = isinstance(prompts, (str, dict)) or (len(prompts) > 0 and isinstance(prompts[0], int))
    many = [prompts] if single else list(prompts)
    each = params if isinstance(params, Sequence) else itertools.repeat(params or SamplingParams(), len(many))
    for prompt, p in zip(many, each, strict=True):
        yield prompt, msgspec.structs.replace(p)
