"""Emissions in, RequestOutput out: detokenise, cut at stop strings, gather log-probabilities. One assembler per request."""

from __future__ import annotations

from typing import Any

from presage.core.errors import PresageError, RequestError
from presage.core.request import Emission, Request, TokenLogprobs
from presage.core.sampling_params import SamplingParams
from presage.engine.outputs import CompletionOutput, Logprob, RequestOutput
from presage.tokenize.detokenize import Detokenizer
from presage.tokenize.stops import StopChecker
from presage.tokenize.tokenizer import Tokenizer


class Assembler:
    """Builds the output of one request. ``add`` returns the branch that changed; ``done`` when every branch ended."""

    def __init__(self, request: Request, tokenizer: Tokenizer, prompt: str | None) -> None:
        self.params, self.tokenizer = request.sampling, tokenizer
        ids = request.prompt.tolist()
        outputs = [CompletionOutput(i, logprobs=[] if self.params.logprobs is not None else None) for i in range(self.params.n)]
        self.output = RequestOutput(request.id, prompt, ids, outputs)
        self.text = [Detokenizer(tokenizer, request.prompt, self.params.skip_special_tokens) for _ in outputs]
        stops = self.params.stop or []
        self.stops = [StopChecker(stops, self.params.include_stop_str_in_output) if stops else None for _ in outputs]
        self.left = self.params.n

    @property
    def done(self) -> bool:
        """Every branch ended."""
        return self.left == 0

    def add(self, e: Emission) -> CompletionOutput:
        """Take in one emission. Raises the request's error, as the class its code names."""
        if e.error is not None:
            raise error_of(e.error)
        out = self.output.outputs[e.branch]
        new = e.ids[max(0, len(out.token_ids) - e.offset) :]
        out.token_ids += new
        if self.params.detokenize:
            out.text += self._text(e, new)
        if e.logprobs and out.logprobs is not None:
            self._logprobs(out, e.logprobs[len(e.logprobs) - len(new) :])
        if e.prompt_logprobs:
            self.output.prompt_logprobs = (self.output.prompt_logprobs or [None]) + [self._entry(p) if p else None for p in e.prompt_logprobs]
        if e.finish:
            out.finish_reason, out.stop_reason = e.finish, e.stop if e.finish == "stop" else None
            self.left -= 1
            self.output.num_cached_tokens = max(self.output.num_cached_tokens, e.n_cached)
            self.output.metrics = {
                "arrival_time": e.times[0],
                "first_scheduled_time": e.times[1],
                "first_token_time": e.times[2],
                "preemptions": e.preemptions,
            }
            self.output.finished = self.done
        return out

    def _text(self, e: Emission, ids: list[int]) -> str:
        stops, detokenizer = self.stops[e.branch], self.text[e.branch]
        last = bool(e.finish)
        if last and e.finish == "stop" and isinstance(e.stop, int) and ids and not self.params.include_stop_str_in_output:
            ids = ids[:-1]  # the stop id itself is not text
        if stops is None:
            return detokenizer.push(ids) + (detokenizer.finish() if last else "")
        shown = ""
        have = len(self.output.outputs[e.branch].token_ids) - len(ids)
        for k, token in enumerate(ids, have + 1):
            # The loop arms stop strings after min_tokens, id by id; so must the text.
            shown += stops.push(detokenizer.push([token]), k > self.params.min_tokens)[0]
        if last and stops.hit is None:
            shown += stops.push(detokenizer.finish())[0] + stops.flush()
        return shown

    def _entry(self, p: TokenLogprobs) -> dict[int, Logprob]:
        entry = {p.id: Logprob(p.logprob, p.rank, self.tokenizer.decode([p.id], skip_special_tokens=False))}
        for rank, (i, value) in enumerate(zip(p.top_ids, p.top_logprobs), 1):
            entry.setdefault(i, Logprob(value, rank, self.tokenizer.decode([i], skip_special_tokens=False)))
        return entry

    def _logprobs(self, out: CompletionOutput, entries: list[TokenLogprobs]) -> None:
        assert out.logprobs is not None
        out.logprobs += [self._entry(p) for p in entries]
        out.cumulative_logprob = (out.cumulative_logprob or 0.0) + sum(p.logprob for p in entries)


def error_of(error: tuple[str, str, int]) -> PresageError:
    """The exception class that carries this code; PresageError with that code if none does."""
    code, message, status = error
    todo: list[type[PresageError]] = [PresageError]
    while todo:
        cls = todo.pop()
        if cls.code == code and (cls is not RequestError or status == 400):
            return cls(message)
        todo += cls.__subclasses__()
    plain = PresageError(message)
    plain.code, plain.status = code, status
    return plain


def prepare(params: SamplingParams, tokenizer: Any) -> SamplingParams:
    """Sampling parameters with bad words turned into ids (with and without a leading space, as vLLM does)."""
    if not params.bad_words or params.bad_words_ids is not None:
        return params
    import msgspec

    ids = []
    for word in params.bad_words:
        for text in (word, " " + word.lstrip()):
            found = tokenizer.encode(text, add_special_tokens=False)
            if found and found not in ids:
                ids.append(found)
    return msgspec.structs.replace(params, bad_words_ids=ids)
