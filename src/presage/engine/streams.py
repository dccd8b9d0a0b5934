"""The end of a request, as every front sees it: emissions until each branch finished, or the request's error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from presage.core.errors import PresageError
from presage.core.request import Emission
from presage.engine.assemble import error_of


async def until_ended(queue: asyncio.Queue[Emission | PresageError], branches: int) -> AsyncIterator[Emission]:
    """Emissions from a queue until ``branches`` of them had ``finish`` set. Raises what the queue or an emission reports."""
    left = max(1, branches)
    while left:
        item = await queue.get()
        if isinstance(item, PresageError):
            raise item
        if item.error is not None:
            raise error_of(item.error)
        left -= bool(item.finish)
        yield item
