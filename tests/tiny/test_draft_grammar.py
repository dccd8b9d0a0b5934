"""What a grammar forces is drafted: fewer steps, the same output, whoever else drafts."""

import json
from typing import Any

import pytest

from presage import LLM, SamplingParams
from presage.core.errors import ConfigError
from presage.core.sampling_params import StructuredOutputsParams
from presage.draft.grammar import GrammarDrafter

SCHEMA = {
    "type": "object",
    "properties": {
        "shipping_address": {"type": "string", "maxLength": 6},
        "delivery_status": {"enum": ["delivered_to_customer", "returned_to_sender"]},
        "refund_requested": {"type": "boolean"},
    },
    "required": ["shipping_address", "delivery_status", "refund_requested"],
    "additionalProperties": False,
}  # fmt: skip
JSON = StructuredOutputsParams(json=SCHEMA)


def run(spec: dict[str, Any] | None, temperature: float = 0.0) -> tuple[list[Any], dict[str, float]]:
    """(ids, statistics) of three constrained requests beside one that is not."""
    llm = LLM(model="presage-tiny", speculative_config=spec, num_gpu_blocks_override=64, max_num_seqs=4)
    params = [SamplingParams(max_tokens=120, temperature=temperature, seed=i, structured_outputs=JSON) for i in range(3)]
    params.append(SamplingParams(max_tokens=20, temperature=temperature, seed=9))
    out = llm.generate(["The order:", "A parcel.", "Once", "Once upon a time"], params)
    stats = llm.stats()
    llm.close()
    for o in out[:3]:
        assert set(json.loads(o.outputs[0].text)) == set(SCHEMA["properties"])  # type: ignore[arg-type]
    return [o.outputs[0].token_ids for o in out], stats


@pytest.fixture(scope="module")
def plain() -> tuple[list[Any], dict[str, float]]:
    """Without speculation."""
    return run(None)


@pytest.mark.parametrize(
    "spec",
    [
        {"method": "grammar", "length": {"policy": "fixed", "num_speculative_tokens": 32}},
        {"method": "ngram", "length": {"policy": "fixed", "num_speculative_tokens": 8}},
        {"method": "hybrid", "drafters": ["grammar", "suffix"], "length": {"policy": "fixed", "num_speculative_tokens": 8}},
        {"method": "suffix", "rule": "rejection", "length": {"policy": "fixed", "num_speculative_tokens": 8}},
    ],
)
def test_same_ids_in_fewer_steps(plain: tuple[list[Any], dict[str, float]], spec: dict[str, Any]) -> None:
    """Greedy: what was forced came by drafts, for nothing."""
    ids, stats = run(spec)
    assert ids == plain[0]
    assert stats["spec_num_accepted_tokens"] > 20
    assert stats["steps"] < plain[1]["steps"]


def test_sampled_keyed() -> None:
    """The keyed rule: seeds give the same ids."""
    assert run({"method": "grammar"}, 1.0)[0] == run(None, 1.0)[0]


def test_the_run_is_what_the_grammar_forces() -> None:
    """Spelt as the tokenizer spells it in the middle of a text."""
    llm = LLM(model="presage-tiny", num_gpu_blocks_override=64)
    tokenizer, room = llm.tokenizer, llm.engine.grammar
    llm.close()
    drafter = GrammarDrafter(room, tokenizer)
    for text in ('{"shipping_address":"', 'ress":"', " two words", "\n", "é"):
        assert tokenizer.join(drafter.spell(text), False) == text.encode()
    assert drafter.spell("") == []
    with pytest.raises(ConfigError):
        GrammarDrafter(room, tokenizer, 0)

