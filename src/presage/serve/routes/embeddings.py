"""POST /v1/embeddings."""

from __future__ import annotations

import base64
import time
from typing import Any

import numpy as np
from fastapi import APIRouter, Request
from starlette.responses import Response

from presage.core.errors import ContextTooLong, RequestError, StepFailed
from presage.core.request import Request as EngineRequest
from presage.core.salt import salt_of
from presage.core.sampling_params import SamplingParams
from presage.core.types import Kind
from presage.serve import openapi
from presage.serve.errors import encode
from presage.serve.front import Front, front_of, tenant_of
from presage.serve.generate import Generation, ids_array, merged
from presage.serve.prompts import encode_prompts
from presage.serve.protocol.other import EmbeddingRequest, EmbeddingResponse
from presage.serve.requests import new_id
from presage.serve.sse import while_connected

router = APIRouter(tags=["OpenAI"])


@router.post(
    "/v1/embeddings",
    responses={200: {"model": EmbeddingResponse}, **openapi.errors(*openapi.BODY_ERRORS)},
    openapi_extra=openapi.takes(EmbeddingRequest),
)
async def embeddings(request: Request) -> Response:
    """Embed texts."""
    front = front_of(request)
    front.admit()
    body = await front.bodies.read(request, EmbeddingRequest)
    model, engine_model = front.model(body.model)
    prompts = await encode_prompts(front, body.input, body.add_special_tokens is not False, "input")
    name = new_id("embd")
    generations = []
    for i, prompt in enumerate(prompts):
        _check_length(front, prompt)
        generations.append(Generation(front, _request(request, body, f"{name}-{i}", engine_model, prompt)))
    vectors = await while_connected(request, _vectors(generations, body))
    if vectors is None:
        return Response(status_code=499)
    n = sum(g.n_prompt for g in generations)
    data = [{"object": "embedding", "index": i, "embedding": _shape(v, body)} for i, v in enumerate(vectors)]
    answer: dict[str, Any] = {"id": name, "object": "list", "created": int(time.time()), "model": model, "data": data}
    return Response(encode({**answer, "usage": {"prompt_tokens": n, "total_tokens": n}}), media_type="application/json")


def _request(http: Request, body: EmbeddingRequest, name: str, model: str, prompt: list[int]) -> EngineRequest:
    tenant = tenant_of(http)
    return EngineRequest(
        id=name,
        prompt=ids_array(prompt),
        # Nothing is sampled for this kind; the field only has to be valid.
        sampling=SamplingParams(max_tokens=1),
        arrival=http.state.arrived,
        kind=Kind.EMBED,
        model=model,
        tenant=tenant,
        salt=salt_of(tenant, body.cache_salt),
        priority=body.priority or 0,
        extras={"pooling": body.pooling} if body.pooling else {},
    )


def _check_length(front: Front, prompt: list[int]) -> None:
    n, limit = len(prompt), front.client.max_model_len
    if n > limit:
        message = f"the input has {n} tokens, but the model's context is {limit} tokens"
        raise ContextTooLong(message, param="input", n_prompt_tokens=n, n_ctx=limit)


async def _vectors(generations: list[Generation], body: EmbeddingRequest) -> list[np.ndarray]:
    async for _ in merged(generations):
        continue
    out = []
    for g in generations:
        if g.pooled is None:
            raise StepFailed("the engine returned no embedding")
        out.append(_scaled(np.asarray(g.pooled, np.float32), body))
    return out


def _scaled(vector: np.ndarray, body: EmbeddingRequest) -> np.ndarray:
    if body.dimensions is not None and body.dimensions != len(vector):
        message = f"this model's embeddings have {len(vector)} dimensions and cannot be cut to {body.dimensions}"
        raise RequestError(message, param="dimensions")
    length = float(np.linalg.norm(vector))
    return vector / np.float32(length) if body.normalize is not False and length > 0 else vector


def _shape(vector: np.ndarray, body: EmbeddingRequest) -> list[float] | str:
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    out: list[float] = vector.tolist()
    return out
