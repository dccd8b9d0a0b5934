"""Stop strings over a stream of text: hold back what could still become one, cut at the first that completes.

Aho and Corasick (1975): one automaton for all strings, a constant amount of work per character whatever their number. "First" means the
match that ends first (the longest of those that end together), so the result does not depend on how the text was cut into pieces: one
token at a time and eight speculated tokens stop at the same place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


class StopAutomaton:
    """Immutable after construction; states are ints, 0 is the start.

    ``match[state]`` is the stop string that ends here, ``hold[state]`` how many of the last characters could still grow into one.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._next: list[dict[str, int]] = [{}]
        self._fail = [0]
        self._depth = [0]
        self.match: list[str | None] = [None]
        for stop in stops:
            if stop:
                self._add(stop)
        self.hold = [0] * len(self._next)
        self._link()

    def _add(self, stop: str) -> None:
        state = 0
        for ch in stop:
            follow = self._next[state].get(ch)
            if follow is None:
                follow = self._next[state][ch] = len(self._next)
                self._next.append({})
                self._fail.append(0)
                self._depth.append(self._depth[state] + 1)
                self.match.append(None)
            state = follow
        self.match[state] = stop

    def _link(self) -> None:
        queue = deque(self._next[0].values())
        while queue:
            state = queue.popleft()
            # A string that is complete and begins no longer one cannot grow: only a shorter end of it may.
            self.hold[state] = self._depth[state] if self._next[state] else self.hold[self._fail[state]]
            for ch, child in self._next[state].items():
                self._fail[child] = self.step(self._fail[state], ch)
                if self.match[child] is None:
                    self.match[child] = self.match[self._fail[child]]
                queue.append(child)

    def step(self, state: int, ch: str) -> int:
        """The state after one more character."""
        while state and ch not in self._next[state]:
            state = self._fail[state]
        return self._next[state].get(ch, 0)

    def feed(self, state: int, text: str, armed: bool = True) -> tuple[int, int, str | None]:
        """(state, characters read, stop string). Reading ends at the first match; unarmed matches are passed over."""
        for n, ch in enumerate(text, 1):
            state = self.step(state, ch)
            if armed and self.match[state] is not None:
                return state, n, self.match[state]
        return state, len(text), None


class StopChecker:
    """Filters a stream of text. ``include`` keeps the stop string itself in what is emitted."""

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        self._automaton, self._include = StopAutomaton(stop), include
        self._state, self._held = 0, ""
        self.hit: str | None = None

    def push(self, delta: str, armed: bool = True) -> tuple[str, str | None]:
        """(text that may be shown now, the stop string if one completed). After a hit nothing more is emitted.

        ``armed=False`` passes over matches that complete in this piece (before ``min_tokens``).
        """
        if self.hit is not None:
            return "", self.hit
        self._state, read, self.hit = self._automaton.feed(self._state, delta, armed)
        text = self._held + delta[:read]
        if self.hit is not None:
            self._held = ""
            return (text if self._include else text[: len(text) - len(self.hit)]), self.hit
        keep = min(self._automaton.hold[self._state], len(text))
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], None

    def flush(self) -> str:
        """The text held back, when the stream ended without a hit."""
        text, self._held = self._held, ""
        return text
