"""GET /health, /ready, /load, /version, /metrics."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import PlainTextResponse, Response

import presage
from presage.serve import openapi
from presage.serve.errors import encode
from presage.serve.front import Front, front_of
from presage.serve.protocol.other import Load, Status, Version

router = APIRouter(tags=["Operations"])
_UNWELL: dict[int | str, dict[str, Any]] = {503: {"model": Status, "description": "Not able to serve."}}


@router.get("/health", responses={200: {"model": Status}, **_UNWELL})
async def health(request: Request) -> Response:
    """200 while the engine's loop is alive, draining or not."""
    return await _status(front_of(request), draining_is_well=True)


@router.get("/ready", responses={200: {"model": Status}, **_UNWELL})
async def ready(request: Request) -> Response:
    """200 while new requests are taken."""
    return await _status(front_of(request), draining_is_well=False)


async def _status(front: Front, draining_is_well: bool) -> Response:
    alive = await front.client.health()
    well = alive and (draining_is_well or not front.draining)
    word = "dead" if not alive else "draining" if front.draining else "ok"
    return Response(encode({"status": word}), 200 if well else 503, media_type="application/json")


@router.get("/load", responses={200: {"model": Load}, **openapi.errors(401)})
async def load(request: Request) -> Response:
    """How busy the server is."""
    front = front_of(request)
    stats = front.client.stats()
    running, waiting = int(stats.get("running", 0)), int(stats.get("waiting", 0))
    busy = {"server_load": front.live, "num_requests_running": running, "num_requests_waiting": waiting}
    return Response(encode(busy), media_type="application/json")


@router.get("/version", responses={200: {"model": Version}})
async def version() -> Response:
    """Version of the server."""
    return Response(encode({"version": presage.__version__}), media_type="application/json")


@router.get("/metrics", response_class=PlainTextResponse, responses={200: {"description": "Prometheus text."}})
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(front_of(request).metrics.page(), media_type=CONTENT_TYPE_LATEST)
