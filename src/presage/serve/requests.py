"""Building engine requests and shared pieces of answers."""

from __future__ import annotations

import math
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request as HttpRequest

from presage.core.errors import RequestError
from presage.core.request import Request
from presage.core.salt import salt_of
from presage.core.sampling_params import SamplingParams
from presage.draft.length.wishes import cap_of
from presage.serve.front import front_of, tenant_of
from presage.serve.generate import Generation, ids_array
from presage.serve.protocol.common import SLO, SamplingBody

END_OF_THINKING = "</think>"


def new_id(prefix: str) -> str:
    """A fresh id such as ``cmpl-<32 hex>``."""
    return f"{prefix}-{uuid.uuid4().hex}"


def engine_request(http: HttpRequest, body: SamplingBody, name: str, model: str, prompt: Sequence[int], sampling: SamplingParams) -> Request:
    """One request for the engine; deadlines count from the arrival of the body."""
    now, tenant = http.state.arrived, tenant_of(http)
    if body.draft and body.draft.get("method", "none") != "none" and not front_of(http).client.drafting:
        raise RequestError("this server was started without a drafter", param="draft")
    cap_of(body.draft)
    first, each, end = deadlines(body.slo, now)
    return Request(
        id=name,
        prompt=ids_array(prompt),
        sampling=sampling,
        arrival=now,
        model=model,
        tenant=tenant,
        salt=salt_of(tenant, body.cache_salt),
        priority=body.priority or 0,
        program=body.program_id,
        stage=body.stage,
        draft=body.draft,
        due_first=first,
        due_each=each,
        due_end=end,
        extras=thinking(http, sampling),
    )


def thinking(http: HttpRequest, sampling: SamplingParams) -> dict[str, Any]:
    """What the engine must know to end the thinking. Errors: a thinking budget for a model without an end-of-thinking token."""
    if sampling.thinking_budget is None:
        return {}
    end = front_of(http).client.tokenizer.token_to_id(END_OF_THINKING)
    if end is None:
        raise RequestError(f"this model has no {END_OF_THINKING} token, so thinking_budget cannot be kept", param="thinking_budget")
    return {"thinking_end_id": end}


def deadlines(slo: SLO | None, now: float) -> tuple[float, float, float]:
    """(due_first, due_each, due_end): absolute times but for the allowance in the middle, in seconds; inf where there is no wish."""
    if slo is None:
        return math.inf, math.inf, math.inf
    first, each, end = (math.inf if ms is None else ms / 1e3 for ms in (slo.ttft_ms, slo.tpot_ms, slo.e2e_ms))
    return now + first, each, now + end


def check_stream(body: SamplingBody) -> bool:
    """True if the answer is a stream. Errors: stream_options without a stream, prompt_logprobs with one."""
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options needs stream: true", param="stream_options")
    if body.stream and body.prompt_logprobs is not None:
        raise RequestError("prompt_logprobs is not available in a stream", param="prompt_logprobs")
    return bool(body.stream)


def usage(generations: Sequence[Generation], reasoning: int | None = None) -> dict[str, Any]:
    """Token counts over all requests of one call; ``reasoning`` tokens are part of the completion tokens."""
    n_prompt, n_output = sum(g.n_prompt for g in generations), sum(g.n_output for g in generations)
    out: dict[str, Any] = {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_output,
        "total_tokens": n_prompt + n_output,
        "prompt_tokens_details": {"cached_tokens": sum(g.n_cached for g in generations)},
    }
    if reasoning is not None:
        out["completion_tokens_details"] = {"reasoning_tokens": reasoning}
    return out


def check_prompt_ids(ids: Sequence[int], vocab: int, param: str) -> None:
    """Errors: RequestError for an empty prompt or ids outside of the vocabulary."""
    if not ids:
        raise RequestError("the prompt is empty", param=param)
    if min(ids) < 0 or max(ids) >= vocab:
        raise RequestError(f"token ids must be between 0 and {vocab - 1}", param=param)
