"""The application: routes, middleware and error handlers around one engine client."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

import presage
from presage.serve import errors, openapi, reasoning
from presage.serve.auth import AuthMiddleware
from presage.serve.client import EngineClient
from presage.serve.config import ServerConfig
from presage.serve.front import Front
from presage.serve.protocol.chat import ChatChunk, ChatRequest
from presage.serve.protocol.completions import CompletionRequest
from presage.serve.protocol.other import DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from presage.serve.request_id import RequestIdMiddleware
from presage.serve.routes import chat, completions, embeddings, explain, models, status, tokens
from presage.serve.sampling import check_defaults
from presage.serve.tools import tool_parser


def create_app(engine_client: EngineClient, config: ServerConfig | None = None) -> FastAPI:
    """An application whose state is its own: several may live in one process.

    Errors: ConfigError for unknown parsers and unusable sampling defaults.
    """
    config = config or ServerConfig()
    if config.tool_call_parser is not None:
        tool_parser(config.tool_call_parser)
    if config.reasoning_parser is not None:
        reasoning.check(config.reasoning_parser)
    check_defaults(config.default_sampling_params)
    docs = not config.disable_docs
    app = FastAPI(
        title="Presage",
        version=presage.__version__,
        description="OpenAI-compatible LLM serving.",
        root_path=config.root_path,
        docs_url="/docs" if docs else None,
        redoc_url=None,
        openapi_url="/openapi.json" if docs else None,
    )
    app.state.front = Front(engine_client, config)
    for part in (chat, completions, embeddings, models, tokens, status, explain):
        app.include_router(part.router)
    errors.install(app)
    openapi.install(app, (ChatRequest, ChatChunk, CompletionRequest, EmbeddingRequest, TokenizeRequest, DetokenizeRequest))
    _middleware(app, config)
    return app


def _middleware(app: FastAPI, config: ServerConfig) -> None:
    # The last one added is the outermost: ids on every answer, CORS before keys because browsers ask without one.
    app.add_middleware(AuthMiddleware, keys=app.state.front.keys)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_credentials=config.allow_credentials,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["X-Request-Id"],
        )
    app.add_middleware(RequestIdMiddleware)
