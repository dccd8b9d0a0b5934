"""Tables of prompt and answer lengths without times: ShareGPT and arXiv summarisation, counted with Llama 2's tokenizer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from presage.bench.workloads.files import each, find, table
from presage.bench.workloads.table import Workload
from presage.core.errors import ConfigError

FILES = {
    "sharegpt": "sharegpt_8k_filtered_stats_llama2_tokenizer.csv",
    "arxiv": "arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv",
}
COLUMNS = ("num_prefill_tokens", "num_decode_tokens")


def read_lengths(folder: str | Path, which: str = "sharegpt", seed: int | None = 0) -> Workload:
    """Lengths in an order drawn from ``seed`` (None: the file's), all due at once: give them arrivals. Raises ConfigError."""
    if which not in FILES:
        raise ConfigError(f"length tables are {sorted(FILES)}, got {which!r}", param="dataset_name")
    path = find(folder, f"request_lengths/{FILES[which]}")
    found = np.array(each(path, table(path, COLUMNS), lambda r: (int(r[COLUMNS[0]]), int(r[COLUMNS[1]]))))
    if seed is not None:
        found = found[np.random.default_rng(seed).permutation(len(found))]
    return Workload(f"{which}_lengths", np.zeros(len(found)), np.maximum(1, found[:, 0]), np.maximum(1, found[:, 1]))
