"""Reasoning between ``<think>`` and ``</think>``, split from the answer as the text comes."""

from __future__ import annotations

from presage.serve.tools.base import partial


class ThinkParser:
    """Nothing is stripped: reasoning, tags and content together are the text.

    ``inside`` starts within the reasoning (the chat template wrote the opening tag); an opening tag repeated by the model is dropped.
    Otherwise only a text that begins with the tag has reasoning.
    """

    def __init__(self, inside: bool, opening: str = "<think>", closing: str = "</think>") -> None:
        self.opening, self.closing = opening, closing
        self.implicit, self.buf = inside, ""
        self.phase = "start"

    @property
    def reasoning(self) -> bool:
        """True while the next text belongs to the reasoning."""
        return self.phase == "inside" or (self.phase == "start" and self.implicit)

    def feed(self, text: str) -> tuple[str, str]:
        """(reasoning, content) that ``text`` settles."""
        self.buf += text
        if self.phase == "start" and not self._started():
            return "", ""
        reasoning = self._inside() if self.phase == "inside" else ""
        content = ""
        if self.phase == "after":
            content, self.buf = self.buf, ""
        return reasoning, content

    def finish(self) -> tuple[str, str]:
        """What is left: half a tag is text of the side it stands on."""
        rest, self.buf = self.buf, ""
        return (rest, "") if self.reasoning else ("", rest)

    def _started(self) -> bool:
        stripped = self.buf.lstrip()
        if not stripped or (self.opening.startswith(stripped) and stripped != self.opening):
            return False
        # Models that are started inside the tag sometimes write it once more.
        tagged = stripped.startswith(self.opening)
        if tagged:
            self.buf = stripped.removeprefix(self.opening)
        self.phase = "inside" if tagged or self.implicit else "after"
        return True

    def _inside(self) -> str:
        before, tag, after = self.buf.partition(self.closing)
        if tag:
            self.buf, self.phase = after, "after"
            return before
        cut = len(self.buf) - partial(self.buf, self.closing)
        before, self.buf = self.buf[:cut], self.buf[cut:]
        return before
