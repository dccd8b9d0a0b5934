"""int8 keys and values through the engine: what is stored, what is read, what it costs, and that tokens depend on nothing but the request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from presage import LLM, SamplingParams
from presage.bundled import bundled_path
from presage.core.config import EngineConfig
from presage.core.kv import KVGeometry
from presage.execute.run import Run
from presage.execute.sizing import least_kv_bytes
from presage.kernels.reference.kv_copy import LEAST, cache_shapes, gather_stored, quantise_kv, scatter_kv
from presage.layers.kv.geometry import kv_groups
from presage.layers.kv.plain import PlainKV
from presage.models.params import parse
from tests.tiny.families import small_config
from tests.tiny.plans import Part, Planner
from tests.tiny.rig import Rig, load

CHEAP = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, detokenize=False)


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Small torch operators wait longer for each other's threads than they compute, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Int8Rig(Rig):
    """A rig over int8 arrays, every scale NaN at first."""

    def __init__(self, model: object, kv_cache_dtype: str = "int8") -> None:
        super().__init__(model)  # type: ignore[arg-type]
        self.geometry = KVGeometry(groups=self.model.kv_groups(32, kv_cache_dtype), num_blocks=self.geometry.num_blocks)
        self.kv = PlainKV(self.model, self.geometry, kv_cache_dtype)
        for arrays in self.kv.groups:
            for keys, values in arrays:
                keys.fill_(-1)
                values.fill_(-1)
        self.run = Run(self.model, self.kv)
        self.planner = Planner(self.geometry, len(self.model.layers))


def test_rows_come_back_within_half_a_step() -> None:
    """Codes times scales are the values to half of the largest magnitude's 127th; rows of zeros and NaN keep to themselves."""
    x = torch.randn(4, 3, 32) * torch.tensor([1e-6, 1.0, 1e6])[:, None]
    x[1, 1], x[2, 0, 5], x[3, 2] = 0.0, float("nan"), LEAST / 2
    codes, scales = quantise_kv(x)
    good = ~x.isnan().any(-1)
    error = (codes * scales[..., None] - x).abs().amax(-1)
    assert (error[good] <= 0.501 * scales[good] + LEAST).all()
    assert codes[1, 1].eq(0).all() and scales[1, 1] == 0 and scales[3, 2] == 0
    assert scales[2, 0].isnan() and codes[2, 0, 5] == 0
    k, v = (torch.full(shape, -1, dtype=torch.int8) for shape in cache_shapes(2, 3, 32, torch.int8))
    slots = torch.tensor([5, 33, 63, 0])
    scatter_kv(k, v, slots, x, x.flip(0))
    got = gather_stored(k, v, slots)
    assert torch.equal(got[0], codes) and torch.equal(got[1], codes.flip(0))
    torch.testing.assert_close(got[2], scales, atol=0, rtol=0, equal_nan=True)
    torch.testing.assert_close(got[3], scales.flip(0), atol=0, rtol=0, equal_nan=True)


def test_blocks_are_priced_as_stored() -> None:
    """Half of bf16's bytes and a scale per token and head; a fingerprint of its own; the arrays are as large as the price."""
    params = parse(small_config("llama"))
    wide, small = (kv_groups(params, dtype, 32)[0] for dtype in ("bfloat16", "int8"))
    per = 2 * params.layers * params.kv_heads * 32
    assert (wide.block_bytes, small.block_bytes) == (per * 2 * params.head_dim, per * (params.head_dim + 4))
    assert wide.fingerprint != small.fingerprint
    plain, int8 = (EngineConfig.model_validate({"cache": {"kv_cache_dtype": d}}) for d in ("auto", "int8"))
    assert least_kv_bytes(plain, params, "bfloat16") * small.block_bytes == least_kv_bytes(int8, params, "bfloat16") * wide.block_bytes
    rig = Int8Rig(load(bundled_path("presage-tiny"), torch.bfloat16, max_len=256))
    held = sum(x.nbytes for arrays in rig.kv.groups for pair in arrays for x in pair)
    assert held == sum(g.block_bytes * n for g, n in zip(rig.geometry.groups, rig.geometry.num_blocks, strict=True))


@pytest.fixture(scope="module")
def path() -> Path:
    """The bundled model."""
    return bundled_path("presage-tiny")


def logits_of(rig: Rig, ids: list[int], chunk: int) -> torch.Tensor:
    """Logits of a prompt served in chunks."""
    rows = []
    for start in range(0, len(ids), chunk):
        stop = min(len(ids), start + chunk)
        rows += rig.logits([Part(1, start, ids[start:stop])])
    return torch.cat(rows)


def test_logits_are_close_to_wide_ones_and_kernels_to_twins(path: Path) -> None:
    """Over 100 tokens of code: int8 moves logits less than bf16 rounding moves them twice over; the twin agrees; chunks change no bit."""
    ids = [int(i) for i in torch.randint(3, 500, (100,), generator=torch.Generator().manual_seed(0))]
    model = load(path, torch.float32, max_len=256)
    exact = logits_of(Int8Rig(model, "auto"), ids, 100)
    got = logits_of(Int8Rig(model), ids, 100)
    assert torch.equal(logits_of(Int8Rig(model), ids, 33), got)
    spread = exact.std()
    assert (got - exact).abs().mean() < 0.02 * spread
    twin = logits_of(Int8Rig(load(path, torch.float32, "reference", max_len=256)), ids, 100)
    assert (got - twin).abs().mean() < 0.004 * spread


def test_tokens_do_not_depend_on_batch_chunks_or_preemption() -> None:
    """Greedy tokens: together, alone, chunked and preempted; a second run hits the prefixes of the first."""
    shared = "def main(arguments):\n    import sys\n    value = sys.argv[1]\n" * 3
    prompts = [shared, "class A:\n", shared + "    x = 1", "for i in range(10):\n    print(" * 2]
    options = {"dtype": "bfloat16", "kv_cache_dtype": "int8"}
    roomy = LLM("presage-tiny", kv_cache_memory="8MiB", max_num_seqs=8, **options)
    assert roomy.engine.executor.kv.dtype == torch.int8
    want = [o.outputs[0].token_ids for o in roomy.generate(prompts, CHEAP)]
    assert [o.outputs[0].token_ids for o in roomy.generate(prompts[::-1], CHEAP)] == want[::-1]
    assert roomy.stats()["prefix_hits"] > 0
    alone = [roomy.generate(p, CHEAP)[0].outputs[0].token_ids for p in prompts]
    roomy.close()
    assert alone == want
    tight = LLM("presage-tiny", num_gpu_blocks_override=6, max_num_batched_tokens=19, max_num_seqs=4, max_model_len=128, **options)
    assert [o.outputs[0].token_ids for o in tight.generate(prompts, CHEAP)] == want
    assert tight.stats()["preemptions"] > 0
    tight.close()
