"""The tokenizer's face: agreement with transformers, special ids, decoding by table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from presage.core.errors import CheckpointError, ConfigError
from presage.models.loading import open_checkpoint
from presage.tokenize import Tokenizer
from tests.shared import shared_data

TEXTS = [
    "",
    " ",
    "Hello world",
    "  two  spaces\n\n",
    "h\u00e9llo \u65e5\u672c\u8a9e \U0001f389!",
    "def f(x):\n\treturn x**2 # 1234",
    "<|im_end|>\n<s>",
]


@pytest.mark.parametrize("where", ["tokenizers/tinyllama", "tokenizers/qwen2.5", "bundled"])
def test_same_ids_and_text_as_transformers(where: str) -> None:
    ours = Tokenizer.load("presage-tiny" if where == "bundled" else shared_data(where))
    folder = open_checkpoint("presage-tiny").path if where == "bundled" else shared_data(where)
    # AutoTokenizer rewrites what Llama tokenizers do to leading spaces; tokenizer.json is what the model was served with.
    plain = where == "tokenizers/tinyllama"
    theirs = (
        transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
        if plain
        else transformers.AutoTokenizer.from_pretrained(folder)
    )
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)
        ids = theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert ours.encode_batch(TEXTS) == [ours.encode(t) for t in TEXTS]


@pytest.fixture(scope="module")
def both() -> list[Tokenizer]:
    return [Tokenizer.load("presage-tiny"), Tokenizer.load(shared_data("tokenizers/tinyllama"))]


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_decoding_by_table_equals_the_package(both: list[Tokenizer], data: st.DataObject) -> None:
    """Any ids at all. Where a run of byte tokens is broken, the package gives up on the run and we only on its broken bytes."""
    tokenizer = data.draw(st.sampled_from(both))
    assert tokenizer.table is not None
    ids = data.draw(st.lists(st.integers(0, 300) | st.integers(0, tokenizer.vocab_size + 5), max_size=12))
    for skip in (True, False):
        theirs = tokenizer.backend.decode(ids, skip_special_tokens=skip)
        ours = tokenizer.decode(ids, skip)
        if "\ufffd" not in theirs or not tokenizer.table.strip:
            assert ours == theirs
        else:
            assert "\ufffd" in ours


def test_eos_is_the_union_of_all_who_name_one(tmp_path: Path) -> None:
    source = open_checkpoint("presage-tiny").path
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 7}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 9]}))
    assert Tokenizer.load(tmp_path).eos_ids == (0, 2, 7, 9)
    assert Tokenizer.load(open_checkpoint("presage-tiny")).eos_ids == (0, 2)


def test_padding_and_truncation_of_a_training_run_are_dropped(tmp_path: Path) -> None:
    source = open_checkpoint("presage-tiny").path
    shutil.copy(source / "tokenizer_config.json", tmp_path)
    backend = tokenizers.Tokenizer.from_file(str(source / "tokenizer.json"))
    backend.enable_padding(length=64, pad_id=3)
    backend.enable_truncation(4)
    backend.save(str(tmp_path / "tokenizer.json"))
    text = "one two three four five six seven"
    assert Tokenizer.load(tmp_path).encode(text) == Tokenizer.load("presage-tiny").encode(text)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no tokenizer found"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a readable tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ConfigError, match=r"chat template .*absent\.jinja"):
        Tokenizer.load("presage-tiny", chat_template=str(tmp_path / "absent.jinja"))
    (tmp_path / "t.jinja").write_text("{% for m in messages %}{{ m.content }}")
    with pytest.raises(ConfigError, match="does not parse"):
        Tokenizer.load("presage-tiny", chat_template=str(tmp_path / "t.jinja"))
