"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from presage.core.errors import RequestError
from presage.core.sampling_params import SamplingParams
from presage.serve import openapi
from presage.serve.chat_answer import ChatAnswer
from presage.serve.chat_prompt import chat_prompt
from presage.serve.errors import encode
from presage.serve.front import Front, front_of
from presage.serve.generate import Delta, Generation
from presage.serve.logprobs import chat_logprobs, prompt_logprobs
from presage.serve.protocol.chat import ChatRequest, ChatResponse
from presage.serve.reasoning import reasoning_parser
from presage.serve.requests import check_prompt_ids, check_stream, engine_request, new_id, usage
from presage.serve.sampling import asked_tokens, output_room, sampling_of, structured_of
from presage.serve.sse import EventStream, event, while_connected
from presage.serve.tool_choice import ToolPlan, constraint_of, plan_tools

router = APIRouter(tags=["OpenAI"])


class Chat:
    """One HTTP call: the generation and an answer per choice."""

    def __init__(self, front: Front, body: ChatRequest, model: str, generation: Generation, prompt: str, plan: ToolPlan) -> None:
        self.front, self.body, self.model, self.generation = front, body, model, generation
        self.name, self.created = generation.request.id, int(time.time())
        kind, show = front.config.reasoning_parser, body.include_reasoning is not False
        self.answers = [
            ChatAnswer(reasoning_parser(kind, prompt) if kind else None, plan.parser() if plan.parser else None, show) for _ in generation.branches
        ]

    def frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        """The outer object."""
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def usage(self) -> dict[str, Any]:
        """Token counts, with the reasoning's share if there is a parser for it."""
        counted = sum(a.reasoning_tokens for a in self.answers) if self.front.config.reasoning_parser else None
        return usage([self.generation], counted)

    def extras(self, delta: Delta) -> dict[str, Any]:
        """Choice fields beside the text."""
        tokenizer, body = self.front.client.tokenizer, self.body
        out: dict[str, Any] = {"logprobs": chat_logprobs(tokenizer, delta.logprobs, body.top_logprobs or 0) if body.logprobs else None}
        out["finish_reason"] = self.answers[delta.branch].finish(delta.finish)
        out["stop_reason"] = delta.stop
        if body.return_token_ids:
            out["token_ids"] = delta.ids
        return out


@router.post(
    "/v1/chat/completions",
    responses={200: {"model": ChatResponse, **openapi.streams(ChatResponse)}, **openapi.errors(*openapi.BODY_ERRORS)},
    openapi_extra=openapi.takes(ChatRequest),
)
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    front = front_of(request)
    front.admit()
    body = await front.bodies.read(request, ChatRequest)
    model, engine_model = front.model(body.model)
    stream = check_stream(body)
    plan = plan_tools(body, front.config)
    # With "none" the model must not even see the tools, or it calls them in prose.
    shown = body.tools if body.tool_choice != "none" else None
    text, ids = await chat_prompt(
        front,
        body.messages,
        shown,
        body.chat_template_kwargs,
        generation_prompt=body.add_generation_prompt is not False,
        continue_final=bool(body.continue_final_message),
        special=bool(body.add_special_tokens),
    )
    check_prompt_ids(ids, front.client.vocab_size, "messages")
    sampling = _sampling(front, body, plan, len(ids))
    generation = Generation(front, engine_request(request, body, new_id("chatcmpl"), engine_model, ids, sampling))
    chat = Chat(front, body, model, generation, text, plan)
    if stream:
        return EventStream(_chunks(chat), front.config)
    answer = await while_connected(request, _whole(chat))
    return Response(status_code=499) if answer is None else Response(encode(answer), media_type="application/json")


def _sampling(front: Front, body: ChatRequest, plan: ToolPlan, n_prompt: int) -> SamplingParams:
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError("top_logprobs needs logprobs: true", param="top_logprobs")
    asked = asked_tokens(body)
    if asked == 0:
        raise RequestError("max_tokens must be at least 1", param="max_tokens")
    fixed: dict[str, Any] = {
        "max_tokens": output_room(asked, None, n_prompt, front.client.max_model_len),
        "logprobs": (body.top_logprobs or 0) if body.logprobs else None,
        "structured_outputs": structured_of(body, lambda: constraint_of(body, plan)),
    }
    if plan.special_tokens:
        # The parser looks for markers that are special tokens; end tokens stay hidden all the same.
        fixed["skip_special_tokens"] = False
    return sampling_of(body, front.client, front.config.default_sampling_params, **fixed)


async def _whole(chat: Chat) -> dict[str, Any]:
    stream = chat.generation.deltas()
    try:
        async for delta in stream:
            answer = chat.answers[delta.branch]
            answer.push(delta)
            answer.whole.branch = delta.branch
            answer.whole.add(delta)
    finally:
        await stream.aclose()  # type: ignore[attr-defined]
    choices = [{"index": i, "message": a.message(), **chat.extras(a.whole)} for i, a in enumerate(chat.answers)]
    out = {**chat.frame("chat.completion", choices), "usage": chat.usage()}
    if chat.body.prompt_logprobs is not None:
        out["prompt_logprobs"] = prompt_logprobs(chat.front.client.tokenizer, chat.generation.prompt_logprobs)
    if chat.body.return_token_ids:
        out["prompt_token_ids"] = chat.generation.request.prompt.tolist()
    return out


async def _chunks(chat: Chat) -> AsyncIterator[bytes]:
    body, options = chat.body, chat.body.stream_options
    last_usage, each_usage = bool(options and options.include_usage), bool(options and options.continuous_usage_stats)

    def chunk(choices: list[dict[str, Any]], final: bool = False) -> bytes:
        out = chat.frame("chat.completion.chunk", choices)
        if last_usage or each_usage:
            out["usage"] = chat.usage() if final or each_usage else None
        return event(out)

    stream, opened = chat.generation.deltas(), False
    try:
        async for delta in stream:
            if not opened:
                opened = True
                # With the first token, not before: a stream that starts has been admitted.
                for i in range(len(chat.answers)):
                    yield chunk([_choice(i, {"role": "assistant", "content": ""})])
            turn = chat.answers[delta.branch].push(delta)
            if turn or delta.finish or body.logprobs or body.return_token_ids:
                yield chunk([_choice(delta.branch, turn.delta(), **chat.extras(delta))])
        if last_usage:
            yield chunk([], final=True)
    finally:
        await stream.aclose()  # type: ignore[attr-defined]


def _choice(index: int, delta: dict[str, Any], **extras: Any) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **extras}
