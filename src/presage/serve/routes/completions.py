"""POST /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from presage.core.errors import RequestError
from presage.core.request import TokenLogprobs
from presage.serve import openapi
from presage.serve.errors import encode
from presage.serve.front import Front, front_of
from presage.serve.generate import Delta, Generation, merged
from presage.serve.logprobs import CompletionLogprobs, prompt_logprobs
from presage.serve.prompts import encode_prompts
from presage.serve.protocol.completions import CompletionRequest, CompletionResponse
from presage.serve.requests import check_stream, engine_request, new_id, usage
from presage.serve.sampling import asked_tokens, output_room, sampling_of, structured_of
from presage.serve.sse import EventStream, event, while_connected
from presage.serve.tool_choice import format_constraint

router = APIRouter(tags=["OpenAI"])
DEFAULT_MAX_TOKENS = 16


class Call:
    """One HTTP call: its generations (one per prompt) and how their text becomes choices."""

    def __init__(self, front: Front, body: CompletionRequest, model: str, prompts: list[list[int]]) -> None:
        self.front, self.body, self.model = front, body, model
        self.name, self.created = new_id("cmpl"), int(time.time())
        self.prompts, self.n = prompts, body.n or 1
        self.generations: list[Generation] = []
        self.blocks: dict[int, CompletionLogprobs] = {}

    @property
    def silent(self) -> bool:
        """max_tokens 0: only the prompt is asked for, so the one token that the engine makes is dropped."""
        return self.body.max_tokens == 0

    def frame(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The outer object, without usage."""
        return {"id": self.name, "object": "text_completion", "created": self.created, "model": self.model, "choices": choices}

    def usage_now(self) -> dict[str, Any]:
        """Token counts; a dropped token does not count."""
        out = usage(self.generations)
        if self.silent:
            out.update(completion_tokens=0, total_tokens=out["prompt_tokens"])
        return out

    def choice(self, which: int, delta: Delta, first: bool) -> dict[str, Any]:
        """A choice of a chunk or, given everything at once, of the answer."""
        body, index = self.body, which * self.n + delta.branch
        if self.silent:
            delta = Delta(delta.branch, "", [], [], delta.finish and "length")
        out: dict[str, Any] = {"index": index, "text": delta.text, "logprobs": None}
        out.update(finish_reason=delta.finish or None, stop_reason=delta.stop)
        echo = bool(body.echo) and first
        if echo:
            skip = body.skip_special_tokens is not False
            out["text"] = self.front.client.tokenizer.decode(self.prompts[which], skip_special_tokens=skip) + delta.text
        if body.logprobs is not None:
            out["logprobs"] = self._logprobs(which, index, delta, echo)
        if body.return_token_ids:
            out["token_ids"] = delta.ids
            out["prompt_token_ids"] = self.prompts[which] if first else None
        return out

    def _logprobs(self, which: int, index: int, delta: Delta, echo: bool) -> dict[str, Any]:
        found: list[TokenLogprobs | None] = list(delta.logprobs)
        ids = delta.ids[: len(found)]
        if echo:
            found, ids = [*self.generations[which].prompt_logprobs, *found], [*self.prompts[which], *ids]
        if index not in self.blocks:
            self.blocks[index] = CompletionLogprobs(self.front.client.tokenizer, self.body.logprobs or 0)
        return self.blocks[index].block(found, ids)


@router.post(
    "/v1/completions",
    responses={200: {"model": CompletionResponse, **openapi.streams(CompletionResponse)}, **openapi.errors(*openapi.BODY_ERRORS)},
    openapi_extra=openapi.takes(CompletionRequest),
)
async def completions(request: Request) -> Response:
    """Continue one or more prompts."""
    front = front_of(request)
    front.admit()
    body = await front.bodies.read(request, CompletionRequest)
    model, engine_model = front.model(body.model)
    stream = check_stream(body)
    _check(body)
    prompts = await encode_prompts(front, body.prompt, body.add_special_tokens is not False, "prompt")
    call = Call(front, body, model, prompts)
    structured = structured_of(body, lambda: format_constraint(body.response_format))
    for i, prompt in enumerate(prompts):
        room = output_room(1 if call.silent else asked_tokens(body), DEFAULT_MAX_TOKENS, len(prompt), front.client.max_model_len)
        fixed: dict[str, Any] = {"max_tokens": room, "logprobs": body.logprobs, "structured_outputs": structured}
        if body.echo and body.logprobs is not None:
            # Echoed log-probabilities are the prompt's, which the engine only computes when asked.
            fixed["prompt_logprobs"] = max(body.logprobs, body.prompt_logprobs or 0)
        sampling = sampling_of(body, front.client, front.config.default_sampling_params, **fixed)
        name = call.name if len(prompts) == 1 else f"{call.name}-{i}"
        call.generations.append(Generation(front, engine_request(request, body, name, engine_model, prompt, sampling)))
    if stream:
        return EventStream(_chunks(call), front.config)
    answer = await while_connected(request, _whole(call))
    return Response(status_code=499) if answer is None else Response(encode(answer), media_type="application/json")


def _check(body: CompletionRequest) -> None:
    if body.suffix:
        raise RequestError("suffix (fill in the middle) is not supported", param="suffix")
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise RequestError("best_of is not supported; use n", param="best_of")
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens 0 makes sense only with echo", param="max_tokens")


async def _whole(call: Call) -> dict[str, Any]:
    parts: dict[tuple[int, int], Delta] = {}
    async for which, delta in merged(call.generations):
        parts.setdefault((which, delta.branch), Delta(delta.branch, "", [], [])).add(delta)
    choices = []
    for (which, _), delta in sorted(parts.items()):
        choice = call.choice(which, delta, True)
        if call.body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(call.front.client.tokenizer, call.generations[which].prompt_logprobs)
        choices.append(choice)
    return {**call.frame(choices), "usage": call.usage_now()}


async def _chunks(call: Call) -> AsyncIterator[bytes]:
    body = call.body
    options = body.stream_options
    last_usage = bool(options and options.include_usage)
    each_usage = bool(options and options.continuous_usage_stats)
    seen: set[tuple[int, int]] = set()
    # Closed by hand below: a generator left to the garbage collector would abort its requests late.
    stream = merged(call.generations)
    try:
        async for which, delta in stream:
            first = (which, delta.branch) not in seen
            seen.add((which, delta.branch))
            quiet = not delta.text and not delta.finish and not (first and body.echo)
            if quiet and body.logprobs is None and not body.return_token_ids:
                continue
            chunk = call.frame([call.choice(which, delta, first)])
            if last_usage or each_usage:
                chunk["usage"] = call.usage_now() if each_usage else None
            yield event(chunk)
        if last_usage:
            yield event({**call.frame([]), "usage": call.usage_now()})
    finally:
        await stream.aclose()  # type: ignore[attr-defined]
