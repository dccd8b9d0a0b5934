"""JSON files of a tokenizer folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from presage.core.errors import CheckpointError


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; an absent file is an empty one. Raises CheckpointError naming the file if it cannot be parsed."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data
