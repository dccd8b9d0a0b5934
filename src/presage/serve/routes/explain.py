"""GET /explain/{request_id}: what the decision log says about a request, as text.

The whole id must be given: it is random and only who got the answer knows it, so that nobody reads another's drafts. Nothing is listed here.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from presage.core.errors import Draining, RequestError
from presage.engine.explain import History, history
from presage.engine.replay import read_frames
from presage.serve import openapi
from presage.serve.errors import NoDecisionLog, UnknownRequest
from presage.serve.explained import PIPE, has_ids, shown_by, tell
from presage.serve.front import Front, front_of, tenant_of
from presage.serve.sse import while_connected

router = APIRouter(tags=["Operations"])
BREATH = 0.001
_TEXT = {"text/plain": {"schema": {"type": "string"}}}
_WISHES = {
    "steps": (12, -1, 1 << 20, "Steps told one by one, evenly spread; 0 for none, -1 for all."),
    "width": (PIPE, 40, 1000, "Columns of a line."),
    "colour": (0, 0, 1, "1: coloured by terminal codes; 0: accepted drafts in [], rejected ones in ⟨⟩."),
}


def _parameters() -> list[dict[str, Any]]:
    return [
        {"name": name, "in": "query", "description": text, "schema": {"type": "integer", "default": default, "minimum": low, "maximum": high}}
        for name, (default, low, high, text) in _WISHES.items()
    ]


@router.get(
    "/explain/{request_id}",
    response_class=Response,  # the text is documented below: PlainTextResponse here would make text of the errors too
    responses={200: {"description": "The request's drafts, delays and steps.", "content": _TEXT}, **openapi.errors(400, 401, 404, 409, 503)},
    openapi_extra={"parameters": _parameters()},
)
async def explain(request: Request, request_id: str) -> Response:
    """What happened to a request: its drafts, why it waited, was preempted, and got these draft lengths."""
    front = front_of(request)
    steps, width, colour = (_number(request, name) for name in _WISHES)
    folder = await front.client.decision_log()
    if folder is None:
        raise NoDecisionLog("this server keeps no decision log; start it with --decision-log FOLDER")

    async def told() -> str:
        # One at a time: reading a long log keeps a core busy.
        async with front.reading_log:
            return await asyncio.to_thread(_told, front, folder, request_id, tenant_of(request), steps, width, bool(colour))

    text = await while_connected(request, told())
    return Response(status_code=499) if text is None else PlainTextResponse(text)


def _number(request: Request, name: str) -> int:
    default, low, high, _ = _WISHES[name]
    given = request.query_params.get(name, str(default))
    try:
        value = int(given)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise RequestError(f"{name} must be a number from {low} to {high}", param=name)
    return value


def _told(front: Front, folder: str, request_id: str, tenant: str, steps: int, width: int, colour: bool) -> str:
    """The text. Errors: UnknownRequest, Draining."""
    from rich.console import Console

    try:
        found = history(_frames(front, folder), request_id)
    except FileNotFoundError:  # the oldest file went while we were about to read it
        found = history(_frames(front, folder), request_id)
    if not _belongs(found, tenant):
        raise UnknownRequest(f"no request {request_id[:200]!r} in the decision log; it must be whole, and old ones are deleted", param="request_id")
    out = io.StringIO()
    console = Console(file=out, width=width, force_terminal=colour, color_system="standard" if colour else None, highlight=False, soft_wrap=True)
    tell(console, found, shown_by(front.client.tokenizer) if has_ids(found) else None, steps)
    return out.getvalue()


def _belongs(found: History, tenant: str) -> bool:
    """Is there anything, and is it the tenant's? What lost its arrival to rotation belongs to nobody but a server without keys."""
    return bool(found.branches) and (not tenant or found.request.get("tenant") == tenant)


def _frames(front: Front, folder: str) -> Iterator[tuple[str, Any]]:
    rested = 0.0
    for frame in read_frames(folder):
        if time.perf_counter() - rested > BREATH:
            if front.draining:
                raise Draining("the server is shutting down", retry_after=5)
            # Python lets another thread in only every 5 ms; without this every stream would wait that long for each of its tokens.
            time.sleep(0.0002)
            rested = time.perf_counter()
        yield frame
