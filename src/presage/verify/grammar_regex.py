"""Regular expressions of JSON Schema and ``regex`` constraints: parsed here, written back for the grammar engine.

The engine's own reader skips what it does not know (lookarounds are dropped with a warning, an unanchored schema ``pattern`` is taken as
a full match, and a literal quote inside a JSON string is not escaped), so that its language is not the one that was asked for. We
parse the ECMA-262 subset without back references and assertions, refuse the rest by name and position, and emit only literals, classes,
groups and counted repeats. Written for JSON strings, every character is spelled as JSON spells it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from presage.core.errors import GrammarError

TOP = 0x10FFFF
MAX_REPEAT = 1 << 16
MAX_DEPTH = 64
MAX_CHARS = 1 << 14
Range = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Chars:
    """One character out of sorted, disjoint, inclusive code point ranges."""

    ranges: tuple[Range, ...]


@dataclass(frozen=True, slots=True)
class Seq:
    """Parts one after another."""

    parts: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Alt:
    """One of the options."""

    options: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Repeat:
    """``low`` to ``high`` times; ``high`` None is unbounded."""

    part: Node
    low: int
    high: int | None


@dataclass(frozen=True, slots=True)
class Edge:
    """``^`` (start) or ``$``."""

    start: bool


Node = Chars | Seq | Alt | Repeat | Edge


def union(ranges: list[Range]) -> tuple[Range, ...]:
    """Sorted and merged ranges."""
    out: list[Range] = []
    for low, high in sorted(ranges):
        if out and low <= out[-1][1] + 1:
            out[-1] = (out[-1][0], max(out[-1][1], high))
        else:
            out.append((low, high))
    return tuple(out)


def complement(ranges: tuple[Range, ...]) -> tuple[Range, ...]:
    """Every code point outside ``ranges``."""
    out, at = [], 0
    for low, high in ranges:
        if low > at:
            out.append((at, low - 1))
        at = high + 1
    return tuple([*out, (at, TOP)] if at <= TOP else out)


def common(a: tuple[Range, ...], b: tuple[Range, ...]) -> tuple[Range, ...]:
    """Code points in both."""
    return union([(max(x, p), min(y, q)) for x, y in a for p, q in b if max(x, p) <= min(y, q)])


DIGIT = ((48, 57),)
WORD = ((48, 57), (65, 90), (95, 95), (97, 122))
SPACE = ((9, 13), (32, 32))
# Dialects disagree on which characters beyond ASCII are digits, letters or spaces: a negated class keeps to those all agree on.
SPACES = (28, 29, 30, 31, 0x85, 0xA0, 0x1680, 0x180E, *range(0x2000, 0x200B), 0x2028, 0x2029, 0x202F, 0x205F, 0x3000, 0xFEFF)
NO_SPACE = complement(union([*SPACE, *((c, c) for c in SPACES)]))
ASCII = ((0, 127),)
CLASSES = {"d": DIGIT, "w": WORD, "s": SPACE, "D": common(complement(DIGIT), ASCII), "W": common(complement(WORD), ASCII), "S": NO_SPACE}
CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0}
ANY = Chars(((0, TOP),))
DOT = Chars(complement(((10, 10), (13, 13), (0x2028, 0x2029))))
EMPTY = Seq(())


class Parser:
    """Recursive descent over one expression; ``parse`` returns its tree. Errors: GrammarError with the position."""

    def __init__(self, text: str) -> None:
        self.text, self.at = text, 0

    def parse(self) -> Node:
        """The whole expression."""
        if len(self.text) > MAX_CHARS:
            raise GrammarError(f"regular expression is longer than {MAX_CHARS} characters")
        node = self._alternatives(0)
        if self.at < len(self.text):
            raise self._error("unmatched )")
        return node

    def _error(self, what: str) -> GrammarError:
        return GrammarError(f"regular expression: {what} at position {self.at}: {self.text[:80]!r}")

    def _peek(self, n: int = 1) -> str:
        return self.text[self.at : self.at + n]

    def _take(self, n: int = 1) -> str:
        got = self._peek(n)
        if len(got) < n:
            raise self._error("unexpected end")
        self.at += n
        return got

    def _alternatives(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise self._error(f"groups nested deeper than {MAX_DEPTH}")
        options = [self._sequence(depth)]
        while self._peek() == "|":
            self.at += 1
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else Alt(tuple(options))

    def _sequence(self, depth: int) -> Node:
        parts: list[Node] = []
        while (c := self._peek()) and c not in "|)":
            part = self._atom(depth)
            parts.append(self._quantified(part))
        return parts[0] if len(parts) == 1 else Seq(tuple(parts))

    def _atom(self, depth: int) -> Node:
        c = self._take()
        if c == "(":
            return self._group(depth)
        if c == "[":
            return Chars(self._class())
        if c == "\\":
            return self._escape()
        if c in "^$":
            return Edge(c == "^")
        if c in "*+?":
            self.at -= 1
            raise self._error(f"nothing to repeat before {c}")
        return DOT if c == "." else Chars(((ord(c), ord(c)),))

    def _group(self, depth: int) -> Node:
        if self._peek() == "?":
            self._group_kind()
        node = self._alternatives(depth + 1)
        if self._peek() != ")":
            raise self._error("missing )")
        self.at += 1
        return node

    def _group_kind(self) -> None:
        """Skip ``?:`` and names; lookarounds and flags change the language and are refused."""
        rest = self.text[self.at : self.at + 4]
        for lead, what in (("?=", "lookahead"), ("?!", "lookahead"), ("?<=", "lookbehind"), ("?<!", "lookbehind")):
            if rest.startswith(lead):
                raise self._error(f"{what} is not supported")
        if rest.startswith("?:"):
            self.at += 2
        elif rest.startswith(("?<", "?P<")):
            end = self.text.find(">", self.at)
            if end < 0:
                raise self._error("unclosed group name")
            self.at = end + 1
        else:
            raise self._error("inline flags and special groups are not supported")

    def _quantified(self, part: Node) -> Node:
        while (bounds := self._bounds()) is not None:
            if isinstance(part, Edge):
                raise self._error("a repeated anchor is not supported")
            low, high = bounds
            if high is not None and high < low:
                raise self._error("repeat bounds out of order")
            if low > MAX_REPEAT:
                raise self._error(f"a repeat of more than {MAX_REPEAT} is not supported")
            part = Repeat(part, low, None if high is None else min(high, MAX_REPEAT))
            if self._peek() in ("?", "+"):  # lazy and possessive: the same language
                self.at += 1
        return part

    def _bounds(self) -> tuple[int, int | None] | None:
        c = self._peek()
        simple: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
        if c in simple:
            self.at += 1
            return simple[c]
        if c != "{":
            return None
        end = self.text.find("}", self.at)
        low, comma, high = self.text[self.at + 1 : max(end, self.at + 1)].partition(",")
        if end < 0 or not low.isdecimal() or not (high.isdecimal() or not high) or len(low) > 9 or len(high) > 9:
            self._check_brace(end)
            return None
        self.at = end + 1
        return int(low), (int(high) if high else None) if comma else int(low)

    def _check_brace(self, end: int) -> None:
        """A brace that is no quantifier stands for itself (ECMA Annex B); huge counts are refused instead."""
        if end > 0 and self.text[self.at + 1 : end].replace(",", "").isdecimal():
            raise self._error(f"a repeat of more than {MAX_REPEAT} is not supported")

    def _escape(self) -> Node:
        c = self._peek()
        if c and c in "bB":
            raise self._error("word boundaries are not supported")
        if c and c in "AZz":
            self.at += 1
            return Edge(c == "A")
        if (c.isdecimal() and c != "0") or c == "k":
            raise self._error("back references are not supported")
        return Chars(self._escaped())

    def _escaped(self) -> tuple[Range, ...]:
        """What follows a backslash, inside a class or outside."""
        c = self._take()
        if c in CLASSES:
            return CLASSES[c]
        if c in "pP":
            raise self._error("unicode property classes are not supported")
        if c in "xu":
            code = self._hex(c)
        elif c == "c":
            code = ord(self._take()) % 32
        elif c in CONTROLS:
            code = CONTROLS[c]
        elif c.isalnum() and c.isascii():
            raise self._error(f"unknown escape \\{c}")
        else:
            code = ord(c)
        return ((code, code),)

    def _hex(self, kind: str) -> int:
        if kind == "u" and self._peek() == "{":
            end = self.text.find("}", self.at)
            digits, self.at = self.text[self.at + 1 : end], max(end, self.at) + 1
        else:
            digits = self._take(2 if kind == "x" else 4)
        try:
            code = int(digits, 16)
        except ValueError:
            raise self._error(f"bad hexadecimal escape {digits!r}") from None
        if code > TOP or 0xD800 <= code < 0xE000:
            raise self._error("surrogate code points are not supported")
        return code

    def _class(self) -> tuple[Range, ...]:
        negated = self._peek() == "^"
        self.at += negated
        start = self.at
        found: list[Range] = []
        while self._peek() != "]":
            low = self._class_item()
            if self._peek() == "-" and self._peek(2) not in ("-]", "-"):
                self.at += 1
                found.extend(self._span(low, self._class_item()))
            else:
                found.extend(low)
        self.at += 1
        ranges = union(found)
        if not negated:
            return ranges
        sets = any(f"\\{c}" in self.text[start : self.at] for c in "dwsDWS")
        return common(complement(ranges), ASCII) if sets else complement(ranges)

    def _span(self, low: tuple[Range, ...], high: tuple[Range, ...]) -> list[Range]:
        """``a-z``; beside a class such as ``\\w-x`` the hyphen is a literal (ECMA Annex B)."""
        if len(low) > 1 or len(high) > 1 or low[0][0] != low[0][1] or high[0][0] != high[0][1]:
            return [*low, (45, 45), *high]
        if low[0][0] > high[0][0]:
            raise self._error("character range out of order")
        return [(low[0][0], high[0][0])]

    def _class_item(self) -> tuple[Range, ...]:
        c = self._take()
        if c != "\\":
            return ((ord(c), ord(c)),)
        if self._peek() == "b":
            self.at += 1
            return ((8, 8),)
        return self._escaped()


def parse_regex(text: str) -> Node:
    """Tree of an expression. Errors: GrammarError naming construct and position."""
    return Parser(text).parse()


def literal(text: str) -> Node:
    """Tree that matches exactly ``text``."""
    return Seq(tuple(Chars(((ord(c), ord(c)),)) for c in text))


def anchored(node: Node, search: bool) -> Node:
    """The same language without anchors, as a full match; ``search`` lets anything stand where no anchor does (schema ``pattern``)."""
    out = _close(node, search, search)
    if _edges(out):
        raise GrammarError("regular expression: an anchor in the middle is not supported")
    return out


def _edges(node: Node) -> bool:
    if isinstance(node, Repeat):
        return _edges(node.part)
    parts = node.parts if isinstance(node, Seq) else node.options if isinstance(node, Alt) else ()
    return isinstance(node, Edge) or any(_edges(p) for p in parts)


def _close(node: Node, left: bool, right: bool) -> Node:
    """Push what must be open on each side down to the ends of every alternative, where the anchors are."""
    if isinstance(node, Alt):
        return Alt(tuple(_close(o, left, right) for o in node.options))
    parts = list(node.parts) if isinstance(node, Seq) else [node]
    while parts and isinstance(parts[0], Edge) and parts[0].start:
        parts, left = parts[1:], False
    while parts and isinstance(parts[-1], Edge) and not parts[-1].start:
        parts, right = parts[:-1], False
    if parts and isinstance(parts[0], Alt | Seq) and _edges(parts[0]):
        parts[0], left = _close(parts[0], left, right and len(parts) == 1), False
        right = right and len(parts) > 1
    if parts and isinstance(parts[-1], Alt | Seq) and _edges(parts[-1]):
        parts[-1], right = _close(parts[-1], False, right), False
    anything = [Repeat(ANY, 0, None)]
    return Seq((*(anything if left else []), *parts, *(anything if right else [])))


def width(node: Node) -> tuple[int, int | None]:
    """Shortest and longest match in characters; None is unbounded."""
    if isinstance(node, Chars):
        return 1, 1
    if isinstance(node, Edge):
        return 0, 0
    if isinstance(node, Repeat):
        low, high = width(node.part)
        return low * node.low, 0 if high == 0 else None if high is None or node.high is None else high * node.high
    sizes = [width(p) for p in (node.parts if isinstance(node, Seq) else node.options)]
    lows, highs = [s[0] for s in sizes], [s[1] for s in sizes]
    if isinstance(node, Seq):
        return sum(lows), None if None in highs else sum(h or 0 for h in highs)
    return min(lows), None if None in highs else max(h or 0 for h in highs)


def fit(node: Node, low: int, high: int | None) -> Node:
    """A sub-language whose matches have ``low`` to ``high`` characters. Errors: GrammarError if repeats cannot be bounded that way."""
    if low > width(node)[0]:
        node = _lengthen(node, low)
    longest = width(node)[1]
    if high is not None and (longest is None or longest > high):
        node = _shorten(node, high)
    if width(node)[0] < low:
        raise GrammarError("pattern together with minLength is not supported for this expression")
    return node


def _lengthen(node: Node, low: int) -> Node:
    """Raise the lower bound of one repeat of single characters at the top level."""
    parts = list(node.parts) if isinstance(node, Seq) else [node]
    missing = low - width(node)[0]
    for i, part in enumerate(parts):
        if isinstance(part, Repeat) and width(part.part) == (1, 1) and (part.high is None or part.high >= part.low + missing):
            parts[i] = replace(part, low=part.low + missing)
            return Seq(tuple(parts))
    raise GrammarError("pattern together with minLength is not supported for this expression")


def _shorten(node: Node, high: int) -> Node:
    """Bound the open repeats so that the longest match has at most ``high`` characters (equal shares)."""
    for share in _shares(high):
        bounded = _bounded(node, share)
        longest = width(bounded)[1]
        if longest is not None and longest <= high:
            return bounded
    raise GrammarError("pattern together with maxLength is not supported for this expression")


def _shares(high: int) -> list[int]:
    """Bounds to try, largest first: exact steps while short, then a geometric ladder."""
    ladder = [high - i for i in range(min(high, 64))]
    while ladder and ladder[-1] > 1:
        ladder.append(ladder[-1] * 7 // 8)
    return [*ladder, 0]


def _bounded(node: Node, most: int) -> Node:
    if isinstance(node, Repeat):
        top = most if node.high is None else min(node.high, most)
        return Repeat(_bounded(node.part, most), node.low, max(node.low, top))
    if isinstance(node, Seq):
        return Seq(tuple(_bounded(p, most) for p in node.parts))
    return Alt(tuple(_bounded(o, most) for o in node.options)) if isinstance(node, Alt) else node


MAX_WORK = 1 << 20


def matches(node: Node, text: str) -> bool:
    """Whether the whole text matches, in time polynomial in both. Errors: GrammarError if even that is too long."""
    fuel = [MAX_WORK]
    return len(text) in _ends(node, text, {0}, fuel)


def _ends(node: Node, text: str, starts: set[int], fuel: list[int]) -> set[int]:
    """Where matches that begin at one of ``starts`` may end."""
    fuel[0] -= len(starts) + 1
    if fuel[0] < 0:
        raise GrammarError("regular expression: matching it against the schema's own names takes too long")
    if isinstance(node, Chars):
        return {s + 1 for s in starts if s < len(text) and any(a <= ord(text[s]) <= b for a, b in node.ranges)}
    if isinstance(node, Seq):
        for part in node.parts:
            starts = _ends(part, text, starts, fuel)
        return starts
    if isinstance(node, Alt):
        return set().union(*(_ends(o, text, starts, fuel) for o in node.options))
    return _repeat_ends(node, text, starts, fuel) if isinstance(node, Repeat) else set()


def _repeat_ends(node: Repeat, text: str, starts: set[int], fuel: list[int]) -> set[int]:
    for _ in range(min(node.low, len(text) + 1)):  # more rounds change nothing: ends stand still or have run out
        starts = _ends(node.part, text, starts, fuel)
    found, fresh = set(starts), starts
    for _ in range(len(text) + 1 if node.high is None else node.high - node.low):
        fresh = _ends(node.part, text, fresh, fuel) - found
        if not fresh:
            break
        found |= fresh
    return found


BROAD = 64  # the engine drops escapes under a repeat anyway, and one plain class per character is its fast path
JSON_PLAIN = ((0x20, 0x21), (0x23, 0x5B), (0x5D, 0xD7FF), (0xE000, TOP))
JSON_SHORT = {0x22: '"', 0x5C: "\\", 8: "b", 9: "t", 10: "n", 12: "f", 13: "r"}
TEXT_PLAIN = ((0, 0xD7FF), (0xE000, TOP))


def emit(node: Node, json: bool) -> str:
    """Text for the grammar engine. ``json`` spells characters as inside a JSON string; control characters without a short
    escape are left out there, and classes of more than 64 characters lose their escaped ones (narrower, never wrong)."""
    if isinstance(node, Chars):
        return _emit_chars(node.ranges, json)
    if isinstance(node, Seq):
        return "".join(emit(p, json) for p in node.parts)
    if isinstance(node, Alt):
        return "(?:" + "|".join(emit(o, json) for o in node.options) + ")"
    if isinstance(node, Repeat):
        count = f"{{{node.low},{'' if node.high is None else node.high}}}"
        return f"(?:{emit(node.part, json)}){'*' if (node.low, node.high) == (0, None) else count}"
    raise GrammarError("regular expression: an anchor in the middle is not supported")


def _emit_chars(ranges: tuple[Range, ...], json: bool) -> str:
    plain = common(ranges, JSON_PLAIN if json else TEXT_PLAIN)
    options = ["[" + "".join(_spell(a) if a == b else f"{_spell(a)}-{_spell(b)}" for a, b in plain) + "]"] if plain else []
    if json and sum(b - a + 1 for a, b in plain) <= BROAD:
        short = "".join(_spell(ord(c)) for code, c in JSON_SHORT.items() if any(a <= code <= b for a, b in ranges))
        options += [f"\\\\[{short}]"] if short else []
    if not options:
        raise GrammarError("regular expression: a class without any character that JSON can hold")
    return options[0] if len(options) == 1 else "(?:" + "|".join(options) + ")"


def _spell(code: int) -> str:
    char = chr(code)
    if code < 0x20 or 0x7F <= code <= 0x9F:
        return f"\\u{code:04x}"
    return "\\" + char if char in "\\]^-[" else char
