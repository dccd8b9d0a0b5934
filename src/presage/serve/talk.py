"""``presage chat`` and ``presage complete``: small clients of a running server, through the openai package."""

from __future__ import annotations

import sys
from typing import Any


def _client(url: str, model: str | None, api_key: str) -> tuple[Any, str]:
    import openai

    client = openai.OpenAI(base_url=url, api_key=api_key, max_retries=0)
    try:
        return client, model or client.models.list().data[0].id
    except openai.APIConnectionError:
        print(f"presage: no server answers at {url}; start one with: presage serve", file=sys.stderr)
        sys.exit(1)


def complete_once(prompt: str, url: str, model: str | None, api_key: str, max_tokens: int, temperature: float) -> int:
    """Stream one completion to standard output."""
    client, name = _client(url, model, api_key)
    for chunk in client.completions.create(model=name, prompt=prompt, max_tokens=max_tokens, temperature=temperature, stream=True):
        if chunk.choices:
            print(chunk.choices[0].text, end="", flush=True)
    print()
    return 0


def chat_session(url: str, model: str | None, api_key: str, temperature: float, system: str) -> int:
    """Read lines, stream answers; Ctrl-C stops an answer, Ctrl-D ends the session."""
    client, name = _client(url, model, api_key)
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    print(f"{name}: type a message; Ctrl-D ends", file=sys.stderr)
    while True:
        try:
            text = input("> ")
        except EOFError:
            return 0
        except KeyboardInterrupt:
            print()
            continue
        if text.strip():
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": _answer(client, name, messages, temperature)})


def _answer(client: Any, model: str, messages: list[dict[str, str]], temperature: float) -> str:
    text = ""
    try:
        with client.chat.completions.create(model=model, messages=messages, temperature=temperature, stream=True) as stream:
            for chunk in stream:
                part = (chunk.choices[0].delta.content or "") if chunk.choices else ""
                text += part
                print(part, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print()
    return text
