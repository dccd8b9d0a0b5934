"""The OpenAPI document: routes read their bodies themselves (bounded, strict), so the document is told what they read and answer."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel

from presage.serve.auth import OPEN_PATHS
from presage.serve.protocol.common import ErrorResponse

_REF = "#/components/schemas/{model}"
_WORDS = {
    400: "The request is at fault; `param` names the field.",
    401: "The API key is missing or wrong.",
    404: "Unknown model or request.",
    408: "The body did not arrive in time.",
    409: "The server keeps no decision log.",
    413: "The body is too large.",
    415: "The body is not JSON.",
    500: "The server failed.",
    503: "Queue full, draining, or the engine is down; see Retry-After.",
    504: "The request's deadline passed while it was queued.",
}
BODY_ERRORS = (400, 401, 404, 408, 413, 415, 500, 503, 504)


def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """``responses`` of a route: each code with the one error body."""
    return {code: {"model": ErrorResponse, "description": _WORDS[code]} for code in codes}


def takes(body: type[BaseModel]) -> dict[str, Any]:
    """``openapi_extra`` of a route that reads ``body`` itself."""
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": {"$ref": _REF.format(model=body.__name__)}}}}}


def streams(chunk: type[BaseModel]) -> dict[str, Any]:
    """The 200 answer's second form: server-sent events of ``chunk``."""
    text = f"With `stream`: events `data: {chunk.__name__}`, then `data: [DONE]`. An error after the head is an event with an ErrorResponse."
    content = {"text/event-stream": {"schema": {"type": "string", "description": text}}}
    return {"description": "The answer, or a stream of it.", "content": content}


def install(app: FastAPI, extra: tuple[type[BaseModel], ...]) -> None:
    """Replace ``app.openapi`` by one that also knows ``extra``: the bodies that routes read and the chunks that they stream."""

    def build() -> dict[str, Any]:
        # Built once and on demand: it takes longer than starting the server.
        if app.openapi_schema is None:
            document = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            _add_models(document, extra)
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = build  # type: ignore[method-assign]


def _add_models(document: dict[str, Any], extra: tuple[type[BaseModel], ...]) -> None:
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)  # FastAPI's own error shape, which we never send
            if path not in OPEN_PATHS:
                operation["security"] = [{"key": []}, {}]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for model in extra:
        schema = model.model_json_schema(ref_template=_REF)
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
