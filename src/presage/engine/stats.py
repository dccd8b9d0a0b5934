"""What an engine reports about itself: one dictionary, read by /metrics, /load, ``presage top`` and the log line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from presage.engine.loop import Loop


class Stats:
    """Counters since start and gauges of now. Read from another thread they may be a turn old."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def __call__(self) -> dict[str, Any]:
        """All numbers by name; seconds, tokens, blocks."""
        loop, use = self.loop, self.loop.kv.usage()
        s = loop.stats
        return {
            "running": len(loop.running),
            "waiting": len(loop.queue),
            "kv_cache_usage": use["kv_cache_usage"],
            "used_blocks": use["used"],
            "cached_blocks": use["cached"],
            "free_blocks": use["free"],
            "prefix_queries": use["queries"],
            "prefix_hits": use["hits"],
            "preemptions": s["preemptions"],
            "steps": loop.steps,
            "step_seconds": s["step_seconds"],
            "generated_tokens": s["generated"],
            "computed_tokens": s["computed"],
            "finished": s["finished"],
            "faults": s["faults"],
            "policy_errors": s["policy_errors"],
            "spec_num_drafts": s["drafts"],
            "spec_num_draft_tokens": s["drafted"],
            "spec_num_accepted_tokens": s["accepted"],
            "predicted_step_seconds": s["predicted_seconds"],
            **loop.speculation.summary(),
            "log_dropped": getattr(loop.log, "dropped", 0),
        }
