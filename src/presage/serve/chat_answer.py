"""One chat answer while it is written: text split into reasoning, content and tool calls."""

from __future__ import annotations

from typing import Any

from presage.serve.generate import Delta
from presage.serve.reasoning import ThinkParser
from presage.serve.tools import ToolDelta, ToolParser


class Turn:
    """What a piece of text turned out to be."""

    def __init__(self, reasoning: str, content: str, calls: list[ToolDelta]) -> None:
        self.reasoning, self.content, self.calls = reasoning, content, calls

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)

    def delta(self) -> dict[str, Any]:
        """The ``delta`` of a chunk."""
        out: dict[str, Any] = {}
        if self.reasoning:
            out["reasoning_content"] = self.reasoning
        if self.content:
            out["content"] = self.content
        if self.calls:
            out["tool_calls"] = [_call_delta(c) for c in self.calls]
        return out


class ChatAnswer:
    """Parsers and totals of one choice. ``finish`` maps the engine's reason to the API's."""

    def __init__(self, think: ThinkParser | None, tools: ToolParser | None, show_reasoning: bool = True) -> None:
        self.think, self.tools, self.show = think, tools, show_reasoning
        self.reasoning_tokens = 0
        self.reasoning, self.content = "", ""
        self.calls: list[dict[str, Any]] = []
        self.whole = Delta(0, "", [], [])

    def push(self, delta: Delta) -> Turn:
        """Split an addition and keep the totals."""
        if self.think is not None and self.think.reasoning:
            # Counted by where the text stood before these ids: the closing tag itself is still reasoning.
            self.reasoning_tokens += len(delta.ids)
        reasoning, content = self._think(delta.text, bool(delta.finish))
        content, calls = self._tools(content, bool(delta.finish))
        turn = Turn(reasoning if self.show else "", content, calls)
        self.reasoning += turn.reasoning
        self.content += content
        for call in calls:
            self._add(call)
        return turn

    def finish(self, reason: str) -> str | None:
        """stop becomes tool_calls if there are any."""
        return "tool_calls" if reason == "stop" and self.calls else reason or None

    def message(self) -> dict[str, Any]:
        """The whole message."""
        # OpenAI has null content beside calls, and never a null answer without them.
        content = self.content or (None if self.calls else "")
        out: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if self.reasoning:
            out["reasoning_content"] = self.reasoning
        if self.calls:
            out["tool_calls"] = self.calls
        return out

    def _think(self, text: str, last: bool) -> tuple[str, str]:
        if self.think is None:
            return "", text
        reasoning, content = self.think.feed(text)
        if last:
            more = self.think.finish()
            reasoning, content = reasoning + more[0], content + more[1]
        return reasoning, content

    def _tools(self, text: str, last: bool) -> tuple[str, list[ToolDelta]]:
        if self.tools is None:
            return text, []
        pieces = self.tools.feed(text)
        if last:
            pieces += self.tools.finish()
        return "".join(p for p in pieces if isinstance(p, str)), [p for p in pieces if isinstance(p, ToolDelta)]

    def _add(self, call: ToolDelta) -> None:
        if call.name:
            self.calls.append({"id": call.id, "type": "function", "function": {"name": call.name, "arguments": ""}})
        self.calls[call.index]["function"]["arguments"] += call.arguments


def _call_delta(call: ToolDelta) -> dict[str, Any]:
    if not call.name:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, "id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
