"""The twelve numbers a latency model prices a step by; ``kernels.mark`` fills them, for engine and simulator alike, in fixed order."""

from __future__ import annotations

NAMES = (
    "rows",
    "spans",
    "decode_rows",
    "prompt_rows",
    "draft_rows",
    "logit_rows",
    "kv_tokens",
    "row_context",
    "layers",
    "adapters",
    "moved",
    "side",
)
