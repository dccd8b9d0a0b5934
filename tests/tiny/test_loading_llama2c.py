"""A real trained checkpoint that is not ours: stories260K tells its story."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from presage.models.loading import open_checkpoint
from presage.tokenize import Detokenizer, Tokenizer
from tests.shared import shared_data
from tests.tiny.llama2c import convert_llama2c


def test_stories260k_tells_its_story(tmp_path: Path) -> None:
    source = shared_data("checkpoints/stories260K")
    folder = convert_llama2c(source / "stories260K.bin", source / "tok512.bin", tmp_path / "m")
    checkpoint = open_checkpoint(folder)
    assert checkpoint.shape("model.layers.0.self_attn.k_proj.weight") == (32, 64)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = Tokenizer.load(checkpoint)
    assert tokenizer.encode("") == [1]
    ids = model.generate(torch.tensor([[1]]), max_new_tokens=120, do_sample=False)[0].tolist()
    text = tokenizer.decode(ids)
    assert text.startswith("Once upon a time, there was a little girl named Lily.")
    # Its own text comes back as its own ids: the tokenizer's merges are the trained ones.
    again = tokenizer.encode(text)
    assert sum(a == b for a, b in zip(again, ids, strict=False)) > 0.9 * len(ids)
    stream = Detokenizer(tokenizer, ids[:1])
    assert "".join([stream.push([i]) for i in ids[1:]] + [stream.finish()]) == text


def test_zh_poems_have_characters_for_tokens(tmp_path: Path) -> None:
    source = shared_data("checkpoints/zh_poem_750K")
    folder = convert_llama2c(source / "poem_model.bin", source / "poem_tok.bin", tmp_path / "m")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = Tokenizer.load(folder)
    prompt = [1, *(tokenizer.token_to_id(c) for c in "主题：明月 体裁：五绝\n".replace(" ", "▁"))]
    ids = [i for i in prompt if i is not None]
    out = model.generate(torch.tensor([ids]), max_new_tokens=24, do_sample=False, bad_words_ids=[[0]])[0].tolist()
    # Five characters and a mark make a line of this form.
    text = tokenizer.decode(out[len(ids) :])
    assert any(len(part) == 5 for part in text.replace("。", "，").split("，")), text
