"""From settings to what is sent: the workload with its arrivals, and the JSON of each request."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from presage.bench.config import ServeBench
from presage.bench.datasets import Codec, Sample, random_samples, sharegpt_samples
from presage.bench.load import Job
from presage.bench.workloads import READERS, Ragged, Workload, read_workload, tokenised, with_rate, with_tenants, with_times, within
from presage.bench.workloads.arrive import closed_loop, ramp_times, replayed
from presage.bench.workloads.chats import SETS as CHATS
from presage.bench.workloads.contents import flat, real_ids
from presage.bench.workloads.table import Message
from presage.core.errors import ConfigError

encode = msgspec.json.encode


def of_samples(name: str, samples: Sequence[Sample]) -> Workload:
    """Single prompts with their ids and texts, due at once."""
    n_in, n_out = [len(s.ids) for s in samples], [s.max_tokens for s in samples]
    ids, texts = Ragged.of([s.ids for s in samples], np.int32), tuple(s.text for s in samples)
    return Workload(name, np.zeros(len(samples)), np.array(n_in), np.array(n_out), ids=ids, prompts=texts)


def read_requests(config: ServeBench, codec: Codec) -> Workload:
    """The data set, with lengths, cut to ``num_prompts`` and ``max_model_len``. Raises ConfigError."""
    if config.dataset_name == "random":
        lengths = config.random_input_len, config.random_output_len, config.random_range_ratio, config.random_prefix_len
        return of_samples("random", random_samples(codec, config.num_prompts, *lengths, config.seed))
    if config.dataset_path is None:
        raise ConfigError(f"the data set {config.dataset_name} needs --dataset-path", param="dataset_path")
    if config.dataset_name == "sharegpt":
        outputs = config.sharegpt_output_len or config.output_len
        return of_samples("sharegpt", sharegpt_samples(codec, config.dataset_path, config.num_prompts, outputs, config.max_model_len, config.seed))
    options: dict[str, Any] = {"think": config.think_time} if config.dataset_name in CHATS else {}
    if config.dataset_name in READERS and config.dataset_name.startswith("servegen"):
        options["seed"] = config.seed
    w = read_workload(config.dataset_name, Path(config.dataset_path), **options).first(config.num_prompts)
    return within(tokenised(w, codec, config.output_len), config.max_model_len)


def with_arrivals(w: Workload, config: ServeBench) -> Workload:
    """When requests are due, by the settings: users, a ramp, a replay, a rate, or the times of the data set itself."""
    if config.users is not None:
        return closed_loop(w, config.users, config.think_time)
    if config.ramp_up_strategy is not None:
        if config.ramp_up_start_rps is None or config.ramp_up_end_rps is None:
            raise ConfigError("a ramp needs ramp_up_start_rps and ramp_up_end_rps", param="ramp_up_strategy")
        return with_times(w, ramp_times(len(w.roots), config.ramp_up_start_rps, config.ramp_up_end_rps, config.ramp_up_strategy, config.seed))
    if config.replay_speed is not None:
        return replayed(w, config.replay_speed)
    if math.isfinite(config.request_rate):
        return with_rate(w, config.request_rate, config.burstiness, config.seed)
    return w


def make_workload(config: ServeBench, codec: Codec) -> Workload:
    """Everything that will be sent. Raises ConfigError."""
    w = with_arrivals(read_requests(config, codec), config)
    return with_tenants(w, config.tenants, config.tenant_skew, config.seed) if config.tenants else w


def request_body(prompt: Any, max_tokens: int, config: ServeBench, seed: int) -> dict[str, Any]:
    """The JSON of one request: ``prompt`` are messages for a chat, else ids or text."""
    body: dict[str, Any] = {
        "model": config.served_model_name or config.model,
        "messages" if config.is_chat else "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": config.temperature,
        "seed": seed,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if config.ignore_eos:
        body["ignore_eos"] = True
    return {**body, **config.extra_body}


def messages_of(prompt: str | Sequence[Message]) -> list[Message]:
    """A prompt as chat messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def make_jobs(w: Workload, config: ServeBench, codec: Codec) -> list[Job]:
    """A job per row. Completions get ids, so that the length of a prompt is exact; chats and growing conversations get text."""
    prompt = _prompt_maker(w, config, codec)
    keys = {name: config.tenant_keys.get(name, config.api_key) for name in w.tenants}

    def job(row: int) -> Job:
        def body(history: Sequence[str]) -> bytes:
            return encode(request_body(prompt(row, history), max(1, int(w.n_out[row])), config, config.seed + row))

        tenant = w.tenants[w.tenant[row]]
        at = float(w.arrival[row]) if w.after[row] < 0 else math.nan
        return Job(body, at, int(w.after[row]), float(w.think[row]), tenant, int(w.session[row]), int(w.turn[row]), keys[tenant])

    return [job(row) for row in range(len(w))]


def _prompt_maker(w: Workload, config: ServeBench, codec: Codec) -> Callable[[int, Sequence[str]], Any]:
    if w.prompts is None:
        ids = real_ids(w, codec)
        if config.is_chat:
            return lambda row, history: messages_of(codec.decode(ids(row)))
        return lambda row, history: ids(row) if config.prompt_ids else codec.decode(ids(row))
    prompts = w.prompts
    if config.is_chat:
        return lambda row, history: _conversation(w, row, history)
    if w.grows:
        return lambda row, history: "\n".join(flat([m]) for m in _conversation(w, row, history))
    known = w.ids
    if config.prompt_ids and known is not None:
        return lambda row, history: known.row(row).tolist()
    return lambda row, history: flat(prompts[row])


def _conversation(w: Workload, row: int, history: Sequence[str]) -> list[Message]:
    """Messages of a turn; in a growing conversation those before it and the server's answers stand in front."""
    prompts = w.prompts or ()
    own = messages_of(prompts[row])
    if not w.grows:
        return own
    found: list[Message] = []
    # A closed loop chains one session to the next: only the turns of the same session are its history.
    turns = int(w.turn[row])
    rows: list[int] = []
    at = int(w.after[row])
    while at >= 0 and len(rows) < turns:
        rows.append(at)
        at = int(w.after[at])
    said = history[len(history) - len(rows) :]
    for before, answer in zip(rows[::-1], said):
        found += [*messages_of(prompts[before]), {"role": "assistant", "content": answer}]
    return found + own
