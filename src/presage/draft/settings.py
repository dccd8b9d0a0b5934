"""``--speculative-config``: one JSON object that says who drafts, how long, and how drafts are accepted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from presage import verify
from presage.core.errors import ConfigError

OURS = ("length", "rule", "method")
IGNORED = ("draft_tensor_parallel_size", "enforce_eager", "max_model_len")
"""vLLM's settings for things that an engine in one process does not have."""


@dataclass(frozen=True, slots=True)
class Speculative:
    """``drafter``: the method's name, ``settings`` its own. ``length``: a policy's name, ``options`` its own. ``rule``: of acceptance."""

    drafter: str
    settings: dict[str, Any]
    length: str
    options: dict[str, Any]
    rule: str


def parse_speculative(value: str | Mapping[str, Any] | None) -> Speculative | None:
    """What the setting says; None if there is none or its method is "none".

    ``method``: "suffix", "ngram", ... (vLLM's names; a ``model`` alone means "model"). ``num_speculative_tokens`` and a method's own settings
    beside it. ``length``: a policy's name or {"policy": name, option: value}; "marginal" by default. ``rule``: "keyed" by default.
    Raises ConfigError for anything it does not understand; settings of a method are checked when its drafter is made.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"speculative_config is no JSON: {error}", param="speculative_config") from None
    if not isinstance(value, Mapping):
        raise ConfigError("speculative_config must be a JSON object", param="speculative_config")
    method = value.get("method") or ("model" if "model" in value else None)
    if method == "none":
        return None
    if not isinstance(method, str):
        raise ConfigError('speculative_config needs a "method"', param="speculative_config")
    length = value.get("length", "marginal")
    length = {"policy": length} if isinstance(length, str) else length
    if not isinstance(length, Mapping) or not isinstance(length.get("policy"), str):
        raise ConfigError('speculative_config: "length" must be a policy\'s name or an object with a "policy"', param="speculative_config")
    options = {k: v for k, v in length.items() if k != "policy"}
    if length["policy"] == "fixed" and "num_speculative_tokens" in value:
        options.setdefault("num_speculative_tokens", value["num_speculative_tokens"])
    rule = str(value.get("rule", "keyed"))
    verify.get(rule)
    settings = {k: v for k, v in value.items() if k not in OURS and k not in IGNORED}
    return Speculative(method, settings, length["policy"], options, rule)
