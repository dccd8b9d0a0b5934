"""``LLM``: offline use, spelled as in vLLM. The loop runs in the calling thread."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from presage.core.config import EngineConfig
from presage.core.errors import ConfigError
from presage.core.request import Emission, Request
from presage.core.sampling_params import SamplingParams
from presage.core.types import Kind
from presage.engine.assemble import Assembler, error_of
from presage.engine.build import build_engine
from presage.engine.inputs import Prompt, expand, make_request, prompt_ids
from presage.engine.outputs import EmbeddingOutput, EmbeddingRequestOutput, RequestOutput
from presage.tokenize.tokenizer import Tokenizer


class LLM:
    """An engine in this process.

    ``model``: a checkpoint folder, .gguf file, hub name or ``presage-tiny``. Keyword arguments are the fields of ``EngineConfig``
    (``max_num_seqs=``, ``dtype=``, ...); unknown ones raise ConfigError.
    """

    def __init__(self, model: str = "presage-tiny", **settings: Any) -> None:
        self.config = EngineConfig.of(model=model, **settings)
        self._inbox: list[Emission] = []
        self.engine = build_engine(self.config, self._inbox.extend, progress=sys.stderr.isatty())
        self.tokenizer = self.engine.tokenizer

    @classmethod
    def from_config(cls, config: EngineConfig) -> LLM:
        """From a whole configuration."""
        flat = {k: v for group in config.model_dump(exclude_unset=True).values() for k, v in group.items()}
        return cls(**flat)

    def get_tokenizer(self) -> Tokenizer:
        """The model's tokenizer."""
        return self.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Complete prompts; outputs are in their order. Raises the first refused request's error after the others were aborted."""
        work: list[Assembler] = []
        for prompt, params in expand(prompts, sampling_params):
            ids, text = prompt_ids(prompt, self.tokenizer)
            work.append(Assembler(self._add(make_request(ids, params, self.tokenizer)), self.tokenizer, text))
        by_id = {a.output.request_id: a for a in work}
        self._drain(by_id, lambda e: by_id[e.id].add(e) and by_id[e.id].done, use_tqdm)
        return [a.output for a in work]

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        use_tqdm: bool = False,
    ) -> list[RequestOutput]:
        """Complete conversations through the model's chat template. Raises ConfigError if it has none."""
        template = self.tokenizer.chat_template
        if template is None:
            raise ConfigError("this model has no chat template; pass chat_template=PATH", param="chat_template")
        many: Any = [messages] if messages and isinstance(messages[0], dict) else messages
        texts = [template.render(m, tools=tools, add_generation_prompt=add_generation_prompt) for m in many]
        return self.generate([self.tokenizer.encode(t, add_special_tokens=False) for t in texts], sampling_params, use_tqdm)

    def embed(self, prompts: Prompt | Sequence[Prompt]) -> list[EmbeddingRequestOutput]:
        """Pooled, normalised hidden states of texts."""
        pairs = []
        for prompt, _ in expand(prompts, None):
            ids, _text = prompt_ids(prompt, self.tokenizer)
            pairs.append(self._add(make_request(ids, SamplingParams(), self.tokenizer, kind=Kind.EMBED)))
        got: dict[str, list[float]] = {}

        def take(e: Emission) -> bool:
            if e.error is not None:
                raise error_of(e.error)
            got[e.id] = e.pooled or got.get(e.id, [])
            return bool(e.finish)

        self._drain({r.id: r for r in pairs}, take, False)
        return [EmbeddingRequestOutput(r.id, EmbeddingOutput(got[r.id]), r.prompt.tolist()) for r in pairs]

    def stats(self) -> dict[str, Any]:
        """The engine's counters."""
        return self.engine.stats()

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def _add(self, request: Request) -> Request:
        self.engine.add(request)
        return request

    def _drain(self, waiting: dict[str, Any], take: Callable[[Emission], Any], show: bool) -> None:
        """Turn the loop until every request in ``waiting`` is done; on an error or Ctrl-C the rest is aborted."""
        left, total = set(waiting), len(waiting)
        try:
            while left:
                self.engine.driver.step()
                inbox, self._inbox[:] = list(self._inbox), []
                for e in inbox:
                    if e.id in left and take(e):
                        left.discard(e.id)
                        if show:
                            print(f"\r{total - len(left)}/{total} prompts", end="" if left else "\n", file=sys.stderr, flush=True)
        except BaseException:
            for request_id in left:
                self.engine.abort(request_id)
            while not self.engine.loop.idle:
                self.engine.driver.step()
            self._inbox.clear()
            raise
