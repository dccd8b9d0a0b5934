"""One engine that replays recorded outputs, in a process of its own: what ``speculation_peers.py`` starts.

    python benchmarks/speculation_peers_worker.py ENGINE MODEL VARIANT

The protocol is that of ``peers_worker.py``. VARIANT is a precision, for Presage and vLLM followed by ``=`` and a speculative configuration
as JSON. Every engine answers ``replay(rows, concurrency, tag)``: rows are pairs of prompt and output ids; the output is forced, the work is real.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import peers_worker
from speculation import teach

LONGEST = 4608
"""Tokens of a request at most: prompts of 3,000 and outputs of 1,500 fit."""
KV_GIB = 2
DEPTH = 4
LAX, STRICT = ((2, 66), (2, 50), (1, 50), (1, 50)), ((4, 75), (3, 66), (2, 66), (2, 66))
"""llama.cpp's ``lookup``: least sightings of an n-gram of 1..4 ids, and least percentage of them that its continuation must have."""


class Replay:
    """Rows through an engine that takes requests (``submit``) and says after each step what came out (``step``)."""

    drafted = 0
    forcing = 0.0
    """Seconds that forcing has taken so far."""

    def submit(self, key: str, prompt: list[int], output: list[int]) -> None:
        """A request whose output is known."""
        raise RuntimeError(f"{type(self).__name__} takes no requests")

    def step(self) -> list[tuple[str, list[int]]]:
        """New ids by request."""
        raise RuntimeError(f"{type(self).__name__} makes no steps")

    def replay(self, rows: list[list[list[int]]], concurrency: int, tag: str) -> dict[str, Any]:
        """``seconds`` from first to last token, summed over rows and divided by those that run at once; ``tokens`` and ``steps`` in them;
        ``drafted`` ids; ``forcing``: seconds that forcing took. RuntimeError if an id that came out is not the recorded one."""
        found: dict[str, Any] = {"seconds": 0.0, "tokens": 0, "steps": 0}
        drafted, forcing = self.drafts(), self.forcing
        for start in range(0, len(rows), concurrency):
            wanted = {f"{tag}-{start + i}": output for i, (_, output) in enumerate(rows[start : start + concurrency])}
            for key, (prompt, output) in zip(wanted, rows[start : start + concurrency], strict=True):
                self.submit(key, prompt, output)
            got, marks = self._run(wanted)
            if got != wanted:
                raise RuntimeError(f"{tag}: the ids that came out are not the recorded ones")
            for m in marks.values():
                found["seconds"] += (m[-1][0] - m[0][0]) / len(wanted)
                found["tokens"] += sum(count for _, count in m[1:])
                found["steps"] += len(m) - 1
        return found | {"drafted": self.drafts() - drafted, "forcing": self.forcing - forcing}

    def remember(self, outputs: list[list[int]]) -> int:
        """Past outputs for the drafter, as if it had seen them; how many it took. 0 if it keeps none."""
        return 0

    def drafts(self) -> int:
        """Ids drafted so far."""
        return self.drafted

    def _run(self, wanted: dict[str, list[int]]) -> tuple[dict[str, list[int]], dict[str, list[tuple[float, int]]]]:
        """Ids, and (when, how many) of each step, until all have come."""
        got: dict[str, list[int]] = {key: [] for key in wanted}
        marks: dict[str, list[tuple[float, int]]] = {key: [] for key in wanted}
        while any(len(got[key]) < len(wanted[key]) for key in wanted):
            for key, ids in self.step():
                marks[key].append((time.perf_counter(), len(ids)))
                got[key] += ids
        return got, marks


class Presage(Replay):
    """Our own engine with its forced sampler."""

    def __init__(self, model: str, variant: str) -> None:
        from presage.kernels.cpu.environment import prepare_environment

        prepare_environment()
        from presage import __version__
        from presage.bench.forced import ForcedSampler
        from presage.core.config import EngineConfig
        from presage.engine.build import build_engine

        self.version, (precision, _, config) = __version__, variant.partition("=")
        settings = EngineConfig.of(
            model=model, quantization=None if precision == "bf16" else precision, speculative_config=json.loads(config or "null"),
            kv_cache_memory=f"{KV_GIB}GiB", max_num_seqs=8, max_model_len=LONGEST, dtype="bfloat16",
        )  # fmt: skip
        self.came: list[tuple[str, list[int]]] = []
        self.engine = build_engine(settings, self._take, sampler=ForcedSampler)

    def _take(self, emissions: list[Any]) -> None:
        for e in emissions:
            if e.error is not None:
                raise RuntimeError(f"{e.id}: {e.error}")
            if e.ids:
                self.came.append((e.id, list(e.ids)))

    def submit(self, key: str, prompt: list[int], output: list[int]) -> None:
        """The recorded output goes with the request."""
        from presage.bench.forced import FORCED
        from presage.core.request import Request
        from presage.core.sampling_params import SamplingParams

        params = SamplingParams(max_tokens=len(output), ignore_eos=True, temperature=0.0)
        self.engine.add(Request(id=key, prompt=np.array(prompt, np.int32), sampling=params, extras={FORCED: output}))

    def step(self) -> list[tuple[str, list[int]]]:
        """One turn of the loop."""
        self.engine.driver.step()
        came, self.came = self.came, []
        return came

    def remember(self, outputs: list[list[int]]) -> int:
        """From a file, as a server would be warmed up."""
        return teach(self.engine.loop.drafter, outputs)

    def drafts(self) -> int:
        """As the engine counts them."""
        return int(self.engine.stats()["spec_num_draft_tokens"])


class Vllm(Replay):
    """vLLM on CPU, compiled as it comes, in this process. Its runner's ``_sample`` sees logits in which the recorded ids are the greatest."""

    def __init__(self, model: str, variant: str) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(KV_GIB))
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{peers_worker.THREADS - 1}")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        import vllm
        from vllm.v1.worker.cpu_model_runner import CPUModelRunner

        self.version, (precision, _, config) = vllm.__version__, variant.partition("=")
        self.past = 0
        self._force(CPUModelRunner)
        self.engine = vllm.LLM(
            model, skip_tokenizer_init=True, dtype="bfloat16" if precision == "bf16" else precision, max_model_len=LONGEST, max_num_seqs=8,
            speculative_config=json.loads(config or "null"), async_scheduling=False,
        ).llm_engine  # fmt: skip

    def _force(self, runner_class: Any) -> None:
        """Wrap the sampling of a runner class: row j of a request with n ids so far is to say the recorded id n + j."""
        import torch

        original, made = runner_class._sample, runner_class.__init__

        def init(runner: Any, *args: Any, **more: Any) -> None:
            self.runner = runner
            made(runner, *args, **more)

        def sample(runner: Any, logits: Any, metadata: Any) -> Any:
            began = time.perf_counter()
            batch, row = runner.input_batch, 0
            rows: list[int] = []
            ids: list[int] = []
            for i, key in enumerate(batch.req_ids):
                count = 1 + (metadata.num_draft_tokens[i] if metadata is not None else 0)
                output = (runner.requests[key].sampling_params.extra_args or {}).get("output", ())
                done = int(batch.num_tokens_no_spec[i] - batch.num_prompt_tokens[i])
                wanted = output[max(0, done) :][:count]
                rows += range(row, row + len(wanted))
                ids += wanted
                row, self.drafted = row + count, self.drafted + count - 1
            if rows:
                logits[torch.tensor(rows), torch.tensor(ids)] = 1e30
            self.forcing += time.perf_counter() - began
            return original(runner, logits, metadata)

        runner_class._sample, runner_class.__init__ = sample, init

    def submit(self, key: str, prompt: list[int], output: list[int]) -> None:
        """The recorded output goes with the sampling parameters."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(temperature=0, max_tokens=len(output), ignore_eos=True, detokenize=False, extra_args={"output": output})
        params.output_kind = RequestOutputKind.DELTA
        self.engine.add_request(key, {"prompt_token_ids": prompt}, params)

    def step(self) -> list[tuple[str, list[int]]]:
        """One step of the engine."""
        return [(o.request_id, list(o.outputs[0].token_ids)) for o in self.engine.step() if o.outputs[0].token_ids]


    def remember(self, outputs: list[list[int]]) -> int:
        """Responses of requests that its suffix cache is told of and that end at once. 0 with other drafters."""
        cache = getattr(getattr(self.runner, "drafter", None), "suffix_cache", None)
        for i, ids in enumerate(outputs if cache is not None else ()):
            key = f"past-{self.past + i}"
            cache.start_request(key, np.array([0], np.int32))
            cache.add_active_response(key, np.array(ids, np.int32))
            cache.stop_request(key)
        self.past += len(outputs)
        return 0 if cache is None else len(outputs)


class Copy:
    """Prompt lookup: the ids after the latest sighting of the last 4, else 3, else 2 ids, in this request, else in earlier ones."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.where: dict[tuple[int, ...], int] = {}

    def begin(self) -> None:
        """A new request; n-grams do not reach over its start."""
        self.start = len(self.ids)

    def append(self, ids: list[int]) -> None:
        """Ids that are now part of the text. Those at the very end are no sightings yet: nothing follows them."""
        for token in ids:
            end = len(self.ids)
            for n in range(2, DEPTH + 1):
                if end - n >= self.start:
                    self.where[tuple(self.ids[end - n :])] = end
            self.ids.append(token)

    def draft(self, length: int) -> list[int]:
        """At most ``length`` ids."""
        for n in range(DEPTH, 1, -1):
            place = self.where.get(tuple(self.ids[-n:]))
            if place is not None:
                return self.ids[place : place + length]
        return []


class Counts:
    """llama.cpp's ``lookup``: how often each id followed each n-gram of up to four, in this request and, trusted less, in earlier ones."""

    def __init__(self) -> None:
        self.here: dict[tuple[int, ...], Counter[int]] = {}
        self.past: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)

    def begin(self) -> None:
        """The request before becomes past."""
        for gram, counts in self.here.items():
            self.past[gram].update(counts)
        self.ids: list[int] = []
        self.here = defaultdict(Counter)

    def append(self, ids: list[int]) -> None:
        """Count what followed what."""
        for token in ids:
            for n in range(1, min(DEPTH, len(self.ids)) + 1):
                self.here[tuple(self.ids[-n:])][token] += 1
            self.ids.append(token)

    def draft(self, length: int) -> list[int]:
        """At most ``length`` ids: the most frequent continuation of the longest n-gram that has seen enough, again and again."""
        text = self.ids[-DEPTH:]
        while len(text) < DEPTH + length:
            token = self._next(self.here, text, LAX)
            token = self._next(self.past, text, STRICT) if token is None else token
            if token is None:
                break
            text.append(token)
        return text[DEPTH:]

    def _next(self, counts: dict[tuple[int, ...], Counter[int]], text: list[int], least: tuple[tuple[int, int], ...]) -> int | None:
        for n in range(DEPTH, 0, -1):
            sightings, percent = least[n - 1]
            followed = counts.get(tuple(text[-n:]))
            if followed:
                token, most = followed.most_common(1)[0]
                total = sum(followed.values())
                if total >= sightings and 100 * most >= percent * total:
                    return token
        return None


class LlamaCpp(peers_worker.LlamaCpp, Replay):
    """llama.cpp with prompt lookup, one request at a time. A context of its own size; the KV of a prompt's part that the last one had is kept."""

    def __init__(self, model: str, variant: str) -> None:
        super().__init__(model, variant)
        p = self.api.llama_context_default_params()
        p.n_ctx, p.n_batch, p.n_ubatch, p.n_threads, p.n_threads_batch = LONGEST, 2048, 512, peers_worker.THREADS, peers_worker.THREADS
        self.c = self.api.llama_init_from_model(self.model, p)
        self.kept: list[int] = []
        self.use("copy", 0)

    def use(self, method: str, length: int | str) -> None:
        """A fresh drafter, ``copy`` or ``counts``, that drafts at most ``length`` ids; 0: none."""
        self.drafter: Copy | Counts = Copy() if method == "copy" else Counts()
        self.length = int(length)

    def remember(self, outputs: list[list[int]]) -> int:
        """As requests without a prompt."""
        for ids in outputs:
            self.drafter.begin()
            self.drafter.append(ids)
        return len(outputs)

    def submit(self, key: str, prompt: list[int], output: list[int]) -> None:
        """Only one request at a time."""
        self.key, self.prompt, self.output, self.done = key, prompt, output, 0
        self.drafter.begin()

    def step(self) -> list[tuple[str, list[int]]]:
        """The prompt, or the last id and a draft: one pass, and the draft's ids that are the recorded ones with the one after them."""
        if self.done == 0:
            ids = self._prompt()
        else:
            draft = self.drafter.draft(min(self.length, len(self.output) - self.done - 1))
            here = len(self.prompt) + self.done - 1
            self._pass([self.output[self.done - 1], *draft], here, logits=True)
            after = self.output[self.done : self.done + len(draft) + 1]
            same = next((i for i, (a, b) in enumerate(zip(draft, after, strict=False)) if a != b), len(draft))
            self._cut(here + 1 + same)
            ids, self.drafted = after[: same + 1], self.drafted + len(draft)
        self.done += len(ids)
        self.drafter.append(ids)
        self.kept += ids
        return [(self.key, ids)]

    def _prompt(self) -> list[int]:
        """The prompt's ids that are not in the KV yet, in chunks; what came out."""
        same, most = 0, min(len(self.kept), len(self.prompt)) - 1  # the last id that came out never went in
        while same < most and self.kept[same] == self.prompt[same]:
            same += 1
        self._cut(same)
        for start in range(same, len(self.prompt), 2048):
            self._pass(self.prompt[start : start + 2048], start, logits=False)
        self.kept = list(self.prompt)
        self.drafter.append(self.prompt)
        return self.output[:1]

    def _pass(self, ids: list[int], position: int, *, logits: bool) -> None:
        """One forward pass of the only sequence, finished when it returns."""
        self.decode(self.c, [(t, position + i, 0, logits or i == len(ids) - 1) for i, t in enumerate(ids)])
        self.api.llama_synchronize(self.c)

    def _cut(self, length: int) -> None:
        self.api.llama_memory_seq_rm(self.api.llama_get_memory(self.c), 0, length, -1)


ENGINES = {"presage": Presage, "vllm": Vllm, "llama.cpp": LlamaCpp}


if __name__ == "__main__":
    peers_worker.ENGINES.update(ENGINES)
    peers_worker.main()
