"""The suffix drafter's store: a file kept from run to run by settings alone, and what does not go into it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from presage.core.errors import CheckpointError, ConfigError
from presage.core.salt import salt_of
from presage.draft.registry import make_drafter
from presage.draft.suffix import SuffixDrafter
from tests.pure.test_suffix_drafter import TEXT, drafts, request, run
from tests.pure.test_suffix_drafts import new_ids

OTHER = list(range(30, 40))


def made(store: Path | None, whose: str = "tiny@1", method: str = "suffix", **settings: Any) -> Any:
    part = {"num_speculative_tokens": 8, **({"suffix_decoding_store": str(store)} if store else {}), **settings}
    config = part if method == "suffix" else {"drafters": [{"method": "suffix", **part}, "ngram"]}
    return make_drafter(method, config, vocab_size=100, model_name="tiny", fingerprint=whose)


def finds(d: SuffixDrafter, text: list[int], slot: int = 5, **fields: Any) -> list[int]:
    """What is drafted behind the first three tokens of a text."""
    d.open(slot, request("new", [1], **fields))
    d.advance(new_ids({slot: text[:3]}))
    (out,) = drafts(d, slot)
    d.rewind(slot, 1)
    d.close(slot)
    return out


@pytest.mark.parametrize("method", ["suffix", "hybrid"])
def test_a_second_run_drafts_from_the_first(tmp_path: Path, method: str) -> None:
    store = tmp_path / "said.bin"
    first = made(store, method=method)
    inner = first.drafters[0] if method == "hybrid" else first
    run(inner, 0, TEXT, model="tiny")
    run(inner, 0, OTHER, tenant="a", salt=salt_of("a", None))
    assert not store.exists()
    first.shut()
    second = made(store, whose="renamed@1", method=method)
    inner = second.drafters[0] if method == "hybrid" else second
    # The front's name of the model and none are the same model; a tenant is not.
    assert finds(inner, TEXT) == finds(inner, TEXT, model="tiny") == TEXT[3:6]
    assert finds(inner, TEXT, model="lora") == finds(inner, OTHER) == []
    assert finds(inner, OTHER, tenant="a", salt=salt_of("a", None)) == OTHER[3:6]
    second.shut()
    assert [p.name for p in tmp_path.iterdir()] == ["said.bin"]


def test_what_is_warmed_up_each_time_is_not_stored(tmp_path: Path) -> None:
    store, past = tmp_path / "said.bin", tmp_path / "past.jsonl"
    past.write_text(json.dumps({"token_ids": OTHER, "model": "tiny"}), encoding="utf-8")
    for runs in range(1, 4):
        d = made(store, suffix_decoding_warm_up=str(past))
        assert d.stats()["responses"] == runs
        assert finds(d, OTHER) == OTHER[3:6]
        run(d, 0, TEXT)
        d.shut()
    assert made(store).stats()["responses"] == 3


def test_a_request_may_ask_not_to_be_remembered(tmp_path: Path) -> None:
    d = made(tmp_path / "said.bin")
    run(d, 0, TEXT, draft={"suffix_decoding_max_cached_requests": 0})
    assert d.stats()["responses"] == 0 and finds(d, TEXT) == []


def test_a_warm_up_reaches_the_tenant_it_names(tmp_path: Path) -> None:
    past = tmp_path / "past.jsonl"
    rows = [{"token_ids": TEXT, "tenant": "a"}, {"token_ids": OTHER, "tenant": "a", "cache_salt": "x"}]
    past.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    d = made(None, suffix_decoding_warm_up=str(past))
    asked = [(TEXT, "a", None), (TEXT, "a", "x"), (TEXT, "", None), (OTHER, "a", "x"), (OTHER, "a", None)]
    found = [bool(finds(d, text, tenant=tenant, salt=salt_of(tenant, salt))) for text, tenant, salt in asked]
    assert found == [True, False, False, True, False]


def test_another_model_is_refused_and_the_file_stays(tmp_path: Path) -> None:
    store = tmp_path / "said.bin"
    d = made(store)
    run(d, 0, TEXT)
    d.shut()
    before = store.read_bytes()
    with pytest.raises(CheckpointError, match=r"of 'tiny@1', not of 'large@2'"):
        made(store, whose="large@2")
    assert store.read_bytes() == before


def test_a_store_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for bad in (tmp_path, tmp_path / "missing" / "said.bin", tmp_path / "file" / "said.bin"):
        with pytest.raises(ConfigError, match="cannot be written") as told:
            made(bad)
        assert told.value.param == "suffix_decoding_store"
    with pytest.raises(ConfigError, match="max_cached_requests"):
        made(tmp_path / "said.bin", suffix_decoding_max_cached_requests=0)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_write_that_fails_is_an_error_and_leaves_the_old_file(tmp_path: Path) -> None:
    store = tmp_path / "in" / "said.bin"
    store.parent.mkdir()
    d = made(store)
    store.parent.rmdir()
    run(d, 0, TEXT)
    with pytest.raises(CheckpointError, match=r"said\.bin"):
        d.shut()


def test_tools_that_know_no_model_leave_the_store_alone(tmp_path: Path) -> None:
    store = tmp_path / "said.bin"
    store.write_bytes(b"not to be touched")
    d = made(store, whose="")
    run(d, 0, TEXT)
    d.shut()
    assert store.read_bytes() == b"not to be touched"


def test_what_the_engine_knows_is_no_setting() -> None:
    with pytest.raises(ConfigError, match="no setting fingerprint"):
        made(None, fingerprint="mine")
