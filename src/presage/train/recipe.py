"""What is trained on what, as data: ``TINY`` is presage-tiny, ``DRAFT`` its draft model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass

PACKAGES = (
    "torch",
    "transformers",
    "sympy",
    "pandas",
    "numpy",
    "networkx",
    "fastapi",
    "starlette",
    "pydantic",
    "jsonschema",
    "requests",
    "aiohttp",
    "datasets",
    "openai",
    "huggingface_hub",
)
TEXTS = ("wiki_plain/wiki.txt", "wikitext2/valid.txt", "tinyshakespeare/input.txt", "tinystories_sample/tiny.txt")
CONVERSATIONS = (
    "alpaca_style/glaive_toolcall_en_demo.jsonl",
    "gpteacher_code/codegen-instruct.jsonl.gz",
    "wikisql/wikisql.jsonl.gz",
    "spider_dev/dev.jsonl",
    "oasst_en_100/en_100_tree.jsonl",
    "self_instruct/seed_tasks.jsonl",
    "sgd_dialogues/train.jsonl.gz",
    "taskmaster4/dialogues.jsonl.gz",
)


@dataclass(frozen=True)
class Shape:
    """A Llama's sizes; embeddings are tied."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int = 4096
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    max_positions: int = 2048


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the weights, apart from the texts themselves (their hashes go into the manifest).

    ``texts`` and ``conversations`` are files below the data folder, ``packages`` installed Python packages (``python`` = also the standard
    library). ``flat`` is the share of steps before the rate falls linearly to ``last`` of its peak. Sequences start at random positions.
    """

    name: str
    shape: Shape
    steps: int
    batch: int = 24
    length: int = 512
    muon_lr: float = 0.02
    momentum: float = 0.95
    weight_decay: float = 0.05
    adam_lr: float = 3e-3
    warmup: int = 100
    flat: float = 0.5
    last: float = 0.02
    seed: int = 0
    autocast: bool = True
    checkpoint_every: int = 200
    python: bool = True
    packages: tuple[str, ...] = PACKAGES
    texts: tuple[str, ...] = TEXTS
    conversations: tuple[str, ...] = CONVERSATIONS
    repeat_conversations: int = 4
    tokenizer_sample_bytes: int = 24 << 20
    validation_windows: int = 40

    def digest(self) -> str:
        """sha256 of all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


TINY = Recipe("presage-tiny", Shape(layers=6, hidden=256, heads=4, kv_heads=2, head_dim=64, intermediate=704), steps=2173)
DRAFT = Recipe("presage-tiny-draft", Shape(layers=3, hidden=96, heads=3, kv_heads=1, head_dim=32, intermediate=256), steps=920)
RECIPES = {"tiny": TINY, "draft": DRAFT}
