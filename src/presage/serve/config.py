"""Settings of the HTTP front."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from presage.core.config import Group


class ServerConfig(Group):
    """The HTTP server."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 picks a free one."""
    uds: str | None = None
    """Unix socket to listen on instead of host and port."""
    api_key: list[str] = Field(default_factory=list)
    """Accepted keys; ``key:tenant`` charges the key's requests to a tenant. None = no check."""
    root_path: str = ""
    """Path prefix behind a proxy that strips it."""
    allowed_origins: list[str] = Field(default_factory=list)
    """Browser origins allowed by CORS; ``*`` for all, none = no CORS headers."""
    allow_credentials: bool = False
    """Let browsers send credentials."""
    ssl_keyfile: str | None = None
    """TLS private key."""
    ssl_certfile: str | None = None
    """TLS certificate."""
    ssl_ca_certs: str | None = None
    """CA certificates that client certificates must be signed by."""
    served_model_name: list[str] = Field(default_factory=list)
    """Names the API answers to; the engine's names by default."""
    max_body_bytes: int = Field(default=16 << 20, ge=1024)
    """Largest request body; more is answered with 413."""
    max_buffered_bytes: int = Field(default=256 << 20, ge=1024)
    """Bytes of unfinished request bodies held over all connections; more is answered with 503."""
    max_connections: int = Field(default=8192, ge=1)
    """Open connections; more are answered with 503 and closed."""
    max_prompts: int = Field(default=256, ge=1)
    """Prompts in one completions or embeddings request at most."""
    header_timeout: float = Field(default=15.0, gt=0)
    """Seconds a connection may take to send a whole request head."""
    body_timeout: float = Field(default=60.0, gt=0)
    """Seconds a client may take to send a whole body."""
    send_timeout: float = Field(default=60.0, gt=0)
    """Seconds a client may leave a chunk of its stream unread before the request is aborted."""
    timeout_keep_alive: int = Field(default=5, ge=1)
    """Seconds an idle connection is kept."""
    stream_grace: float = Field(default=5.0, ge=0)
    """Seconds a stream waits for its first token before it sends its head, so that late refusals keep their status."""
    stream_ping: float = Field(default=15.0, gt=0)
    """Seconds of silence after which a stream sends a comment line, against idle timeouts of proxies."""
    shutdown_timeout: float = Field(default=30.0, ge=0)
    """Seconds running requests get to finish after SIGTERM."""
    enable_auto_tool_choice: bool = False
    """Let the model decide to call tools (needs ``tool_call_parser``)."""
    tool_call_parser: str | None = None
    """How the model writes tool calls: hermes, llama3_json, mistral or pythonic."""
    reasoning_parser: str | None = None
    """How the model marks its reasoning: deepseek_r1 or qwen3."""
    default_sampling_params: dict[str, Any] = Field(default_factory=dict)
    """Sampling fields used where a request leaves them out (``{"temperature": 0.7}``)."""
    vllm_metrics: bool = False
    """Export every metric a second time with the prefix ``vllm:`` for existing dashboards."""
    disable_docs: bool = False
    """Do not serve /docs and /openapi.json."""
    log_level: Literal["critical", "error", "warning", "info", "debug"] = "info"
    """Level of the server's log."""
    access_log: bool = False
    """Log one line a request."""
