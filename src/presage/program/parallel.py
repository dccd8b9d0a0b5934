"""``n > 1`` as a program: the prompt is computed once; at the first output token the other branches fork before it and draw their own.

The branches share the prompt's blocks (the last one copy-on-write) and differ only in their noise, so they are what n requests with n
seeds would have produced.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from presage.core.events import Boundary, ChildDone, Command, Fork, Started, Watch


class Parallel:
    """Forks branches 1 .. n-1 when branch 0 has its first token."""

    def __init__(self, n: int) -> None:
        self.n = n

    def on(self, event: Boundary | ChildDone | Started) -> Iterator[Command]:
        """Watch the first token; then fork."""
        if isinstance(event, Started):
            yield Watch(event.slot, len(event.request.emitted) + 1)
        elif isinstance(event, Boundary):
            for branch in range(1, self.n):
                yield Fork(event.slot, msgspec.structs.replace(event.request, branch=branch), keep=len(event.request.prompt))
