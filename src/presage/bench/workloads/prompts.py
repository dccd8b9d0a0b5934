"""Prompt sets: questions with the answers that are recorded for them. One row of ``SETS`` says where a set lies and how to read a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from presage.bench.workloads.files import each, find, rows, table
from presage.bench.workloads.table import Workload
from presage.core.errors import ConfigError

Shot = tuple[str, str, str]
"""Prompt, answer ("" = none recorded), category."""


@dataclass(frozen=True)
class PromptSet:
    """``files`` of a set (JSON lines, or CSV with a header) and what one row gives."""

    files: tuple[str, ...]
    read: Callable[[Any], Shot]


def _mbpp(r: Any) -> Shot:
    tests = "\n".join(r["test_list"])
    return f"{r['text']}\nYour code should pass these tests:\n{tests}\n", r["code"].replace("\r\n", "\n"), ""


def _passages(r: Any) -> Shot:
    context = "\n\n".join(f"{c.get('title', '')}\n{c['text']}".strip() for c in r["ctxs"])
    return f"{context}\n\nQuestion: {r['question']}\nAnswer:", str(r["answers"][0]), ""


def _kv(r: Any) -> Shot:
    pairs = ",\n ".join(f'"{k}": "{v}"' for k, v in r["ordered_kv_records"])
    return f'JSON data:\n{{{pairs}}}\n\nKey: "{r["key"]}"\nCorresponding value:', r["value"], ""


def _instruction(r: Any, answer: str = "output") -> Shot:
    given = r.get("input") or ""
    return r["instruction"] + (f"\n\n{given}" if given else ""), r.get(answer) or "", r.get("dataset", "")


def _seed_task(r: Any) -> Shot:
    one = r["instances"][0]
    return _instruction({"instruction": r["instruction"], **one})


def _sql(r: Any) -> Shot:
    hint = r.get("full_instructions") or r.get("instructions") or ""
    return f"-- Database: {r['db_name']}\n-- {r['question']}\n{f'-- {hint}' + chr(10) if hint else ''}SELECT", r["query"], r["db_name"]


SETS: dict[str, PromptSet] = {
    "humaneval": PromptSet(("humaneval/HumanEval.jsonl",), lambda r: (r["prompt"], r["canonical_solution"], "")),
    "mbpp": PromptSet(("mbpp/mbpp.jsonl",), _mbpp),
    "gsm8k": PromptSet(("gsm8k/test.jsonl",), lambda r: (r["question"], r["answer"], "")),
    "nq_open": PromptSet(("nq_open/NQ-open.dev.jsonl",), lambda r: (r["question"], r["answer"][0], "")),
    "nq_oracle": PromptSet(("nq_open/nq-open-oracle.jsonl",), _passages),
    "musique": PromptSet(("musique/musique_s.jsonl",), _passages),
    "kv_retrieval": PromptSet(("kv_retrieval/kv-retrieval-75_keys.jsonl",), _kv),
    "alpaca_eval": PromptSet(("alpaca_eval/alpaca_eval.jsonl",), _instruction),
    "alpaca_en": PromptSet(("alpaca_style/alpaca_en_demo.jsonl",), _instruction),
    "alpaca_zh": PromptSet(("alpaca_style/alpaca_zh_demo.jsonl",), _instruction),
    "self_instruct": PromptSet(("self_instruct/seed_tasks.jsonl", "self_instruct/user_oriented_instructions.jsonl"), _seed_task),
    "gpteacher_code": PromptSet(("gpteacher_code/codegen-instruct.jsonl",), lambda r: _instruction(r, "response")),
    "arena_hard": PromptSet(
        ("arena_hard/arena-hard-v0.1.jsonl", "arena_hard/arena-hard-v2.0.jsonl"), lambda r: (r["prompt"], "", r.get("category", ""))
    ),
    "bbh": PromptSet(("bbh/bbh.jsonl",), lambda r: (f"Q: {r['input']}\nA:", r["target"], r["task"])),
    "sql_eval": PromptSet(
        ("sql_eval/questions_gen_postgres.csv", "sql_eval/questions_gen_sqlite.csv", "sql_eval/instruct_advanced_postgres.csv"), _sql
    ),
    "wikisql": PromptSet(("wikisql/wikisql.jsonl",), lambda r: (f"-- Table: {r['table_id']}\n-- {r['question']}\nSELECT", r["sql"], r["split"])),
}  # fmt: skip


def _source(path: Path) -> Iterator[Any]:
    return table(path, ()) if path.suffix == ".csv" else rows(path)


def read_prompts(folder: str | Path, which: str) -> Workload:
    """A prompt set, all due at once: give it arrivals. Categories become tenants. Raises ConfigError.

    ``bbh`` puts the task's worked examples in front, ``spider`` the database's tables: prefixes that many questions share.
    """
    if which == "spider":
        return _workload(which, _spider(folder))
    if which not in SETS:
        raise ConfigError(f"prompt sets are {sorted([*SETS, 'spider'])}, got {which!r}", param="dataset_name")
    shots: list[Shot] = []
    paths = [Path(folder)] if Path(folder).is_file() else [find(folder, f) for f in SETS[which].files]
    for path in paths:
        shots += each(path, _source(path), SETS[which].read)
    if which == "bbh":
        shots = _with_examples(folder, shots)
    return _workload(which, shots)


def _workload(name: str, shots: list[Shot]) -> Workload:
    prompts, answers, category = zip(*shots)
    names = tuple(dict.fromkeys(category))
    at = {c: i for i, c in enumerate(names)}
    tenant = np.array([at[c] for c in category])
    return Workload(name, np.zeros(len(shots)), tenant=tenant, tenants=names, prompts=prompts, answers=answers)


def _with_examples(folder: str | Path, shots: list[Shot]) -> list[Shot]:
    path = find(folder if Path(folder).is_dir() else Path(folder).parent, "bbh/cot_prompts.jsonl")
    # The first two lines ask that the text is not trained on; they are no part of the prompt.
    heads = dict(each(path, rows(path), lambda r: (r["task"], r["prompt"].partition("-----\n")[2])))
    return [(f"{heads.get(task, '')}\n\n{prompt}", answer, task) for prompt, answer, task in shots]


def _spider(folder: str | Path) -> list[Shot]:
    path = find(folder, "spider_dev/tables.jsonl")
    schemas = dict(each(path, rows(path), lambda r: (r["db_id"], _schema(r))))
    dev = find(folder, "spider_dev/dev.jsonl")
    return each(dev, rows(dev), lambda r: (f"{schemas[r['db_id']]}\n-- {r['question']}\nSELECT", r["query"], r["db_id"]))


def _schema(r: Any) -> str:
    """The tables of a database as SQL."""
    columns: dict[int, list[str]] = {}
    for (at, name), kind in zip(r["column_names_original"], r["column_types"]):
        columns.setdefault(at, []).append(f"  {name} {kind}")
    return "\n".join(f"CREATE TABLE {name} (\n" + ",\n".join(columns.get(i, [])) + "\n);" for i, name in enumerate(r["table_names_original"]))
