"""Readers of every trace and prompt set: facts of the real files, and typed errors for broken ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from presage.bench.measures import summarise
from presage.bench.workloads import READERS, read_vllm_records, read_workload
from presage.bench.workloads.requests import prompt_ids
from presage.bench.workloads.servegen import gaps, read_clients
from presage.core.errors import ConfigError
from tests.shared import shared_data

NAMED_BY_USERS = {"sharegpt_chats"}


@pytest.mark.parametrize("name", sorted(set(READERS) - NAMED_BY_USERS))
def test_every_data_set_is_read(name: str) -> None:
    w = read_workload(name, shared_data("README.md").parent)
    assert len(w) > 10 and len(w.roots) > 0
    lengths, texts = w.n_in.min() > 0 and w.n_out.min() > 0, w.prompts is not None and all(w.prompts)
    assert lengths or texts
    assert (np.diff(w.arrival[w.roots]) >= 0).all() and w.arrival[w.roots][0] >= 0
    assert (w.session[w.after[w.after >= 0]] == w.session[w.after >= 0]).all()


def test_azure_facts() -> None:
    w = read_workload("azure", shared_data("azure_llm_2023"))
    assert len(w) == 19366 and w.arrival[0] == 0.0 and w.n_in[0] == 374 and w.n_out[0] == 44
    assert w.arrival[1] == pytest.approx(4.314579, abs=1e-5)


def test_mooncake_prefixes_are_shared_as_recorded() -> None:
    w = read_workload("mooncake", shared_data("mooncake_fast25"))
    assert len(w) == 12031 and w.block == 512 and (np.diff(w.hashes.offset) == -(-w.n_in // 512)).all()  # type: ignore[union-attr]
    a, b = prompt_ids(w, 0), prompt_ids(w, 1)
    assert len(a) == 6758 and np.array_equal(a[:512], b[:512]) and not (a[512:1024] == b[512:1024]).any()


def test_agentic_sessions_are_chains_with_scopes_of_their_own() -> None:
    w = read_workload("agentic", shared_data("agentic_coding_sessions"))
    assert len(w) == 984 and len(w.roots) == 41 and w.block == 64
    first, second = w.roots[:2]
    assert not set(w.hashes.row(int(first)).tolist()) & set(w.hashes.row(int(second)).tolist())  # type: ignore[union-attr]
    assert w.think[1] == pytest.approx(3360 - 4.05) and np.array_equal(prompt_ids(w, 0)[:16000], prompt_ids(w, 1)[:16000])


def test_servegen_clients_keep_their_rates() -> None:
    folder = shared_data("servegen_clients")
    clients = read_clients(folder, "m-small")
    w = read_workload("servegen_m-small", folder, duration=1200.0)
    want = sum(float(c.windows[:2, 1].sum()) * 600 for c in clients)
    assert len(w) == pytest.approx(want, rel=0.05) and len(w.tenants) == 5
    late = read_workload("servegen_deepseek-r1", folder, start=77000.0, duration=300.0, rate_scale=0.5)
    assert len(late) > 0 and late.arrival.max() < 300
    with pytest.raises(ConfigError, match="no client"):
        read_workload("servegen_m-small", folder, start=1e9)


@pytest.mark.parametrize("weibull", [False, True])
def test_gaps_have_the_measured_rate(weibull: bool) -> None:
    assert gaps(np.random.default_rng(0), 200_000, 20.0, 0.8, weibull).mean() == pytest.approx(0.05, rel=0.02)


def test_a_measured_run_gives_records() -> None:
    folder = shared_data("vllm_measured_runs")
    w, records = read_workload("vllm_llama", folder), read_vllm_records(folder)
    assert len(w) == len(records) == 300 and np.array_equal(w.n_out, [r.n_out for r in records])
    s = summarise(records)
    assert s.completed == 300 and 0.04 < min(s.samples["ttft"]) < 0.1 and len(w.replies.row(0)) == w.n_out[0]  # type: ignore[union-attr]


def test_agent_logs_grow() -> None:
    w = read_workload("agent_logs", shared_data("agent_prompt_logs"))
    assert w.prompts is not None and set(w.tenants) == {"miniswe", "magagent", "taubench"}
    coders = [i for i in np.flatnonzero(w.after >= 0).tolist() if w.tenants[w.tenant[i]] == "miniswe"]
    assert len(coders) > 200 and all(str(w.prompts[i]).startswith(str(w.prompts[w.after[i]])) for i in coders) and (w.think >= 0).all()


def test_questions_of_one_database_share_its_schema() -> None:
    w = read_workload("spider", shared_data("spider_dev"))
    first = [str(w.prompts[i]) for i in np.flatnonzero(w.tenant == 0)[:2]]  # type: ignore[index]
    assert all(p.startswith("CREATE TABLE") for p in first) and first[0].split("--")[0] == first[1].split("--")[0]


def test_what_is_missing_or_broken_is_a_typed_error(tmp_path: Path) -> None:
    for name in READERS:
        with pytest.raises(ConfigError):
            read_workload(name, tmp_path)
    with pytest.raises(ConfigError, match="workloads are"):
        read_workload("nonsense", tmp_path)
    with pytest.raises(ConfigError, match="does not exist"):
        read_workload("azure", tmp_path / "nowhere")
    cases = {
        "azure": ("t.csv", "TIMESTAMP,ContextTokens\nx,1\n", "lacks the columns"),
        "mooncake": ("t.jsonl", '{"timestamp": 0, "input_length": 5}\n', "row 1: KeyError"),
        "humaneval": ("t.jsonl", '{"prompt": "x", "canonical_solution": "y"}\nnot json\n', "row 2"),
        "mt_bench": ("t.jsonl", "", "is empty"),
        "agentic": ("t.jsonl.gz", "", "cannot be read"),
        "sharegpt_chats": ("t.json", "[1, 2]", "row 1"),
    }
    for name, (file, content, message) in cases.items():
        (tmp_path / file).write_text(content or "\n" if not file.endswith(".gz") else "not gzip")
        with pytest.raises(ConfigError, match=message):
            read_workload(name, tmp_path / file)


def test_a_file_of_conversations(tmp_path: Path) -> None:
    talk = [{"from": f, "value": v} for f, v in (("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2"), ("human", "left out"))]
    with gzip.open(tmp_path / "sharegpt.json.gz", "wt") as file:
        json.dump([{"conversations": talk}, {"conversations": talk[:2]}], file)
    w = read_workload("sharegpt_chats", tmp_path, think=2.0)
    assert w.answers == ("a1", "a2", "a1") and w.after.tolist() == [-1, 0, -1] and w.think.tolist() == [0, 2.0, 0] and w.grows
