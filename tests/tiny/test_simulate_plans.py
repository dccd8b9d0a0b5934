"""Same plans: runs of the real engine, recorded, are simulated with their measured step times; every plan is byte-equal."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from presage.core.errors import ReplayMismatch
from presage.core.request import Emission
from presage.core.sampling_params import SamplingParams
from presage.engine.inputs import make_request
from presage.engine.llm import LLM
from presage.simulate.rerun import kinds, read_run, rerun

TEXTS = [
    "Once upon a time there was a little girl who lived near a big forest. ", "The sun was warm and the birds sang in the old trees. ",
    "Tom and his dog went to the park to play with a red ball. ",
]  # fmt: skip


def busy(llm: LLM, requests: int = 14) -> int:
    """Requests of many kinds, added while steps run; some are aborted. Returns how many ended."""
    rng, ended, engine = np.random.default_rng(0), 0, llm.engine
    tokens = llm.get_tokenizer()

    def drain() -> Iterator[Emission]:
        inbox, llm._inbox[:] = list(llm._inbox), []
        yield from inbox

    sent: list[str] = []
    while ended < requests or not engine.loop.idle:
        if len(sent) < requests and (rng.random() < 0.4 or engine.loop.idle):
            for _ in range(min(int(rng.integers(1, 4)), requests - len(sent))):
                text = TEXTS[int(rng.integers(3))] * int(rng.integers(1, 6))
                params = SamplingParams(
                    temperature=float(rng.choice([0.0, 1.0])), seed=len(sent), max_tokens=int(rng.integers(2, 60)),
                    min_tokens=int(rng.choice([0, 2])), n=int(rng.choice([1, 1, 1, 2])), stop=[["the", "and"], None][int(rng.integers(2))],
                    ignore_eos=bool(rng.random() < 0.3),
                )  # fmt: skip
                request = make_request(np.array(tokens.encode(text), np.int32), params, tokens)
                sent.append(request.id)
                engine.add(request)
        elif rng.random() < 0.03 and sent:
            engine.abort(sent[int(rng.integers(len(sent)))])
        engine.driver.step()
        ended += sum(bool(e.finish) and e.branch == 0 for e in drain())
    return ended


@pytest.mark.parametrize(("level", "policy", "dials"), [("tokens", "fcfs", None), ("shape", "layered", {"work": 24, "short": 16})])
def test_the_simulator_makes_the_plans_of_the_engine(tmp_path: Path, level: str, policy: str, dials: Any) -> None:
    llm = LLM(
        "presage-tiny", decision_log=str(tmp_path), decision_log_level=level, max_num_seqs=6, max_num_batched_tokens=64,
        num_gpu_blocks_override=12, max_model_len=256, scheduling_policy=policy, scheduling_config=dials, threads=1,
    )  # fmt: skip
    ended = busy(llm)
    stats, steps = llm.stats(), llm.engine.loop.steps
    llm.close()
    run = read_run(tmp_path)
    assert ended == 14 == sum(r.id.startswith("req-") for r in run.requests) and kinds(run)["Arrive"] > 14
    assert rerun(tmp_path) == steps > 50
    assert stats["preemptions"] > 0
    partial = [d for d in map(msgspec.msgpack.decode, run.decisions) if np.frombuffer(d[2], np.int32).reshape(6, -1)[4].any()]
    assert bool(partial) == (policy == "layered")


def test_another_plan_is_found(tmp_path: Path) -> None:
    llm = LLM("presage-tiny", decision_log=str(tmp_path), decision_log_level="tokens", max_num_seqs=6, max_num_batched_tokens=64, threads=1)
    busy(llm, 6)
    llm.close()
    path = sorted(tmp_path.glob("*.plog"))[0]
    data = path.read_bytes()
    path.write_bytes(data.replace(b"max_num_batched_tokens\x40", b"max_num_batched_tokens\x20"))
    with pytest.raises(ReplayMismatch):
        rerun(tmp_path)
