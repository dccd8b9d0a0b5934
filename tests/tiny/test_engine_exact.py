"""Greedy text through the engine equals transformers' whatever the batch, the chunks, prefix hits or preemption did to it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from presage import LLM, SamplingParams
from presage.bundled import bundled_path
from tests.tiny.families import CASES, write_checkpoint

PROMPTS = [list(np.random.default_rng(i).integers(3, 290, n)) for i, n in enumerate((1, 9, 33, 70, 64, 70))]
PROMPTS[5] = PROMPTS[3][:66] + [5, 6, 7, 8]  # shares two whole blocks with another prompt
TOKENS = 40
CHEAP = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, detokenize=False)


def greedy(model: Any, prompt: list[int]) -> list[int]:
    """transformers, one prompt at a time, the whole sequence anew for each token: nothing cached, nothing batched."""
    ids = [int(i) for i in prompt]
    with torch.inference_mode():
        for _ in range(TOKENS):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def outputs(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    return [o.outputs[0].token_ids for o in llm.generate([[int(i) for i in p] for p in prompts], CHEAP)]


@pytest.mark.parametrize("case", list(CASES))
def test_greedy_equals_transformers(case: str, tmp_path: Path) -> None:
    model = write_checkpoint(case, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_path("presage-tiny") / name, tmp_path / name)
    want = [greedy(model, p) for p in PROMPTS]
    roomy = LLM(str(tmp_path), dtype="float32", kv_cache_memory="8MiB", max_num_seqs=8)
    assert outputs(roomy, PROMPTS) == want, "batched"
    assert outputs(roomy, PROMPTS[::-1]) == want[::-1], "prefix hits, other order"
    assert roomy.stats()["prefix_hits"] > 0
    roomy.close()
    tight = LLM(str(tmp_path), dtype="float32", num_gpu_blocks_override=8, max_num_batched_tokens=23, max_num_seqs=4, max_model_len=128)
    assert outputs(tight, PROMPTS) == want, "chunked and preempted"
    full = all(not g.window for g in tight.engine.executor.geometry.groups)
    assert tight.stats()["preemptions"] > 0 or not full
    tight.engine.loop.receiver.audit()
    tight.close()


@pytest.mark.parametrize(("policy", "dials"), [("layered", {"work": 32, "short": 16}), ("priority", {}), ("shortest", {"margin": 5})])
def test_policies_do_not_change_tokens(policy: str, dials: dict[str, int]) -> None:
    prompts = [list(range(20 + i, 20 + i + n)) for i, n in enumerate((5, 150, 90, 200, 40))]
    kw = {"kv_cache_memory": "16MiB", "max_num_batched_tokens": 128, "max_num_seqs": 4}
    plain, other = LLM("presage-tiny", **kw), LLM("presage-tiny", scheduling_policy=policy, scheduling_config=dials, **kw)
    assert outputs(plain, prompts) == outputs(other, prompts)
    assert other.stats()["policy_errors"] == 0
    plain.close()
    other.close()


def test_sampled_tokens_do_not_depend_on_the_batch() -> None:
    llm = LLM("presage-tiny", kv_cache_memory="16MiB", max_num_batched_tokens=64, max_num_seqs=6)
    params = [
        SamplingParams(temperature=0.9, top_p=0.9, top_k=50, seed=i, max_tokens=30, repetition_penalty=1.1, presence_penalty=0.2) for i in range(5)
    ]
    prompts = ["def main():", "Once upon a time", "SELECT name FROM", "import numpy as np\n", "The"]
    together = [o.outputs[0].token_ids for o in llm.generate(prompts, params)]
    alone = [llm.generate(p, s)[0].outputs[0].token_ids for p, s in zip(prompts, params)]
    assert together == alone
    llm.close()


def test_branches_equal_seeded_runs_and_share_the_prompt() -> None:
    llm = LLM("presage-tiny", kv_cache_memory="16MiB")
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=16, n=4)
    first, again = (llm.generate("def f(x):\n    return", params)[0].outputs for _ in range(2))
    assert [o.token_ids for o in first] == [o.token_ids for o in again]
    assert len({tuple(o.token_ids) for o in first}) > 1
    llm.close()
