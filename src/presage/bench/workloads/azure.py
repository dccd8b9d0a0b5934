"""Azure LLM inference traces (Patel et al., Splitwise, ISCA 2024): arrival times and token counts of one production service."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import numpy as np

from presage.bench.workloads.files import each, find, table
from presage.bench.workloads.table import Workload

COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


def read_azure(folder: str | Path) -> Workload:
    """``AzureLLMInferenceTrace_conv.csv`` (or the file itself): times from the first request, lengths at least 1. Raises ConfigError."""
    path = find(folder, "azure_llm_2023/AzureLLMInferenceTrace_conv.csv")

    def row(r: dict[str, str]) -> tuple[float, int, int]:
        # Seven digits of fraction: one more than Python reads.
        return datetime.fromisoformat(r["TIMESTAMP"][:26]).timestamp(), int(r["ContextTokens"]), int(r["GeneratedTokens"])

    found = np.array(each(path, table(path, COLUMNS), row))
    found = found[np.argsort(found[:, 0], kind="stable")]
    return Workload("azure", found[:, 0] - found[0, 0], np.maximum(1, found[:, 1]), np.maximum(1, found[:, 2]))
