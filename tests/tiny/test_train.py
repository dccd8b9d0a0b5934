"""A micro run of the recipe: loss falls, a resumed run has the same bits, the export is what transformers reads, hashes hold."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from presage.bundled import bundled_path
from presage.core.errors import CheckpointError, ConfigError
from presage.tokenize import Tokenizer
from presage.train.__main__ import main
from presage.train.data import Corpus, open_corpus, prepare
from presage.train.loop import Trainer, schedule
from presage.train.model import Llama, config_json, export, load_weights
from presage.train.optim import orthogonalise
from presage.train.recipe import DRAFT, TINY, Recipe, Shape
from presage.train.sources import chatml, conversation, documents
from tests.shared import shared_data

MICRO = Recipe(
    "micro",
    Shape(layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, intermediate=64, vocab=300),
    steps=20,
    batch=4,
    length=32,
    warmup=4,
    checkpoint_every=8,
    python=False,
    packages=(),
    texts=("a.txt",),
    conversations=("c.jsonl.gz",),
    validation_windows=2,
)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, Path]:
    data = tmp_path_factory.mktemp("data")
    lines = [f"Number {i} comes after number {i - 1}, and the cat sat on mat {i % 7}.\n" for i in range(9000)]
    (data / "a.txt").write_text("\n".join(lines))
    rows = [{"instruction": f"Add {i} and 1.", "input": "", "output": str(i + 1)} for i in range(200)]
    (data / "c.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in rows).encode()))
    out = tmp_path_factory.mktemp("run") / "data"
    return prepare(MICRO, data, out), out


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Micro matrices on two busy cores spend their time waiting for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: t.clone() for n, t in trainer.model.state_dict().items()}


def test_resumed_run_has_the_same_bits_and_loss_falls(corpus: tuple[Corpus, Path], tmp_path: Path) -> None:
    whole = Trainer(MICRO, corpus[0], tmp_path / "whole")
    before = whole.validate()
    whole.run()
    # Cut at step 11, in between checkpoints: steps 9 to 11 are done again from the checkpoint at 8.
    cut = Trainer(MICRO, corpus[0], tmp_path / "cut")
    cut.run(11)
    (tmp_path / "cut/checkpoints/step_000011/record.json").unlink()
    again = Trainer(MICRO, corpus[0], tmp_path / "cut")
    assert again.step == 8
    again.run()
    for name, tensor in weights(whole).items():
        assert torch.equal(tensor, weights(again)[name]), name
    logs = [[json.loads(x) for x in (tmp_path / d / "train_log.jsonl").read_text().splitlines()] for d in ("whole", "cut")]
    for a, b in zip(*logs, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert [r["step"] for r in logs[0]] == list(range(1, 21))
    assert whole.validate() < before - 0.5
    assert logs[0][-1]["loss"] < logs[0][0]["loss"] - 0.5


def test_checkpoints_chain_and_refuse_tampering(corpus: tuple[Corpus, Path], tmp_path: Path) -> None:
    Trainer(MICRO, corpus[0], tmp_path).run(10)
    records = [json.loads(f.read_text()) for f in sorted(tmp_path.glob("checkpoints/*/record.json"))]
    assert [r["step"] for r in records] == [8, 10]
    assert records[0]["before"] == ""
    assert len(records[1]["before"]) == 64
    with pytest.raises(CheckpointError, match="another recipe"):
        Trainer(replace(MICRO, seed=1), corpus[0], tmp_path)
    file = tmp_path / "checkpoints/step_000010/model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match=r"not the file that its record\.json describes"):
        Trainer(MICRO, corpus[0], tmp_path)


def test_export_gives_the_same_logits_in_transformers(corpus: tuple[Corpus, Path], tmp_path: Path) -> None:
    trainer = Trainer(MICRO, corpus[0], tmp_path / "run")
    trainer.run(3)
    export(trainer.model, corpus[1] / "tokenizer.json", tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    ours = Llama(MICRO.shape)
    load_weights(ours, tmp_path / "model/model.safetensors")
    ids = torch.from_numpy(corpus[0].windows(2, 32))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=0, atol=2e-5)
    tokenizer = Tokenizer.load(tmp_path / "model")
    assert tokenizer.eos_ids == (0, 2)
    text = "Number 123 <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_the_plain_model_reproduces_the_bundled_checkpoint() -> None:
    """The README's 1.5616 nats were measured on text that is not in this repository; equal logits on any text are the stronger check."""
    for recipe, name in ((TINY, "presage-tiny"), (DRAFT, "presage-tiny-draft")):
        folder = bundled_path(name)
        assert folder is not None
        stored = json.loads((folder / "config.json").read_text())
        assert stored == config_json(recipe.shape)
        model = Llama(recipe.shape)
        load_weights(model, folder / "model.safetensors")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = torch.tensor([Tokenizer.load(name).encode("def add(a, b):\n    return a + b\n\nSELECT name FROM singer WHERE age = 20")])
        with torch.no_grad():
            torch.testing.assert_close(model(ids), theirs(ids).logits, rtol=0, atol=1e-4)


def test_corpus_is_reproducible_and_documented(corpus: tuple[Corpus, Path]) -> None:
    found, out = corpus
    lines = [json.loads(x) for x in (out / "manifest.jsonl").read_text().splitlines()]
    assert [x["source"] for x in lines] == ["tokenizer", "a.txt", "c.jsonl.gz"]
    assert sum(x.get("train_tokens", 0) for x in lines) == len(found.train)
    assert sum(x.get("validation_tokens", 0) for x in lines) == len(found.validation)
    assert lines[2]["documents"] == 800
    a, b = found.batch(0, 5, 4, 32), found.batch(0, 5, 4, 32)
    assert (a == b).all()
    assert (a != found.batch(0, 6, 4, 32)).any()
    with (out / "manifest.jsonl").open("a") as f:
        f.write(" ")
    with pytest.raises(ConfigError, match="was changed"):
        open_corpus(out)
    (out / "manifest.jsonl").write_text((out / "manifest.jsonl").read_text()[:-1])


def test_missing_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.txt"):
        prepare(MICRO, tmp_path, tmp_path / "out")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ConfigError, match=r"c\.jsonl\.gz is missing"):
        prepare(MICRO, tmp_path, tmp_path / "out")
    with pytest.raises(ConfigError, match="no_such_package_here"):
        prepare(replace(MICRO, packages=("no_such_package_here",)), tmp_path, tmp_path / "out")


def test_command_line_names_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "draft", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--without-packages"]) == 1
    assert capsys.readouterr().err == f"error: training text {tmp_path / TINY.texts[0]} is missing\n"


def test_python_sources_leave_tests_out(tmp_path: Path) -> None:
    """The standard library's own test suite is a third of it and no example of anything."""
    names = [d.name for d in documents(replace(MICRO, packages=("pydantic",), texts=(), conversations=()), tmp_path)]
    assert "pydantic/main.py" in names
    assert all(n.startswith("pydantic/") for n in names)
    found = (d.name for d in documents(replace(MICRO, python=True, texts=(), conversations=()), tmp_path))
    first = [next(found) for _ in range(60)]
    assert "stdlib/argparse.py" in first
    assert not [n for n in first if "/test/" in n or "/tests/" in n]


def test_schedule_and_orthogonalisation() -> None:
    rates = [schedule(TINY, s) for s in (0, 99, 100, 1000, 1630, 2172)]
    assert rates[0] == pytest.approx(0.01)
    assert rates[1:4] == [1.0, 1.0, 1.0]
    assert 0.45 < rates[4] < 0.55
    assert rates[5] == pytest.approx(0.02, abs=2e-3)
    torch.manual_seed(0)
    for shape in ((64, 32), (32, 64), (48, 48)):
        values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
        assert values.max() < 1.3
        assert values.median() > 0.65


def test_every_conversation_set_is_understood() -> None:
    rows = {
        "oasst": {"prompt": {"role": "prompter", "text": "a", "replies": [{"role": "assistant", "text": "b", "replies": []}]}},
        "sgd": {"turns": [["USER", "a"], ["SYSTEM", "b"]]},
        "taskmaster": {"utterances": [["user", "a"], ["assistant", "b"]]},
        "glaive": {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "tools": "[]"},
        "wikisql": {"question": "a", "sql": "b"},
        "spider": {"question": "a", "query": "b"},
        "seed": {"instruction": "a", "instances": [{"input": "", "output": "b"}]},
        "gpteacher": {"instruction": "a", "input": "", "response": "b"},
    }
    for name, row in rows.items():
        assert conversation(row) == [("user", "a"), ("assistant", "b")], name
    assert conversation({"question": "a"}) == []
    template = Tokenizer.load("presage-tiny").chat_template
    assert template is not None
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert chatml([("user", "a"), ("assistant", "b")]) == template.render(messages, add_generation_prompt=False)


def test_the_shared_sets_parse() -> None:
    for name in TINY.conversations:
        file = shared_data(name)
        raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        rows = [json.loads(line) for line in raw.decode().splitlines()[:50]]
        turns = [conversation(row) for row in rows]
        assert sum(bool(t) for t in turns) > 0.9 * len(rows), name
        assert {role for t in turns for role, _ in t} <= {"user", "assistant", "system", "tool"}, name
