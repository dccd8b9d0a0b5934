"""Both of two schemas at once, whether a value matches a schema, and whether two schemas share no value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote

from presage.core.errors import GrammarError
from presage.verify.grammar_regex import anchored, matches, parse_regex

Options = list[tuple[Any, str]]
MAX_DEPTH = 32


class Never(Exception):
    """Nothing can match here: an option to drop, or, at the root, a refusal. Control flow of the lowering, never seen by users."""


@dataclass(slots=True)
class Flat:
    """Keywords after references and ``allOf`` are resolved (``type`` a list, ``const`` an ``enum``), and groups of options
    (keyword, [(schema, place)]) of which one each must match."""

    words: dict[str, Any]
    groups: list[tuple[str, Options]]


class Owner(Protocol):
    """What the helpers here need from the lowering."""

    def flat(self, schema: Any, at: str, seen: tuple[str, ...]) -> Flat:
        """Resolve one schema."""


class Refs:
    """Where references of one document lead. Only places inside the document: nothing is ever fetched."""

    def __init__(self, root: Any) -> None:
        self.root = root
        self.ids: dict[str, Any] = {}
        self.base = str(root.get("$id", root.get("id", ""))).rstrip("#") if isinstance(root, dict) else ""
        self._index(root, 0)

    def _index(self, node: Any, depth: int) -> None:
        if depth > 512:
            raise GrammarError("the schema is nested too deep", param="json")
        if isinstance(node, list):
            for item in node:
                self._index(item, depth + 1)
        if not isinstance(node, dict):
            return
        for word in ("$id", "id"):
            if isinstance(node.get(word), str):
                self.ids.setdefault(node[word], node)
        for word in ("$anchor", "$dynamicAnchor"):
            if isinstance(node.get(word), str):
                self.ids.setdefault(f"#{node[word]}", node)
        for word, value in node.items():
            if word not in ("enum", "const", "default", "examples", "example"):
                self._index(value, depth + 1)

    def get(self, ref: Any, at: str) -> Any:
        """The schema a reference names. Errors: GrammarError for remote or dangling ones."""
        if not isinstance(ref, str):
            raise GrammarError(f"$ref must be a string (at {at or '/'})", param="json", keyword="$ref")
        local = ref[len(self.base) :] if self.base and ref.startswith(self.base + "#") else ref
        if local in self.ids:
            return self.ids[local]
        if local in ("#", "", self.base):
            return self.root
        if not local.startswith("#/"):
            raise GrammarError(f"remote $ref {ref[:200]!r} is not supported (at {at or '/'})", param="json", keyword="$ref")
        node = self.root
        for part in unquote(local[2:]).split("/"):
            name = part.replace("~1", "/").replace("~0", "~")
            try:
                node = node[int(name)] if isinstance(node, list) else node[name]
            except (KeyError, IndexError, ValueError, TypeError):
                raise GrammarError(f"$ref {ref[:200]!r} leads nowhere (at {at or '/'})", param="json", keyword="$ref") from None
        return node


def merge(a: Flat, b: Flat) -> Flat:
    """What matches both. Raises Never if the types exclude each other, GrammarError where both cannot be written as one."""
    if not a.words or not b.words:
        return Flat({**a.words, **b.words}, [*a.groups, *b.groups])
    out = dict(a.words)
    for word, value in b.words.items():
        if word in out and word not in _OBJECT_WORDS and out[word] != value:
            value = _both(word, out[word], value)
        out[word] = value
    _merge_objects(out, a.words, b.words)
    _merge_items(out, a.words, b.words)
    return Flat(out, [*a.groups, *b.groups])


_OBJECT_WORDS = ("properties", "patternProperties", "additionalProperties", "items", "prefixItems")


def _both(word: str, a: Any, b: Any) -> Any:
    """One keyword that both schemas give different values."""
    if word in ("minimum", "exclusiveMinimum", "minLength", "minItems", "minProperties"):
        return max(a, b)
    if word in ("maximum", "exclusiveMaximum", "maxLength", "maxItems", "maxProperties"):
        return min(a, b)
    if word == "type":
        kept = [t for t in a if t in b or (t == "integer" and "number" in b)] + [t for t in b if t == "integer" and "number" in a]
        if not kept:
            raise Never(f"types {a} and {b} exclude each other")
        return list(dict.fromkeys(kept))
    if word == "enum":
        return [v for v in a if any(same(v, w) for w in b)]
    if word == "required":
        return [*a, *(n for n in b if n not in a)]
    if word in ("dependentRequired", "dependencies"):
        return {n: [*a.get(n, []), *b.get(n, [])] for n in {**a, **b}}
    if word == "propertyNames":
        return {"allOf": [a, b]}
    if word == "multipleOf" and all(isinstance(v, int) for v in (a, b)):
        return math.lcm(a, b)
    if word == "uniqueItems":
        return a or b
    raise _refused(word, "given twice with different values is")


def _refused(word: str, how: str) -> GrammarError:
    return GrammarError(f"JSON schema keyword {word!r} {how} not supported", param="json", keyword=word)


def _all(*schemas: Any) -> Any:
    """Schema for all of several."""
    found = [s for s in schemas if s is not True and s != {}]
    return True if not found else found[0] if len(found) == 1 else {"allOf": found}


def _view(words: dict[str, Any], name: str) -> Any:
    """What one side says about a key that it does not declare."""
    matched = [s for p, s in words.get("patternProperties", {}).items() if _search(p, name)]
    return _all(*matched) if matched else words.get("additionalProperties", True)


def _merge_objects(out: dict[str, Any], a: dict[str, Any], b: dict[str, Any]) -> None:
    first, second = a.get("properties", {}), b.get("properties", {})
    if first or second:
        out["properties"] = {
            n: _all(first[n] if n in first else _view(a, n), second[n] if n in second else _view(b, n)) for n in {**first, **second}
        }
    p, q = a.get("patternProperties", {}), b.get("patternProperties", {})
    if p or q:
        if p and q and list(p) != list(q):
            raise GrammarError(
                "patternProperties in several parts of an allOf are not supported", param="json", keyword="patternProperties"
            )
        rest_a, rest_b = a.get("additionalProperties", True), b.get("additionalProperties", True)
        out["patternProperties"] = {n: _all(p.get(n, rest_a), q.get(n, rest_b)) for n in {**p, **q}}
    if "additionalProperties" in a and "additionalProperties" in b:
        both = (a["additionalProperties"], b["additionalProperties"])
        out["additionalProperties"] = False if False in both else _all(*both)
    elif "additionalProperties" in out and out["additionalProperties"] is not False:
        out["additionalProperties"] = a.get("additionalProperties", b.get("additionalProperties"))


def _merge_items(out: dict[str, Any], a: dict[str, Any], b: dict[str, Any]) -> None:
    first, second = a.get("prefixItems", []), b.get("prefixItems", [])
    rest_a, rest_b = a.get("items", True), b.get("items", True)
    if first or second:
        longest = max(len(first), len(second))
        out["prefixItems"] = [
            _all(first[i] if i < len(first) else rest_a, second[i] if i < len(second) else rest_b) for i in range(longest)
        ]
    if "items" in a or "items" in b:
        out["items"] = False if rest_a is False or rest_b is False else _all(rest_a, rest_b)


def closed(words: dict[str, Any], word: str, value: Any) -> None:
    """``unevaluated…: false`` closes what its plain counterpart leaves open."""
    if value is False:
        words.setdefault(word, False)


def same(a: Any, b: Any) -> bool:
    """JSON equality: 1 and 1.0 are equal, 1 and true are not."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def kind_of(value: Any) -> str:
    """JSON type of a value; whole numbers are integers."""
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "integer" if value == value // 1 else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def _search(pattern: str, text: str) -> bool:
    return matches(anchored(parse_regex(pattern), True), text)


def admits(value: Any, schema: Any, owner: Owner, depth: int) -> bool:
    """Whether a JSON value matches a schema."""
    try:
        flat = owner.flat(schema, "", ())
    except Never:
        return False
    if depth > MAX_DEPTH:
        raise GrammarError("the schema is nested too deep below enum or const", param="json")
    return _admits_words(value, flat.words, owner, depth) and all(
        (sum if word == "oneOf" else any)(admits(value, s, owner, depth + 1) for s, _ in options) == 1 for word, options in flat.groups
    )


def _admits_words(value: Any, w: dict[str, Any], owner: Owner, depth: int) -> bool:
    kind = kind_of(value)
    if "type" in w and kind not in w["type"] and not (kind == "integer" and "number" in w["type"]):
        return False
    if "enum" in w and not any(same(value, v) for v in w["enum"]):
        return False
    if kind in ("integer", "number"):
        return _admits_number(value, w)
    if kind == "string":
        inside = w.get("minLength", 0) <= len(value) <= w.get("maxLength", math.inf)
        return inside and ("pattern" not in w or _search(w["pattern"], value))
    if kind == "array":
        prefix, size = w.get("prefixItems", []), len(value)
        each = all(admits(v, prefix[i] if i < len(prefix) else w.get("items", True), owner, depth + 1) for i, v in enumerate(value))
        return each and w.get("minItems", 0) <= size <= w.get("maxItems", math.inf)
    return kind != "object" or _admits_object(value, w, owner, depth)


def _admits_number(value: float, w: dict[str, Any]) -> bool:
    low, high = w.get("minimum", -math.inf), w.get("maximum", math.inf)
    inside = low <= value <= high and w.get("exclusiveMinimum", -math.inf) < value < w.get("exclusiveMaximum", math.inf)
    return inside and ("multipleOf" not in w or value % w["multipleOf"] == 0)


def _admits_object(value: dict[str, Any], w: dict[str, Any], owner: Owner, depth: int) -> bool:
    if not (set(w.get("required", [])) <= value.keys() and w.get("minProperties", 0) <= len(value) <= w.get("maxProperties", math.inf)):
        return False
    needs = {**w.get("dependencies", {}), **w.get("dependentRequired", {})}
    if any(n in value and not set(need) <= value.keys() for n, need in needs.items() if isinstance(need, list)):
        return False
    if "propertyNames" in w and not all(admits(n, w["propertyNames"], owner, depth + 1) for n in value):
        return False
    props = w.get("properties", {})
    return all(admits(v, _all(props[n], *_matched(w, n)) if n in props else _view(w, n), owner, depth + 1) for n, v in value.items())


def _matched(words: dict[str, Any], name: str) -> list[Any]:
    return [s for p, s in words.get("patternProperties", {}).items() if _search(p, name)]


def misses(a: Flat, b: Flat, owner: Owner, depth: int) -> bool:
    """True if nothing that we generate for ``a`` (strict: declared keys only) can match ``b``. False means: not shown."""
    if depth > MAX_DEPTH:
        return False
    if a.groups:
        options = a.groups[0][1]
        rest = Flat(a.words, a.groups[1:])
        return all(misses(merge(rest, f), b, owner, depth + 1) for f in _alive(options, owner))
    if "enum" in a.words:
        return not any(_admits_flat(v, b, owner) for v in a.words["enum"] if _admits_words(v, a.words, owner, 0))
    if any(all(misses(a, f, owner, depth + 1) for f in _alive(options, owner)) for _, options in b.groups):
        return True
    kinds, other = _kinds(a.words), _kinds(b.words, generated=False)
    shared = [k for k in kinds if k in other or (k in ("integer", "number") and {"integer", "number"} & set(other))]
    if not shared:
        return True
    apart = {
        "object": _objects_apart,
        "number": _numbers_apart,
        "integer": _numbers_apart,
        "string": _strings_apart,
        "array": _arrays_apart,
    }
    return all(k in apart and apart[k](a.words, b.words, owner, depth + 1) for k in shared)


def _admits_flat(value: Any, flat: Flat, owner: Owner) -> bool:
    return _admits_words(value, flat.words, owner, 0) and all(any(admits(value, s, owner, 1) for s, _ in o) for _, o in flat.groups)


def _alive(options: Options, owner: Owner) -> list[Flat]:
    out = []
    for schema, at in options:
        try:
            out.append(owner.flat(schema, at, ()))
        except Never:
            continue
    return out


def _kinds(words: dict[str, Any], generated: bool = True) -> list[str]:
    from presage.verify.grammar_schema import TYPES, types_of

    if "enum" in words:
        return list({kind_of(v) for v in words["enum"]})
    return types_of(Flat(words, [])) if generated else list(words.get("type", TYPES))


def _child(words: dict[str, Any], name: str, owner: Owner) -> Flat | None:
    props = words.get("properties", {})
    schema = _all(props[name], *_matched(words, name)) if name in props else _view(words, name)
    try:
        return owner.flat(schema, "", ())
    except Never:
        return None


def _objects_apart(a: dict[str, Any], b: dict[str, Any], owner: Owner, depth: int) -> bool:
    declared = a.get("properties", {})
    is_open = a.get("additionalProperties", bool(not declared and not a.get("required"))) is not False or "patternProperties" in a
    always, demanded = a.get("required", []), b.get("required", [])
    for name in {**dict.fromkeys(always), **dict.fromkeys(demanded)}:
        if name not in always and name not in declared:
            if not is_open:
                return True
            continue
        mine, theirs = _child(a, name, owner), _child(b, name, owner)
        if mine is None or theirs is None or misses(mine, theirs, owner, depth):
            return True
    return len(always) > b.get("maxProperties", math.inf)


def _numbers_apart(a: dict[str, Any], b: dict[str, Any], owner: Owner, depth: int) -> bool:
    def bounds(w: dict[str, Any]) -> tuple[float, float]:
        return max(w.get("minimum", -math.inf), w.get("exclusiveMinimum", -math.inf)), min(
            w.get("maximum", math.inf), w.get("exclusiveMaximum", math.inf)
        )

    (low, high), (least, most) = bounds(a), bounds(b)
    touch = (high == least and not ("exclusiveMaximum" in a or "exclusiveMinimum" in b)) or (
        low == most and not ("exclusiveMinimum" in a or "exclusiveMaximum" in b)
    )
    return (high <= least or low >= most) and not touch


def _strings_apart(a: dict[str, Any], b: dict[str, Any], owner: Owner, depth: int) -> bool:
    if "enum" in b:
        return not any(_admits_words(v, a, owner, 0) for v in b["enum"])
    return bool(a.get("maxLength", math.inf) < b.get("minLength", 0) or a.get("minLength", 0) > b.get("maxLength", math.inf))


def _arrays_apart(a: dict[str, Any], b: dict[str, Any], owner: Owner, depth: int) -> bool:
    if a.get("maxItems", math.inf) < b.get("minItems", 0) or a.get("minItems", 0) > b.get("maxItems", math.inf):
        return True
    if not a.get("minItems", 0):
        return False
    mine, theirs = ((w.get("prefixItems") or [w.get("items", True)])[0] for w in (a, b))
    try:
        return misses(owner.flat(mine, "", ()), owner.flat(theirs, "", ()), owner, depth)
    except Never:
        return True
