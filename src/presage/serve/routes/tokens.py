"""POST /tokenize and /detokenize."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from presage.core.errors import RequestError
from presage.serve import openapi
from presage.serve.chat_prompt import chat_prompt
from presage.serve.errors import encode
from presage.serve.front import Front, front_of
from presage.serve.protocol.other import DetokenizeRequest, DetokenizeResponse, TokenizeRequest, TokenizeResponse

router = APIRouter(tags=["Tokens"])


@router.post(
    "/tokenize",
    responses={200: {"model": TokenizeResponse}, **openapi.errors(*openapi.BODY_ERRORS)},
    openapi_extra=openapi.takes(TokenizeRequest),
)
async def tokenize(request: Request) -> Response:
    """Ids of a text or of a conversation."""
    front = front_of(request)
    body = await front.bodies.read(request, TokenizeRequest)
    front.model(body.model)
    ids = await _ids(front, body)
    out: dict[str, object] = {"count": len(ids), "max_model_len": front.client.max_model_len, "tokens": ids}
    if body.return_token_strs:
        out["token_strs"] = [front.client.tokenizer.id_to_token(i) or "" for i in ids]
    return Response(encode(out), media_type="application/json")


async def _ids(front: Front, body: TokenizeRequest) -> list[int]:
    prompt = body.prompt
    if (prompt is None) == (body.messages is None):
        raise RequestError("exactly one of prompt and messages is needed", param="prompt")
    if prompt is not None:
        special, tokenizer = body.add_special_tokens is not False, front.client.tokenizer
        found: list[int] = await front.off_loop(len(prompt), lambda: tokenizer.encode(prompt, add_special_tokens=special))
        return found
    generation, special = body.add_generation_prompt is not False, bool(body.add_special_tokens)
    options = body.chat_template_kwargs
    return (await chat_prompt(front, body.messages or [], body.tools, options, generation_prompt=generation, special=special))[1]


@router.post(
    "/detokenize",
    responses={200: {"model": DetokenizeResponse}, **openapi.errors(*openapi.BODY_ERRORS)},
    openapi_extra=openapi.takes(DetokenizeRequest),
)
async def detokenize(request: Request) -> Response:
    """Text of ids."""
    front = front_of(request)
    body = await front.bodies.read(request, DetokenizeRequest)
    front.model(body.model)
    if any(not 0 <= i < front.client.vocab_size for i in body.tokens):
        raise RequestError(f"token ids must be between 0 and {front.client.vocab_size - 1}", param="tokens")
    text = front.client.tokenizer.decode(body.tokens, skip_special_tokens=False)
    return Response(encode({"prompt": text}), media_type="application/json")
