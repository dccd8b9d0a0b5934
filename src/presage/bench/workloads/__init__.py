"""Workloads as data: readers of traces and prompt sets, arrivals, sessions, tenants, and the forms a server and the simulator take.

    from presage.bench.workloads import read_workload, to_requests
    requests = to_requests(at_rate(read_workload("azure", "data"), 5.0))

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from presage.bench.workloads.agent_logs import read_agent_logs
from presage.bench.workloads.agentic import read_agentic
from presage.bench.workloads.arrive import at_rate, closed_loop, ramp_times, replayed, sessions_of, with_rate, with_times
from presage.bench.workloads.azure import read_azure
from presage.bench.workloads.chats import SETS as CHATS
from presage.bench.workloads.chats import read_chats
from presage.bench.workloads.contents import tokenised, within
from presage.bench.workloads.lengths import FILES, read_lengths
from presage.bench.workloads.measured import WORKLOADS, read_vllm_records, read_vllm_workload
from presage.bench.workloads.mooncake import read_mooncake
from presage.bench.workloads.prompts import SETS as PROMPTS
from presage.bench.workloads.prompts import read_prompts
from presage.bench.workloads.ragged import Ragged
from presage.bench.workloads.requests import Requests, to_requests
from presage.bench.workloads.servegen import read_servegen
from presage.bench.workloads.table import Workload
from presage.bench.workloads.tag import with_deadlines, with_priorities, with_tenants
from presage.core.errors import ConfigError

__all__ = [
    "READERS", "Ragged", "Requests", "Workload", "at_rate", "closed_loop", "ramp_times", "read_agent_logs", "read_agentic", "read_azure",
    "read_chats", "read_lengths", "read_mooncake", "read_prompts", "read_servegen", "read_vllm_records", "read_vllm_workload", "read_workload",
    "replayed", "sessions_of", "to_requests", "tokenised", "with_deadlines", "with_priorities", "with_rate", "with_tenants", "with_times",
    "within",
]  # fmt: skip

READERS: dict[str, Callable[..., Workload]] = {
    "azure": read_azure,
    "mooncake": read_mooncake,
    "agentic": read_agentic,
    "agent_logs": read_agent_logs,
    **{f"servegen_{s}": partial(read_servegen, service=s) for s in ("m-small", "deepseek-r1")},
    **{f"{which}_lengths": partial(read_lengths, which=which) for which in FILES},
    **{f"vllm_{which}": partial(read_vllm_workload, which=which) for which in WORKLOADS},
    **{which: partial(read_prompts, which=which) for which in (*PROMPTS, "spider")},
    **{which: partial(read_chats, which=which) for which in CHATS},
}
"""Every workload by name: a function of the folder its files lie in (or the folder of all data sets)."""


def read_workload(name: str, folder: str | Path, **options: Any) -> Workload:
    """The workload ``name`` from the files under ``folder``; ``options`` go to its reader.

    Raises ConfigError for an unknown name and for files that are missing or malformed.
    """
    if name not in READERS:
        raise ConfigError(f"workloads are {', '.join(sorted(READERS))}; got {name!r}", param="dataset_name")
    if not Path(folder).exists():
        raise ConfigError(f"{folder} does not exist", param="dataset_path")
    return READERS[name](folder, **options)
