"""tools, tool_choice and response_format: which constraint they put on the output and which parser reads it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from presage.core.errors import RequestError
from presage.core.sampling_params import StructuredOutputsParams
from presage.serve.config import ServerConfig
from presage.serve.protocol.chat import ChatRequest, NamedChoice, ResponseFormat, Tool
from presage.serve.tools import ToolParser, tool_parser
from presage.serve.tools.array import ArrayParser
from presage.serve.tools.named import NamedParser

ParserFactory = Callable[[], ToolParser]


class ToolPlan:
    """What a chat request wants of tools: ``schema`` forces calls, ``parser`` makes one parser per answer; both None for plain text."""

    def __init__(self, schema: dict[str, Any] | None = None, parser: ParserFactory | None = None, special_tokens: bool = False) -> None:
        self.schema, self.parser, self.special_tokens = schema, parser, special_tokens


def plan_tools(body: ChatRequest, config: ServerConfig) -> ToolPlan:
    """Errors: RequestError for choices without tools, unknown names, and ``auto`` on a server that was not started for it."""
    tools, choice = body.tools or [], body.tool_choice
    names = [t.function.name for t in tools]
    if len(set(names)) != len(names):
        raise RequestError("tools must have different names", param="tools")
    # OpenAI refuses this as well; ignoring it would hide a client's bug.
    if choice is not None and choice != "none" and not tools:
        raise RequestError("tool_choice needs tools", param="tool_choice")
    if not tools or choice == "none":
        return ToolPlan()
    if isinstance(choice, NamedChoice):
        return _named(tools, choice.function.name)
    if choice == "required":
        return ToolPlan(array_schema(tools, body.parallel_tool_calls is not False), lambda: ArrayParser(frozenset(names)))
    if not config.enable_auto_tool_choice or config.tool_call_parser is None:
        raise RequestError(
            "automatic tool choice is off: start the server with --enable-auto-tool-choice and --tool-call-parser, "
            'or send tool_choice "none", "required" or a named function',
            param="tool_choice",
        )
    kind = tool_parser(config.tool_call_parser)
    return ToolPlan(None, lambda: kind(frozenset(names)), kind.special_tokens)


def _named(tools: list[Tool], name: str) -> ToolPlan:
    found = next((t for t in tools if t.function.name == name), None)
    if found is None:
        raise RequestError(f"tool_choice names {name!r}, which is not among the tools", param="tool_choice")
    return ToolPlan(parameters(found), lambda: NamedParser(name))


def parameters(tool: Tool) -> dict[str, Any]:
    """A tool's parameter schema; without one, an empty object."""
    return tool.function.parameters or {"type": "object", "properties": {}, "additionalProperties": False}


def array_schema(tools: list[Tool], several: bool) -> dict[str, Any]:
    """Schema of ``[{"name", "parameters"}, ...]``; name comes first so that the parser can stream the rest."""
    defs: dict[str, Any] = {}
    calls = []
    for i, tool in enumerate(tools):
        schema = _hoisted(parameters(tool), f"tool{i}", defs)
        properties = {"name": {"type": "string", "enum": [tool.function.name]}, "parameters": schema}
        calls.append({"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False})
    out: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls} if len(calls) > 1 else calls[0]}
    if not several:
        out["maxItems"] = 1
    return out | ({"$defs": defs} if defs else {})


def _hoisted(schema: dict[str, Any], name: str, defs: dict[str, Any]) -> dict[str, Any]:
    """A tool's schema for use inside another. References are rooted at the whole document, so a schema that has some moves to ``$defs``
    as a whole, its own definitions beside it under names that no other tool has."""
    if not _has_reference(schema):
        return schema
    own = {k: v for k, v in schema.items() if k not in ("$defs", "definitions")}
    for group in ("$defs", "definitions"):
        for key, value in (schema.get(group) or {}).items():
            defs[f"{name}_{key}"] = _pointed(value, name)
    defs[name] = _pointed(own, name)
    return {"$ref": f"#/$defs/{name}"}


def _has_reference(node: Any) -> bool:
    if isinstance(node, dict):
        return isinstance(node.get("$ref"), str) or any(_has_reference(v) for v in node.values())
    return isinstance(node, list) and any(_has_reference(v) for v in node)


def _pointed(node: Any, name: str) -> Any:
    if isinstance(node, list):
        return [_pointed(v, name) for v in node]
    if not isinstance(node, dict):
        return node
    return {k: _pointer(v, name) if k == "$ref" and isinstance(v, str) else _pointed(v, name) for k, v in node.items()}


def _pointer(reference: str, name: str) -> str:
    for group in ("#/$defs/", "#/definitions/"):
        if reference.startswith(group):
            return f"#/$defs/{name}_{reference.removeprefix(group)}"
    return f"#/$defs/{name}{reference[1:]}" if reference.startswith("#") else reference


def constraint_of(body: ChatRequest, plan: ToolPlan) -> StructuredOutputsParams | None:
    """The constraint of tools or of response_format. Errors: RequestError if both want one, or a schema is missing."""
    shape = format_constraint(body.response_format)
    if plan.schema is None:
        return shape
    if shape is not None:
        raise RequestError("response_format and a forced tool_choice exclude each other", param="response_format")
    return StructuredOutputsParams(json=plan.schema)


def format_constraint(shape: ResponseFormat | None) -> StructuredOutputsParams | None:
    """The constraint of a response_format."""
    if shape is None or shape.type == "text":
        return None
    if shape.type == "json_object":
        return StructuredOutputsParams(json_object=True)
    if shape.json_schema is None or shape.json_schema.schema_ is None:
        raise RequestError("response_format json_schema needs json_schema.schema", param="response_format.json_schema")
    return StructuredOutputsParams(json=shape.json_schema.schema_)
