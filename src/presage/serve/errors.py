"""From any failure to the one error body: ``{"error": {"message", "type", "param", "code"}}``."""

from __future__ import annotations

import logging
from typing import Any

import msgspec
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from presage.core import errors as tree
from presage.core.errors import Overloaded, PresageError

log = logging.getLogger("presage.serve")

_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 408: "request_timeout", 413: "body_too_large", 415: "unsupported_media_type"}


class BodyTooLarge(tree.RequestError):
    """The request body exceeds ``max_body_bytes``."""

    code, status = "body_too_large", 413


class BadMediaType(tree.RequestError):
    """The body is not declared as JSON."""

    code, status = "unsupported_media_type", 415


class BodyTimeout(tree.RequestError, TimeoutError):
    """The client did not send its body in time."""

    code, status = "request_timeout", 408


class UnknownRequest(tree.RequestError, LookupError):
    """No request of this id is in the decision log, or it is another tenant's."""

    code, status = "request_not_found", 404


class NoDecisionLog(tree.RequestError):
    """The server keeps no decision log, so nothing can be told about a request."""

    code, status = "no_decision_log", 409


class Failed(PresageError):
    """An error that reached us as plain data (code, message, status) and matches no class of the tree."""

    def __init__(self, message: str, *, param: str | None = None, code: str = "internal_error", status: int = 500, **details: Any) -> None:
        super().__init__(message, param=param, **details)
        self.code, self.status = code, status  # type: ignore[misc]
        self.kind = "invalid_request_error" if status < 500 else "server_error"  # type: ignore[misc]


def from_emission(error: tuple[str, str, int]) -> PresageError:
    """The exception an engine error (code, message, status) stands for."""
    code, message, status = error
    found = _by_code().get(code)
    return found(message) if found is not None and found.status == status else Failed(message, code=code, status=status)


def _by_code() -> dict[str, type[PresageError]]:
    # Reversed, so that a parent wins where a child inherits its code.
    classes = [c for c in vars(tree).values() if isinstance(c, type) and issubclass(c, PresageError)]
    return {c.code: c for c in reversed(classes)}


def error_body(error: PresageError) -> dict[str, Any]:
    """The JSON body of an error; numbers of an over-long prompt stand beside the four fields."""
    body = {"message": error.message, "type": error.kind, "param": error.param, "code": error.code}
    # Only these: details may hold internal numbers that are nobody's business.
    body.update({k: v for k, v in error.details.items() if k in ("n_prompt_tokens", "n_ctx")})
    return {"error": body}


def known(error: BaseException) -> PresageError:
    """Any exception as one of the tree. What we did not foresee is logged with its trace and hidden from the client."""
    if isinstance(error, PresageError):
        return error
    log.error("request failed", exc_info=error)
    return PresageError("internal error; the server's log has the details")


def error_response(error: PresageError) -> Response:
    """The HTTP answer for an error, with Retry-After where waiting helps."""
    headers = {}
    if isinstance(error, Overloaded) or error.status == 503:
        headers["Retry-After"] = str(max(1, round(float(error.details.get("retry_after", 1)))))
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(encode(error_body(error)), error.status, headers, "application/json")


def encode(body: Any) -> bytes:
    """JSON bytes; text with lone surrogates (from a client's own escape games) is replaced rather than failing."""
    try:
        return msgspec.json.encode(body)
    except UnicodeEncodeError:
        return msgspec.json.encode(_clean(body))


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {_clean(k): _clean(v) for k, v in value.items()}
    return [_clean(v) for v in value] if isinstance(value, list) else value


def install(app: FastAPI) -> None:
    """Register the handlers; every route and middleware may then raise errors of the tree."""
    app.add_exception_handler(PresageError, _presage)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unforeseen)


async def _presage(request: Request, error: Exception) -> Response:
    return error_response(known(error))


async def _http(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    message = f"{request.method} {request.url.path}: {error.detail}" if isinstance(error, HTTPException) else "error"
    answer = error_response(Failed(message, code=_HTTP_CODES.get(status, "invalid_request"), status=status))
    if isinstance(error, HTTPException) and error.headers:
        answer.headers.update(error.headers)
    return answer


async def _unforeseen(request: Request, error: Exception) -> Response:
    return error_response(known(error))
