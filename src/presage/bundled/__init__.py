"""The bundled checkpoints: two small Llama models of our own (Apache-2.0; recipe in each README and in ``presage.train``)."""

from __future__ import annotations

from pathlib import Path

BUNDLED: dict[str, str] = {"presage-tiny": "presage_tiny", "presage-tiny-draft": "presage_tiny_draft"}
LICENCE = "Apache-2.0"


def bundled_path(name: str) -> Path | None:
    """Folder of a bundled checkpoint (hyphens and underscores are the same), or None for any other name."""
    folder = BUNDLED.get(name.replace("_", "-"))
    return Path(__file__).parent / folder if folder else None
