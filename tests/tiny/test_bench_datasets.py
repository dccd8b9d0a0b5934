"""Data sets: lengths, seeds, files; and the in-process driver on the bundled model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from presage.bench.datasets import random_ids, random_samples, sharegpt_samples
from presage.bench.offline import TimedEngine, decode_rate, latency, throughput
from presage.core.config import EngineConfig
from presage.core.errors import ConfigError, NeverFits, RequestError
from presage.tokenize.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def codec() -> Tokenizer:
    return Tokenizer.load("presage-tiny")


def test_random_prompts_have_their_lengths_and_no_special_ids(codec: Tokenizer) -> None:
    found = random_samples(codec, 20, inputs=30, outputs=9, ratio=0.5, prefix=4, seed=1)
    assert all(4 + 15 <= len(s.ids) <= 4 + 45 and 4 <= s.max_tokens <= 13 for s in found)
    assert len({tuple(s.ids[:4]) for s in found}) == 1 and len({tuple(s.ids[4:9]) for s in found}) == 20
    assert not {i for s in found for i in s.ids} & codec.special_ids
    assert [s.ids for s in found] == [s.ids for s in random_samples(codec, 20, 30, 9, 0.5, 4, seed=1)]


def test_random_ids_avoid_what_is_banned() -> None:
    assert {i for row in random_ids(50, 10, 5, 0, frozenset({0, 3})) for i in row} == {1, 2, 4}


def test_bad_random_lengths_are_refused(codec: Tokenizer) -> None:
    with pytest.raises(ConfigError):
        random_samples(codec, 3, 10, 10, ratio=1.0, prefix=0, seed=0)


def talk(question: str, answer: str) -> dict[str, list[dict[str, str]]]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def test_conversations_give_questions_and_answer_lengths(codec: Tokenizer, tmp_path: Path) -> None:
    rows = [talk("What is the name of the little dog?", "The little dog is called Max."), talk("Hi", "Ok"), {"conversations": []}]
    (tmp_path / "talks.json").write_text(json.dumps(rows))
    (tmp_path / "talks.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    for name in ("talks.json", "talks.jsonl"):
        [sample] = sharegpt_samples(codec, str(tmp_path / name), 1, None, 4096, 0)
        assert sample.text == "What is the name of the little dog?"
        assert sample.max_tokens == len(codec.encode("The little dog is called Max.", add_special_tokens=False))
    with pytest.raises(ConfigError, match="1 usable"):
        sharegpt_samples(codec, str(tmp_path / "talks.json"), 2, None, 4096, 0)
    (tmp_path / "bad.json").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="not a file of conversations"):
        sharegpt_samples(codec, str(tmp_path / "bad.json"), 1, None, 4096, 0)


@pytest.fixture(scope="module")
def engine() -> Iterator[TimedEngine]:
    made = TimedEngine(EngineConfig.of(model="presage-tiny", kernels="reference", max_num_seqs=4, max_model_len=128))
    yield made
    made.close()


def test_a_batch_gives_every_token_it_was_asked_for(engine: TimedEngine) -> None:
    runs = latency(engine, batch=3, inputs=6, outputs=5, iterations=2, warmups=1, seed=0)
    assert len(runs) == 2
    for r in (r for run in runs for r in run):
        assert r.ok and r.n_out == 5 and r.n_in == 6 and r.t_sched < r.chunks[0] <= r.t_done


def test_throughput_counts_and_decode_is_a_difference(engine: TimedEngine) -> None:
    found = throughput(engine, 6, 4, 3, seed=1)
    assert found["total_num_tokens"] == 42
    assert found["output_tokens_per_second"] == pytest.approx(18 / found["elapsed_time"])
    rate = decode_rate(engine, 4, 4, 12, seed=5)
    assert rate["decode_tokens_per_second"] == pytest.approx(48 / max(rate["long_time"] - rate["short_time"], 1e-9))


def test_a_refused_prompt_raises_its_error(engine: TimedEngine) -> None:
    with pytest.raises((RequestError, NeverFits)):
        engine.run([[5] * 126, [5] * 200], 20)
    assert engine.run([[5, 6, 7]], 2)[0].n_out == 2
