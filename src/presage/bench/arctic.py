"""ArcticInference's C++ suffix trees behind a drafter's verbs, to replay and to time beside ours. Not needed for anything else."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Generator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from presage.core.errors import ConfigError
from presage.core.plan import Draft, Grants, NewIds
from presage.core.protocols import EngineView
from presage.core.request import Request
from presage.core.types import Ints

_ASK = "import json, sys, arctic_inference as a; print(json.dumps([list(sys.version_info[:2]), a.__path__[0]]))"


def load(module: str, python: str = "") -> Any:
    """A module of ``arctic_inference``, from this environment, or else from that of the interpreter ``python``, a path.

    Only that package is taken from there. Raises ConfigError if it is not installed, or built for another version of Python.
    """
    where = whereabouts(python) if python and "arctic_inference" not in sys.modules else ""
    sys.path += [where] if where else []
    try:
        return import_module(f"arctic_inference.{module}")
    except ImportError as error:
        raise ConfigError(f"arctic-inference cannot be imported ({error})", param="arctic_python") from error
    finally:
        if where:
            sys.path.remove(where)


def whereabouts(python: str) -> str:
    """The folder in which another interpreter has the package. Raises ConfigError if it has none, or none of use here."""
    try:
        told = subprocess.run([python, "-c", _ASK], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(f"{python} has no arctic-inference ({getattr(error, 'stderr', '') or error})", param="arctic_python") from error
    version, package = json.loads(told)
    if version != list(sys.version_info[:2]):
        ours, theirs = (".".join(map(str, v)) for v in (sys.version_info[:2], version))
        raise ConfigError(f"{python} is Python {theirs}: its arctic-inference cannot be loaded here, by Python {ours}", param="arctic_python")
    return str(Path(package).parent)


class ArcticDrafter:
    """``SuffixDecodingCache`` with one call per request, as its users make them. Raises ConfigError when it is not installed."""

    def __init__(
        self,
        num_speculative_tokens: int = 16,
        suffix_decoding_max_tree_depth: int = 24,
        suffix_decoding_max_cached_requests: int = 10000,
        suffix_decoding_max_spec_factor: float = 1.0,
        suffix_decoding_max_spec_offset: float = 0.0,
        suffix_decoding_min_token_prob: float = 0.1,
        suffix_decoding_tree: bool = False,
        *,
        python: str = "",
    ) -> None:
        self.cap, self.depth = num_speculative_tokens, suffix_decoding_max_tree_depth
        self.cache = load("suffix_decoding.cache", python).SuffixDecodingCache(self.depth, suffix_decoding_max_cached_requests)
        self.options = {
            "max_spec_factor": suffix_decoding_max_spec_factor,
            "max_spec_offset": suffix_decoding_max_spec_offset,
            "min_token_prob": suffix_decoding_min_token_prob,
            "use_tree_spec": suffix_decoding_tree,
        }
        self.ids: dict[int, Ints] = {}
        self.known: dict[int, int] = {}
        self.name: dict[int, str] = {}
        self.stored = 0
        # Seconds of turning answers into our form, which a replay does not charge to the package.
        self.converting = 0.0

    def open(self, slot: int, req: Request) -> None:
        """Start a request."""
        n = len(req.prompt)
        self.ids[slot], self.known[slot], self.name[slot] = np.empty(n + 4096, np.int32), n, req.id
        self.ids[slot][:n] = req.prompt
        self.cache.start_request(req.id, np.ascontiguousarray(req.prompt, np.int32))

    def advance(self, new: NewIds) -> None:
        """Append each request's ids."""
        for i, slot in enumerate(new.slot.tolist()):
            ids = new.ids[new.off[i] : new.off[i + 1]]
            if len(ids):
                self.cache.add_active_response(self.name[slot], ids)
                n, m = self.known[slot], self.known[slot] + len(ids)
                if m > len(self.ids[slot]):
                    self.ids[slot] = np.concatenate([self.ids[slot], np.empty(m, np.int32)])
                self.ids[slot][n:m] = ids
                self.known[slot] = m
                self.stored += len(ids)

    def close(self, slot: int) -> None:
        """Stop a request."""
        self.cache.stop_request(self.name.pop(slot))

    def hint(self, view: EngineView) -> Ints:
        """The cap, for all."""
        return np.full(len(view.known), self.cap, np.int32)

    def propose(self, view: EngineView, grants: Grants) -> Generator[Any, Any, Draft]:
        """Drafts, request by request."""
        yield from ()
        parts = self.speculate(grants.slot, grants.draft)
        start = time.thread_time()
        offset = np.concatenate([[0], np.cumsum([len(p.token_ids) for p in parts])]).astype(np.int32)
        token = np.array([t for p in parts for t in p.token_ids], np.int32)
        parent = np.array([t for p in parts for t in p.parents], np.int32)
        prob = np.array([t for p in parts for t in p.probs], np.float32)
        draft = Draft(offset, token, parent, _depths(offset, parent), prob)
        self.converting += time.thread_time() - start
        return draft

    def speculate(self, slots: Ints, budget: Ints) -> list[Any]:
        """The package's own drafts, at most ``budget`` [G] ids for ``slots`` [G]."""
        return [self._one(slot, cap) for slot, cap in zip(slots.tolist(), budget.tolist(), strict=True)]

    def stats(self) -> dict[str, float]:
        """``bytes_per_token`` of the shared tree by the package's own estimate. It takes 24 bytes for each id where 4 are used; eviction is not
        taken into account."""
        return {"bytes_per_token": self.cache._global_tree.estimate_memory() / max(1, self.stored)}

    def _one(self, slot: int, cap: int) -> Any:
        n = self.known[slot]
        return self.cache.speculate(self.name[slot], self.ids[slot][max(0, n - self.depth) : n], max_spec_tokens=cap, **self.options)


def _depths(offset: Ints, parent: Ints) -> Ints:
    """Depth of each node [N], from 1."""
    out = np.ones(len(parent), np.int32)
    for g in range(len(offset) - 1):
        for i in range(offset[g], offset[g + 1]):
            if parent[i] >= 0:
                out[i] = out[offset[g] + parent[i]] + 1
    return out
