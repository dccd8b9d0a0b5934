"""Configurations as plain data: real config.json files, and no torch."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from presage.core.errors import CheckpointError, UnsupportedModel
from presage.layers.kv.geometry import kv_groups
from presage.models.params import parse
from tests.shared import shared_data
from tests.tiny.families import small_config

# Published parameter counts, in billions (embedding and head included).
PUBLISHED = {
    "Qwen--Qwen3-0.6B": (0.596, 28),
    "Qwen--Qwen3-8B": (8.19, 36),
    "Qwen--Qwen3-30B-A3B": (30.5, 48),
    "Qwen--Qwen3-235B-A22B": (235.1, 94),
    "meta-llama--Meta-Llama-3.1-8B": (8.03, 32),
    "meta-llama--Meta-Llama-3.1-405B": (405.9, 126),
    "mistralai--Mixtral-8x7B-v0.1": (46.7, 32),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_of_published_models(name: str) -> None:
    config = json.loads(shared_data(f"model_configs/{name}_config.json").read_text())
    params = parse(config)
    billions, layers = PUBLISHED[name]
    assert params.elements() / 1e9 == pytest.approx(billions, rel=0.005)
    assert params.layers == layers == len(params.windows) == len(params.ropes) == len(params.moe)


def test_an_architecture_that_is_not_there_is_refused() -> None:
    config = json.loads(shared_data("model_configs/deepseek-ai--DeepSeek-V3_config.json").read_text())
    with pytest.raises(UnsupportedModel, match=r"deepseek_v3.*llama"):
        parse(config)


def test_a_missing_key_is_named() -> None:
    config = small_config("llama").to_dict()
    del config["hidden_size"]
    with pytest.raises(CheckpointError, match=r"llama.*hidden_size"):
        parse(config)


def test_groups_by_window_and_their_bytes() -> None:
    params = parse(small_config("gemma3_text").to_dict())
    near, full = kv_groups(params, "bfloat16", 32)
    assert (near.window, full.window) == (8, 0)
    assert near.layers == ((0, 0), (1, 1), (3, 2)) and full.layers == ((2, 0),)
    assert near.block_bytes == 3 * 2 * 2 * 16 * 2 * 32 and full.block_bytes == 2 * 2 * 16 * 2 * 32
    assert near.fingerprint == full.fingerprint != kv_groups(params, "float32", 32)[0].fingerprint


def test_parsing_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; import presage.models.params, presage.layers.kv.geometry"
    subprocess.run([sys.executable, "-c", code], check=True)
