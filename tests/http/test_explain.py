"""``GET /explain/ID`` and ``presage explain ID --url``: what a server's decision log says, to those whose request it was."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

from presage.serve.cli import main
from tests.http.echo import EchoEngine
from tests.http.server import served

pytest.importorskip("torch")
PROMPT = "import os\nimport sys\n" * 8
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


class Site(NamedTuple):
    """A server with two tenants and a log."""

    base: str
    folder: Path

    def get(self, path: str, key: str = "one", **wishes: Any) -> httpx.Response:
        return httpx.get(self.base + path, params=wishes, headers={"Authorization": f"Bearer {key}"}, timeout=60)

    def complete(self, **body: Any) -> str:
        """The id of an answer."""
        answer = httpx.post(
            self.base + "/v1/completions", json={"prompt": PROMPT, "temperature": 0, **body}, headers={"Authorization": "Bearer one"}, timeout=60
        )
        return str(answer.json()["id"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    from presage.engine.async_llm import AsyncLLM

    folder = tmp_path_factory.mktemp("log")
    spec = {"method": "suffix", "length": {"policy": "fixed", "num_speculative_tokens": 6}}
    engine = AsyncLLM.from_engine_args(
        model="presage-tiny", max_num_seqs=8, num_gpu_blocks_override=80, max_model_len=1024, threads=1, speculative_config=spec,
        decision_log=str(folder), decision_log_level="tokens",
    )  # fmt: skip
    with served(engine, api_key=["one:alice", "two:bob"]) as base:
        yield Site(base, folder)
    engine.shutdown()


@pytest.fixture(scope="module")
def asked(site: Site) -> str:
    return site.complete(max_tokens=30)


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["explain", *words])
    return int(ended.value.code or 0)


def test_a_request_is_told_as_text(site: Site, asked: str) -> None:
    plain = site.get(f"/explain/{asked}")
    assert plain.status_code == 200 and plain.headers["content-type"].startswith("text/plain")
    assert plain.text.startswith(asked) and "finish length, 30 tokens in" in plain.text and "\nat  " in plain.text
    accepted = int(re.findall(r"draft tokens, (\d+) accepted", plain.text)[0])
    assert accepted > 0 and re.search(r"\[[^]]+\]", plain.text.partition("drafts (")[2].partition("\n")[2])
    coloured = site.get(f"/explain/{asked}", colour=1).text
    assert COLOUR.search(coloured) and not COLOUR.search(plain.text)
    brief = site.get(f"/explain/{asked}", steps=0).text
    assert plain.text.startswith(brief) and len(brief) < len(plain.text)


def test_a_running_request_is_told_too(site: Site) -> None:
    body = {"prompt": PROMPT, "max_tokens": 900, "ignore_eos": True, "temperature": 0, "stream": True}
    with httpx.stream("POST", site.base + "/v1/completions", json=body, headers={"Authorization": "Bearer one"}, timeout=60) as answer:
        lines = answer.iter_lines()  # one that is dropped ends the request
        first = next(line for line in lines if line)
        name = first.split('"id":"')[1].split('"')[0]
        told = site.get(f"/explain/{name}").text
    assert told.startswith(name) and "finish running" in told


def test_only_its_owner_is_told(site: Site, asked: str) -> None:
    for key, name in (("two", asked), ("one", "cmpl-0"), ("one", asked[:-1]), ("one", "a/b")):
        answer = site.get(f"/explain/{name}", key)
        assert answer.status_code == 404, name
    assert site.get(f"/explain/{asked}", "two").json()["error"]["code"] == "request_not_found"
    assert site.get(f"/explain/{asked}", "three").status_code == 401


@pytest.mark.parametrize("wish", [{"steps": "x"}, {"steps": -2}, {"width": 3}, {"colour": 2}])
def test_wishes_out_of_range(site: Site, asked: str, wish: dict[str, Any]) -> None:
    answer = site.get(f"/explain/{asked}", **wish)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == next(iter(wish))


def test_a_server_without_a_log_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with served(EchoEngine()) as base:
        answer = httpx.get(base + "/explain/cmpl-1")
        assert answer.status_code == 409 and answer.json()["error"]["code"] == "no_decision_log"
        assert command("cmpl-1", "--url", base) == 1
    assert "--decision-log FOLDER [no_decision_log]" in capsys.readouterr().err


def test_the_command_asks_the_server(site: Site, asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(asked, "--url", site.base + "/v1", "--api-key", "one") == 0
    from_server = capsys.readouterr().out
    assert command(asked, "--decision-log", str(site.folder)) == 0
    assert from_server == capsys.readouterr().out == site.get(f"/explain/{asked}").text


def test_mistakes_of_the_command_are_named(site: Site, asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in (
        ((asked, "--url", site.base, "--api-key", "two"), "[request_not_found]"),
        ((asked, "--url", site.base), "[invalid_api_key]"),
        (("--url", site.base), "give the id"),
        ((asked, "--url", "http://127.0.0.1:9"), "no server at http://127.0.0.1:9"),
        ((asked, "--url", "nonsense"), "no address"),
    ):
        assert command(*words) == 1
        assert told in capsys.readouterr().err
