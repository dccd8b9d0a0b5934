"""The Jinja environment of chat templates: immutable sandbox, Hugging Face's helpers, and limits on work.

Templates come from the internet with the model and messages come from anybody. Jinja's sandbox keeps them away from Python; the deadline
is checked whenever an expression reads an attribute or an item, calls, adds or multiplies, and loops over ``range`` share one budget.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from types import CodeType
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MAX_RANGE_TOTAL = 200_000


class Meter:
    """What one rendering has used."""

    def __init__(self, max_chars: int, max_seconds: float) -> None:
        self.max_chars, self.until = max_chars, time.monotonic() + max_seconds
        self.ranged, self.chars = 0, 0

    def tick(self) -> None:
        if time.monotonic() > self.until:
            raise SecurityError("the template ran too long")

    def wrote(self, n: int) -> None:
        self.chars += n
        if self.chars > self.max_chars:
            raise SecurityError(f"the template wrote more than {self.max_chars} characters")
        self.tick()


class Environment(ImmutableSandboxedEnvironment):
    """Sandbox that charges a ``Meter``. Each rendering makes its own (under a millisecond), so threads share nothing."""

    intercepted_binops = frozenset(("*", "**", "+", "%"))
    meter: Meter | None = None

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._tick()
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._tick()
        return super().getitem(obj, argument)

    def call(self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        self._tick()
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        self._tick()
        if operator in ("*", "**"):
            self._fits(operator, left, right)
        return super().call_binop(context, operator, left, right)

    def _tick(self) -> None:
        if self.meter is not None:
            self.meter.tick()

    def _fits(self, operator: str, left: Any, right: Any) -> None:
        limit = self.meter.max_chars if self.meter is not None else MAX_RANGE_TOTAL
        if operator == "**" and isinstance(right, int) and abs(right) > 64:
            raise SecurityError("exponent too large")
        for one, other in ((left, right), (right, left)):
            if isinstance(one, (str, list, tuple)) and isinstance(other, int) and len(one) * other > limit:
                raise SecurityError("repetition too large")


class GenerationTag(jinja2.ext.Extension):
    """``{% generation %}`` marks assistant text for training; when serving it is only its body."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Namespace(jinja2.utils.Namespace):
    """``namespace()`` that refuses names with a leading underscore, which could reach into Python objects."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, rest = args[0], args[1:]
        attrs = dict(*rest, **kwargs)
        for name in attrs:
            _public(name)
        jinja2.utils.Namespace.__init__(self, attrs)

    def __setitem__(self, name: str, value: Any) -> None:
        _public(name)
        super().__setitem__(name, value)


def environment() -> Environment:
    """An environment that compiles templates as transformers does (blocks trimmed, loop controls, plain-JSON ``tojson``)."""
    env = Environment(trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, jinja2.ext.loopcontrols])
    env.filters["tojson"] = _tojson
    env.globals.update(raise_exception=_raise, strftime_now=_strftime_now, namespace=_Namespace, dict=_plain_dict)
    return env


def compile_template(source: str) -> CodeType:
    """Compile once, render often. Raises jinja2.TemplateSyntaxError."""
    return environment().compile(source)


def render(code: CodeType, names: dict[str, Any], max_chars: int, max_seconds: float) -> str:
    """The template's text. Raises whatever the template raises, and SecurityError beyond the limits."""
    meter = Meter(max_chars, max_seconds)
    env = environment()
    env.meter = meter
    env.globals["range"] = _budgeted_range(meter)
    chunks = []
    for chunk in jinja2.Template.from_code(env, code, env.globals).generate(names):
        meter.wrote(len(chunk))
        chunks.append(chunk)
    return "".join(chunks)


def _budgeted_range(meter: Meter) -> Callable[..., range]:
    def limited(*args: int) -> range:
        numbers = range(*args)
        meter.ranged += len(numbers)
        if meter.ranged > MAX_RANGE_TOTAL:
            raise SecurityError(f"loops over more than {MAX_RANGE_TOTAL} numbers")
        return numbers

    return limited


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _plain_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
    return dict(*args, **kwargs)


def _public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}: the name begins with an underscore")
