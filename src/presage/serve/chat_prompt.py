"""Messages to a prompt through the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from presage.core.errors import RequestError
from presage.serve.front import Front
from presage.serve.protocol.chat import MediaPart, Message, Tool
from presage.tokenize import ChatTemplate

RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt", "continue_final_message"})


async def chat_prompt(
    front: Front,
    messages: Sequence[Message],
    tools: Sequence[Tool] | None,
    options: dict[str, Any] | None,
    *,
    generation_prompt: bool = True,
    continue_final: bool = False,
    special: bool = False,
) -> tuple[str, list[int]]:
    """(text, ids) of a conversation. Errors: RequestError for media, reserved option names and what the template refuses."""
    client = front.client
    # Asked for here rather than at start: a base model still serves completions.
    template = client.chat_template
    if template is None:
        raise RequestError("this model has no chat template; start the server with --chat-template", param="messages")
    clash = RESERVED & set(options or {})
    if clash:
        raise RequestError(f"chat_template_kwargs must not contain {', '.join(sorted(clash))}", param="chat_template_kwargs")
    turns = [plain_message(m, i) for i, m in enumerate(messages)]
    listed = [t.model_dump(exclude_none=True) for t in tools] if tools else None
    switches = {"add_generation_prompt": generation_prompt, "continue_final_message": continue_final}

    def work() -> tuple[str, list[int]]:
        text = render_turns(template, turns, {"tools": listed, **switches, **(options or {})})
        return text, client.tokenizer.encode(text, add_special_tokens=special)

    return await front.off_loop(sum(len(str(t.get("content") or "")) for t in turns), work)


def render_turns(template: ChatTemplate, turns: list[dict[str, Any]], names: dict[str, Any]) -> str:
    """Tool arguments as objects, which most templates print as JSON; some (functionary) add them to a string and need the text."""
    try:
        return template.render(turns, **names)
    except RequestError:
        if not any(turn.get("tool_calls") for turn in turns):
            raise
    return template.render([_with_argument_text(turn) for turn in turns], **names)


def _with_argument_text(turn: dict[str, Any]) -> dict[str, Any]:
    if "tool_calls" not in turn:
        return turn
    calls = [{**c, "function": {**c["function"], "arguments": _as_text(c["function"]["arguments"])}} for c in turn["tool_calls"]]
    return {**turn, "tool_calls": calls}


def _as_text(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else msgspec.json.encode(arguments).decode()


def plain_message(message: Message, index: int) -> dict[str, Any]:
    """A message as templates expect it: text content, known roles, tool arguments as objects."""
    # Templates know "system" only; OpenAI renamed the role for its newer models.
    turn: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": _text(message, index)}
    for key in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, key) is not None:
            turn[key] = getattr(message, key)
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.function.name, "arguments": _arguments(c.function.arguments, index)}}
            for c in message.tool_calls
        ]
    return turn


def _text(message: Message, index: int) -> str:
    content = message.content
    if content is None:
        if message.role in ("assistant", "function"):
            return ""
        raise RequestError(f"messages.{index}.content is missing", param=f"messages.{index}.content")
    if isinstance(content, str):
        return content
    for part in content:
        if isinstance(part, MediaPart):
            raise RequestError(f"content of type {part.type} is not supported by this model", param=f"messages.{index}.content")
    # Templates take one string; a line break keeps parts from running into each other.
    return "\n".join((p.text if p.type == "text" else p.refusal) or "" for p in content if not isinstance(p, MediaPart))


def _arguments(text: str | None, index: int) -> Any:
    try:
        found = msgspec.json.decode(text or "{}")
    except (msgspec.MsgspecError, RecursionError):
        # Models do write broken arguments, and clients send them back: the template shows them as they are.
        return text
    return found
