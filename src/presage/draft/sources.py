"""Numbers for ``Draft.source``: which drafter proposed a node."""

from __future__ import annotations

import numpy as np

from presage.core.types import Bytes

SOURCES = ("other", "suffix", "ngram", "lookahead", "model", "early_exit", "speed", "grammar")


def code_of(name: str) -> int:
    """The number of a drafter; 0 ("other") for names that are not in SOURCES, such as plug-ins'."""
    return SOURCES.index(name) if name in SOURCES else 0


def sources(nodes: int, name: str) -> Bytes:
    """``Draft.source`` [nodes] for nodes that all come from one drafter."""
    return np.full(nodes, code_of(name), np.uint8)
