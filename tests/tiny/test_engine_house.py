"""The engine as a whole: real checkpoints, replay of a real run, one thread pool, memory errors with numbers."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from presage import LLM, SamplingParams, StructuredOutputsParams
from presage.core.errors import CheckpointError, NotEnoughMemory
from presage.engine.replay import replay
from tests.shared import shared_data
from tests.tiny.llama2c import convert_llama2c

GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


def test_stories260k_equals_transformers(tmp_path: Path) -> None:
    folder = shared_data("checkpoints/stories260K")
    convert_llama2c(folder / "stories260K.bin", folder / "tok512.bin", tmp_path)
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    llm = LLM(str(tmp_path), dtype="float32", kv_cache_memory="8MiB", max_num_batched_tokens=16)
    out = llm.generate(["Once upon a time", "The little dog"], GREEDY)
    for o in out:
        ids = torch.tensor([o.prompt_token_ids])
        want = model.generate(ids, max_new_tokens=60, do_sample=False, eos_token_id=None, pad_token_id=0)[0, ids.shape[1] :].tolist()
        assert o.outputs[0].token_ids == want
    assert "there was a little" in out[0].outputs[0].text
    llm.close()


@pytest.mark.parametrize("level", ["shape", "tokens"])
def test_a_real_run_replays(tmp_path: Path, level: str) -> None:
    llm = LLM("presage-tiny", num_gpu_blocks_override=13, max_num_batched_tokens=48, max_num_seqs=6, max_model_len=512,
              decision_log=str(tmp_path), decision_log_level=level)  # fmt: skip
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    params = [
        SamplingParams(max_tokens=70, temperature=0.8, seed=1, n=2),
        SamplingParams(max_tokens=40, stop=["e "]),
        SamplingParams(max_tokens=30, structured_outputs=StructuredOutputsParams(json=schema)),
        SamplingParams(max_tokens=90, temperature=0),
        SamplingParams(max_tokens=20, prompt_logprobs=0),
        SamplingParams(max_tokens=100, ignore_eos=True),
        SamplingParams(max_tokens=100, ignore_eos=True, seed=3),
    ]
    from presage.core.request import Request

    thinker = Request(id="t", prompt=np.arange(50, 60, dtype=np.int32), sampling=SamplingParams(max_tokens=20, thinking_budget=6, ignore_eos=True),
                      extras={"thinking_end_id": 7})  # fmt: skip
    if level == "tokens":
        llm.engine.add(thinker)
    prompts = [f"def function_number_{i}(a, b, c):\n" * 4 for i in range(len(params))]
    llm.generate(prompts, params)
    llm.generate(prompts, params)
    steps, preemptions = llm.engine.loop.steps, llm.stats()["preemptions"]
    llm.close()
    assert preemptions > 0 and replay(tmp_path) == steps


def test_one_thread_pool() -> None:
    """The number of threads stays constant while steps run, and torch's own pool has one thread in the executor."""
    llm = LLM("presage-tiny", kv_cache_memory="16MiB", threads=2)
    llm.generate(["warm up"] * 3, SamplingParams(max_tokens=4))
    seen: set[int] = set()
    over = threading.Event()
    process = psutil.Process()

    def watch() -> None:
        while not over.is_set():
            seen.add(process.num_threads())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    llm.generate(["def f(x):" * 20] * 8, SamplingParams(max_tokens=60, temperature=0.9, top_p=0.9, ignore_eos=True))
    over.set()
    watcher.join()
    assert len(seen) == 1, seen
    regions: list[int] = []
    run = llm.engine.executor.step

    def spy(plan: object) -> object:
        regions.append(torch.get_num_threads())
        return run(plan)

    llm.engine.executor.step = spy
    llm.generate("x", SamplingParams(max_tokens=4, ignore_eos=True))
    assert set(regions) == {1}
    llm.close()


def test_memory_errors_hold_the_numbers() -> None:
    with pytest.raises(NotEnoughMemory) as caught:
        LLM("presage-tiny", kv_cache_memory="64KiB")
    assert any(ch.isdigit() for ch in caught.value.message) and caught.value.details


def test_an_unreachable_name_is_one_line() -> None:
    with pytest.raises(CheckpointError) as caught:
        LLM("/no/such/checkpoint")
    assert "\n" not in caught.value.message


def test_pooling_per_request() -> None:
    from presage.core.request import Request
    from presage.core.types import Kind

    llm = LLM("presage-tiny", kv_cache_memory="16MiB", max_num_batched_tokens=16)
    ids = np.array(llm.tokenizer.encode("the quick brown fox jumps over the lazy dog and more words follow"), np.int32)
    got: dict[str, list[float]] = {}
    for kind in ("last", "mean"):
        llm.engine.add(Request(id=kind, prompt=ids, kind=Kind.EMBED, extras={"pooling": kind}))
    while len(got) < 2:
        llm.engine.driver.step()
        got |= {e.id: e.pooled for e in llm._inbox if e.pooled}
    last, mean = (np.array(got[k]) for k in ("last", "mean"))
    assert abs(float(last @ last) - 1) < 1e-5 and abs(float(mean @ mean) - 1) < 1e-5 and float(last @ mean) < 0.999
    llm.close()
