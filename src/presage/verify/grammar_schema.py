"""JSON Schema made into the part of it that the grammar engine enforces, or refused by keyword.

xgrammar 0.2.8 ignores without a word: keywords beside ``$ref``, ``allOf``, ``anyOf`` or ``enum``; ``not``, ``if``, ``uniqueItems``,
``contains``; ``required`` names that are not declared; lengths beside ``pattern``; remote references; overlapping ``oneOf`` branches. It
also lets raw control characters into strings of bounded length. So we merge what can be merged exactly and name what cannot. The
result is never wider than the schema; where it is narrower it follows what the engine calls strict: keys that are not declared are not
generated unless ``additionalProperties`` is given, ``type`` left out is what the other keywords speak about, declared keys come in order.
"""

from __future__ import annotations

import json
from typing import Any

from presage.core.errors import GrammarError
from presage.verify.grammar_merge import Flat, Never, Refs, admits, closed, merge, misses
from presage.verify.grammar_strings import number_range, pattern_of_names, string_schema, whole_multiple


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


ENFORCED = _words(
    """$ref type enum const properties required additionalProperties unevaluatedProperties patternProperties propertyNames minProperties
    maxProperties items prefixItems additionalItems unevaluatedItems minItems maxItems uniqueItems minLength maxLength pattern format
    minimum maximum exclusiveMinimum exclusiveMaximum multipleOf allOf anyOf oneOf dependentRequired dependencies nullable"""
)
REFUSED = _words(
    "not if then else contains minContains maxContains dependentSchemas $dynamicRef $recursiveRef $recursiveAnchor extends disallow"
)
TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
SPEAKS = {
    "object": _words(
        """properties required additionalProperties patternProperties propertyNames minProperties maxProperties dependentRequired
        dependencies"""
    ),
    "array": _words("items prefixItems additionalItems minItems maxItems uniqueItems"),
    "string": _words("minLength maxLength pattern"),
    "number": _words("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf"),
}
COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")
MAX_NODES = 20_000
MAX_DEPTH = 128
MAX_PRODUCT = 64
MAX_WORK = 200_000


def lower(schema: Any) -> Any:
    """The schema to hand to the engine. Errors: GrammarError naming keyword and place (a JSON pointer)."""
    return Lowering(schema).run()


class Lowering:
    """One schema on its way down; every object, array or choice becomes a definition, so that recursion stays finite."""

    def __init__(self, schema: Any) -> None:
        self.root, self.refs = schema, Refs(schema)
        self.names: dict[str, str] = {}
        self.defs: dict[str, Any] = {}
        self.nodes = self.work = 0

    def run(self) -> Any:
        """Lower the root and drop what could never end (a key that requires itself for ever)."""
        try:
            root = self.node(self.root, "", 0)
        except Never as never:
            raise GrammarError(f"the schema cannot be satisfied: {never}", param="json") from None
        defs, root = _productive(self.defs, root)
        return {**root, "$defs": defs} if defs else root

    def refuse(self, keyword: str, at: str, why: str = "is not supported") -> GrammarError:
        """The error for a keyword we do not enforce."""
        return GrammarError(f"JSON schema keyword {keyword!r} {why} (at {at or '/'})", param="json", keyword=keyword, at=at)

    def node(self, schema: Any, at: str, depth: int) -> Any:
        """One subschema. Raises Never if nothing can match it."""
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise GrammarError(f"the schema is too large or nested too deep (at {at[:200]})", param="json")
        if schema is True or schema == {}:
            return {}
        if schema is False:
            raise Never(f"false at {at or '/'}")
        key = json.dumps(schema, sort_keys=False)
        if key in self.names:
            return {"$ref": f"#/$defs/{self.names[key]}"}
        flat = self.flat(schema, at, ())
        if self.leaf(flat):
            return self.typed(flat, at, depth)
        name = self.names[key] = f"n{len(self.names)}"
        try:
            self.defs[name] = self.choice(flat, at, depth) if flat.groups else self.typed(flat, at, depth)
        except Never:
            del self.names[key]
            raise
        return {"$ref": f"#/$defs/{name}"}

    def leaf(self, flat: Flat) -> bool:
        """True if the node needs no definition of its own."""
        return not flat.groups and ("enum" in flat.words or not {"object", "array"} & set(types_of(flat)))

    def flat(self, schema: Any, at: str, seen: tuple[str, ...]) -> Flat:
        """``$ref`` followed and ``allOf`` merged: plain keywords, and groups of alternatives still to choose from."""
        self.work += 1
        if self.work > MAX_WORK:
            raise GrammarError("the schema is too complex: too many comparisons of its parts", param="json")
        if isinstance(schema, bool):
            if not schema:
                raise Never(f"false at {at or '/'}")
            return Flat({}, [])
        if not isinstance(schema, dict):
            raise GrammarError(f"a schema must be an object or a boolean (at {at or '/'})", param="json")
        self.known(schema, at)
        words = {k: v for k, v in schema.items() if k in ENFORCED}
        out = Flat(_modern(words, at), [])
        if "$ref" in words:
            ref = words["$ref"]
            if ref in seen or len(seen) > 32:
                raise self.refuse("$ref", at, "refers to itself")
            out = merge(self.flat(self.refs.get(ref, at), at, (*seen, ref)), out)
        for i, part in enumerate(_list(schema, "allOf", at)):
            out = merge(out, self.flat(part, f"{at}/allOf/{i}", seen))
        for word in ("anyOf", "oneOf"):
            if word in schema:
                out.groups.append((word, [(p, f"{at}/{word}/{i}") for i, p in enumerate(_list(schema, word, at))]))
        return out

    def known(self, schema: dict[str, Any], at: str) -> None:
        """Refuse keywords of the standards that we do not enforce; unknown names are annotations, as the standard says."""
        for word in schema:
            if word in REFUSED and self.active(word, schema):
                raise self.refuse(word, at)
        if schema.get("uniqueItems") is True and schema.get("maxItems", 2) > 1:
            raise self.refuse("uniqueItems", at)

    def active(self, word: str, schema: dict[str, Any]) -> bool:
        """Whether a refusable keyword has any effect (``then`` without ``if`` has none)."""
        if word in ("then", "else", "if"):
            return "if" in schema and ("then" in schema or "else" in schema)
        if word in ("minContains", "maxContains"):
            return "contains" in schema
        return schema[word] is not False

    def choice(self, flat: Flat, at: str, depth: int) -> Any:
        """Alternatives: the base merged into each combination of one option per group."""
        (word, options), rest = flat.groups[0], flat.groups[1:]
        flats = self.options(options)
        if word == "oneOf":
            self.disjoint(flats, flat.words, at)
        out = []
        for sub, where, raw in flats:
            try:
                if flat.words or rest:
                    out.append(self.merged(merge(Flat(flat.words, list(rest)), sub), where, depth))
                else:
                    out.append(self.node(raw, where, depth + 1))
            except Never:
                continue
        if not out:
            raise Never(f"no option of {word} at {at or '/'} can match")
        if len(out) > MAX_PRODUCT * 4:
            raise self.refuse(word, at, f"has more than {MAX_PRODUCT * 4} options")
        return {"anyOf": out}

    def options(self, options: list[tuple[Any, str]]) -> list[tuple[Flat, str, Any]]:
        """Flat forms of the options that can match at all."""
        out = []
        for raw, where in options:
            try:
                out.append((self.flat(raw, where, ()), where, raw))
            except Never:
                continue
        return out

    def merged(self, flat: Flat, at: str, depth: int) -> Any:
        """A node made by merging, named by its content so that recursive schemas come back to it."""
        self.nodes += 1
        if depth > MAX_DEPTH or self.nodes > MAX_NODES:
            raise GrammarError(f"combinations of anyOf and allOf grow too large (at {at[:200]})", param="json")
        if self.leaf(flat):
            return self.typed(flat, at, depth)
        key = "+" + json.dumps([flat.words, flat.groups])
        if key not in self.names:
            name = self.names[key] = f"n{len(self.names)}"
            try:
                self.defs[name] = self.choice(flat, at, depth + 1) if flat.groups else self.typed(flat, at, depth + 1)
            except Never:
                del self.names[key]
                raise
        return {"$ref": f"#/$defs/{self.names[key]}"}

    def disjoint(self, flats: list[tuple[Flat, str, Any]], base: dict[str, Any], at: str) -> None:
        """``oneOf`` may be offered as ``anyOf`` only if what we generate for one option never matches another."""
        for i, (a, _, _) in enumerate(flats):
            for j, (b, _, _) in enumerate(flats):
                if i != j and not misses(merge(Flat(dict(base), []), a), b, self, 0):
                    raise self.refuse("oneOf", at, f"has options {i} and {j} that may both match")

    def typed(self, flat: Flat, at: str, depth: int) -> Any:
        """A node without alternatives, by its types."""
        words = flat.words
        if "enum" in words:
            plain = {k: v for k, v in words.items() if k != "enum"}
            kept = [v for v in words["enum"] if admits(v, plain, self, 0)]
            if not kept:
                raise Never(f"no value of enum at {at or '/'} matches its other keywords")
            return {"enum": kept}
        make = {"object": self.object, "array": self.array}
        out, last = [], Never(f"nothing matches at {at or '/'}")
        for kind in types_of(flat):
            try:
                out.append(make[kind](words, at, depth) if kind in make else _scalar(kind, words, at))
            except Never as never:
                last = never
        if not out:
            raise last
        return out[0] if len(out) == 1 else {"anyOf": out}

    def object(self, words: dict[str, Any], at: str, depth: int) -> Any:
        """Declared keys in order, then pattern keys or further keys where the schema speaks of them."""
        words = _dependent(words, at, self)
        required = words.get("required", [])
        patterns, more = self.open_keys(words, at, depth)
        props: dict[str, Any] = {}
        for name in [*words.get("properties", {}), *(r for r in required if r not in words.get("properties", {}))]:
            try:
                props[name] = self.node(self.declared(name, words), f"{at}/properties/{_escape(name)}", depth + 1)
            except Never:
                if name in required:
                    raise
        out: dict[str, Any] = {"type": "object", "additionalProperties": False}
        if props:
            out["properties"] = props
        if required:
            out["required"] = [n for n in props if n in required]
        if patterns and not any(admits(n, {"pattern": p}, self, 0) for n in props for p in patterns):
            out["patternProperties"] = {pattern_of_names({"pattern": p}): s for p, s in patterns.items()}
        elif more is not None and not patterns:
            out["additionalProperties"] = more
        return self.counted(out, words, at)

    def declared(self, name: str, words: dict[str, Any]) -> Any:
        """Everything the schema says about the value of one key."""
        props, found = words.get("properties", {}), []
        if "propertyNames" in words and not admits(name, words["propertyNames"], self, 0):
            return False
        if name in props:
            found.append(props[name])
        matched = [s for p, s in words.get("patternProperties", {}).items() if admits(name, {"pattern": p}, self, 0)]
        if name not in props and not matched:
            return words.get("additionalProperties", True)
        found += matched
        return found[0] if len(found) == 1 else {"allOf": found}

    def open_keys(self, words: dict[str, Any], at: str, depth: int) -> tuple[dict[str, Any], Any]:
        """Pattern keys with their schemas, and the schema of any other key (None: not generated)."""
        patterns, more = words.get("patternProperties", {}), words.get("additionalProperties")
        if words.get("maxProperties") == 0:
            return {}, None
        if patterns:
            # A key may match several patterns: each value then has to satisfy all of them.
            whole = {"allOf": list(patterns.values())} if len(patterns) > 1 else next(iter(patterns.values()))
            return self.each(dict.fromkeys(patterns, whole), at, depth), None
        plain = not words.get("properties") and not words.get("required") and "propertyNames" not in words
        more = True if more is None and plain else False if more is None else more
        if more is False:
            return {}, None
        if "propertyNames" in words:
            names = self.flat(words["propertyNames"], f"{at}/propertyNames", ())
            if names.groups:
                raise self.refuse("propertyNames", at, "with alternatives is not supported")
            return self.each({pattern_of_names(names.words): more}, at, depth), None
        try:
            return {}, self.node(more, f"{at}/additionalProperties", depth + 1)
        except Never:
            return {}, None

    def each(self, patterns: dict[str, Any], at: str, depth: int) -> dict[str, Any]:
        """Lowered pattern keys; those that admit no value are left out."""
        out = {}
        for pattern, value in patterns.items():
            try:
                out[pattern] = self.node(value, f"{at}/patternProperties", depth + 1)
            except Never:
                continue
        return out

    def counted(self, out: dict[str, Any], words: dict[str, Any], at: str) -> Any:
        """``minProperties`` and ``maxProperties``; a repeated open key counts once, so few of them can be promised."""
        low, high = words.get("minProperties", 0), words.get("maxProperties")
        props, required = out.get("properties", {}), out.get("required", [])
        is_open = "patternProperties" in out or out["additionalProperties"] is not False
        if low > len(required):
            if low > len(props) and not is_open:
                raise Never(f"minProperties {low} at {at or '/'} with {len(props)} keys to choose from")
            if is_open and low > len(required) + 1:
                raise self.refuse("minProperties", at, f"{low} is not supported beside undeclared keys")
            if len(props) * low > 4096:
                raise self.refuse("minProperties", at, "is not supported with so many keys")
            out["minProperties"] = low
        if high is not None and (is_open or high < len(props)):
            if high < len(required):
                raise Never(f"maxProperties {high} at {at or '/'} is below the required keys")
            out["maxProperties"] = high
        if out.get("maxProperties") == 0:
            return {"enum": [{}]}
        return out

    def array(self, words: dict[str, Any], at: str, depth: int) -> Any:
        """Leading items by place, then a common schema, with counts."""
        low, high = words.get("minItems", 0), words.get("maxItems")
        if high is not None and high < low:
            raise Never(f"maxItems below minItems at {at or '/'}")
        prefix = []
        for i, item in enumerate(words.get("prefixItems", [])[:high]):
            try:
                prefix.append(self.node(item, f"{at}/prefixItems/{i}", depth + 1))
            except Never:
                high = i
                break
        items: Any = False
        if high is None or high > len(prefix):
            try:
                items = self.node(words.get("items", not prefix), f"{at}/items", depth + 1)
            except Never:
                high = len(prefix)
        if high is not None and low > high:
            raise Never(f"too few items can match at {at or '/'}")
        if high == 0:
            return {"enum": [[]]}
        if max(low, len(prefix)) > 4096:
            raise self.refuse("minItems", at, "above 4096 is not supported")
        return self.counted_items(prefix, items, low, high)

    def counted_items(self, prefix: list[Any], items: Any, low: int, high: int | None) -> dict[str, Any]:
        """The engine's array. A huge ``maxItems`` is cut: no output reaches it."""
        out: dict[str, Any] = {"type": "array", "items": items if high is None or high > len(prefix) else False}
        if prefix:
            out["prefixItems"] = prefix
        if low:
            out["minItems"] = low
        if high is not None and out["items"] is not False:
            out["maxItems"] = min(high, 1 << 16)
        return out


def types_of(flat: Flat) -> list[str]:
    """The types a node may have: those it names, or those its keywords speak about, or all."""
    words = flat.words
    if "type" in words:
        return words["type"]
    spoken = [kind for kind, keys in SPEAKS.items() if any(k in words for k in keys)]
    return spoken or (["string"] if "format" in words else list(TYPES[:4] + TYPES[5:]))


def _scalar(kind: str, words: dict[str, Any], at: str) -> Any:
    if kind == "string":
        return string_schema(words, at)
    if kind in ("number", "integer"):
        kind, words = whole_multiple(kind, words, at)
        return number_range(kind, words, at)
    return {"type": kind}


def _modern(words: dict[str, Any], at: str) -> dict[str, Any]:
    """Older spellings in today's words: draft 4 exclusive bounds, item lists, ``const``, one type as a list, OpenAPI's ``nullable``."""
    out = {k: v for k, v in words.items() if k not in ("$ref", "allOf", "anyOf", "oneOf", "const", "additionalItems", "nullable")}
    if "const" in words:
        out["enum"] = [words["const"]] if "enum" not in out or words["const"] in out["enum"] else []
    for bound, strict in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(out.get(strict), bool) and out.pop(strict) and bound in out:
            out[strict] = out.pop(bound)
    if isinstance(out.get("items"), list):
        out["prefixItems"] = out.pop("items")
        out["items"] = words.get("additionalItems", not out["prefixItems"])
    for today, word in (("items", "unevaluatedItems"), ("additionalProperties", "unevaluatedProperties")):
        closed(out, today, out.pop(word, True))
    if "type" in out:
        out["type"] = _types(out["type"], at)
        if words.get("nullable") is True and "null" not in out["type"]:
            out["type"] = [*out["type"], "null"]
    if "enum" in out and not isinstance(out["enum"], list):
        raise GrammarError(f"enum must be a list (at {at or '/'})", param="json")
    _check_shapes(out, at)
    return out


def _types(value: Any, at: str) -> list[str]:
    names = value if isinstance(value, list) else [value]
    for name in names:
        if name not in TYPES:
            raise GrammarError(f"unknown type {name!r} (at {at or '/'})", param="json", keyword="type")
    return [n for n in names if not (n == "integer" and "number" in names)]


def _check_shapes(words: dict[str, Any], at: str) -> None:
    """Wrongly typed keyword values, named before they break something."""
    kinds: dict[type | tuple[type, ...], str] = {
        dict: "properties patternProperties dependentRequired dependencies",
        list: "required prefixItems",
        str: "pattern",
        (int, float): "minimum maximum exclusiveMinimum exclusiveMaximum multipleOf",
    }
    for kind, names in kinds.items():
        for name in names.split():
            if name in words and (not isinstance(words[name], kind) or isinstance(words[name], bool)):
                raise GrammarError(f"{name} has a value of the wrong type (at {at or '/'})", param="json", keyword=name)
    for name in COUNTS:
        value = words.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
            raise GrammarError(f"{name} must be a non-negative whole number (at {at or '/'})", param="json", keyword=name)
        if name in words:
            words[name] = int(value)


def _dependent(words: dict[str, Any], at: str, owner: Lowering) -> dict[str, Any]:
    """``dependentRequired``: keys demanded by a required key become required; for an optional key the key itself is given up."""
    needs = {**words.get("dependencies", {}), **words.get("dependentRequired", {})}
    if not needs:
        return words
    if any(not isinstance(v, list) for v in needs.values()):
        raise owner.refuse("dependencies", at, "with a schema is not supported")
    if words.get("additionalProperties", False) is not False or words.get("patternProperties"):
        raise owner.refuse("dependentRequired", at, "is not supported beside undeclared keys")
    required, props = list(words.get("required", [])), dict(words.get("properties", {}))
    for name in required:  # grows while it is walked: demands of demanded keys count too
        required += [n for n in needs.get(name, []) if n not in required]
    for name in set(needs) - set(required):
        if not set(needs[name]) <= set(required):
            props.pop(name, None)
    return {**words, "required": required, "properties": props}


def _list(schema: dict[str, Any], word: str, at: str) -> list[Any]:
    value = schema.get(word, [])
    if not isinstance(value, list) or (word in schema and not value):
        raise GrammarError(f"{word} must be a non-empty list (at {at or '/'})", param="json", keyword=word)
    return value


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")


def _productive(defs: dict[str, Any], root: Any) -> tuple[dict[str, Any], Any]:
    """Drop options and optional keys that have no finite value; a root without one is refused. Least fixed point over definitions."""
    good: set[str] = set()
    while grown := {n for n, d in defs.items() if n not in good and _finite(d, good)}:
        good |= grown
    if not _finite(root, good):
        raise GrammarError("the schema has no finite value (a required part contains itself)", param="json", keyword="$ref")
    kept = {n: _pruned(d, good) for n, d in defs.items() if n in good}
    return kept, root


def _finite(node: Any, good: set[str]) -> bool:
    if not isinstance(node, dict) or "enum" in node:
        return node is not False
    if "$ref" in node:
        return node["$ref"].rpartition("/")[2] in good
    if "anyOf" in node:
        return any(_finite(o, good) for o in node["anyOf"])
    if node.get("type") == "array":
        low, prefix = node.get("minItems", 0), node.get("prefixItems", [])
        return all(_finite(p, good) for p in prefix[:low]) and (low <= len(prefix) or _finite(node["items"], good))
    return all(_finite(node["properties"][n], good) for n in node.get("required", []))


def _pruned(node: Any, good: set[str]) -> Any:
    if "anyOf" in node:
        return {"anyOf": [_pruned(o, good) for o in node["anyOf"] if _finite(o, good)]}
    if node.get("type") == "object":
        node = {**node, "properties": {n: s for n, s in node.get("properties", {}).items() if _finite(s, good)}}
        if not _finite(node["additionalProperties"], good):
            node["additionalProperties"] = False
        if "patternProperties" in node:
            node["patternProperties"] = {p: s for p, s in node["patternProperties"].items() if _finite(s, good)}
    if node.get("type") == "array" and not _finite(node["items"], good):
        node = {**node, "items": False}
        node.pop("maxItems", None)
    return node
