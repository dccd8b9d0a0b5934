"""GET /v1/models."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from presage.serve import openapi
from presage.serve.errors import encode
from presage.serve.front import Front, front_of
from presage.serve.protocol.other import ModelCard, ModelList

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", responses={200: {"model": ModelList}, **openapi.errors(401)})
async def models(request: Request) -> Response:
    """Every served name."""
    front = front_of(request)
    return _json({"object": "list", "data": [_card(front, name) for name in front.names]})


@router.get("/v1/models/{model_id:path}", responses={200: {"model": ModelCard}, **openapi.errors(401, 404)})
async def model(request: Request, model_id: str) -> Response:
    """One served name."""
    front = front_of(request)
    return _json(_card(front, front.model(model_id)[0]))


def _json(body: object) -> Response:
    return Response(encode(body), media_type="application/json")


def _card(front: Front, name: str) -> dict[str, object]:
    base = front.names[0]
    return {
        "id": name,
        "object": "model",
        "created": front.created,
        "owned_by": "presage",
        "root": front.client.model_names[0],
        "parent": None if name == base else base,
        "max_model_len": front.client.max_model_len,
    }
