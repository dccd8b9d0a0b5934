"""SamplingParams as vLLM spells them, validated when they are made."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from presage.core.errors import RequestError

MAX_LOGPROBS = 64
MAX_STOPS = 64
MAX_STOP_CHARS = 1024
MAX_BIAS = 4096
MAX_BAD_WORDS = 256
MAX_N = 128


class StructuredOutputsParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the output must match: exactly one of ``json``, ``regex``, ``choice``, ``grammar``, ``json_object``, ``structural_tag``.

    ``any_whitespace`` lets JSON contain free whitespace; compact is the default because small models loop in it.
    """

    json: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    any_whitespace: bool = False

    def __post_init__(self) -> None:
        given = [k for k in ("json", "regex", "choice", "grammar", "json_object", "structural_tag") if getattr(self, k) not in (None, False)]
        if self.json is False:
            given.append("json")
        if len(given) != 1:
            raise RequestError(f"structured outputs need exactly one constraint, got {given or 'none'}", param="structured_outputs")
        if self.choice is not None and (not self.choice or len(self.choice) > 1024):
            raise RequestError("choice needs 1 to 1024 strings", param="structured_outputs.choice")


class SamplingParams(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How tokens are chosen for one request (vLLM's names and defaults).

    ``temperature`` 0 is greedy. ``top_k`` 0 or -1 and ``top_p`` 1 and ``min_p`` 0 are off. ``seed`` None means the engine picks one per request.
    ``n`` independent continuations share the prompt's KV. ``logprobs`` k returns the k most likely tokens beside the chosen one;
    ``prompt_logprobs`` does so for the prompt. ``allowed_token_ids`` and ``bad_words`` restrict the support; ``min_tokens`` suppresses stops.
    ``stop`` strings end the text before them unless ``include_stop_str_in_output``. ``thinking_budget`` caps tokens
    before the end-of-thinking marker.
    Errors: RequestError naming the field.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: list[str] | str | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    detokenize: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    bad_words_ids: list[list[int]] | None = None
    structured_outputs: StructuredOutputsParams | None = None
    thinking_budget: int | None = None
    output_kind: str = "cumulative"
    extra_args: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            self.stop = [self.stop]
        self.stop = [s for s in self.stop or [] if s]
        self._check_numbers()
        self._check_lists()

    def _check_numbers(self) -> None:
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                raise RequestError(f"{name} must be between {low} and {high}, got {value}", param=name)
        if self.top_p <= 0:
            raise RequestError(f"top_p must be above 0, got {self.top_p}", param="top_p")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens ({self.min_tokens}) exceeds max_tokens ({self.max_tokens})", param="min_tokens")
        if self.output_kind not in ("cumulative", "delta", "final_only"):
            raise RequestError(f"output_kind must be cumulative, delta or final_only, got {self.output_kind!r}", param="output_kind")

    def _check_lists(self) -> None:
        for name, cap in (("stop", MAX_STOPS), ("stop_token_ids", 1024), ("logit_bias", MAX_BIAS), ("bad_words", MAX_BAD_WORDS)):
            value = getattr(self, name)
            if value is not None and len(value) > cap:
                raise RequestError(f"{name} takes at most {cap} entries, got {len(value)}", param=name)
        if any(len(s) > MAX_STOP_CHARS for s in self.stop or ()):
            raise RequestError(f"a stop string takes at most {MAX_STOP_CHARS} characters", param="stop")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids must not be empty", param="allowed_token_ids")
        if any(not math.isfinite(v) or abs(v) > 100 for v in (self.logit_bias or {}).values()):
            raise RequestError("logit_bias values must be between -100 and 100", param="logit_bias")

    @property
    def greedy(self) -> bool:
        """True if the most likely token is always taken."""
        return self.temperature < 1e-5


_RANGES: tuple[tuple[str, float, float], ...] = (
    ("n", 1, MAX_N),
    ("temperature", 0, 100),
    ("top_p", 0, 1),
    ("top_k", -1, 1 << 30),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 1e-3, 1e3),
    ("seed", -(1 << 63), (1 << 63) - 1),
    ("max_tokens", 1, 1 << 30),
    ("min_tokens", 0, 1 << 30),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
    ("thinking_budget", 0, 1 << 30),
)
