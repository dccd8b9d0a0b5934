"""tokenizer.model files: SentencePiece BPE agrees with the sentencepiece package itself, and its absence is explained."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

from presage.core.errors import CheckpointError
from presage.tokenize import Tokenizer
from tests.shared import shared_data
from tests.tiny.test_tokenize_gguf import goldens, mismatches

FILES = ["llama2/tokenizer.model", "mistral/tokenizer.model.v1", "mistral/mistral_instruct_tokenizer_240323.model.v3"]


@pytest.mark.parametrize("name", FILES)
def test_ids_equal_the_package(tmp_path: Path, name: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    shutil.copyfile(shared_data(f"tokenizers/{name}"), tmp_path / "tokenizer.model")
    tokenizer = Tokenizer.load(tmp_path)
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    for text, _ in goldens("llama-spm"):
        assert tokenizer.encode(text, add_special_tokens=False) == model.encode(text)
        assert tokenizer.encode(text) == [1, *model.encode(text)]
    if name.startswith("llama2"):
        assert mismatches(tokenizer, "llama-spm") == []


def test_without_the_package_the_message_says_so(tmp_path: Path) -> None:
    if find_spec("sentencepiece") and find_spec("tiktoken"):
        pytest.skip("both packages are installed")
    shutil.copyfile(shared_data(f"tokenizers/{FILES[0]}"), tmp_path / "tokenizer.model")
    if find_spec("sentencepiece") is None:
        with pytest.raises(CheckpointError, match="needs the packages sentencepiece or tiktoken"):
            Tokenizer.load(tmp_path)
