"""The exception tree: every error has a stable ``code``, an HTTP status and a stdlib parent.

The OpenAI error body is derived from these attributes in one place (``serve``), so raising the right class is all a room has to do.
Exceptions are picklable: they are rebuilt from their message and ``details``.
"""

from __future__ import annotations

from typing import Any


class PresageError(Exception):
    """Root of the tree. ``code`` is stable across versions; ``status`` is the HTTP status the front answers with."""

    code = "internal_error"
    status = 500
    kind = "server_error"

    def __init__(self, message: str, *, param: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message, self.param, self.details = message, param, details

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.message, self.param, self.details))


def _rebuild(cls: type[PresageError], message: str, param: str | None, details: dict[str, Any]) -> PresageError:
    return cls(message, param=param, **details)


class RequestError(PresageError, ValueError):
    """The request itself is at fault: nothing was queued."""

    code, status, kind = "invalid_request", 400, "invalid_request_error"


class ContextTooLong(RequestError):
    """Prompt plus requested tokens exceed the model's length. ``details``: n_prompt_tokens, n_ctx."""

    code = "context_length_exceeded"


class GrammarError(RequestError):
    """A schema, regex or grammar cannot be compiled; the message names the keyword or position."""

    code = "invalid_grammar"


class NeverFits(RequestError):
    """The request needs more KV blocks than the whole pool has; waiting would not help."""

    code = "kv_cache_too_small"


class UnknownModel(RequestError, LookupError):
    """The named model or adapter is not served here."""

    code, status = "model_not_found", 404


class Unauthorized(RequestError, PermissionError):
    """The API key is missing or wrong."""

    code, status, kind = "invalid_api_key", 401, "authentication_error"


class Overloaded(PresageError, BlockingIOError):
    """The queue is full. ``details``: retry_after in seconds."""

    code, status, kind = "queue_full", 503, "overloaded_error"


class Draining(Overloaded):
    """The server is shutting down and takes no new requests."""

    code = "draining"


class DeadlineMissed(PresageError, TimeoutError):
    """The request's own deadline passed while it was queued."""

    code, status, kind = "deadline_missed", 504, "timeout_error"


class StepFailed(PresageError, RuntimeError):
    """A forward step raised; the requests in it end with this error, the others go on."""

    code = "step_failed"


class EngineDead(PresageError, ConnectionError):
    """The engine process ended and could not be restarted, or this request could not be resumed."""

    code, status = "engine_dead", 503


class ConfigError(PresageError, ValueError):
    """A configuration value is unknown, out of range or conflicts with another one."""

    code, status, kind = "invalid_config", 400, "config_error"


class UnsupportedModel(ConfigError, LookupError):
    """The checkpoint's architecture (or one of its options) is not one we have; the message lists what we have."""

    code = "unsupported_model"


class CheckpointError(PresageError, OSError):
    """A checkpoint cannot be found or read; the message says which file."""

    code = "checkpoint_error"


class NotEnoughMemory(PresageError, MemoryError):
    """Weights and KV cache do not fit; the message holds the numbers."""

    code = "not_enough_memory"


class PolicyError(PresageError, RuntimeError):
    """A policy (scheduler, drafter, ...) raised or returned an illegal plan; the step was planned by the fallback."""

    code = "policy_error"


class PolicyStall(PolicyError):
    """There is work, nothing is in flight, and the scheduler grants nothing. ``details``: slots."""

    code = "policy_stall"


class IllegalTransition(PresageError, RuntimeError):
    """A request was moved between states in a way the state table forbids: a bug, never a user's fault."""

    code = "illegal_transition"


class AuditFailed(PresageError, RuntimeError):
    """The idle audit found a leaked block or a lost request; the message says which."""

    code = "audit_failed"


class ReplayMismatch(PresageError, RuntimeError):
    """A decision log does not replay: version, configuration or decisions differ. ``details``: step."""

    code = "replay_mismatch"
