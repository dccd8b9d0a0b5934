"""What a suffix drafter learns outlives the engine: ``suffix_decoding_store`` and a warm-up of texts, as a user of ``LLM`` meets them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from presage import LLM
from presage.bundled import bundled_path
from presage.core.errors import CheckpointError
from presage.draft.suffix import SuffixDrafter
from presage.models.loading.fingerprint import identity
from tests.tiny.speculation_work import CLASS, engine, params

WORK = [CLASS, "SELECT name, age FROM users WHERE ", "The quick brown"]
FIXED = {"policy": "fixed", "num_speculative_tokens": 8}


class Ended(NamedTuple):
    """A run that was closed."""

    texts: list[str]
    ids: list[list[int]]
    accepted: int
    responses: int


def parts(drafter: Any) -> list[SuffixDrafter]:
    """The suffix drafters in a drafter."""
    return [drafter] if isinstance(drafter, SuffixDrafter) else [s for part in getattr(drafter, "drafters", ()) for s in parts(part)]


def ran(**spec: Any) -> Ended:
    llm = engine({"method": "suffix", "length": FIXED, **spec})
    out = [r.outputs[0] for r in llm.generate(WORK, [params(max_tokens=60)] * len(WORK))]
    (suffix,) = parts(llm.engine.loop.drafter)
    ended = Ended([o.text for o in out], [o.token_ids for o in out], llm.stats()["spec_num_accepted_tokens"], len(suffix.library.entries))
    llm.close()
    return ended


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Ended, Path]:
    store = tmp_path_factory.mktemp("store") / "said.bin"
    return ran(suffix_decoding_store=str(store)), store


def test_a_second_engine_drafts_from_what_the_first_said(first: tuple[Ended, Path]) -> None:
    before, store = first
    assert before.responses == len(WORK), "and nothing of the engine's own first steps"
    part = {"method": "suffix", "suffix_decoding_store": str(store)}
    after = ran(method="hybrid", drafters=[part, "ngram"])
    assert after.ids == before.ids
    assert after.responses == 2 * len(WORK)
    assert after.accepted > before.accepted + 60


def test_texts_warm_it_up(first: tuple[Ended, Path], tmp_path: Path) -> None:
    before, _ = first
    past = tmp_path / "past.jsonl"
    past.write_text("".join(json.dumps({"output": text}) + "\n" for text in before.texts), encoding="utf-8")
    after = ran(suffix_decoding_warm_up=str(past))
    assert after.ids == before.ids
    assert after.accepted > before.accepted + 30


def test_the_file_of_another_model_is_refused(first: tuple[Ended, Path]) -> None:
    _, store = first
    with pytest.raises(CheckpointError, match=r"ids of 'presage_tiny@.*', not of 'presage_tiny_draft@"):
        LLM("presage-tiny-draft", speculative_config={"method": "suffix", "suffix_decoding_store": str(store)}, threads=1, kv_cache_memory="16MiB")


def test_a_copy_of_a_model_is_the_same_model(tmp_path: Path) -> None:
    path = bundled_path("presage-tiny")
    assert path is not None
    copy = tmp_path / "elsewhere"
    shutil.copytree(path, copy)
    (copy / "README.md").write_text("another", encoding="utf-8")
    assert identity(copy) == identity(path)
    weights = next(copy.glob("*.safetensors"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2 + 100] ^= 1
    weights.write_bytes(data)
    assert identity(copy) != identity(path)
