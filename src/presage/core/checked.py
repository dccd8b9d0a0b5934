"""Settings from JSON against a constructor's annotations: a wrong type is told by name before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError, PydanticUserError

from presage.core.errors import ConfigError

MOST = 1024
"""Drafts that one request may ask for in a step: no batch has room for more."""


def checked(kind: Any, settings: Mapping[str, Any], what: str) -> None:
    """Raise ConfigError if a setting is not of the type that ``kind``'s constructor names; types JSON cannot write are left to it."""
    hints = {name: p.annotation for name, p in signature(kind, eval_str=True).parameters.items()}
    for name, value in settings.items():
        if name not in hints:
            continue
        try:
            TypeAdapter(hints[name], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            raise ConfigError(f"{what}: {name}: {error.errors()[0]['msg'].lower()}, got {value!r}", param=name) from None
        except (PydanticSchemaGenerationError, PydanticUserError):
            continue
        if name == "num_speculative_tokens" and value is not None and value > MOST:
            raise ConfigError(f"{what}: {name} must be at most {MOST}, got {value}", param=name)
