"""From a body's fields to SamplingParams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from presage.core.errors import ConfigError, ContextTooLong, RequestError
from presage.core.sampling_params import SamplingParams, StructuredOutputsParams
from presage.serve.client import EngineClient
from presage.serve.protocol.common import SamplingBody
from presage.tokenize import Tokenizer

_COPIED = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "prompt_logprobs",
    "allowed_token_ids",
    "bad_words",
    "thinking_budget",
)
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


def sampling_of(body: SamplingBody, client: EngineClient, defaults: dict[str, Any], **fixed: Any) -> SamplingParams:
    """Parameters of one request; ``fixed`` (max_tokens, logprobs, structured_outputs) wins over the body, the body over ``defaults``.

    Errors: RequestError naming the field, for values out of range and for token ids outside of the vocabulary.
    """
    # null means "not given" in OpenAI's API.
    given = {k: v for k in _COPIED if (v := getattr(body, k)) is not None}
    fields = {**defaults, **given, **fixed}
    if body.logit_bias is not None:
        fields["logit_bias"] = _bias(body.logit_bias)
    _check_ids(fields, client.vocab_size)
    _check_words(body)
    sampling = SamplingParams(output_kind="delta", **fields)
    if sampling.bad_words:
        sampling.bad_words_ids = bad_word_ids(sampling.bad_words, client.tokenizer)
    return sampling


def check_defaults(defaults: dict[str, Any]) -> None:
    """Raise ConfigError if ``default_sampling_params`` of the server cannot be used."""
    try:
        SamplingParams(**defaults)
    except (TypeError, RequestError) as error:
        raise ConfigError(f"default_sampling_params: {error}", param="default_sampling_params") from None


def asked_tokens(body: SamplingBody) -> int | None:
    """max_tokens under either of its names. Errors: RequestError if they differ."""
    if body.max_tokens is not None and body.max_completion_tokens not in (None, body.max_tokens):
        raise RequestError("max_tokens and max_completion_tokens differ", param="max_completion_tokens")
    return body.max_tokens if body.max_tokens is not None else body.max_completion_tokens


def output_room(asked: int | None, default: int | None, n_prompt: int, n_ctx: int) -> int:
    """Output tokens a request may take. Without a wish, ``default`` (None = all) as far as there is room. Errors: ContextTooLong."""
    room = n_ctx - n_prompt
    if room < 1 or (asked is not None and asked > room):
        # Chat clients show this message to people, so both numbers are in it.
        wish = "" if asked is None else f" plus {asked} requested tokens"
        raise ContextTooLong(
            f"the prompt has {n_prompt} tokens{wish}, but the model's context is {n_ctx} tokens",
            param="prompt" if room < 1 else "max_tokens",
            n_prompt_tokens=n_prompt,
            n_ctx=n_ctx,
        )
    return asked if asked is not None else min(room, default or room)


def structured_of(body: SamplingBody, also: Callable[[], StructuredOutputsParams | None]) -> StructuredOutputsParams | None:
    """The one constraint of a body: structured_outputs, a guided_* field, or what ``also`` finds. Errors: RequestError if there are two."""
    found = {"structured_outputs": body.structured_outputs} if body.structured_outputs is not None else {}
    found |= {name: {key: getattr(body, name)} for name, key in _GUIDED.items() if getattr(body, name) is not None}
    other = also()
    if len(found) + (other is not None) > 1:
        names = [*found, *(["response_format or tool_choice"] if other is not None else [])]
        raise RequestError(f"only one output constraint is possible, got {', '.join(names)}", param=names[0])
    if not found:
        return other
    name, fields = next(iter(found.items()))
    try:
        return msgspec.convert(fields, StructuredOutputsParams)
    except msgspec.ValidationError as error:
        raise RequestError(f"{name}: {error}", param=name) from None


def bad_word_ids(words: list[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Id sequences of each word, at the start of a text and after a space (where that is another spelling of the same length)."""
    out = []
    for word in words:
        plain = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        spaced = tokenizer.encode(" " + word.lstrip(), add_special_tokens=False)
        if not plain:
            raise RequestError("a bad word must have visible characters", param="bad_words")
        out += [plain, spaced] if spaced[0] != plain[0] and len(spaced) == len(plain) else [plain]
    return out


def _bias(given: dict[str, float]) -> dict[int, float]:
    try:
        return {int(k): v for k, v in given.items()}
    except ValueError:
        raise RequestError("logit_bias maps token ids to numbers", param="logit_bias") from None


def _check_ids(fields: dict[str, Any], vocab: int) -> None:
    for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
        if any(not 0 <= i < vocab for i in fields.get(name) or ()):
            raise RequestError(f"{name}: token ids must be between 0 and {vocab - 1}", param=name)


def _check_words(body: SamplingBody) -> None:
    for word in body.bad_words or ():
        if not word.strip() or len(word) > 256:
            raise RequestError("a bad word has 1 to 256 characters", param="bad_words")
