"""Questions to an engine in this process or to a server, so many at a time, with what came back: the load under an energy meter."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request as Call
from urllib.request import urlopen

import numpy as np

from presage.bench.client import StreamReader
from presage.bench.measures import Record
from presage.bench.offline import TimedEngine
from presage.core.config import EngineConfig
from presage.core.errors import ConfigError
from presage.core.request import Emission, Request
from presage.core.sampling_params import SamplingParams

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
Answers = tuple[list[Record], list[str]]


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


SCORES: dict[str, Callable[[str, str], bool]] = {
    "exact": lambda said, right: said.strip().split("\n")[0].strip() == right.strip(),
    "prefix": lambda said, right: said.strip().startswith(right.strip()),
    "contains": lambda said, right: right.strip().casefold() in said.casefold(),
    "number": lambda said, right: _last_number(said) is not None and _last_number(said) == _last_number(right),
}
"""How an answer is judged: first line equal, begins with it, holds it (in any case), last number equal."""


def read_task(path: Path, question: str = "prompt", answer: str = "answer", limit: int | None = None) -> list[tuple[str, str]]:
    """(question, right answer) of each row of a .jsonl file. Raises ConfigError naming what is missing."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()][:limit]
        return [(str(row[question]), str(row[answer])) for row in map(json.loads, lines)]
    except KeyError as error:
        raise ConfigError(f"{path}: a row has no field {error.args[0]!r}; name others with --prompt-field and --answer-field", param="task") from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not a task: {error}", param="task") from None


class Engine(TimedEngine):
    """An engine in this process that is asked as a server is: at most ``concurrency`` requests in flight, answers kept."""

    def __init__(self, config: EngineConfig) -> None:
        self.said: dict[str, list[int]] = {}
        super().__init__(config)

    def _take(self, emissions: list[Emission]) -> None:
        super()._take(emissions)
        for e in emissions:
            self.said.setdefault(e.id, []).extend(e.ids or ())

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Texts as ids."""
        return [self.engine.tokenizer.encode(p) for p in prompts]

    def ask(self, prompts: Sequence[Sequence[int]], sampling: SamplingParams | Sequence[SamplingParams], concurrency: int) -> Answers:
        """Records and texts, in the order of the prompts. Raises the first refused request's error."""
        self.runs += 1
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingParams) else list(sampling)
        names = [f"ask-{self.runs}-{i}" for i in range(len(prompts))]
        self.records, self.said, self.left, self.failure = {}, {}, 0, None
        for name, ids, params in zip(names, prompts, each, strict=True):
            while self.left >= concurrency:
                self.engine.driver.step()
            now = time.monotonic()
            self.records[name] = Record(now, now, n_in=len(ids))
            self.left += 1
            self.engine.add(Request(id=name, prompt=np.array(ids, np.int32), sampling=params, arrival=now))
        while self.left:
            self.engine.driver.step()
        if self.failure is not None:
            raise self.failure
        return [self.records[n] for n in names], [self.engine.tokenizer.decode(self.said[n]) for n in names]


class Server:
    """Any OpenAI-compatible server. ``used``: seconds in which at least one request was in flight.

    Raises ConfigError if it does not answer.
    """

    def __init__(self, url: str, model: str = "", key: str = "") -> None:
        self.url, self.key = url.rstrip("/").removesuffix("/v1"), key
        self.spans: list[list[float]] = []
        if not model:
            try:
                with urlopen(self._call("/v1/models"), timeout=30) as answer:
                    model = json.load(answer)["data"][0]["id"]
            except (OSError, ValueError, LookupError) as error:
                raise ConfigError(f"{self.url} does not say which model it serves: {error}", param="url") from None
        self.model = model

    def _call(self, path: str, body: dict[str, Any] | None = None) -> Call:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        return Call(self.url + path, None if body is None else json.dumps(body).encode(), headers)

    def used(self) -> float:
        """Time with work so far: the union of the requests' spans, those in flight until now."""
        now, total, upto = time.monotonic(), 0.0, 0.0
        for began, ended in sorted((s[0], s[1] if len(s) > 1 else now) for s in list(self.spans)):
            total += max(0.0, ended - max(began, upto))
            upto = max(upto, ended)
        return total

    def ask(self, prompts: Sequence[Any], max_tokens: int, concurrency: int, ignore_eos: bool = False) -> Answers:
        """Records and texts, in the order of the prompts (texts or ids); failures are in the records."""
        body = {"model": self.model, "max_tokens": max_tokens, "temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        body |= {"ignore_eos": True} if ignore_eos else {}
        with ThreadPoolExecutor(concurrency, thread_name_prefix="presage-ask") as pool:
            found = list(pool.map(lambda p: self._one(body | {"prompt": p}), prompts))
        return [r for r, _ in found], [text for _, text in found]

    def _one(self, body: dict[str, Any]) -> tuple[Record, str]:
        record = Record(now := time.monotonic(), now)
        reader, error = StreamReader(record, lambda r: None, keep_text=True), ""
        self.spans.append(span := [now])
        try:
            with urlopen(self._call("/v1/completions", body), timeout=600) as answer:
                while data := answer.read1(65536):
                    reader.body(data, time.monotonic())
        except HTTPError as refused:
            reader.head(refused.code)
            reader.body(refused.read(), time.monotonic())
        except (URLError, OSError) as broken:
            error = f"no connection: {broken}"
        span.append(time.monotonic())
        reader.end(error)
        return record, reader.text
