"""Conversations: a request per turn of the assistant, each after the one before. ``grows``: the server's own answers stand in the history."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from presage.bench.workloads.files import each, find, rows
from presage.bench.workloads.table import Message, Workload, chained
from presage.core.errors import ConfigError

Talk = list[tuple[list[Message], str]]
"""New messages of each turn, and the answer recorded for it."""

ROLES = {**dict.fromkeys(("human", "user"), "user"), **dict.fromkeys(("gpt", "chatgpt", "bing", "assistant"), "assistant"), "system": "system"}


def turns_of(messages: list[Message]) -> Talk:
    """Turns of a chat: each ends with a message of the assistant; what nobody answers is left out."""
    made: Talk = []
    new: list[Message] = []
    for message in messages:
        if message["role"] == "assistant":
            if new:
                made.append((new, message.get("content") or ""))
            new = []
        else:
            new.append({"role": message["role"], "content": message.get("content") or ""})
    return made


def said(pairs: list[Any], user: str) -> Talk:
    """Turns of a list of (speaker, text)."""
    return turns_of([{"role": "user" if str(who).lower() == user else "assistant", "content": text} for who, text in pairs])


def _questions(r: Any) -> Talk:
    return [([{"role": "user", "content": q}], "") for q in r["turns"]]


def _sharegpt(r: Any) -> Talk:
    talk = r.get("conversations", r.get("conversation", r.get("items", [])))
    return turns_of([{"role": ROLES[m["from"]], "content": m["value"]} for m in talk if m["from"] in ROLES])


def _best_thread(r: Any) -> Talk:
    """The best ranked reply at every branch of a tree (OASST)."""
    messages, at = [], r["prompt"]
    while at is not None:
        messages.append({"role": "assistant" if at["role"] == "assistant" else "user", "content": at["text"]})
        replies = sorted(at.get("replies") or (), key=lambda reply: reply.get("rank") if reply.get("rank") is not None else 99)
        at = replies[0] if replies else None
    return turns_of(messages)


def _history(r: Any) -> Talk:
    """The messages of an agent's trajectory that are text."""
    return turns_of([m for m in r["traj"].get("history", []) if isinstance(m["content"], str)])


SETS: dict[str, tuple[str, Callable[[Any], Talk]]] = {
    "spec_bench": ("spec_bench/question.jsonl", _questions),
    "mt_bench": ("mt_bench/question.jsonl", _questions),
    "sharegpt_chats": ("sharegpt.json", _sharegpt),
    "oasst": ("oasst_en_100/en_100_tree.jsonl", _best_thread),
    "sgd": ("sgd_dialogues/train.jsonl", lambda r: said(r["turns"], "user")),
    "taskmaster": ("taskmaster4/dialogues.jsonl", lambda r: said(r["utterances"], "user")),
    "glaive": ("alpaca_style/glaive_toolcall_en_demo.jsonl", _sharegpt),
    "tau_bench": ("tau_bench_trajectories/gpt-4o-airline.jsonl", lambda r: turns_of(r["traj"])),
    "swe_agent": ("swe_agent_trajectories/trajectories.jsonl", _history),
    "bfcl": ("bfcl/multi_turn_base.jsonl", lambda r: [(list(turn), "") for turn in r["question"] if turn]),
}  # fmt: skip


def read_chats(folder: str | Path, which: str, think: float = 0.0) -> Workload:
    """A set of conversations, all due at once; later turns ``think`` seconds after the answer before. Raises ConfigError."""
    if which not in SETS:
        raise ConfigError(f"conversation sets are {sorted(SETS)}, got {which!r}", param="dataset_name")
    file, read = SETS[which]
    path = find(folder, file)
    talks = [t for t in each(path, rows(path), read) if t]
    if not talks:
        raise ConfigError(f"{path} holds no conversation", param="dataset_path")
    after, session, turn = chained(np.array([len(t) for t in talks]))
    prompts, answers = zip(*(pair for t in talks for pair in t))
    return Workload(
        which, np.where(after < 0, 0.0, np.nan), after=after, think=np.where(after < 0, 0.0, think), session=session, turn=turn,
        prompts=tuple(_known(p) for p in prompts), answers=tuple(answers), grows=True,
    )  # fmt: skip


def _known(messages: list[Message]) -> list[Message]:
    # Tool results belong to calls that the server under test did not make, so a strict server would refuse their role.
    return [{**m, "role": m["role"] if m["role"] in ("system", "user") else "user"} for m in messages]
