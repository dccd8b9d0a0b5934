"""Fixtures: an engine, a server around it, and the official client."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.http.echo import EchoEngine
from tests.http.server import served


@pytest.fixture(scope="module")
def engine() -> EchoEngine:
    """One engine per test module."""
    return EchoEngine()


@pytest.fixture(scope="module")
def url(engine: Any) -> Iterator[str]:
    """A server with tools and reasoning switched on."""
    with served(engine, enable_auto_tool_choice=True, tool_call_parser="hermes") as base:
        yield base


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    """The official client."""
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as made:
        yield made
