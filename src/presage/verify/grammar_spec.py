"""From ``structured_outputs`` of a request to what the grammar engine compiles. Pure: also runs in the HTTP front, before queueing."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from presage.core.errors import GrammarError
from presage.core.sampling_params import StructuredOutputsParams
from presage.verify.grammar_regex import Alt, anchored, emit, literal, parse_regex
from presage.verify.grammar_schema import lower

MAX_SPEC_CHARS = 256 * 1024
MAX_GRAMMAR_CHARS = 64 * 1024
TAME_CHARS = 16 * 1024
TAME_KEYS = 64
MAX_WHITESPACE = 2
Kind = Literal["json", "regex", "grammar", "structural_tag"]


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """One constraint in the engine's words. Equal specs share a compiled grammar.

    ``tame``: small enough that compiling it in this process is known to be cheap; others are tasted in a limited process first.
    """

    kind: Kind
    text: str
    any_whitespace: bool = False
    tame: bool = True

    @property
    def key(self) -> bytes:
        """Cache key: hash of everything that decides the language."""
        return hashlib.sha256(f"{self.kind}\0{self.any_whitespace}\0{self.text}".encode("utf-8", "surrogatepass")).digest()


def spec_of(params: StructuredOutputsParams) -> GrammarSpec:
    """The engine's form of a constraint.

    Errors: GrammarError for what cannot be enforced, naming the keyword or position: nothing is ever silently ignored.
    """
    try:
        return _spec(params)
    except RecursionError:
        raise GrammarError("the constraint is nested too deep", param="structured_outputs") from None


def _spec(params: StructuredOutputsParams) -> GrammarSpec:
    if params.json is not None:
        return _json_spec(_schema(params.json), params.any_whitespace)
    if params.json_object:
        return _json_spec({"type": "object"}, params.any_whitespace)
    if params.regex is not None:
        return _regex_spec(params.regex)
    if params.choice is not None:
        return _choice_spec(params.choice)
    if params.grammar is not None:
        return _grammar_spec(params.grammar)
    tag = params.structural_tag
    text = tag if isinstance(tag, str) else json.dumps(tag, ensure_ascii=False)
    _bound(text, MAX_GRAMMAR_CHARS, "structural_tag")
    return GrammarSpec("structural_tag", text, tame=False)


def _bound(text: str, most: int, what: str) -> None:
    if len(text) > most:
        raise GrammarError(f"{what} is longer than {most} characters", param=f"structured_outputs.{what}")


def _schema(given: str | dict[str, Any] | bool) -> Any:
    if not isinstance(given, str):
        return given
    _bound(given, MAX_SPEC_CHARS, "json")
    try:
        return json.loads(given)
    except ValueError as error:
        raise GrammarError(f"the schema is not JSON: {error}", param="structured_outputs.json") from None


def _json_spec(schema: Any, any_whitespace: bool) -> GrammarSpec:
    low = lower(schema)
    text = json.dumps(low, ensure_ascii=False)
    _bound(text, 4 * MAX_SPEC_CHARS, "json")
    return GrammarSpec("json", text, any_whitespace, tame=len(text) <= TAME_CHARS and _few_keys(low))


def _few_keys(low: Any) -> bool:
    """Compile time grows with the square of optional keys, and with the cube if they are counted."""
    nodes = [low, *low.get("$defs", {}).values()]
    return all(
        len(n.get("properties", {})) <= (TAME_KEYS // 4 if "minProperties" in n or "maxProperties" in n else TAME_KEYS) for n in nodes
    )


def _regex_spec(text: str) -> GrammarSpec:
    """A regular expression is a full match, as in vLLM; anchors at its ends change nothing."""
    _bound(text, MAX_SPEC_CHARS, "regex")
    try:
        out = emit(anchored(parse_regex(text), search=False), json=False)
    except GrammarError as error:
        raise GrammarError(error.message, param="structured_outputs.regex") from None
    return GrammarSpec("regex", out, tame=len(out) <= TAME_CHARS)


def _choice_spec(choice: list[str]) -> GrammarSpec:
    if sum(map(len, choice)) > MAX_GRAMMAR_CHARS:
        raise GrammarError(f"choice is longer than {MAX_GRAMMAR_CHARS} characters", param="structured_outputs.choice")
    if any(not c for c in choice):
        raise GrammarError("an empty choice is not supported", param="structured_outputs.choice")
    out = emit(Alt(tuple(literal(c) for c in dict.fromkeys(choice))), json=False)
    return GrammarSpec("regex", out)


def _grammar_spec(text: str) -> GrammarSpec:
    """GBNF; the engine parses it. Users' grammars may be ambiguous, so they are always tasted."""
    _bound(text, MAX_GRAMMAR_CHARS, "grammar")
    if max(text.count("("), text.count("[")) > MAX_GRAMMAR_CHARS // 16:
        raise GrammarError("the grammar has too many groups", param="structured_outputs.grammar")
    return GrammarSpec("grammar", text, tame=False)
