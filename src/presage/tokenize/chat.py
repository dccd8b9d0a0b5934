"""Chat templates: Jinja in a sandbox with the names Hugging Face's templates expect, bounded in time and output."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from presage.core.errors import ConfigError, RequestError
from presage.tokenize.files import read_object

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MAX_CHARS = 8 << 20
MAX_SECONDS = 5.0


class ChatTemplate:
    """One template, or several by name (``default``, ``tool_use``: the latter is taken when there are tools).

    Compiled at the first use, so that a model with a broken template still serves completions.
    """

    def __init__(self, sources: str | Mapping[str, str], special_tokens: Mapping[str, str], origin: str = "chat template") -> None:
        self.sources: dict[str, str] = {"default": sources} if isinstance(sources, str) else dict(sources)
        self.special_tokens, self.origin = dict(special_tokens), origin
        self._compiled: dict[str, Any] = {}

    @classmethod
    def from_file(cls, path: str | Path, special_tokens: Mapping[str, str] | None = None) -> ChatTemplate:
        """A Jinja file given by the operator. Raises ConfigError at once if it is missing or does not parse."""
        file = Path(path).expanduser()
        try:
            source = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"chat template {file}: cannot be read ({error})", param="chat_template") from None
        template = cls(source, special_tokens or {}, str(file))
        try:
            template._template("default")
        except RequestError as error:
            raise ConfigError(error.message, param="chat_template") from None
        return template

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """The prompt text of a conversation; ``kwargs`` are further names the template may read (``enable_thinking``).

        ``continue_final_message`` leaves the last message open, so that the model goes on writing it. Encode the result without special
        tokens. Raises RequestError with the template's reason (bad roles, missing fields), and when it runs too long or writes too much.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError("continue_final_message and add_generation_prompt exclude each other", param="continue_final_message")
        chat = [_with_reasoning(m) for m in messages]
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        names: dict[str, Any] = {**self.special_tokens, **kwargs, "messages": chat, "tools": list(tools) if tools else None}
        names.update(documents=documents, add_generation_prompt=add_generation_prompt)
        text = self._run(name, names)
        return _cut_after_final(text, chat) if continue_final_message else text

    def _run(self, name: str, names: dict[str, Any]) -> str:
        from presage.tokenize.sandbox import render

        template = self._template(name)
        try:
            return render(template, names, MAX_CHARS, MAX_SECONDS)
        except RecursionError:
            raise RequestError(f"{self.origin}: recursion too deep", param="messages") from None
        except Exception as error:  # a template can raise anything its expressions can
            raise RequestError(f"{self.origin}: {error or type(error).__name__}", param="messages") from error

    def _template(self, name: str) -> Any:
        from jinja2 import TemplateError

        from presage.tokenize.sandbox import compile_template

        if name not in self._compiled:
            if name not in self.sources:
                raise RequestError(f"{self.origin}: there is no template named {name}", param="chat_template")
            try:
                self._compiled[name] = compile_template(self.sources[name])
            except (TemplateError, RecursionError) as error:
                at = getattr(error, "lineno", None)
                line = f" (line {at})" if at else ""
                raise RequestError(f"{self.origin} does not parse{line}: {error}", param="chat_template") from None
        return self._compiled[name]


def find_template(path: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """The template of a tokenizer folder: chat_template.jinja, additional_chat_templates, chat_template.json, tokenizer_config.json."""
    sources: dict[str, str] = {}
    listed = config.get("chat_template")
    if not listed and path.is_dir():
        listed = read_object(path / "chat_template.json").get("chat_template")
    if isinstance(listed, str):
        sources["default"] = listed
    elif isinstance(listed, list):
        sources.update({str(t["name"]): str(t["template"]) for t in listed if isinstance(t, dict) and {"name", "template"} <= t.keys()})
    if path.is_dir():
        sources.update({f.stem: f.read_text(encoding="utf-8") for f in sorted(path.glob("additional_chat_templates/*.jinja"))})
        if (path / "chat_template.jinja").exists():
            sources["default"] = (path / "chat_template.jinja").read_text(encoding="utf-8")
    return ChatTemplate(sources, special_strings(config)) if sources else None


def special_strings(config: Mapping[str, Any]) -> dict[str, str]:
    """bos_token, eos_token and the like as text, from tokenizer_config.json."""
    found = {}
    for name in SPECIAL:
        token = config.get(name)
        text = token.get("content") if isinstance(token, dict) else token
        if isinstance(text, str):
            found[name] = text
    return found


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """Templates read the reasoning of earlier turns as ``reasoning_content``; clients also send ``reasoning`` or ``thinking``."""
    given = next((message[k] for k in ("reasoning_content", "thinking", "reasoning") if message.get(k) is not None), None)
    return dict(message) if given is None else {"thinking": given, **message, "reasoning_content": given}


def _cut_after_final(text: str, chat: list[dict[str, Any]]) -> str:
    content = chat[-1].get("content") if chat else None
    if isinstance(content, list):
        content = next((p.get("text") for p in reversed(content) if isinstance(p, dict) and p.get("text")), None)
    if not isinstance(content, str) or not content.strip():
        raise RequestError("continue_final_message needs a last message with text", param="continue_final_message")
    at = text.rfind(content.strip())
    if at < 0:
        raise RequestError("continue_final_message: the chat template does not show the last message as it was given", param="messages")
    # A template that keeps the message's own white space at the end keeps it here too.
    end = at + len(content.strip())
    tail = content[len(content.rstrip()) :]
    return text[: end + len(tail)] if tail and text.startswith(tail, end) else text[:end]
