"""A row's bits never depend on how the step was cut: chunks, neighbours, trees, layer ranges, block sizes."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from presage.core.errors import StepFailed
from presage.core.plan import Moves
from presage.execute.batch import Batch
from presage.execute.walk import compile_legs, layers
from presage.layers.state import State
from presage.models.base import Model
from tests.tiny.plans import Part
from tests.tiny.rig import Rig, load, tiny

CASES = ["llama", "gemma2", "qwen3_moe", "mistral"]
LENGTH = 75


def prompt(seed: int, length: int = LENGTH) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


BOTH = [(c, d) for c in CASES for d in (torch.float32, torch.bfloat16)]


@pytest.fixture(scope="module", params=BOTH, ids=lambda p: f"{p[0]}-{str(p[1])[6:]}")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    case, dtype = request.param
    return tiny(case, tmp_path_factory.mktemp(case), dtype)[1]


def whole(model: Model, ids: list[int]) -> torch.Tensor:
    return Rig(model).logits([Part(0, 0, ids)])[0]


@pytest.mark.parametrize("sizes", [[1] * 12 + [40] + [1] * 23, [7] * 11, [32, 32, 11], [74, 1]], ids=["1", "7", "32", "74+1"])
def test_chunks_equal_the_whole(model: Model, sizes: list[int]) -> None:
    ids, rig, at, got = prompt(1), Rig(model), 0, []
    for size in sizes:
        tokens = ids[at : at + size]
        if tokens:
            got += rig.logits([Part(3, at, tokens)])
        at += size
    assert torch.equal(torch.cat(got), whole(model, ids))


def test_neighbours_do_not_matter(model: Model) -> None:
    prompts = [prompt(s, n) for s, n in ((1, 75), (2, 3), (3, 40), (4, 1))]
    alone = [whole(model, p) for p in prompts]
    rig = Rig(model)
    first = rig.logits([Part(i, 0, p[: len(p) // 2]) for i, p in enumerate(prompts) if len(p) > 1])
    second = rig.logits([Part(i, len(p) // 2, p[len(p) // 2 :]) for i, p in reversed(list(enumerate(prompts)))])
    joined = [torch.cat([a, b]) for a, b in zip([*first, torch.empty(0, 300)], reversed(second), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(joined, alone, strict=True))


def test_a_tree_equals_its_paths(model: Model) -> None:
    ids, tree = prompt(1), [(5, -1), (6, -1), (7, 0), (8, 0), (9, 2), (10, 1)]
    rig = Rig(model)
    rig.logits([Part(0, 0, ids[:-1]), Part(1, 0, prompt(2))])
    got = rig.logits([Part(1, LENGTH, [11], [(3, -1)]), Part(0, LENGTH - 1, ids[-1:], tree)])[1]
    for path in ([0, 2, 4], [0, 3], [1, 5]):
        line = whole(model, ids + [tree[n][0] for n in path])[LENGTH - 1 :]
        assert torch.equal(got[[0] + [n + 1 for n in path]], line)


def test_an_accepted_path_moves_down(model: Model) -> None:
    ids, tree, path = prompt(1), [(5, -1), (6, -1), (7, 1), (8, 2)], [1, 2, 3]
    rig = Rig(model)
    rig.logits([Part(0, 0, ids, tree)])
    groups = range(len(rig.geometry.groups))
    src, dst = (np.concatenate([rig.planner.slots(g, 0, LENGTH + np.array(x)) for g in groups]) for x in (path, range(3)))
    rig.kv.move(Moves(row_group=np.repeat(np.array(groups, np.int32), 3), row_src=src, row_dst=dst))
    (got,) = rig.logits([Part(0, LENGTH + 3, [9])])
    assert torch.equal(got[0], whole(model, [*ids, 6, 7, 8, 9])[-1])


def test_copied_blocks_are_read_like_the_originals(model: Model) -> None:
    ids, rig = prompt(1), Rig(model)
    rig.logits([Part(0, 0, ids)])
    groups = range(len(rig.geometry.groups))
    pairs = [(g, a, b) for g in groups for a, b in zip(rig.planner.table(g, 0, LENGTH), rig.planner.table(g, 1, LENGTH), strict=True)]
    group, src, dst = (np.array(x, np.int32) for x in zip(*pairs, strict=True))
    rig.kv.move(Moves(group=group, src=src, dst=dst))
    a, b = rig.logits([Part(0, LENGTH, [4]), Part(1, LENGTH, [4])])
    assert torch.equal(a, b) and not torch.isnan(a).any()


def test_blocks_of_64_tokens_change_nothing(model: Model) -> None:
    ids = prompt(1)
    rig = Rig(model, block_size=64)
    rig.logits([Part(0, 0, ids[:50])])
    assert torch.equal(rig.logits([Part(0, 50, ids[50:])])[0], whole(model, ids)[50:])


def test_layer_ranges_equal_the_whole_stack(model: Model) -> None:
    """A layered prefill: two chunks go up the stack in steps of their own, beside a sequence that decodes."""
    n, ids, other = len(model.layers), prompt(1), prompt(2, 20)
    rig, decoded = Rig(model), []
    rig.logits([Part(1, 0, other[:-2])])
    decoded += rig.logits([Part(0, 0, ids[:40], layer1=1), Part(1, 18, other[18:19])])[1:]
    parts = [Part(0, 40, ids[40:], layer1=1), Part(1, 19, other[19:]), Part(0, 0, ids[:40], layer0=1, layer1=n)]
    plan = rig.planner.plan(parts)
    h = rig.hidden(plan)
    with torch.inference_mode():
        decoded.append(model.head(h[plan.rows[1] : plan.rows[2]], rig.run.work).clone())
        low = model.head(h[plan.rows[2] :], rig.run.work).clone()
    high = rig.logits([Part(0, 40, ids[40:], layer0=1, layer1=n)])[0]
    assert torch.equal(torch.cat([low, high]), whole(model, ids))
    assert torch.equal(torch.cat(decoded), whole(model, other)[18:])
    assert rig.run.bank.nbytes == 0


def test_stages_cut_at_any_cursor_equal_the_whole(model: Model) -> None:
    ids, rig = prompt(1), Rig(model)
    plan = rig.planner.plan([Part(0, 0, ids)])
    batch = Batch.of(plan, plan.ids, rig.geometry, model.ops)
    with torch.inference_mode():
        h = torch.empty(LENGTH, model.params.d)
        model.embed(batch.ids, batch.positions, h)
        state, n = State(batch.rows, h), len(model.layers)
        cursors = [(i, j) for i in range(n) for j in range(len(model.layers[i].stages))] + [(n, 0)]
        names = [stage.name for a, b in pairwise(cursors) for stage, _ in layers(rig.run, state, batch, a, b)]
        assert names == [stage.name for layer in model.layers for stage in layer.stages]
        assert torch.equal(model.head(state.h, rig.run.work), whole(model, ids))


def test_rows_may_leave_between_two_stages(model: Model) -> None:
    """CacheBlend's cut: keys of all rows are written, then only some rows attend."""
    ids, rig, n = prompt(1), Rig(model), len(model.layers)
    plan = rig.planner.plan([Part(0, 0, ids)])
    batch, places = Batch.of(plan, plan.ids, rig.geometry, model.ops), torch.tensor([2, 30, 31, 74])
    with torch.inference_mode():
        h = torch.empty(LENGTH, model.params.d)
        model.embed(batch.ids, batch.positions, h)
        state = State(batch.rows, h)
        for _ in layers(rig.run, state, batch, (0, 0), (n - 1, 1)):
            pass
        state, batch = state.select(places), batch.select(places)
        for _ in layers(rig.run, state, batch, (n - 1, 1), (n, 0)):
            pass
        assert torch.equal(model.head(state.h, rig.run.work), whole(model, ids)[places])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["gemma2", "qwen3_moe"])
def test_teams_of_any_size_give_the_same_bits(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _, one = tiny(case, tmp_path, dtype)
    expected = whole(one, prompt(1))
    assert all(torch.equal(whole(load(tmp_path, dtype, max_len=256, threads=n), prompt(1)), expected) for n in (2, 3))


def test_filled_layers_hold_what_a_run_would_have_written(model: Model) -> None:
    """SwiftKV's verb: with the right hidden states, keys and values of a skipped layer are those of the layer itself."""
    ids, full, rig = prompt(1), Rig(model), Rig(model)
    full.logits([Part(0, 0, ids)])
    plan = rig.planner.plan([Part(0, 0, ids, layer1=1)])
    h = rig.hidden(plan)
    batch = Batch.of(plan, plan.ids, rig.geometry, model.ops)
    with torch.inference_mode():
        model.fill(State(batch.rows, h), [rig.run.context(1, batch)])
    for layer in (0, 1):
        ran, filled = full.kv.layers[layer], rig.kv.layers[layer]
        assert torch.equal(ran.keys.nan_to_num(7.0), filled.keys.nan_to_num(7.0))
        assert torch.equal(ran.values.nan_to_num(7.0), filled.values.nan_to_num(7.0))


def test_selecting_twice_is_selecting_once(model: Model) -> None:
    rig = Rig(model)
    plan = rig.planner.plan([Part(0, 0, prompt(1, 20), [(5, -1), (6, 0)]), Part(1, 0, prompt(2, 9))])
    batch = Batch.of(plan, plan.ids, rig.geometry, model.ops)
    first, second = torch.tensor([0, 3, 4, 19, 20, 21, 25, 30]), torch.tensor([1, 4, 5, 7])
    a, b = batch.select(first).select(second), batch.select(first[second])
    assert a.tree is not None and b.tree is not None and torch.equal(a.tree, b.tree)
    for name in ("rows", "ids", "positions", "index", "span_of"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert all(torch.equal(x.slots, y.slots) for x, y in zip(a.tables, b.tables, strict=True))


def test_a_missing_bank_entry_is_an_error(model: Model) -> None:
    rig = Rig(model)
    with pytest.raises(StepFailed, match="slot 5"):
        rig.hidden(rig.planner.plan([Part(5, 0, [1, 2, 3], layer0=1)]))


def test_legs_cover_exactly_the_ranges() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        layer0 = rng.integers(0, 6, 5).astype(np.int32)
        layer1 = layer0 + rng.integers(1, 4, 5).astype(np.int32)
        seen: dict[int, list[int]] = {s: [] for s in range(5)}
        for leg in compile_legs(layer0, layer1):
            for s in leg.spans.tolist():
                seen[s] += range(leg.start, leg.stop)
            assert set(leg.joins.tolist()) == {s for s in leg.spans.tolist() if layer0[s] == leg.start}
            assert set(leg.leaves.tolist()) == {s for s in leg.spans.tolist() if layer1[s] == leg.stop}
        assert all(seen[s] == list(range(layer0[s], layer1[s])) for s in range(5))
