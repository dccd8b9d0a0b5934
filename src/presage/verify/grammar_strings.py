"""Strings and numbers of a schema in the engine's words: one pattern per constrained string, whole-number steps, bounds it can hold."""

from __future__ import annotations

import math
from typing import Any

from presage.core.errors import GrammarError
from presage.verify.grammar_merge import Never
from presage.verify.grammar_regex import ANY, MAX_REPEAT, Alt, Node, Repeat, anchored, emit, fit, literal, parse_regex, width

_DAY = "(?:0[1-9]|1[0-9]|2[0-8])"
_DATE = rf"[0-9]{{4}}-(?:(?:0[1-9]|1[0-2])-{_DAY}|(?:0[13-9]|1[0-2])-(?:29|30)|(?:0[13578]|1[02])-31)"
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,9})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
FORMATS = {
    "date": f"^{_DATE}$",
    "time": f"^{_TIME}$",
    "date-time": f"^{_DATE}T{_TIME}$",
    "uuid": "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$",
    "ipv4": f"^{_BYTE}(?:\\.{_BYTE}){{3}}$",
    "hostname": "^(?:[a-z0-9](?:[a-z0-9-]{0,20}[a-z0-9])?\\.){0,6}[a-z](?:[a-z0-9-]{0,20}[a-z0-9])?$",
    "email": "^[A-Za-z0-9_%+-]{1,30}(?:\\.[A-Za-z0-9_%+-]{1,30}){0,2}@(?:[a-z0-9](?:[a-z0-9-]{0,20}[a-z0-9])?\\.){1,6}[a-z]{2,20}$",
    "uri": "^[a-z][a-z0-9+.-]{1,20}://[A-Za-z0-9-]{1,60}(?:\\.[A-Za-z0-9-]{1,60}){0,6}(?::[0-9]{1,4})?(?:/[A-Za-z0-9_.~-]{1,60}){0,20}/?(?:\\?[A-Za-z0-9_.~=&-]{1,200})?(?:#[A-Za-z0-9_.~-]{1,60})?$",
    "json-pointer": "^(?:/(?:[A-Za-z0-9_.-]|~[01])*)*$",
    "duration": "^P(?:[0-9]{1,4}W|[0-9]{1,4}Y(?:[0-9]{1,2}M)?(?:[0-9]{1,3}D)?|[0-9]{1,2}M(?:[0-9]{1,3}D)?|[0-9]{1,4}D)$",
}  # fmt: skip
NATIVE = frozenset(("ipv6", "relative-json-pointer", "uri-reference", "uri-template"))
NAMED_ONLY = frozenset(("idn-email", "idn-hostname", "iri", "iri-reference", "regex"))
MAX_MIN_LENGTH = 1 << 16
MAX_STEPS = 4096
MAX_ENGINE_STEP = 64
LARGEST = 10**18 - 1
FAR = 10**15 - 1


def _refused(word: str, how: str) -> GrammarError:
    return GrammarError(f"JSON schema keyword {word!r} {how}", param="json", keyword=word)


def string_schema(words: dict[str, Any], at: str) -> dict[str, Any]:
    """``pattern``, a format and lengths as one pattern. Errors: GrammarError where they cannot be joined."""
    low, high = words.get("minLength", 0), words.get("maxLength")
    if high is not None and high < low:
        raise Never(f"maxLength below minLength at {at or '/'}")
    if low > MAX_MIN_LENGTH:
        raise GrammarError(f"minLength above {MAX_MIN_LENGTH} is not supported (at {at or '/'})", param="json", keyword="minLength")
    name = words.get("format")
    if name in NAMED_ONLY:
        raise _refused("format", f"{name!r} is not supported (at {at or '/'})")
    if name in NATIVE and "pattern" not in words and not low and high is None:
        return {"type": "string", "format": name}
    node = string_node(words)
    return {"type": "string"} if node is None else {"type": "string", "pattern": f"^{emit(node, json=True)}$"}


def string_node(words: dict[str, Any]) -> Node | None:
    """Tree of all that is said about a string; None if nothing is."""
    low, high, name = words.get("minLength", 0), words.get("maxLength"), words.get("format")
    texts = [t for t in (words.get("pattern"), FORMATS.get(str(name))) if t is not None]
    if len(texts) > 1 or (name in NATIVE and (texts or low or high is not None)):
        raise _refused("format", f"{name!r} beside pattern or lengths is not supported")
    if not texts:
        return Repeat(ANY, low, None if high is None else min(high, MAX_REPEAT)) if low or high is not None else None
    node = anchored(parse_regex(texts[0]), search=True)
    return fit(node, low, high) if width(node)[0] < low or high is not None else node


def pattern_of_names(words: dict[str, Any]) -> str:
    """Pattern for keys that match a string schema. Raises Never if none can."""
    if "enum" in words:
        names = [n for n in words["enum"] if isinstance(n, str)]
        if not names:
            raise Never("propertyNames allows no string")
        return f"^{emit(Alt(tuple(literal(n) for n in names)), json=True)}$"
    node = string_node(words)
    return f"^{emit(Repeat(ANY, 0, None) if node is None else node, json=True)}$"


def whole_multiple(kind: str, words: dict[str, Any], at: str) -> tuple[str, dict[str, Any]]:
    """``multipleOf``: a whole step makes the number an integer; others are refused."""
    step = words.get("multipleOf")
    if step is None:
        return kind, words
    if step <= 0:
        raise GrammarError(f"multipleOf must be above 0 (at {at or '/'})", param="json", keyword="multipleOf")
    if step != int(step):
        raise GrammarError(
            f"JSON schema keyword 'multipleOf' {step} is not supported: not a whole number (at {at or '/'})",
            param="json",
            keyword="multipleOf",
        )
    rest = {k: v for k, v in words.items() if k != "multipleOf"}
    return "integer", rest if step == 1 else {**rest, "multipleOf": int(step)}


def number_range(kind: str, words: dict[str, Any], at: str) -> dict[str, Any]:
    """Bounds as the engine takes them: whole for integers, within what it can hold."""
    low, high = words.get("minimum"), words.get("maximum")
    over, under = words.get("exclusiveMinimum"), words.get("exclusiveMaximum")
    if kind == "integer":
        least = _inner([low if low is None else math.ceil(low), None if over is None else math.floor(over) + 1], max)
        most = _inner([high if high is None else math.floor(high), None if under is None else math.ceil(under) - 1], min)
        return _integers(least, most, words.get("multipleOf"), at)
    least, most = _inner([low, over], max), _inner([high, under], min)
    if least is not None and most is not None and least > most:
        raise Never(f"minimum above maximum at {at or '/'}")
    if least is not None or most is not None:
        least = min(-FAR, most - 1) if least is None else least
        most = max(FAR, least + 1) if most is None else most
    out: dict[str, Any] = {"type": "number"}
    for name, value, tight in (("inimum", least, over), ("aximum", most, under)):
        if value is not None:
            out[f"exclusive{'M' if tight == value else ''}{name}" if tight == value else f"m{name}"] = value
    return out


def _inner(values: list[Any], pick: Any) -> Any:
    found = [v for v in values if v is not None]
    return pick(found) if found else None


def _integers(least: int | None, most: int | None, step: int | None, at: str) -> dict[str, Any]:
    if least is not None and most is not None and least > most:
        raise Never(f"no integer in range at {at or '/'}")
    if step:
        return _steps(least, most, step, at)
    if (least or 0) > LARGEST or (most or 0) < -LARGEST:
        raise _refused("minimum", f"and maximum of integers beyond 10^18 are not supported (at {at or '/'})")
    if least is None and most is None:
        return {"type": "integer"}
    # A side left open would be an endless loop of digits.
    low = -LARGEST if least is None else max(least, -LARGEST)
    return {"type": "integer", "minimum": low, "maximum": LARGEST if most is None else min(most, LARGEST)}


def _steps(least: int | None, most: int | None, step: int, at: str) -> dict[str, Any]:
    """Multiples: listed when few, by the engine's automaton for small steps, refused otherwise."""
    if least is not None and most is not None and (most - least) // step <= MAX_STEPS:
        values = list(range(-(-least // step) * step, most + 1, step))
        if not values:
            raise Never(f"no multiple of {step} in range at {at or '/'}")
        return {"enum": values}
    if step > MAX_ENGINE_STEP or least is not None or most is not None:
        raise _refused("multipleOf", f"{step} over this range is not supported (at {at or '/'})")
    return {"type": "integer", "multipleOf": step}
