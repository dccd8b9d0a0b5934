"""One engine in a process of its own, asked through standard input: what ``peers.py`` starts. Peers' environments need only numpy.

    python benchmarks/peers_worker.py ENGINE MODEL [VARIANT]

A question is a JSON line ``[method, arguments]``, the answer a JSON line. Every engine has ``generate(batch, length, tokens, seed)``: seconds
for ``batch`` new random prompts of ``length`` ids, each completed by ``tokens`` greedy ids. Some have ``steps(context, rows, repeats)``:
the median seconds of a step with each number of ``rows`` of one sequence behind ``context`` tokens, taken in turns.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

VOCABULARY = 32000
LONGEST = 2304
THREADS = os.cpu_count() or 1


def prompts(batch: int, length: int, seed: int) -> list[list[int]]:
    """Random ids, new for each seed, so that no prefix cache helps."""
    return [row.tolist() for row in np.random.default_rng(seed).integers(3, VOCABULARY - 1, (batch, length))]


def seconds(call: Callable[[], Any]) -> float:
    """Wall time of a call."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class Presage:
    """Our own engine; ``variant`` bf16 or a name for ``quantization``."""

    def __init__(self, model: str, variant: str) -> None:
        from presage.kernels.cpu.environment import prepare_environment

        prepare_environment()
        from presage import LLM, __version__

        self.version = __version__
        scheme = None if variant == "bf16" else variant
        self.llm = LLM(model, dtype="bfloat16", quantization=scheme, max_model_len=LONGEST, max_num_seqs=32, kv_cache_memory="1GiB")

    def generate(self, batch: int, length: int, tokens: int, seed: int) -> float:
        """Seconds of one batch."""
        from presage import SamplingParams

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        ids = prompts(batch, length, seed)
        return seconds(lambda: self.llm.generate(ids, params))

    def steps(self, context: int, rows: list[int], repeats: int) -> list[float]:
        """Verification as the engine does it: one known token and a chain of ``rows - 1`` draft nodes, all judged."""
        from presage.bench.steps import FixedSteps

        with self._idle():
            fixed = FixedSteps(self.llm.engine.executor, 1, context, max(rows))
            plans = [fixed.plan(nodes=n - 1) for n in rows]
            taken = [[fixed.seconds(plan) for plan in plans] for _ in range(repeats + 2)][2:]
            fixed.close()
        return [statistics.median(column) for column in zip(*taken)]

    def bytes_per_step(self, context: int) -> int:
        """Bytes a decode step of one sequence reads: weights with their scales, keys and values."""
        from presage.bench.steps import FixedSteps
        from presage.bench.traffic import step_bytes

        with self._idle():
            executor = self.llm.engine.executor
            return step_bytes(executor, FixedSteps(executor, 1, context).plan())

    @contextlib.contextmanager
    def _idle(self) -> Iterator[None]:
        """The executor without its thread, so that steps run in this one."""
        engine = self.llm.engine
        engine.executor.close()
        yield
        engine.executor.start(engine.driver.post)


class Vllm:
    """vLLM on CPU, bf16, compiled as it comes."""

    def __init__(self, model: str, variant: str) -> None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{THREADS - 1}")
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self.version = next(v for p in ("vllm-cpu", "vllm") if (v := _version(p)))
        self.llm = LLM(model, skip_tokenizer_init=True, dtype="bfloat16", max_model_len=LONGEST, max_num_seqs=32)

    def generate(self, batch: int, length: int, tokens: int, seed: int) -> float:
        """Seconds of one batch."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        ids = [TokensPrompt(prompt_token_ids=p) for p in prompts(batch, length, seed)]
        return seconds(lambda: self.llm.generate(ids, params, use_tqdm=False))


class OpenVino:
    """OpenVINO GenAI's continuous batching on an exported folder."""

    def __init__(self, model: str, variant: str) -> None:
        import openvino_genai

        self.genai, self.version = openvino_genai, _version("openvino-genai")
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size, scheduler.max_num_seqs, scheduler.max_num_batched_tokens = 1, 32, 2048
        scheduler.dynamic_split_fuse, scheduler.enable_prefix_caching = True, False
        self.pipe = openvino_genai.ContinuousBatchingPipeline(model, scheduler, "CPU")

    def generate(self, batch: int, length: int, tokens: int, seed: int) -> float:
        """Seconds of one batch."""
        import openvino

        config = self.genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = tokens
        config.do_sample, config.ignore_eos = False, True
        ids = [openvino.Tensor(np.array([p], np.int64)) for p in prompts(batch, length, seed)]
        return seconds(lambda: self.pipe.generate(ids, [config] * batch))


class LlamaCpp:
    """llama.cpp by its batch interface, on a GGUF file. A context is made for each number of sequences, then kept."""

    def __init__(self, model: str, variant: str) -> None:
        import llama_cpp

        self.api, self.version = llama_cpp, f"llama-cpp-python {llama_cpp.__version__}"
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        self.contexts: dict[int, Any] = {}

    def context(self, sequences: int) -> Any:
        """A context with 2,304 tokens for one sequence, 512 each for more."""
        if sequences not in self.contexts:
            p = self.api.llama_context_default_params()
            p.n_ctx, p.n_seq_max = LONGEST if sequences == 1 else 512 * sequences, sequences
            p.n_batch, p.n_ubatch, p.n_threads, p.n_threads_batch = 2048, 512, THREADS, THREADS
            self.contexts[sequences] = self.api.llama_init_from_model(self.model, p)
        found = self.contexts[sequences]
        self.api.llama_memory_clear(self.api.llama_get_memory(found), True)
        return found

    def decode(self, context: Any, items: list[tuple[int, int, int, bool]]) -> None:
        """One forward pass of (id, position, sequence, logits wanted)."""
        batch = self.api.llama_batch_init(len(items), 0, 1)
        batch.n_tokens = len(items)
        for i, (token, position, sequence, wanted) in enumerate(items):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = sequence
        status = self.api.llama_decode(context, batch)
        self.api.llama_batch_free(batch)
        if status:
            raise RuntimeError(f"llama_decode returned {status}")

    def best(self, context: Any, row: int) -> int:
        """The most likely id after a row."""
        return int(np.ctypeslib.as_array(self.api.llama_get_logits_ith(context, row), (VOCABULARY,)).argmax())

    def generate(self, batch: int, length: int, tokens: int, seed: int) -> float:
        """Seconds of one batch: each prompt in a pass of its own, then all sequences together."""
        ids, context = prompts(batch, length, seed), self.context(batch)

        def work() -> None:
            last = []
            for s, prompt in enumerate(ids):
                self.decode(context, [(t, i, s, i == length - 1) for i, t in enumerate(prompt)])
                last.append(self.best(context, -1))
            for k in range(tokens - 1):
                self.decode(context, [(last[s], length + k, s, True) for s in range(batch)])
                last = [self.best(context, s) for s in range(batch)]

        return seconds(work)

    def steps(self, context: int, rows: list[int], repeats: int) -> list[float]:
        """Rows of one sequence with logits for each; they are taken back after every step."""
        c = self.context(1)
        self.decode(c, [(t, i, 0, i == context - 1) for i, t in enumerate(prompts(1, context, 1)[0])])

        def step(n: int) -> float:
            took = seconds(lambda: (self.decode(c, [(7, context + i, 0, True) for i in range(n)]), [self.best(c, i) for i in range(n)]))
            self.api.llama_memory_seq_rm(self.api.llama_get_memory(c), 0, context, -1)
            return took

        taken = [[step(n) for n in rows] for _ in range(repeats + 2)][2:]
        return [statistics.median(column) for column in zip(*taken)]


class Linears:
    """Our linear kernel alone: W4A8, several copies of one matrix in turn, so that each call streams from memory."""

    def __init__(self, model: str, variant: str, n: int = 8192, k: int = 2048, copies: int = 16) -> None:
        from presage.kernels.cpu.environment import prepare_environment

        prepare_environment()
        import torch

        from presage import __version__
        from presage.kernels.cpu.memory import Arena
        from presage.kernels.cpu.pack_int import pack_int
        from presage.kernels.cpu.team import Team
        from presage.quantize.rtn import quantize_rtn
        from presage.quantize.schemes import parse_scheme

        self.torch, self.version, self.team = torch, __version__, Team(THREADS)
        torch.set_num_threads(1)
        scheme, self.n, self.k = parse_scheme(variant), n, k
        made = (torch.randn(n, k).bfloat16() for _ in range(copies))
        arena = Arena()
        self.packs = [arena.settle(pack_int([quantize_rtn(w, scheme, self.team)], self.team)) for w in made]

    def linear(self, rows: int, repeats: int) -> dict[str, float]:
        """Bytes and operations per second of one call of ``rows`` rows: the median pass over the copies."""
        from presage.kernels.cpu.linear import linear

        x, out = self.torch.randn(rows, self.k).bfloat16(), self.torch.empty(rows, self.n)

        def once() -> None:
            for p in self.packs:
                linear(self.team, x, p, out)

        once()
        took = statistics.median(seconds(once) for _ in range(repeats))
        work = 2 * rows * self.n * self.k * len(self.packs)
        return {"bytes_per_second": sum(p.nbytes for p in self.packs) / took, "operations_per_second": work / took}


class PlainRead:
    """The machine's plain read bandwidth."""

    def __init__(self, model: str, variant: str) -> None:
        import torch

        torch.set_num_threads(THREADS)
        self.version, self.data = torch.__version__, torch.ones(1 << 28, dtype=torch.float32)

    def read(self) -> float:
        """Bytes per second of summing 1 GiB with all cores, best of five."""
        return self.data.nbytes / min(seconds(self.data.sum) for _ in range(5))


ENGINES = {"presage": Presage, "vllm": Vllm, "openvino": OpenVino, "llama.cpp": LlamaCpp, "linear": Linears, "read": PlainRead}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def main() -> None:
    """Load the engine, say so, and answer until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the engine prints goes to stderr
    name, model, variant = (sys.argv[1:] + [""])[:3]
    engine: Any = ENGINES[name](model, variant)
    if hasattr(engine, "generate"):
        for seed in range(2):
            engine.generate(1, 32, 8, seed)
    print(json.dumps({"version": engine.version}), file=out, flush=True)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            answer = {"value": getattr(engine, method)(*arguments)}
        except Exception as error:  # the asker decides what a failed question means
            answer = {"error": repr(error)}
        print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    main()
